"""What `inspect --deep` finds in the data of a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.small_checkpoints import (
    COLUMNS,
    NAME,
    ROWS,
    against,
    printed,
    stored,
)

from qtool.checkpoint import open_checkpoint
from qtool.codes import pack_pairs
from qtool.conversion import export
from qtool.formats import detect
from qtool.inspection import inspect
from qtool.scheme import SCHEMES
from qtool.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]


def numbers(folder, name=NAME):
    return next(
        found
        for found in inspect(open_checkpoint(folder), deep=True).deep.modules
        if found.name == name
    )


def int4(codes):
    return pack_pairs((codes + 8).to(torch.uint8))


def int8(codes):
    return codes.to(torch.int8)


def fp8(codes):
    return codes.to(torch.float8_e4m3fn)


def fp4(codes):
    magnitudes = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return pack_pairs(
        (magnitudes == codes.abs()[..., None]).int().argmax(-1).to(torch.uint8)
        | (codes < 0).to(torch.uint8) << 3
    )


# The numbers


@pytest.mark.parametrize(
    ("scheme", "pack", "scale", "low", "top"),
    [
        (SCHEMES["W4A16"], int4, torch.full((ROWS, 1), 0.5), -8, 7),
        (SCHEMES["W8A16_CHANNEL"], int8, torch.full((ROWS, 1), 0.5), -128, 127),
        (SCHEMES["W3A16"], int8, torch.full((ROWS, 1), 0.5), -4, 3),
        (SCHEMES["FP8_W8A16"], fp8, torch.full((ROWS, 1), 0.5), -448, 448),
        (SCHEMES["MXFP8A16"], fp8, torch.full((ROWS, 4), 0.5).to(torch.float8_e8m0fnu), -448, 448),
        (SCHEMES["MXFP4A16"], fp4, torch.full((ROWS, 4), 0.5).to(torch.float8_e8m0fnu), -6, 6),
        (SCHEMES["NVFP4A16"], fp4, torch.full((ROWS, 8), 0.5).to(torch.float8_e4m3fn), -6, 6),
    ],
    ids=["W4A16", "W8A16", "W3A16", "FP8", "MXFP8", "MXFP4", "NVFP4"],
)
def test_saturated_codes_and_dead_channels_are_counted(tmp_path, scheme, pack, scale, low, top):
    codes = torch.ones(ROWS, COLUMNS)
    codes[0, :5] = torch.tensor([low, top, top, low, low]).float()
    codes[5], codes[9], codes[:, 7] = 0, 0, 0
    scale2 = torch.ones(ROWS) if scheme.weights.scale == "e4m3" else None
    found = numbers(
        stored(tmp_path / "model", {NAME: (QuantizedWeight(pack(codes), scale, scale2), scheme)})
    )
    assert (found.saturated, found.dead_rows, found.dead_columns) == (
        pytest.approx(5 / (ROWS * COLUMNS)),
        2,
        1,
    )
    assert (found.scale_min, found.scale_max, found.scale_histogram) == (
        0.5,
        0.5,
        ((-1, scale.numel()),),
    )


def test_with_a_zero_point_a_dead_channel_is_one_of_zero_points(tmp_path):
    codes, zero = torch.ones(ROWS, COLUMNS), torch.full((ROWS, 1), 3, dtype=torch.int8)
    codes[4], codes[6], codes[0, 0] = 3, 0, -8
    weight = QuantizedWeight(int4(codes), torch.ones(ROWS, 1), zero=zero)
    found = numbers(stored(tmp_path / "model", {NAME: (weight, SCHEMES["W4A16_ASYM"])}))
    assert (found.saturated, found.dead_rows, found.dead_columns) == (
        pytest.approx(1 / (ROWS * COLUMNS)),
        1,
        0,
    )


def test_the_histogram_is_of_the_effective_scale_of_both_levels(tmp_path):
    scale = torch.tensor([0.5, 1, 2, 3, 4, 96, 0, 448]).expand(ROWS, 8).to(torch.float8_e4m3fn)
    weight = QuantizedWeight(fp4(torch.ones(ROWS, COLUMNS)), scale, torch.full((ROWS,), 2.0**-6))
    found = numbers(stored(tmp_path / "model", {NAME: (weight, SCHEMES["NVFP4A16"])}))
    # and none for the scale of 0
    assert found.scale_histogram == (
        (-7, ROWS),
        (-6, ROWS),
        (-5, 2 * ROWS),
        (-4, ROWS),
        (0, ROWS),
        (2, ROWS),
    )
    assert (found.scale_min, found.scale_max) == (0, 7)


@pytest.mark.parametrize(
    "name",
    [
        "ct/W4A16",
        "ct/FP8_BLOCK",
        "ct/NVFP4",
        "ct/MXFP8",
        "ct/W8A8",
        "gptq/asym_v2",
        "gptq/desc_act",
        "modelopt/INT4_AWQ",
    ],
)
def test_the_histogram_holds_every_scale_of_a_real_checkpoint(sample, name):
    checkpoint = open_checkpoint(sample(name))
    layout = detect(checkpoint)
    for found in inspect(checkpoint, deep=True).deep.modules:
        module = layout.modules[found.name]
        assert sum(
            count for _, count in found.scale_histogram
        ) == module.scheme.weights.scale_count(*module.shape)
        assert (
            2.0 ** found.scale_histogram[0][0]
            <= found.scale_min
            <= found.scale_max
            < 2.0 ** (found.scale_histogram[-1][0] + 1)
        )
        assert (found.dead_rows, found.dead_columns, found.saturated < 0.2) == (0, 0, True)


def test_digests_match_until_one_byte_is_flipped_and_then_its_file_is_named(sample, tmp_path):
    folder = export(
        sample("ct/W4A16"), to="gptq", output=tmp_path / "out", max_shard_size="2MiB"
    ).output
    found = inspect(open_checkpoint(folder), deep=True)
    count = len({path.name for path in folder.iterdir()} - {"qtool-manifest.json", "README.md"})
    assert (found.deep.digests, found.deep.changed, found.damage) == (
        f"all {count} files match the manifest",
        (),
        (),
    )
    codes = open_checkpoint(folder).tensors["model.layers.3.mlp.up_proj.qweight"]
    with codes.file.open("r+b") as file:
        file.seek(codes.offset + 100)
        byte = file.read(1)[0]
        file.seek(codes.offset + 100)
        file.write(bytes([byte ^ 1]))
    (folder / "generation_config.json").unlink()
    found = inspect(open_checkpoint(folder), deep=True)
    assert found.deep.digests == "the files are not those of the manifest: 1 changed, 1 missing"
    assert set(found.deep.changed) == {codes.file.name, "generation_config.json"}
    assert f"{codes.file.name} is not the file that the manifest describes" in found.damage
    assert found.deep.digests in printed(found)
    assert printed(found).splitlines()[-1].startswith("damage: generation_config.json is in")


@pytest.fixture
def with_nan(sample, tmp_path):
    folder = Path(shutil.copytree(sample("ct/W4A16"), tmp_path / "bad"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight_scale"].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_bad_values_come_with_the_numbers(with_nan):
    found = inspect(open_checkpoint(with_nan), deep=True)
    assert [
        warning
        for warning in found.damage
        if "`model.layers.3.mlp.up_proj.weight_scale` holds NaN or infinity" in warning
    ]
    assert (len(found.deep.modules), found.deep.digests) == (
        42,
        "there is no manifest to compare the files with",
    )


def test_what_json_prints_of_a_nan_is_json(with_nan):
    json.dumps(
        inspect(open_checkpoint(with_nan), deep=True, against=open_checkpoint(EXAMPLE)).to_dict(),
        allow_nan=False,
    )


def test_a_layer_with_nan_is_the_worst(with_nan):
    assert against(with_nan, EXAMPLE).modules[0].name == "model.layers.3.mlp.up_proj"


def test_the_terminal_shows_the_most_saturated_first(sample):
    found = inspect(open_checkpoint(sample("ct/W2A16")), deep=True)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", printed(found))]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(
        100 * max(one.saturated for one in found.deep.modules), abs=0.01
    )
