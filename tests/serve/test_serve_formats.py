"""The commands of SGLang's documentation, with `qtool serve` for its server, on checkpoints of
several formats; what `--quantization` says of one.

The two `curl` commands: its quick start (`docs/get-started/quickstart`,
`docs/basic_usage/send_request`), and the README of its native route.
The command lines that start servers: `docs/advanced_features/quantization`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import pytest
from support import EXAMPLE
from support.gguf_files import write_gguf
from support.server import free_port, start_server

import qtool

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve formats")]

CHAT = """curl http://localhost:30000/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "qwen/qwen2.5-0.5b-instruct",
    "messages": [
      {"role": "user", "content": "What is the capital of France?"}
    ]
  }'
"""
GENERATE = """curl http://localhost:30000/generate \\
  -H "Content-Type: application/json" \\
  -d '{
    "text": "Once upon a time,",
    "sampling_params": {
      "max_new_tokens": 16,
      "temperature": 0
    }
  }'
"""
MADE = {  # a checkpoint that no calibration is needed for -> its format and scheme
    "fp8_dynamic": ("compressed-tensors", "FP8_DYNAMIC"),
    "gptq": ("gptq", "W4A16"),
    "awq": ("awq", "W4A16_ASYM"),
    "modelopt_fp8": ("modelopt", "FP8_DYNAMIC"),
    "modelopt_fp4": ("modelopt", "MXFP4"),
    "blocks": ("fp8_block", "FP8_BLOCK"),
}
# what is served, the flags of the documentation's line, what an Engine is told for the same;
# `tests/benchmarks/serve_formats.py` starts a server for all of them
DEPLOYED = [
    ("modelopt_fp8", ["--quantization", "modelopt"], None),
    pytest.param(
        "plain",
        ["--torchao-config", "int8dq", "--disable-cuda-graph"],
        "int8dq",
        marks=pytest.mark.exhaustive,
    ),
]
FITTING = {  # what `--quantization` may say, and of which checkpoints
    "compressed-tensors": ["fp8_dynamic"],
    "gptq": ["gptq"],
    "gptq_marlin": ["gptq"],
    "awq": ["awq"],
    "awq_marlin": ["awq"],
    "marlin": ["gptq", "awq"],
    "modelopt": ["modelopt_fp8", "modelopt_fp4"],
    "modelopt_fp8": ["modelopt_fp8"],
    "modelopt_fp4": ["modelopt_fp4"],
    # by its method, and where the scheme is what `fp8` would make
    "fp8": [
        "blocks",
        "fp8_dynamic",
        "modelopt_fp8",
    ],
    "w8a8_fp8": ["fp8_dynamic", "modelopt_fp8"],
    "w8a8_int8": [],
}
REFUSED = [  # some of all others
    (name, flag)
    for number, (flag, names) in enumerate(FITTING.items())
    for name in [name for name in MADE if name not in names][number % 3 :: 3]
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model):
    """A function: a name in `MADE`, or `plain`, to its folder."""
    root = tmp_path_factory.mktemp("formats")

    def get(name: str) -> Path:
        if name == "plain":
            return tiny_model
        if not (root / name).exists():
            to, scheme = MADE[name]
            qtool.export(tiny_model, to=to, scheme=scheme, requantize=True, output=root / name)
        return root / name

    return get


# --- the documentation's commands


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(("name", "flags", "quantization"), DEPLOYED)
def test_the_documentations_commands_work(checkpoint, tmp_path, name, flags, quantization):
    """Byte for byte but for the port."""
    server = start_server(
        tmp_path, checkpoint(name), *flags, "--host", "0.0.0.0", "--context-length", 256
    )
    try:
        generated, said = shell(GENERATE, server), shell(CHAT, server)
    finally:
        assert server.end() == 0
    assert said["object"] == "chat.completion"
    assert said["model"] == "qwen/qwen2.5-0.5b-instruct"
    assert said["choices"][0]["message"]["content"]
    assert said["choices"][0]["finish_reason"] in ("stop", "length")
    assert generated["meta_info"]["completion_tokens"] == 16
    with qtool.Engine(checkpoint(name), quantization=quantization) as engine:
        own = engine.generate("Once upon a time,", {"max_new_tokens": 16, "temperature": 0})
    assert (generated["text"], generated["output_ids"]) == (own["text"], own["output_ids"])
    assert "WARNING: anybody who can reach" in server.said()
    assert "Traceback" not in server.said()


def shell(command, server):
    """Run a command of the documentation as a shell does, and return the answer."""
    done = subprocess.run(
        command.replace("localhost:30000", f"localhost:{server.port}"),
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- what --quantization may say of a quantized checkpoint


@pytest.fixture(scope="module")
def outcomes(checkpoint):
    """The exit code and stderr of `qtool serve --quantization FLAG --dry-run`, by checkpoint and
    flag: one process, for torch loads once in it.
    """
    code = """
        import contextlib, io, json, sys
        from qtool.cli import main

        outcomes = []
        for folder, flag in json.load(sys.stdin):
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()) as error,
            ):
                try:
                    main(["serve", "--model-path", folder, "--quantization", flag, "--dry-run"])
                except SystemExit as end:
                    outcomes.append((end.code or 0, error.getvalue()))
        print(json.dumps(outcomes))
    """
    asked = [*((name, flag) for flag, names in FITTING.items() for name in names), *REFUSED]
    given = json.dumps([(str(checkpoint(name)), flag) for name, flag in asked])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=given,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout), strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "flag"), [(name, flag) for flag, names in FITTING.items() for name in names]
)
def test_a_flag_that_says_what_a_checkpoint_is_is_taken(outcomes, name, flag):
    assert outcomes[name, flag][0] == 0, outcomes[name, flag][1]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "flag"), REFUSED)
def test_any_other_flag_is_a_usage_error_that_names_the_method_found(outcomes, name, flag):
    code, error = outcomes[name, flag]
    method = {"compressed-tensors": "compressed-tensors", "fp8_block": "fp8"}.get(
        MADE[name][0], MADE[name][0]
    )
    assert code == 2
    assert f"error[E_QUANTIZATION]: `{flag}` does not fit" in error
    assert f"quantized already: `{method}`" in error


@pytest.mark.exhaustive
def test_a_server_of_another_method_does_not_start(checkpoint, run_cli):
    result = run_cli(
        "serve", "--model-path", checkpoint("gptq"), "--quantization", "awq", "--port", free_port()
    )
    assert result.exit_code == 2
    assert "`awq` does not fit" in result.stderr
    assert "quantized already: `gptq`" in result.stderr
    assert result.stdout == ""


@pytest.mark.exhaustive
def test_gptq_in_the_layout_of_marlin_is_refused_whatever_the_flag_says(
    checkpoint, tmp_path, run_cli
):
    folder = Path(shutil.copytree(checkpoint("gptq"), tmp_path / "marlin"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (folder / "config.json").write_text(json.dumps(config))
    result = run_cli("serve", "--model-path", folder, "--quantization", "marlin", "--dry-run")
    assert result.exit_code == 3
    assert "error[E_KERNEL_LAYOUT]" in result.stderr


def test_a_folder_with_a_gguf_file_is_served_with_its_chat_template(tmp_path):
    (tmp_path / "tiny").mkdir()
    write_gguf(EXAMPLE, tmp_path / "tiny" / "tiny.gguf")
    server = start_server(tmp_path, tmp_path / "tiny", "--max-total-tokens", 4096)
    try:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    finally:
        server.end()
    assert answer.status_code == 200, answer.text
