"""The command line as a user meets it: what it prints, what it refuses, with which exit code, and
that a refusal leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qtool.cli.app import run
from qtool.cli.files import write_file
from qtool.errors import QtoolError
from qtool.recipe import catalogue, recipe_from


@pytest.fixture
def listing(tmp_path):
    """A function that returns everything below ``tmp_path``: name, size and time of the last
    change.
    """

    def listing() -> dict[str, tuple[int, int]]:
        return {
            str(path.relative_to(tmp_path)): (
                0 if path.is_dir() else path.lstat().st_size,
                path.lstat().st_mtime_ns,
            )
            for path in tmp_path.rglob("*")
        }

    return listing


@pytest.fixture
def refused(run_cli, listing):
    """A function that runs a command which must be refused, and returns exit code, error code,
    message and hint.

    What holds for every refusal: one line and a hint on stderr, nothing on stdout, no traceback,
    and the folder as it was.
    """

    def refused(*arguments, **options) -> tuple[int, str, str, str]:
        before = listing()
        result = run_cli(*arguments, **options)
        assert listing() == before
        assert "Traceback" not in result.stderr, result.stderr[-1500:]
        found = re.search(
            r"^error\[(E_[A-Z_]+)\]: (.+)\nhint: (.+)\n$", result.stderr, re.MULTILINE
        )
        assert found, result.stderr
        assert result.stdout == ""
        return result.exit_code, *found.groups()

    return refused


@pytest.fixture
def refused_here(listing, tmp_path, monkeypatch):
    """The same as ``refused``, in this process: a process of its own for each of many refusals
    would show nothing more.
    """
    monkeypatch.chdir(tmp_path)

    def refused_here(*arguments) -> tuple[int, str, str, str]:
        before = listing()
        with pytest.raises(QtoolError) as caught:
            run(list(map(str, arguments)))
        assert listing() == before
        assert caught.value.hint
        return caught.value.exit_code, caught.value.code, caught.value.message, caught.value.hint

    return refused_here


QUANTIZE = ("quantize", "--output", "out", "--method", "fp8_dynamic")


# A model that cannot be used


def test_a_missing_folder_is_refused(refused):
    exit_code, code, message, _ = refused(*QUANTIZE, "--model-path", "./none")
    assert (exit_code, code) == (3, "E_NO_MODEL")
    assert "none: no such folder" in message


def test_a_folder_that_is_no_model_is_refused(refused_here, tmp_path):
    (tmp_path / "photos").mkdir()
    exit_code, code, _, hint = refused_here(*QUANTIZE, "--model-path", "photos")
    assert (exit_code, code) == (3, "E_NOT_A_MODEL")
    assert "config.json" in hint


def test_a_model_of_pickles_is_refused(refused_here, tiny_copy):
    (tiny_copy / "model.safetensors").rename(tiny_copy / "pytorch_model.bin")
    exit_code, code, message, _ = refused_here(*QUANTIZE, "--model-path", tiny_copy)
    assert (exit_code, code) == (3, "E_PICKLE")
    assert "pytorch_model.bin" in message


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11547040\n",
            "E_LFS_POINTER",
        ),
        (b"<html><body>403 Forbidden</body></html>", "E_NOT_SAFETENSORS"),
        (b"", "E_HEADER_SHORT"),
    ],
)
def test_weights_that_are_something_else_are_refused(refused_here, tiny_copy, content, code):
    (tiny_copy / "model.safetensors").write_bytes(content)
    exit_code, found, message, _ = refused_here(*QUANTIZE, "--model-path", tiny_copy)
    assert (exit_code, found) == (3, code)
    assert "model.safetensors" in message


def test_a_truncated_model_is_refused_with_the_tensor(refused_here, tiny_copy):
    file = tiny_copy / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    exit_code, code, message, _ = refused_here(*QUANTIZE, "--model-path", tiny_copy)
    assert (exit_code, code) == (3, "E_TRUNCATED")
    assert "tensor `model.norm.weight`" in message


def test_a_model_that_is_quantized_already_is_refused(refused_here, tiny_copy):
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "awq"}})
    )
    exit_code, code, message, _ = refused_here(*QUANTIZE, "--model-path", tiny_copy)
    assert (exit_code, code) == (3, "E_ALREADY_QUANTIZED")
    assert "awq" in message


@pytest.mark.slow
def test_model_code_is_not_run_unasked(refused, tiny_copy, tmp_path):
    config = json.loads((tiny_copy / "config.json").read_text())
    config |= {
        "model_type": "my_own",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (tiny_copy / "config.json").write_text(json.dumps(config))
    (tiny_copy / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    exit_code, code, message, hint = refused(*QUANTIZE, "--model-path", tiny_copy, "--quiet")
    assert (exit_code, code) == (3, "E_REMOTE_CODE")
    assert "`my_own`" in message
    assert "--trust-remote-code" in hint


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_name_without_a_network_is_refused_within_seconds(refused, tmp_path, offline):
    env = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        **({"HF_HUB_OFFLINE": "1"} if offline else {}),
    }
    exit_code, code, message, _ = refused(
        *QUANTIZE, "--model-path", "org/model", env=env, timeout=20
    )
    assert (exit_code, code) == (4, "E_HUB_UNREACHABLE")
    assert ("HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 does not answer") in message


# A wish that cannot be met


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "hint"),
    [
        (["--method", "modelopt_fp9"], 2, "E_UNKNOWN_METHOD", "`modelopt_fp8`"),
        (["--method", "fp8", "--backend", "llm-compressor"], 3, "E_RECIPE", "`llmcompressor`"),
        (
            ["--method", "fp8_dynamic", "--backend", "gptqmodel"],
            3,
            "E_BACKEND_REFUSES",
            "--backend ",
        ),
        (["--method", "rtn_int4", "--group-size", "100"], 3, "E_GROUP_SIZE", "--group-size 128"),
        (["--method", "modelopt_fp8", "--group-size", "64"], 3, "E_GROUP_SIZE", "integer method"),
        (["--method", "kv_fp8", "--group-size", "64"], 2, "E_GROUP_SIZE", "--group-size"),
        (["--method", "fp8_dynamic", "--ignore", "donw_proj"], 3, "E_PATTERN", "`down_proj`"),
        (["--method", "fp8_dynamic", "--ignore", "re:("], 3, "E_PATTERN", "regular expression"),
        (["--method", "fp8_dynamic", "--kv-cache", "fp9"], 3, "E_RECIPE", "`fp8`"),
        (["--method", "fp8_dynamic", "--lm-head"], 3, "E_TIED_HEAD", "--no-lm-head"),
        (["--method", "fp8_dynamic", "--device", "gpu"], 2, "E_DEVICE", "cuda"),
        (["--method", "fp8_dynamic", "--recipe", "fp8.yaml"], 2, "E_METHOD_TWICE", "--recipe"),
        (["--recipe", "none.yaml"], 3, "E_NO_RECIPE", "--list"),
        (
            ["--method", "fp8_dynamic", "--checkpoint-save-path", "state"],
            2,
            "E_STATE_BACKEND",
            "modelopt",
        ),
        (["--checkpoint-restore-path", "none"], 3, "E_STATE", ""),
        (["--method", "modelopt_fp8"], 2, "E_NEEDS_DATA", "--calibration"),
        ([], 2, "E_NO_METHOD", "--list"),
        (["--metod", "fp8"], 2, "E_UNKNOWN_OPTION", "qtool quantize --help"),
        (["--method", "fp8_dynamic", "--num-samples", "0"], 2, "E_LIMIT", "qtool quantize --help"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_with_what_can(
    refused_here, tiny_model, arguments, exit_code, code, hint
):
    found = refused_here("quantize", "--model-path", tiny_model, "--output", "out", *arguments)
    assert found[:2] == (exit_code, code)
    assert hint in found[3]


def test_a_command_that_does_not_exist_is_refused(refused_here):
    assert refused_here("quantise")[:2] == (2, "E_USAGE")
    assert refused_here("quantize", "--method", "fp8")[:2] == (2, "E_NO_MODEL")


# Calibration data that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("empty.jsonl", b"", "E_DATA_EMPTY", "empty.jsonl"),
        ("binary.jsonl", b"\x00\x01\x02" * 99, "E_DATA_BINARY", "binary.jsonl"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "E_DATA_BINARY", "latin.jsonl, line 1"),
        (
            "bad.jsonl",
            b'{"text": "a long enough text for a sample, really"}\n' * 2 + b"{oops}\n",
            "E_DATA_LINE",
            "bad.jsonl, line 3",
        ),
        (
            "field.jsonl",
            b'{"body": "a long enough text for a sample, really"}\n',
            "E_DATA_FIELD",
            "field.jsonl, line 1",
        ),
        ("short.jsonl", b'{"text": "a"}\n' * 20, "E_DATA_USELESS", "short.jsonl"),
        ("data.pkl", b"\x80\x04", "E_DATA_FORMAT", ".pkl"),
    ],
)
def test_calibration_data_that_cannot_be_used_is_refused_with_its_line(
    refused_here, tiny_model, tmp_path, name, content, code, message
):
    (tmp_path / name).write_bytes(content)
    found = refused_here(
        "quantize",
        "--model-path",
        tiny_model,
        "--method",
        "modelopt_fp8",
        "--output",
        "out",
        "--calibration",
        name,
    )
    assert found[:2] == (3, code)
    assert message in found[2]


def test_a_missing_calibration_file_is_refused(refused_here, tiny_model):
    found = refused_here(
        "quantize",
        "--model-path",
        tiny_model,
        "--method",
        "modelopt_fp8",
        "--output",
        "out",
        "--calibration",
        "./none.jsonl",
    )
    assert found[:2] == (3, "E_DATA_MISSING")


# An output that cannot be written


def test_an_output_that_exists_is_refused_and_kept(refused_here, tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    exit_code, code, _, hint = refused_here(*QUANTIZE, "--model-path", tiny_model)
    assert (exit_code, code) == (6, "E_OUTPUT_EXISTS")
    assert "--overwrite" in hint
    # no checkpoint: not ours to replace
    assert refused_here(*QUANTIZE, "--model-path", tiny_model, "--overwrite")[:2] == (
        6,
        "E_OUTPUT_EXISTS",
    )


def test_a_file_beside_the_output_that_is_named_like_its_log_is_kept(
    refused_here, tiny_model, tmp_path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.log").write_text("of an earlier run")
    assert refused_here(*QUANTIZE, "--model-path", tiny_model)[0] == 6


@pytest.mark.parametrize("output", ["tiny", "tiny/inside", "link/inside", "."])
def test_an_output_in_or_around_the_source_is_refused(refused_here, tiny_copy, tmp_path, output):
    (tmp_path / "link").symlink_to("tiny")
    found = refused_here(
        "quantize",
        "--model-path",
        tiny_copy,
        "--method",
        "fp8_dynamic",
        "--output",
        output,
        "--overwrite",
    )
    assert found[:2] == (2, "E_OUTPUT_PLACE")


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused(refused, make_model, tmp_path):
    rows = shutil.disk_usage(tmp_path).free * 3 // (2 * 4096)
    try:
        path = make_model({"model.layers.0.mlp.up_proj.weight": (rows, 4096)})
    except OSError:
        pytest.skip("this file system has no files three times its size")
    exit_code, code, message, _ = refused(*QUANTIZE, "--model-path", path)
    assert (exit_code, code) == (4, "E_DISK")
    assert "B are needed" in message


# How errors are shown


def test_an_error_under_json_is_a_document_on_stdout(run_cli, tiny_model):
    for arguments, code, exit_code in (
        (["--method", "fp9"], "E_UNKNOWN_METHOD", 2),
        (["--seed", "x"], "E_LIMIT", 2),
    ):
        result = run_cli("quantize", "--model-path", tiny_model, "--json", *arguments)
        error = json.loads(result.stdout)["error"]
        assert result.exit_code == error["exit_code"] == exit_code
        assert error["code"] == code
        assert error["message"] and error["hint"]
        assert f"error[{code}]: " in result.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(run_cli, tiny_model):
    result = run_cli("quantize", "--model-path", tiny_model, "--method", "fp9", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error[E_UNKNOWN_METHOD]" in result.stderr


def test_a_hostile_name_moves_no_cursor_and_stays_on_one_line(refused):
    _, _, message, _ = refused(*QUANTIZE, "--model-path", "./a\x1b[2J\nb")
    assert "a\\x1b[2J\\nb" in message


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    command = [sys.executable, "-m", "qtool.cli", "quantize", "--list"]
    done = subprocess.run(command, stdout=write_fd, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write_fd)
    assert done.stderr == ""


# What is printed


def test_help_names_the_commands(run_cli):
    for arguments in ((), ("--help",), ("-h",)):
        result = run_cli(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert re.search(r"quantize .*export .*inspect ", result.stdout, re.DOTALL)


def test_list_shows_every_method_that_is_not_experimental(run_cli):
    result = run_cli("quantize", "--list")
    shown = re.findall(
        r"^ ?([a-z0-9_]+)(?:, [a-z0-9_]+)* +(?:llmcompressor|gptqmodel|modelopt|torchao) ",
        result.stdout,
        re.MULTILINE,
    )
    assert shown == [name for name, recipe in catalogue().items() if not recipe.experimental]
    assert result.stderr == ""
    line = next(line for line in result.stdout.splitlines() if "modelopt_fp8 " in line)
    assert re.search(r"modelopt +FP8 +8\.00 +yes +cpu, cuda +sm_89 +FP8 weights", line)


def test_list_as_json_says_what_the_table_says_and_all_adds_the_experimental(run_cli):
    plain = json.loads(run_cli("quantize", "--list", "--json").stdout)
    everything = json.loads(run_cli("quantize", "--list", "--all", "--json").stdout)
    assert [entry["method"] for entry in everything] == list(catalogue())
    assert plain == [entry for entry in everything if not entry["experimental"]]
    assert next(entry for entry in plain if entry["method"] == "w4a16_gptq") == {
        "method": "w4a16_gptq",
        "aliases": ["w4a16"],
        "backend": "llmcompressor",
        "scheme": "W4A16",
        "bits_per_weight": 4.125,
        "needs_calibration": True,
        "quantizes_on": ["cpu", "cuda"],
        "native_gpu": "sm_75",
        "experimental": False,
        "summary": catalogue()["w4a16_gptq"].summary,
    }


def test_a_terminal_without_box_characters_gets_a_table_too(run_cli):
    result = run_cli("quantize", "--list", env={"PYTHONIOENCODING": "ascii"})
    assert result.exit_code == 0
    assert "modelopt_fp8" in result.stdout


def test_dry_run_shows_modules_schemes_bytes_and_needs_and_writes_nothing(
    run_cli, listing, tiny_model
):
    before = listing()
    result = run_cli(
        "quantize",
        "--model-path",
        tiny_model,
        "--method",
        "rtn_int4",
        "--dry-run",
        "--ignore",
        "v_proj",
        "--output",
        "out",
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert listing() == before
    assert "backend llmcompressor, algorithm rtn, no calibration data" in result.stdout
    assert re.search(r"down_proj +W4A16 +6 +2\.36 MB +608\.26 kB", result.stdout)
    assert re.search(
        r"v_proj +16 bit: ignored by the recipe +6 +393\.22 kB +393\.22 kB", result.stdout
    )
    assert re.search(r"all +11\.54 MB +\d\.\d\d MB", result.stdout)
    assert re.search(
        r"memory: about [67]\d\d\.\d\d MB with .*; runs native from sm_75", result.stdout
    )
    assert re.search(r"output: .*out$", result.stdout, re.MULTILINE)


def test_dry_run_as_json_is_the_plan(run_cli, tiny_model, tmp_path):
    result = run_cli(
        "quantize",
        "--model-path",
        tiny_model,
        "--method",
        "gptq_int4",
        "--group-size",
        "64",
        "--seed",
        "5",
        "--dry-run",
        "--json",
    )
    data = json.loads(result.stdout)
    recipe = recipe_from(data["recipe"])
    assert recipe.scheme.weights.group_size == 64
    assert recipe.seed == 5
    assert len(data["modules"]) == 42
    assert data["bytes_after"] < data["bytes_before"]
    assert Path(data["output"]) == tmp_path / "tiny-python-llama-gptq_int4"


def test_commands_of_sglang_work_as_they_stand(run_cli, refused, tiny_model, tmp_path):
    result = run_cli(
        "quantize",
        "--model",
        tiny_model,
        "--quantization-method",
        "modelopt_fp8",
        "--export-dir",
        "out",
        "--dry-run",
        "--json",
    )
    data = json.loads(result.stdout)
    assert data["recipe"]["name"] == "modelopt_fp8"
    assert Path(data["output"]) == tmp_path / "out"
    arguments = (
        "--model",
        tiny_model,
        "--quantization-method",
        "modelopt_fp8",
        "--export-dir",
        "out",
        "--checkpoint-restore-path",
        "none",
    )
    assert refused("export", *arguments)[:2] == (3, "E_STATE")


def test_a_recipe_file_is_used_as_it_stands(run_cli, tiny_model, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "summary: mine\nbackend: modelopt\nscheme: FP8\nignore: [layers.0.*]\n"
    )
    result = run_cli(
        "quantize", "--model-path", tiny_model, "--recipe", "mine.yaml", "--dry-run", "--json"
    )
    modules = json.loads(result.stdout)["modules"]
    assert {module["scheme"] for module in modules if ".layers.0." in module["name"]} == {None}
    assert sum(module["scheme"] == "FP8" for module in modules) == 35


def test_inspect_shows_a_model_from_its_headers(run_cli, refused, make_model):
    path = make_model(
        {"model.layers.0.mlp.up_proj.weight": (128, 256)}, architectures=["LlamaForCausalLM"]
    )
    assert "up_proj" in run_cli("inspect", "--model-path", path).stdout
    assert (
        json.loads(run_cli("inspect", "--model-path", path, "--json").stdout)["architecture"]
        == "LlamaForCausalLM"
    )
    (path / "model.safetensors").write_bytes(b"")
    assert refused("inspect", "--model-path", path)[:2] == (3, "E_HEADER_SHORT")


COMMANDS = ("quantize", "export", "inspect", "eval", "serve")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_whole_at_80_columns(run_cli, command):
    import typer.main

    from qtool.cli.app import app
    from qtool.cli.help import GROUPED

    result = run_cli(command, "--help", env={"COLUMNS": "80"})
    assert result.exit_code == 0 and "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    for parameter in typer.main.get_command(app).commands[command].params:
        assert parameter.name in GROUPED
        for name in parameter.opts:
            assert re.search(rf"{re.escape(name)}(?![\w-])", result.stdout), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_general_options(run_cli, command):
    help_text = run_cli(command, "--help").stdout
    for name in ("--json", "-q, --quiet", "-v, --verbose", "--debug"):
        assert name in help_text


@pytest.mark.parametrize(
    ("end", "printed"), [(("--", "--json", "--debug"), False), (("--json",), True)]
)
def test_nothing_after_two_dashes_is_ours(run_cli, tmp_path, end, printed):
    result = run_cli("serve", "--model-path", tmp_path / "none", "--engine", "vllm", *end)
    assert result.exit_code == 3
    assert ("error" in result.stdout) == printed and "Traceback" not in result.stderr


@pytest.mark.parametrize(("flag", "level"), [("--quiet", "warning"), ("--verbose", "debug")])
def test_quiet_and_verbose_reach_the_engine_that_is_handed_over_to(
    run_cli, tiny_model, flag, level
):
    result = run_cli("serve", "--model-path", tiny_model, "--engine", "sglang", "--dry-run", flag)
    assert result.exit_code == 0, result.stderr
    assert f"--log-level {level}" in result.stdout


def test_a_report_replaces_a_file_whole_and_leaves_links_and_pipes_what_they_are(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    target.write_text("before")
    link.symlink_to(target)
    write_file(link, "after")
    assert link.is_symlink() and target.read_text() == "after"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        write_file(pipe, "through")
        assert read.result(10) == "through"
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]
