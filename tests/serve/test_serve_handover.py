"""Our options in the words of vLLM and SGLang, checkpoints they refuse, and this process becoming
theirs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.headers_only import Gptq, build, fp8, int8
from support.hub_server import HubServer

from qtool.errors import CheckpointRefused, ResourceError, UsageError
from qtool.serve.api.reasoning.styles import NAMES as REASONING_NAMES
from qtool.serve.api.tools.styles import NAMES as TOOL_NAMES
from qtool.serve.engine_command import HIDDEN, Command, make_command, targets
from qtool.serve.handover import prepare
from qtool.serve.settings import (
    ServeOptions,
    least_tensor_parallel,
    make_settings,
    suggestion,
)

KEY = "not-for-your-eyes"
# Names of flags, without the dashes. vLLM 0.33.0: engine/arg_utils.py,
# entrypoints/common/cli_args.py, `no-` those of BooleanOptionalAction.
# SGLang 0.5.23: srt/server_args.py and srt/arg_groups/fields/. Of those that begin like one we
# pass.
THEIRS = {
    "vllm": """
        chat-template chat-template-content-format data-parallel-address
        data-parallel-backend data-parallel-external-lb data-parallel-hybrid-lb
        data-parallel-multi-port-external-lb data-parallel-rank data-parallel-rpc-port
        data-parallel-size data-parallel-size-local data-parallel-start-rank
        data-parallel-supervisor-port disable-log-stats dtype enable-auto-tool-choice
        enable-chunked-prefill enable-log-requests enforce-eager generation-config
        gpu-memory-utilization headless host kv-cache-dtype load-format master-addr master-port
        max-log-len max-logprobs max-model-len max-num-active-seqs
        max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens
        max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers nnodes
        no-async-scheduling no-enable-chunked-prefill no-enable-prefix-caching node-rank
        pipeline-parallel-size port quantization quantization-config reasoning-parser revision seed
        runner served-model-name shutdown-timeout skip-tokenizer-init structured-outputs-config
        tensor-parallel-size tokenizer tokenizer-mode tokenizer-revision
        tool-call-parser tool-parser-plugin tool-server tool-strict-level
        trust-remote-code trust-request-chat-template trust-request-mm-kwargs
        uvicorn-log-level""",
    "sglang": """
        api-key chat-template chunked-prefill-size context-bucket context-length device
        disable-cuda-graph disable-overlap-schedule disable-radix-cache dist-init-addr
        dist-timeout dp-size dtype enable-dp-attention enable-metrics
        enable-torch-compile grammar-backend host is-embedding kv-cache-dtype load-format log-level
        log-level-http log-requests log-requests-format log-requests-level
        log-requests-target max-ep-size max-mamba-cache-size max-prefill-tokens
        max-queued-requests max-running-requests max-total-tokens mem-fraction-static
        model model-checksum model-config-parser model-impl model-loader-extra-config
        model-path nnodes node-rank port pp-async-batch-depth pp-max-micro-batch-size
        pp-size quantization quantization-param-path random-seed reasoning-parser revision
        sampling-backend sampling-defaults served-model-name skip-tokenizer-init
        speculative-algorithm speculative-num-draft-tokens speculative-num-steps
        tokenizer-backend tokenizer-mode tokenizer-path tokenizer-worker-num
        tool-call-parser tool-server tp-size trust-remote-code watchdog-timeout
        trust-request-chat-template""",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterOptions(ServeOptions):
    """With options that the command line does not have."""

    grammar_backend: str | None = None
    override: str | None = None
    max_body_bytes: int | None = None


def options_of(given):
    return LaterOptions(**{"model_path": "M", **given})


START = {
    "vllm": ["-m", "vllm.entrypoints.cli.main", "serve", "M"],
    "sglang": ["-m", "sglang.launch_server", "--model-path", "M"],
}
ADDRESS = ["--host", "127.0.0.1", "--port", "30000"]  # vLLM's own default is every address
SAID = {  # options -> what vLLM is told beside START and ADDRESS, and what SGLang is
    "nothing": ({}, [], []),
    "none given": ({"tp": None, "trust_remote_code": False}, [], []),
    "tokenizer": ({"tokenizer_path": "T"}, ["--tokenizer", "T"], ["--tokenizer-path", "T"]),
    "name": (
        {"served_model_name": "N"},
        ["--served-model-name", "N", "default"],
        ["--served-model-name", "N"],
    ),
    "dtype": ({"dtype": "bfloat16"}, ["--dtype", "bfloat16"], ["--dtype", "bfloat16"]),
    "online fp8": (
        {"quantization": "FP8"},
        ["--quantization", "fp8_per_channel"],
        ["--quantization", "fp8"],
    ),
    "by torchao's name": (
        {"torchao_config": "fp8dq-per_row"},
        ["--quantization", "fp8_per_channel"],
        ["--quantization", "fp8"],
    ),
    "cache": (
        {"kv_cache_dtype": "bf16"},
        ["--kv-cache-dtype", "bfloat16"],
        ["--kv-cache-dtype", "bf16"],
    ),
    "fp8 cache": (
        {"kv_cache_dtype": "fp8_e4m3"},
        ["--kv-cache-dtype", "fp8_e4m3"],
        ["--kv-cache-dtype", "fp8_e4m3"],
    ),
    "context": (
        {"context_length": 4096},
        ["--max-model-len", "4096"],
        ["--context-length", "4096"],
    ),
    "memory": (
        {"mem_fraction_static": 0.8},
        ["--gpu-memory-utilization", "0.8"],
        ["--mem-fraction-static", "0.8"],
    ),
    "running": (
        {"max_running_requests": 64},
        ["--max-num-seqs", "64"],
        ["--max-running-requests", "64"],
    ),
    "queued": (
        {"max_running_requests": 64, "max_queued_requests": 100},
        ["--max-num-seqs", "64", "--max-num-queued-reqs", "164"],  # where the running ones count
        ["--max-running-requests", "64", "--max-queued-requests", "100"],
    ),
    "queued alone": ({"max_queued_requests": 100}, [], ["--max-queued-requests", "100"]),
    "tokens": ({"max_total_tokens": 9000}, [], ["--max-total-tokens", "9000"]),
    "chunks": (
        {"chunked_prefill_size": 2048},
        ["--max-num-batched-tokens", "2048"],
        ["--chunked-prefill-size", "2048"],
    ),
    "small chunks": (
        {"max_running_requests": 64, "chunked_prefill_size": 32},
        ["--max-num-seqs", "64", "--max-num-batched-tokens", "64"],
        ["--max-running-requests", "64", "--chunked-prefill-size", "32"],
    ),
    "no chunks": (
        {"chunked_prefill_size": -1},
        ["--no-enable-chunked-prefill"],
        ["--chunked-prefill-size=-1"],
    ),
    "switches": (
        {
            "disable_cuda_graph": True,
            "disable_radix_cache": True,
            "disable_overlap_schedule": True,
            "enable_torch_compile": True,
        },
        ["--enforce-eager", "--no-enable-prefix-caching", "--no-async-scheduling"],
        [
            "--disable-cuda-graph",
            "--disable-radix-cache",
            "--disable-overlap-schedule",
            "--enable-torch-compile",
        ],
    ),
    "tools": (
        {"tool_call_parser": "llama3", "chat_template": "t.jinja"},
        [
            "--chat-template",
            "t.jinja",
            "--tool-call-parser",
            "llama3_json",
            "--enable-auto-tool-choice",
        ],
        ["--chat-template", "t.jinja", "--tool-call-parser", "llama3"],
    ),
    "grammar": (
        {"grammar_backend": "xgrammar"},
        ["--structured-outputs-config", '{"backend": "xgrammar"}'],
        ["--grammar-backend", "xgrammar"],
    ),
    "sampling": (
        {"sampling_defaults": "openai"},
        ["--generation-config", "vllm"],
        ["--sampling-defaults", "openai"],
    ),
    "rest": (
        {
            "skip_tokenizer_init": True,
            "trust_remote_code": True,
            "log_requests": True,
            "random_seed": 0,
            "revision": "main",
            "drain_timeout_s": 2.5,
        },
        [
            "--skip-tokenizer-init",
            "--trust-remote-code",
            "--revision",
            "main",
            "--enable-log-requests",
            "--seed",
            "0",
            "--shutdown-timeout",
            "3",
        ],
        [
            "--skip-tokenizer-init",
            "--trust-remote-code",
            "--revision",
            "main",
            "--log-requests",
            "--random-seed",
            "0",
        ],
    ),
    "log level": ({"log_level": "INFO"}, ["--uvicorn-log-level", "info"], ["--log-level", "info"]),
    "cuda": ({"device": "cuda"}, [], []),
    "several GPUs": (
        {"tp": 4, "pp": 2, "dp": 2},
        [
            "--tensor-parallel-size",
            "4",
            "--pipeline-parallel-size",
            "2",
            "--data-parallel-size",
            "2",
        ],
        ["--tp-size", "4", "--pp-size", "2", "--dp-size", "2"],
    ),
    "first node": (
        {"tp": 16, "nnodes": 2, "node_rank": 0, "dist_init_addr": "10.0.0.1:25000"},
        [
            "--tensor-parallel-size",
            "16",
            "--nnodes",
            "2",
            "--node-rank",
            "0",
            "--master-addr",
            "10.0.0.1",
            "--master-port",
            "25000",
        ],
        [
            "--tp-size",
            "16",
            "--nnodes",
            "2",
            "--node-rank",
            "0",
            "--dist-init-addr",
            "10.0.0.1:25000",
        ],
    ),
    "another node": (
        {"nnodes": 2, "node_rank": 1, "dist_init_addr": "[fd00::1]:25000"},
        [
            "--nnodes",
            "2",
            "--node-rank",
            "1",
            "--master-addr",
            "fd00::1",
            "--master-port",
            "25000",
            "--headless",
        ],
        ["--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "[fd00::1]:25000"],
    ),
    "no port": (
        {"nnodes": 2, "node_rank": 0, "dist_init_addr": "head"},
        ["--nnodes", "2", "--node-rank", "0", "--master-addr", "head"],
        ["--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "head"],
    ),
}


@pytest.fixture
def not_installed(monkeypatch):
    """As on a machine with neither engine and without a GPU."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.mark.parametrize("name", SAID)
def test_options_are_said_as_vllm_says_them(name):
    options, vllm, _ = SAID[name]
    start = [sys.executable, *START["vllm"]]
    words = list(make_command("vllm", options_of(options)).arguments)
    assert words[:5] == start
    at = words.index("--host")
    assert words[at : at + 4] == ADDRESS
    assert words[5:at] + words[at + 4 :] == vllm


@pytest.mark.parametrize("name", SAID)
def test_options_are_said_as_sglang_says_them(name):
    options, _, sglang = SAID[name]
    assert list(make_command("sglang", options_of(options)).arguments) == [
        sys.executable,
        *START["sglang"],
        *sglang,
    ]


@pytest.mark.parametrize("engine", THEIRS)
def test_every_flag_is_one_the_engine_has(engine):
    flags = {
        word
        for option in targets()[engine].options.values()
        for word in (option.flag, *option.extra)
        if word.startswith("-")
    }
    assert flags <= {f"--{name}" for name in THEIRS[engine].split()}


def test_names_of_parsers_are_known_here_and_to_the_engines():
    for option, names in (("tool_call_parser", TOOL_NAMES), ("reasoning_parser", REASONING_NAMES)):
        tables = [targets()[engine].options[option].values for engine in THEIRS]
        for table in tables:
            assert set(table) <= {*names, "none"}
        assert set(names) == set(names) & set().union(*tables) | {"interns1", "kimi"} & set(names)


@pytest.mark.parametrize("engine", THEIRS)
def test_every_option_in_the_table_of_the_other_engine_has_an_answer(engine):
    # what vLLM has in parts
    parts = {
        "master_addr",
        "master_port",
        "headless",
        "dist_init_addr",
        "no_chunked_prefill",
    }
    known = {name for target in targets().values() for name in target.options} - parts
    assert known <= targets()[engine].options.keys()


def test_another_address_is_said_to_vllm_once():
    words = make_command("vllm", options_of({"host": "0.0.0.0", "port": 8000})).arguments
    assert [word for word in words if word.startswith("--")] == ["--host", "--port"]
    assert {"0.0.0.0", "8000"} <= set(words)


@pytest.mark.parametrize("engine", THEIRS)
def test_the_engines_own_arguments_come_last(engine):
    words = make_command(
        engine, options_of({"tp": 2}), ["--distributed-executor-backend", "ray"]
    ).arguments
    assert words[-2:] == ("--distributed-executor-backend", "ray")


@pytest.mark.parametrize(
    ("engine", "options", "word"),
    [
        ("vllm", {"max_total_tokens": 10}, "--max-total-tokens is left out"),
        ("vllm", {"enable_torch_compile": True}, "compiles by default"),
        ("vllm", {"max_queued_requests": 10}, "counts the running ones too"),
        ("vllm", {"disable_cuda_graph": True}, "torch.compile off"),
        ("vllm", {"max_running_requests": 64, "chunked_prefill_size": 32}, "becomes 64"),
        ("sglang", {"drain_timeout_s": 5.0}, "--drain-timeout is left out"),
        ("sglang", {"api_key": KEY}, "process list"),
        (
            "sglang",
            {"max_body_bytes": 5},
            "--max-body-bytes is left out: sglang has nothing like it",
        ),
    ],
)
def test_what_gets_lost_is_told(engine, options, word):
    assert any(word in warning for warning in make_command(engine, options_of(options)).warnings)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("vllm", {"quantization": "int4wo-128"}),
        ("vllm", {"quantization": "mxfp4"}),  # there it rounds the inputs too
        ("vllm", {"torchao_config": "int8dq"}),
        ("vllm", {"override": "w8a8_int8"}),
        ("vllm", {"kv_cache_dtype": "int3"}),
        ("vllm", {"dtype": "float64"}),
        ("vllm", {"device": "cpu"}),
        ("vllm", {"tool_call_parser": "klingon"}),
        ("sglang", {"quantization": "w8a8_int8"}),  # there it only loads what is int8 already
        ("sglang", {"torchao_config": "int4wo-32"}),
    ],
)
def test_an_option_that_changes_the_numbers_is_refused_where_it_cannot_be_said(engine, options):
    (value,) = options.values()
    with pytest.raises(UsageError, match=value) as caught:
        make_command(engine, options_of(options))
    assert caught.value.code == "E_ENGINE_OPTION"
    assert "takes" in caught.value.hint or "rounds" in caught.value.hint


def test_two_names_for_one_quantization_are_refused():
    with pytest.raises(UsageError, match="exclude each other"):
        make_command(
            "vllm",
            options_of({"quantization": "fp8", "torchao_config": "int8wo"}),
        )


@pytest.mark.parametrize(
    "options",
    [{"nnodes": 2}, {"nnodes": 2, "node_rank": 2, "dist_init_addr": "a:1"}, {"node_rank": 1}],
)
def test_nodes_that_cannot_meet_are_refused(options):
    with pytest.raises(UsageError) as caught:
        make_command("sglang", options_of(options))
    assert caught.value.code == "E_NODES"


def test_an_unknown_engine_is_answered_with_a_known_one():
    with pytest.raises(UsageError) as caught:
        make_command("vlm", options_of({}))
    assert "`vllm`" in caught.value.hint


@pytest.mark.parametrize(
    ("visible", "expected"), [("", "1"), ("4,6", "6"), ("GPU-aa,GPU-bb", "GPU-bb")]
)
def test_one_of_several_gpus_is_picked_among_those_that_are_visible(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for engine in THEIRS:
        command = make_command(engine, options_of({"device": "cuda:1"}))
        assert command.environment == {"CUDA_VISIBLE_DEVICES": expected}
        assert "--device" not in command.arguments


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for device in ("cuda:1", "cuda:x", "cuda:-1"):
        with pytest.raises(UsageError) as caught:
            make_command("vllm", options_of({"device": device}))
        assert caught.value.code == "E_DEVICE"


def test_one_gpu_and_two_ranks_are_refused():
    with pytest.raises(UsageError, match="more are asked for"):
        make_command("sglang", options_of({"device": "cuda:0", "tp": 2}))


def test_an_old_engine_is_not_given_a_flag_it_lacks(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.25.1")
    command = make_command(
        "vllm", options_of({"max_running_requests": 8, "max_queued_requests": 8})
    )
    assert "--max-num-queued-reqs" not in command.arguments
    assert any(
        "vllm 0.25.1 has no --max-num-queued-reqs" in warning for warning in command.warnings
    )


@pytest.mark.parametrize("engine", THEIRS)
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--api-key", KEY, f"{KEY}2", "--seed", "1"],
        [f"--api-key={KEY}"],
        ["--api_key", f"-{KEY}"],
        ["--hf-token", KEY],
    ],
)
def test_a_key_is_never_printed(engine, extra):
    for key in (KEY, f"-{KEY}"):
        command = make_command(engine, options_of({"api_key": key}), extra)
        for shown in (
            str(command),
            repr(command),
            json.dumps(command.to_dict()),
            str(dataclasses.replace(command, arguments=())),
        ):
            assert KEY not in shown
        assert HIDDEN in str(command)
        assert key in command.environment.values() or any(key in word for word in command.arguments)


def test_vllm_gets_its_key_where_the_process_list_does_not_show_it():
    command = make_command("vllm", options_of({"api_key": KEY}))
    assert command.environment == {"VLLM_API_KEY": KEY}
    assert KEY not in " ".join(command.arguments)


def test_the_printed_command_is_one_for_a_shell():
    shown = str(
        make_command(
            "vllm",
            options_of(
                {
                    "model_path": "a model's folder",
                    "log_level": "debug",
                    "grammar_backend": "xgrammar",
                }
            ),
        )
    )
    said = subprocess.run(
        ["sh", "-c", shown.replace(sys.executable, "printf '%s|'")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("|")
    assert "a model's folder" in said
    assert '{"backend": "xgrammar"}' in said
    assert shown.startswith("VLLM_LOGGING_LEVEL=debug ")


@pytest.mark.parametrize("engine", THEIRS)
def test_a_plain_model_is_prepared_without_the_engine_when_nothing_runs(
    engine, tiny_model, not_installed
):
    command = prepare(
        engine, options_of({"model_path": str(tiny_model), "quantization": "fp8"}), dry_run=True
    )
    assert isinstance(command, Command)
    assert str(tiny_model) in command.arguments
    assert "--quantization" in command.arguments
    assert any("--engine-python" in warning for warning in command.warnings)


@pytest.mark.parametrize("engine", THEIRS)
def test_an_engine_that_is_not_installed_is_named_with_the_line_that_installs_it(
    engine, tiny_model, not_installed
):
    with pytest.raises(ResourceError) as caught:
        prepare(engine, options_of({"model_path": str(tiny_model)}))
    assert caught.value.exit_code == 4
    assert f"{engine}-env/bin/pip install {engine}==" in caught.value.hint
    assert "--engine-python" in caught.value.hint


def test_a_folder_with_the_engines_name_is_no_engine(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ResourceError):
        prepare("vllm", options_of({"model_path": str(tiny_model)}))


def test_a_checkpoint_the_engine_does_not_load_is_refused_before_anything_else(
    tmp_path, not_installed
):
    folder = build(tmp_path / "m", Gptq(desc_act=True)).path
    with pytest.raises(
        CheckpointRefused, match=r"act-order in groups \(desc_act\) is no longer supported"
    ) as caught:
        prepare("vllm", options_of({"model_path": str(folder)}))
    assert caught.value.code == "E_ENGINE_REFUSES"
    assert "sglang loads it: --engine sglang" in caught.value.hint
    assert "qtool inspect --model-path" in caught.value.hint
    taken = prepare("sglang", options_of({"model_path": str(folder)}), dry_run=True)
    assert str(folder) in taken.arguments
    assert taken.arguments[-2:] == ("--served-model-name", "m")  # clients see no path


def test_of_several_reasons_the_first_are_told(tmp_path, not_installed):
    folder = build(tmp_path / "m", Gptq()).path
    with pytest.raises(CheckpointRefused, match="divide the attention heads evenly; and 8 more"):
        prepare("vllm", options_of({"model_path": str(folder), "tp": 3}), dry_run=True)


def test_groups_that_the_ranks_would_cut_are_refused(tmp_path, not_installed):
    folder = build(tmp_path / "m", Gptq()).path
    prepare("vllm", options_of({"model_path": str(folder), "tp": 2}), dry_run=True)
    with pytest.raises(CheckpointRefused, match="85 inputs on each of 3 ranks"):
        prepare("vllm", options_of({"model_path": str(folder), "tp": 3}), dry_run=True)


def test_a_card_that_is_too_old_is_asked_of_the_driver(tmp_path, monkeypatch):
    folder = build(tmp_path / "m", fp8()).path
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\ncase "$*" in *"-i 1"*) echo 7.0;; *) echo 9.0;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    prepare("vllm", options_of({"model_path": str(folder)}), dry_run=True)
    for pick in ({"device": "cuda:1"}, {}):
        with pytest.raises(CheckpointRefused, match=r"on 7\.0"):
            prepare("vllm", options_of({"model_path": str(folder), **pick}), dry_run=True)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")


def test_a_true_word_about_a_quantized_checkpoint_need_not_be_passed_on(tmp_path, not_installed):
    folder = build(tmp_path / "m", Gptq()).path
    for engine in THEIRS:
        command = prepare(
            engine,
            options_of({"model_path": str(folder), "quantization": "gptq_marlin"}),
            dry_run=True,
        )
        assert "--quantization" not in command.arguments
        with pytest.raises(UsageError, match="`awq` does not fit"):
            prepare(
                engine, options_of({"model_path": str(folder), "quantization": "awq"}), dry_run=True
            )


def test_inputs_rounded_otherwise_than_the_checkpoint_says_are_sglangs_alone(
    tmp_path, not_installed
):
    folder = build(tmp_path / "m", int8(inputs={"strategy": "tensor", "dynamic": False})).path
    options = {"model_path": str(folder), "quantization": "w8a8_int8"}
    assert prepare("sglang", options_of(options), dry_run=True).arguments[-2:] == (
        "--quantization",
        "w8a8_int8",
    )
    with pytest.raises(UsageError, match="--quantization w8a8_int8 cannot be passed to vllm"):
        prepare("vllm", options_of(options), dry_run=True)


@pytest.fixture
def engine_environment(tmp_path):
    """An interpreter whose environment has an engine of some version; nothing else."""

    def make(engine, version):
        root = tmp_path / f"{engine}-{version}"
        site = root / "site"
        (site / engine).mkdir(parents=True)
        (site / engine / "__init__.py").touch()
        metadata = site / f"{engine}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {engine}\nVersion: {version}\n")
        python = root / "bin" / "python3"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
        command = root / "bin" / engine
        command.write_text(f"#!{python}\n")
        for file in (python, command):
            file.chmod(0o755)
        return python

    return make


@pytest.mark.parametrize("engine", THEIRS)
def test_an_engine_runs_in_an_environment_of_its_own(engine, engine_environment, tiny_model):
    python = engine_environment(engine, "0.25.1")
    options = options_of({"model_path": str(tiny_model), "engine_python": str(python)})
    command = prepare(engine, options)
    assert command.arguments[0] == str(python)
    assert not any("--engine-python" in warning for warning in command.warnings)
    assert "--engine-python" not in command.arguments


def test_the_version_is_that_of_the_engines_own_environment(engine_environment, tmp_path):
    folder = build(tmp_path / "m", Gptq(desc_act=True)).path
    given = {"model_path": str(folder), "max_running_requests": 8, "max_queued_requests": 8}
    old, new = (str(engine_environment("vllm", each)) for each in ("0.28.0", "0.32.0+cpu"))
    command = prepare("vllm", options_of({**given, "engine_python": old}))
    assert any("vllm 0.28.0 has no --max-num-queued-reqs" in each for each in command.warnings)
    with pytest.raises(CheckpointRefused, match=r"vllm 0\.32\.0\+cpu does not load"):
        prepare("vllm", options_of({**given, "engine_python": new}))
    command = make_command("vllm", options_of({**given, "engine_python": new}))
    assert "--max-num-queued-reqs" in command.arguments


@pytest.mark.parametrize("engine", THEIRS)
def test_the_engines_command_in_path_tells_its_environment(
    engine, engine_environment, tiny_model, not_installed, monkeypatch
):
    python = engine_environment(engine, "0.25.1")
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}/usr/bin:/bin")
    command = prepare(engine, options_of({"model_path": str(tiny_model)}))
    assert command.arguments[0] == str(python)


def test_a_command_in_path_that_is_no_script_of_python_is_left_alone(
    tmp_path, tiny_model, not_installed, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    for content in (b"#!/bin/sh\n", b"\x7fELF\xff\xfe", b"", b"#!/nowhere/python3\n"):
        (tmp_path / "vllm").write_bytes(content)
        (tmp_path / "vllm").chmod(0o755)
        with pytest.raises(ResourceError) as caught:
            prepare("vllm", options_of({"model_path": str(tiny_model)}))
        assert caught.value.code == "E_NO_ENGINE_PACKAGE"


@pytest.mark.parametrize("python", ["/nowhere/python", "no-such-python", "/bin/true", "/tmp"])
def test_an_interpreter_that_does_not_start_is_named(python):
    with pytest.raises(ResourceError, match=python) as caught:
        make_command("vllm", options_of({"engine_python": python}))
    assert caught.value.code == "E_ENGINE_PYTHON"


def test_the_builtin_engine_has_no_interpreter_of_its_own():
    with pytest.raises(UsageError, match="--engine-python") as caught:
        make_settings(ServeOptions(model_path="M", engine_python=sys.executable))
    assert "--engine vllm" in caught.value.hint


ENGINE = """
import json, os, pathlib, sys
seen = {"argv": sys.argv[1:], "pid": os.getpid()}
seen |= {"key": os.environ.get("VLLM_API_KEY"), "kept": os.environ.get("KEPT")}
pathlib.Path(os.environ["RECORD"]).write_text(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("engine", "module"),
    [("vllm", "vllm/entrypoints/cli/main.py"), ("sglang", "sglang/launch_server.py")],
)
def test_the_process_becomes_the_engines(engine, module, tiny_model, tmp_path):
    file = tmp_path / "site" / module
    file.parent.mkdir(parents=True)
    file.write_text(ENGINE)
    (tmp_path / "site" / engine / "__init__.py").touch()
    code = f"""
import os
from qtool.serve.handover import hand_over, prepare
from qtool.serve.settings import ServeOptions
# not flushed: the pipe gets it only if it is flushed before the process is replaced
print(os.getpid())
options = ServeOptions(model_path={str(tiny_model)!r}, port=8001, api_key={KEY!r})
hand_over(prepare({engine!r}, options, ["--seed", "3"]))
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "RECORD": str(tmp_path / "record"),
        "KEPT": "yes",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=60)
    seen = json.loads((tmp_path / "record").read_text())
    assert process.returncode == 0
    assert output.strip() == str(process.pid)
    assert (seen["pid"], seen["kept"]) == (process.pid, "yes")
    assert seen["argv"][-2:] == ["--seed", "3"]
    assert str(tiny_model) in seen["argv"]
    assert "8001" in seen["argv"]
    assert (seen["key"] == KEY) if engine == "vllm" else (KEY in seen["argv"])


def test_a_model_of_the_hub_is_served_as_it_was_checked_under_the_name_that_was_asked_for(
    tiny_model, tmp_path
):
    files = {
        path.name: path.read_bytes()
        for path in tiny_model.iterdir()
        if path.suffix not in (".py", ".jsonl")
    }
    code = """
from qtool.serve.handover import prepare
from qtool.serve.settings import ServeOptions
options = ServeOptions(model_path="org/tiny", revision="v1.0")
print("\\n".join(prepare("sglang", options, dry_run=True).arguments))
"""
    with HubServer({"org/tiny": files}) as server:
        # a library of another test may have set some
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**clean, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    folder = words[words.index("--model-path") + 1]
    assert folder.startswith(str(tmp_path / "hub"))
    assert words[words.index("--served-model-name") + 1] == "org/tiny"
    assert "--revision" not in words


def test_handing_over_needs_no_torch(tiny_model, run_python):
    code = f"""
        import sys
        from qtool.serve.handover import prepare
        from qtool.serve.settings import ServeOptions
        options = ServeOptions(model_path={str(tiny_model)!r}, quantization="fp8")
        prepare("vllm", options, dry_run=True)
        print(sorted({{"torch", "transformers"}} & sys.modules.keys()))
    """
    assert run_python(code) == "[]"


def test_the_suggestion_is_the_command_to_type_instead():
    options = {
        "model_path": "my model",
        "tp": 2,
        "port": 8000,
        "trust_remote_code": True,
        "quantization": None,
        "api_key": KEY,
    }
    said = suggestion(options_of(options))
    assert (
        "`qtool serve --model-path 'my model' --engine vllm --tp 2 --port 8000 "
        "--trust-remote-code --api-key ...`" in said
    )
    assert KEY not in said


def test_the_suggestion_counts_the_gpus_a_model_needs():
    assert "--tp 4" in suggestion(options_of({}), size_bytes=140 << 30, gpu_bytes=80 << 30)
    assert "--tp 2" in suggestion(options_of({"tp": 2}), size_bytes=140 << 30, gpu_bytes=80 << 30)


@given(size=st.integers(1, 1 << 42), memory=st.integers(1 << 30, 1 << 38))
def test_the_fewest_gpus_hold_the_weights(size, memory):
    count = least_tensor_parallel(size, memory)
    assert count & (count - 1) == 0
    assert size / count <= memory
    assert count == 1 or size / (count // 2) > memory * 0.69
