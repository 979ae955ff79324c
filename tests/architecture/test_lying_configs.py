"""A config that lies is refused by every command alike, before any weight is read.

`tests/benchmarks/lying_configs.py` makes every folder; some of each kind are made here.
"""

from __future__ import annotations

import os
import shutil

import pytest
from support.lying_configs import (
    LIES,
    MODELS,
    ODD,
    QUANTIZED,
    harmless_reason,
    make_bases,
    make_folder,
    reshape,
)

from qtool.cli.app import run
from qtool.errors import QtoolError

SAMPLE = [lie for lie in LIES if not harmless_reason(*lie)][::32]

TRUE = [*MODELS, *list(QUANTIZED)[::3]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def commands(base, folder):
    """The command lines that must agree on ``folder``."""
    place = ["--model-path", os.fspath(folder)]
    output = ["--output", os.fspath(folder.with_name("out"))]
    target = ["--to", "bf16"]
    if base in MODELS:
        target = ["--to", "compressed-tensors", "--requantize", "--scheme", "FP8_DYNAMIC"]
    return {
        "quantize": ["quantize", *place, *output, "--method", "modelopt_fp8", "--dry-run"],
        "export": ["export", *place, *output, *target, "--quiet"],
        "serve": ["serve", *place, "--device", "cpu", "--dry-run"],
        "inspect": ["inspect", *place, "--deep"],
    }


def outcome(command):
    """The exit code of a command and its error's, if that has a hint."""
    try:
        return run(command), ""
    except QtoolError as error:
        return error.exit_code, error.code if error.hint else f"{error.code} without a hint"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "change"),
    [*((base, lambda folder: None) for base in TRUE), *ODD.values()],
    ids=[*TRUE, *ODD],
)
def test_what_is_true_or_only_odd_is_accepted(base, change, bases, tmp_path):
    folder = make_folder(bases[base], tmp_path / "model", change)
    found = {name: outcome(command) for name, command in commands(base, folder).items()}
    if base in QUANTIZED:
        assert found.pop("quantize") == (3, "E_ALREADY_QUANTIZED")
    assert set(found.values()) == {(0, "")}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "name"), SAMPLE, ids=lambda part: str(part))
def test_a_lie_is_refused_by_every_command(base, name, bases, tmp_path):
    folder = make_folder(bases[base], tmp_path / "model", LIES[base, name])
    found = {name: outcome(command) for name, command in commands(base, folder).items()}
    shutil.rmtree(tmp_path)
    assert {code for code, _ in found.values()} == {3}, found
    assert not any("without" in code for _, code in found.values()), found


def test_an_expert_of_another_shape_is_named_with_both_shapes(bases, tmp_path):
    change = reshape("experts.2.up_proj.weight", lambda shape: [shape[0] * 2, shape[1] // 2])
    folder = make_folder(bases["mixture"], tmp_path / "model", change)
    with pytest.raises(QtoolError) as raised:
        run(commands("mixture", folder)["inspect"])
    assert raised.value.code == "E_TENSORS"
    for part in ("experts.2.up_proj", "[256, 64]", "experts.0.up_proj", "[128, 128]"):
        assert part in raised.value.message
