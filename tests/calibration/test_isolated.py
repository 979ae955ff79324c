"""Files, chat templates and tokenizers of strangers: refused in bounded time and memory."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import pytest

from qtool.calibration import (
    CalibrationSpec,
    check_source,
    isolated,
    isolated_tokenizing,
    load_calibration,
)
from qtool.calibration.reading import Reading
from qtool.calibration.samples import check_records
from qtool.errors import InputRefused

LONG = "the quick brown fox jumps over the lazy dog " * 4
CHAT = {"messages": [{"role": "user", "content": LONG}]}
LOOP = "{% for i in range(99999) %}"


@pytest.fixture(scope="module", autouse=True)
def libraries():
    from transformers import AutoTokenizer  # noqa: F401 - loads here, not in the first test


@pytest.fixture
def load(tiny_copy, tmp_path):
    """Load records with the tokenizer of the tiny model, which a test may have changed."""

    def load(records, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        spec = CalibrationSpec(str(path), **options)
        with isolated_tokenizing(spec, tiny_copy, 4096) as steps:
            return load_calibration(spec, steps)

    return load


def test_the_samples_are_those_of_this_process(load, tiny_model, calibration_file):
    from transformers import AutoTokenizer

    records = [*map(json.loads, calibration_file.read_text().splitlines()), CHAT]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for options in ({"seq_len": 64, "num_samples": 9}, {"seq_len": 200, "pack": True}):
        found = load(records, **options)
        spec = CalibrationSpec(found.report.source, **options)
        assert found == load_calibration(spec, Reading(spec, tokenizer, 4096))


@pytest.mark.parametrize(
    "template",
    [
        LOOP * 3 + "{% endfor %}" * 3,
        "{% set n = namespace(s='x' * 1000) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
        "{% endfor %}{{ n.s }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{{ '\\ud800' }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_hostile_chat_template_is_refused(load, tiny_copy, monkeypatch, template):
    monkeypatch.setattr(isolated, "TEXT_S", 1.0)
    (tiny_copy / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    with pytest.raises(InputRefused) as caught:
        load([{"text": LONG}, CHAT])
    assert caught.value.code == "E_DATA_TEMPLATE"
    assert "line 2" in caught.value.message and caught.value.hint
    assert time.monotonic() - start < 20


def hostile_tokenizer(path, **changes):
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(tokenizer | changes))


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": split("(?:[a-z ]|[a-x ])+![a-z]")},
        {
            "normalizer": {
                "type": "Replace",
                "pattern": {"Regex": "(?:.|[a-z])+![a-z]"},
                "content": "x",
            }
        },
        {"pre_tokenizer": split("(")},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 100_000}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "x"}] * 5,
            }
            | {"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 10_000_000}
        },
        {"model": {"type": "BPE"}},
        {"added_tokens": [{"id": 5}]},
    ],
)
def test_a_hostile_tokenizer_is_refused(load, tiny_copy, monkeypatch, changes):
    monkeypatch.setattr(isolated, "TEXT_S", 2.0)
    hostile_tokenizer(tiny_copy / "tokenizer.json", **changes)
    start = time.monotonic()
    with pytest.raises(InputRefused) as caught:
        load([{"text": LONG * 20 + "!"}])
    assert caught.value.code == "E_TOKENIZER"
    assert caught.value.hint
    assert time.monotonic() - start < 20


# Parquet


def write_parquet(path, columns, *, group=1 << 20, **options):
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path, row_group_size=group, **options)
    return CalibrationSpec(str(path))


def check(spec):
    check_records(spec, Reading(spec))


def counted_groups(monkeypatch):
    """Return the list of the row groups that are read, in order."""
    groups = []
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def counted(self, *args, row_groups, **options):
        groups.extend(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    return groups


def test_parquet_with_many_useless_rows_is_read_few_times_in_order(tmp_path, monkeypatch):
    groups = counted_groups(monkeypatch)
    texts = ["short"] * 50_000 + [LONG]
    spec = write_parquet(tmp_path / "a.parquet", {"text": texts}, group=10_000)
    check(spec)
    passes = 1 + sum(a > b for a, b in pairwise(groups))
    assert passes <= 5


def test_thousands_of_row_groups_are_read_once(tmp_path, monkeypatch):
    groups = counted_groups(monkeypatch)
    texts = [f"{number} {LONG}" for number in range(700)]
    check(write_parquet(tmp_path / "a.parquet", {"text": texts}, group=1))
    assert len(groups) == 512 and groups == sorted(groups)


NOT_UTF8 = pyarrow.array([b"caf\xe9 " * 20] * 9, pyarrow.binary()).view(pyarrow.string())


def test_bad_utf8_in_parquet_is_refused_with_its_row(tmp_path):
    with pytest.raises(InputRefused, match=r"row \d .*0xe9, not UTF-8") as caught:
        check(write_parquet(tmp_path / "a.parquet", {"text": NOT_UTF8}))
    assert caught.value.code == "E_DATA_BINARY"


def twice(path):
    schema = pyarrow.schema([("text", pyarrow.string()), ("text", pyarrow.string())])
    table = pyarrow.Table.from_arrays([pyarrow.array([LONG])] * 2, schema=schema)
    pyarrow.parquet.write_table(table, path)


def cut(path):
    write_parquet(path, {"text": [f"{n} {LONG}" for n in range(1000)]}, compression="none")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3] + data[len(data) // 2 :])


def overwritten(path):
    write_parquet(path, {"text": [f"{n} {LONG}" for n in range(1000)]})
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = os.urandom(len(data) // 2 - 4)
    path.write_bytes(data)


@pytest.mark.parametrize("make", [twice, cut, overwritten])
def test_a_broken_parquet_file_is_refused(tmp_path, make):
    make(tmp_path / "a.parquet")
    with pytest.raises(InputRefused) as caught:
        check_source(CalibrationSpec(str(tmp_path / "a.parquet")))
    assert caught.value.code in ("E_DATA_BINARY", "E_DATA_LIMIT")
    assert caught.value.hint


def test_a_decompression_bomb_is_refused_by_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "READ_BYTES", 300 << 20)
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 5_000, pyarrow.int32()), pyarrow.array(["x" * (1 << 20)])
    )
    spec = write_parquet(tmp_path / "a.parquet", {"text": column}, store_schema=False)
    with pytest.raises(InputRefused, match="memory") as caught:
        check_source(spec)
    assert caught.value.code == "E_DATA_LIMIT"


# Text and JSON


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[\n{"text": "caf\xe9"}]', "line 2: byte 16 of this file is 0xe9"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}', "line 2: byte 14 of this line"),
        ("a.txt", b"one\n\ncaf\xe9", "line 3: byte 4 of this paragraph"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
        ("a.jsonl", b'{"\\ud800": 1}', "no `text`"),
        ("a.jsonl", b'{"input_ids": [' + b"9" * 5000 + b"]}", "not JSON"),
        ("a.jsonl", b'{"text": "' + b"x" * (64 << 20), "longer than"),
    ],
)
def test_hostile_text_is_refused_where_it_stands(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    if message is None:
        check(CalibrationSpec(str(path)))
        return
    with pytest.raises(InputRefused) as caught:
        check(CalibrationSpec(str(path)))
    assert message in caught.value.message


def test_json_that_fills_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "READ_BYTES", 100 << 20)
    (tmp_path / "a.json").write_bytes(b"[" + b"[]," * 2_000_000 + b"[]]")
    with pytest.raises(InputRefused, match="memory") as caught:
        check_source(CalibrationSpec(str(tmp_path / "a.json")))
    assert caught.value.code == "E_DATA_LIMIT"


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(InputRefused, match="not a regular file"):
            check_source(CalibrationSpec(str(tmp_path / name)))
