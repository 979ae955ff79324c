"""What strangers wrote is printed escaped, and what cannot be printed is lost."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import textwrap

import pytest
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from qtool.cli.console import EscapingConsole
from qtool.terminal import EscapingFormatter, lossy_stream, printable, printable_lines

HOSTILE = (
    "\x1b]0;pwned\x07\x1b[2J",  # title, clear
    "a\nwarning: forged",
    "a\r\nb\x08\x0b\x0c\x00\x7f",
    "\x9b31m\x90q\x9c",  # C1
    "\u202eexe.txt\u202c\u2066a\u2069\u200f",
    "\ud800 \udcff",
    "\u2028\u2029\u00ad\ufeff\U000e0041",
)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_text_is_printed_escaped_everywhere(text):
    escaped = printable(text)
    assert escaped.isprintable() and escaped.isascii()
    assert printable_lines(text).count("\n") == text.count("\n")
    out = io.StringIO()
    console = EscapingConsole(file=out, width=200)
    table = Table(text, title=text)
    table.add_row(text)
    tree = Tree(text)
    tree.add(text)
    console.print(table, tree, text)
    assert out.getvalue().count(escaped) == 6
    assert all(line.isprintable() for line in out.getvalue().split("\n"))
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (text,), None)
    assert EscapingFormatter().format(record) == f"INFO: {escaped}"


def test_plain_text_stays_as_it_is():
    text = "Größe 模型 🚀 [red]x[/red] :smile: [link=file:///etc/passwd]y[/link] \\x1b"
    assert printable(text) == text
    out = io.StringIO()
    EscapingConsole(file=out, width=200).print(text, Text("[b]z[/b]"))
    assert out.getvalue() == f"{text} [b]z[/b]\n"


def test_a_message_of_a_library_forges_no_line():
    code = """
        import logging, sys, warnings
        from qtool.terminal import guard_streams
        guard_streams()
        logging.warning("a\\nerror: forged\\x1b[2J")
        warnings.warn("b\\nerror: forged\\x9b")
        print("c\\nerror: forged", file=sys.stderr)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.split("\n")
    assert sum(line.startswith("  error: forged") for line in lines) == 3
    assert all(line.isprintable() and not line.startswith("error") for line in lines)


def test_a_stream_that_cannot_be_written_loses_its_lines():
    full = os.open("/dev/full", os.O_WRONLY)
    read_fd, gone = os.pipe()
    os.close(read_fd)
    nobody, busy = os.pipe()
    os.set_blocking(busy, False)
    for descriptor in (full, gone, busy):
        stream = lossy_stream(descriptor)
        for _ in range(200):
            print("x" * 1000, file=stream, flush=True)
        os.close(descriptor)
        print("closed", file=stream, flush=True)
    os.close(nobody)
