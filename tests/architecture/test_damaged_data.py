"""Weights and scales that are NaN or infinite: `inspect --deep` ends with 3, and `load` too."""

from __future__ import annotations

import os

import pytest
from support.lying_configs import filled, make_bases, make_folder

from qtool import load
from qtool.cli.app import run
from qtool.errors import CheckpointRefused

NAN_16, NAN_32 = b"\xc0\x7f", b"\0\0\xc0\x7f"
DAMAGE = {  # base, end of a tensor's name, bytes at its start
    "weight NaN": ("llama", "q_proj.weight", NAN_16),
    "norm infinite": ("llama", "model.norm.weight", b"\x80\x7f"),
    "code NaN": ("ct-fp8", "q_proj.weight", b"\x7f"),
    "code minus NaN": ("modelopt-fp8", "q_proj.weight", b"\xff"),
    "block code NaN": ("fp8-block", "q_proj.weight", b"\x7f"),
    "scale NaN": ("ct-int4", "q_proj.weight_scale", NAN_16),
    "scale infinite": ("gptq", "q_proj.scales", b"\x80\x7f"),
    "global scale zero": ("ct-nvfp4", "q_proj.weight_global_scale", bytes(4)),
    "MX scale NaN": ("ct-mxfp4", "q_proj.weight_scale", b"\xff"),
    "block scale NaN": ("ct-nvfp4", "q_proj.weight_scale", b"\x7f"),
    "global scale NaN": ("ct-nvfp4", "q_proj.weight_global_scale", NAN_32),
    "groups beyond": ("gptq", "q_proj.g_idx", b"\x09\0\0\0"),
    "expert NaN": ("mixture", "experts.1.up_proj.weight", NAN_16),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data_is_refused_by_inspect_and_by_load(case, bases, tmp_path):
    base, suffix, value = DAMAGE[case]
    folder = make_folder(bases[base], tmp_path / "model", filled(suffix, value))
    for read in (
        lambda: run(["inspect", "--model-path", os.fspath(folder), "--deep"]),
        lambda: load(folder, device="cpu"),
    ):
        with pytest.raises(CheckpointRefused, match=suffix.replace(".", r"\.")) as caught:
            read()
        assert caught.value.code in ("E_VALUES", "E_G_IDX")
        assert caught.value.hint
