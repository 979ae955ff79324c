"""What inspect says of a checkpoint, from headers alone."""

import io
import json

import pytest
from support import EXAMPLE

from qtool.checkpoint import open_checkpoint
from qtool.cli.console import EscapingConsole
from qtool.inspection import inspect, render

pytest_plugins = ["support.sample_plugin"]

PARAMETERS = 5_770_496


def test_a_plain_model_is_counted():
    found = inspect(open_checkpoint(EXAMPLE), deep=True)
    assert (found.format, found.architecture, found.parameters, found.quantized) == (
        None,
        "LlamaForCausalLM",
        PARAMETERS,
        (),
    )
    assert found.bits_per_weight == 16
    assert found.tied_embeddings
    assert {(row.kind, row.count) for row in found.unquantized} >= {
        ("embed_tokens", 1),
        ("norm", 1),
        ("input_layernorm", 6),
        ("q_proj", 6),
    }


@pytest.mark.parametrize(
    "name",
    [
        "ct/W4A16",
        "ct/NVFP4",
        "ct/kv_fp8",
        "gptq/rtn4",
        "modelopt/FP8_KV",
        "modelopt/INT4_AWQ",
        "modelopt/MXFP4",
    ],
)
def test_quantizing_changes_bytes_and_not_parameters(sample, name):
    found = inspect(open_checkpoint(sample(name)))
    assert found.parameters == PARAMETERS
    assert (
        sum(row.size_bytes for row in (*found.quantized, *found.unquantized))
        <= found.size_bytes
        < 7.2e6
    )
    assert sum(row.count for row in found.quantized) == 42


def test_bits_per_weight_count_the_scales(sample):
    rows = {row.kind: row for row in inspect(open_checkpoint(sample("ct/W4A16"))).quantized}
    assert rows["down_proj"].scheme == "W4A16"
    assert 4.125 <= rows["down_proj"].bits_per_weight < 4.13  # and 16 bytes of weight_shape


def test_mixed_schemes_stand_in_rows_of_their_own(sample):
    found = inspect(open_checkpoint(sample("modelopt/MIXED")))
    assert {(row.kind, row.scheme) for row in found.quantized} >= {
        ("q_proj", "FP8"),
        ("up_proj", "NVFP4"),
    }
    assert any(row.kind == "down_proj" for row in found.unquantized)


def test_the_report_survives_json_and_names_what_matters_in_print(sample):
    found = inspect(open_checkpoint(sample("ct/kv_fp8")))
    data = json.loads(json.dumps(found.to_dict()))
    assert (data["kv_cache"], data["quantized"][0]["scheme"]) == ("fp8", "FP8_DYNAMIC")
    text = io.StringIO()
    EscapingConsole(file=text, width=120).print(render(found))
    assert all(
        part in text.getvalue()
        for part in (
            "kv_fp8",
            "LlamaForCausalLM",
            "FP8_DYNAMIC",
            "embed_tokens",
            "down_proj",
            "tied",
        )
    )


def test_warnings_of_the_layout_are_passed_on(sample):
    assert "engines misread it" in inspect(open_checkpoint(sample("gptq/rtn_gemm"))).warnings[0]
