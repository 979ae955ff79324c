"""Layers are rounded again only when that is asked for, and to the nearest scheme."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support import EXAMPLE
from support.conversion import (
    AWQ,
    CT,
    FP8,
    GPTQ,
    MODELOPT,
    MXFP4,
    refusal,
    schemes,
)

from qtool.checkpoint import open_checkpoint
from qtool.conversion import export
from qtool.errors import UsageError
from qtool.formats import detect
from qtool.inspection.comparison import compare
from qtool.scheme import SCHEMES
from qtool.weight import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]


def decibels(folder, base):
    return {
        found.name: found.sqnr_db
        for found in compare(open_checkpoint(folder), open_checkpoint(base)).modules
        if found.sqnr_db is not None
    }


@pytest.mark.parametrize(
    ("name", "to", "scheme", "becomes", "rounded", "at_least_db"),
    [
        ("ct/FP8_DYNAMIC", GPTQ, None, "W8A16", 42, 38),
        ("ct/FP8_DYNAMIC", FP8, None, "FP8_BLOCK", 42, 28),
        ("ct/W5A16", GPTQ, None, "W8A16", 42, 38),
        ("ct/W8A16", AWQ, None, "W4A16_ASYM", 42, 17),
        ("ct/NVFP4", CT, "W4A16", "W4A16", 42, 15),
        ("ct/W4A16", MODELOPT, "W8A16_CHANNEL", "W8A16_CHANNEL", 42, 35),
        ("gptq/desc_act", AWQ, None, "int4 g64", 14, 17),
        ("modelopt/INT4_AWQ", CT, None, "W4A16", 12, 17),
        ("modelopt/INT8_SQ", CT, None, "W8A16_CHANNEL", 42, 35),
    ],
)
def test_requantize_rounds_to_the_nearest_scheme_within_its_error(
    sample, tmp_path, name, to, scheme, becomes, rounded, at_least_db
):
    result = export(sample(name), to=to, output=tmp_path / "out", requantize=True, scheme=scheme)
    assert {scheme.name for scheme in schemes(detect(open_checkpoint(result.output))).values()} == {
        becomes
    }
    assert (result.rounded_layers, result.notes[0]) == (
        rounded,
        f"rounded to nearest: {rounded} layers to {becomes}",
    )
    export(sample(name), to="bf16", output=tmp_path / "plain")
    found = decibels(result.output, tmp_path / "plain")
    assert min(found.values()) > at_least_db


@pytest.mark.parametrize(
    ("name", "to", "scheme", "becomes"),
    [
        ("ct/W4A8", GPTQ, None, "W4A16"),
        ("ct/W8A8", GPTQ, None, "W8A16_CHANNEL"),
        ("modelopt/FP8_PB_WO", FP8, None, "FP8_BLOCK"),
        ("ct/NVFP4", CT, "NVFP4A16", "NVFP4A16"),
        ("ct/MXFP4", CT, "MXFP4A16", "MXFP4A16"),
    ],
)
def test_where_only_inputs_differ_requantize_keeps_the_codes(
    sample, tmp_path, name, to, scheme, becomes
):
    result = export(sample(name), to=to, output=tmp_path / "out", requantize=True, scheme=scheme)
    assert result.rounded_layers == 0
    assert [note for note in result.notes if not note.startswith("inputs of 42 layers: ")] == []
    assert len(result.notes) == 1
    assert {scheme.name for scheme in schemes(detect(open_checkpoint(result.output))).values()} == {
        becomes
    }
    assert decibels(result.output, sample(name)) == {}


def test_only_the_layers_that_do_not_fit_are_rounded(sample, tmp_path):
    result = export(sample("ct/mixed"), to=GPTQ, output=tmp_path / "out", requantize=True)
    assert result.notes == (
        "rounded to nearest: 24 layers to W8A16",
        "inputs of 24 layers: fp8 token -> 16 bits",
    )
    assert "24 of them rounded to nearest" in result.summary()
    found = decibels(result.output, sample("ct/mixed"))
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    rounded = json.loads((tmp_path / "out" / "qtool-manifest.json").read_text())["conversion"][
        "rounded"
    ]
    assert (rounded.keys(), set(rounded.values())) == (found.keys(), {"int8 g128"})


def test_a_plain_model_is_rounded_only_to_a_scheme_that_is_named(tmp_path):
    for options in ({}, {"requantize": True}):
        with pytest.raises(UsageError, match="is not quantized") as caught:
            export(EXAMPLE, to=FP8, output=tmp_path / "out", **options)
        assert caught.value.code == "E_NOT_QUANTIZED"
    result = export(EXAMPLE, to=FP8, output=tmp_path / "out", requantize=True, scheme="FP8_BLOCK")
    assert (result.source_format, result.rounded_layers) == ("16 bit", 42)
    assert {scheme.name for scheme in schemes(detect(open_checkpoint(result.output))).values()} == {
        "FP8_BLOCK"
    }
    found = decibels(result.output, EXAMPLE)
    assert len(found) == 42
    assert 28 < min(found.values()) < max(found.values()) < 36
    wanted = quantize(
        load_file(EXAMPLE / "model.safetensors")["model.layers.3.mlp.up_proj.weight"],
        SCHEMES["FP8_BLOCK"],
    )
    assert torch.equal(
        load_file(result.output / "model.safetensors")[
            "model.layers.3.mlp.up_proj.weight_scale_inv"
        ],
        wanted.scale,
    )


@pytest.mark.parametrize(
    ("to", "scheme", "constraint"),
    [
        (CT, "NVFP4A16", "scale: layers that engines fuse must share NVFP4's second scale"),
        (CT, "FP8", "input_scale: fp8 tensor static inputs need a scale that calibration finds"),
        (GPTQ, "W8A8", "activations"),
        (AWQ, "W8A16", "bits"),
        (MXFP4, "MXFP4A16", "experts"),
    ],
)
def test_a_scheme_that_rounding_cannot_make_is_refused_with_the_reason(
    tmp_path, to, scheme, constraint
):
    error = refusal(EXAMPLE, tmp_path, to, requantize=True, scheme=scheme)
    assert constraint in error.message
    assert error.hint == "choose another --scheme"


def test_a_scheme_without_requantize_is_a_mistake(sample, tmp_path):
    with pytest.raises(UsageError) as caught:
        export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "out", scheme="W8A16")
    assert (caught.value.code, caught.value.hint) == ("E_SCHEME_UNUSED", "add --requantize")
