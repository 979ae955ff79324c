"""What inspect finds in the numbers themselves, beside another checkpoint, and in front of an
engine; and how the command shows it.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support import EXAMPLE

from qtool.checkpoint import open_checkpoint
from qtool.conversion import export
from qtool.errors import CheckpointRefused
from qtool.formats import WRITABLE, QuantizedModule, detect
from qtool.inspection import inspect, render
from qtool.scheme import SCHEMES, Scheme, Weights
from qtool.weight import QuantizedWeight, pack_pairs, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

NAME = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 32, 128


def stored(
    folder: Path, layers: dict[str, tuple[QuantizedWeight, Scheme]], **plain: torch.Tensor
) -> Path:
    """Write a compressed-tensors checkpoint of some layers and plain tensors."""
    folder.mkdir()
    modules = [
        QuantizedModule(name, scheme, weight.shape, {}) for name, (weight, scheme) in layers.items()
    ]
    written = {
        module.name: WRITABLE["compressed-tensors"].write(module, layers[module.name][0])
        for module in modules
    }
    tensors = {
        f"{name}.{suffix}": tensor.clone()
        for name, parts in written.items()
        for suffix, tensor in parts.items()
    }
    save_file(
        tensors | {name: tensor.clone() for name, tensor in plain.items()},
        folder / "model.safetensors",
    )
    own = (
        WRITABLE["compressed-tensors"].quantization_config(modules, [], None)["config.json"]
        if modules
        else {}
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **own}))
    return folder


def plain_model(folder: Path, **weights: torch.Tensor) -> Path:
    return stored(
        folder,
        {},
        **{f"model.layers.0.mlp.{kind}_proj.weight": weight for kind, weight in weights.items()},
    )


def random_weight(rows=ROWS, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def numbers(folder, name=NAME):
    return next(
        found
        for found in inspect(open_checkpoint(folder), deep=True).deep.modules
        if found.name == name
    )


def printed(found, **options):
    text = io.StringIO()
    Console(file=text, width=140).print(render(found, **options))
    return text.getvalue()


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
    count = len(list(folder.iterdir())) - 1
    assert (found.deep.digests, found.deep.changed, found.warnings) == (
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
    assert found.deep.digests == f"2 of {count} files are not those of the manifest"
    assert set(found.deep.changed) == {codes.file.name, "generation_config.json"}
    assert f"{codes.file.name} is not the file that the manifest describes" in found.warnings
    assert found.deep.digests in printed(found)


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
        for warning in found.warnings
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


# Beside another checkpoint


def against(folder, base):
    return inspect(open_checkpoint(folder), against=open_checkpoint(base)).against


def test_the_worst_layer_comes_first_and_equal_ones_last(tmp_path):
    weight = torch.ones(ROWS, COLUMNS)
    base = plain_model(tmp_path / "base", gate=weight, up=weight, down=weight)
    found = against(
        plain_model(tmp_path / "here", gate=weight * 1.01, up=weight, down=weight * 1.1), base
    )
    assert [one.name.rpartition(".")[2] for one in found.modules] == [
        "down_proj",
        "gate_proj",
        "up_proj",
    ]
    assert [one.sqnr_db for one in found.modules] == [
        pytest.approx(20, abs=0.01),
        pytest.approx(40, abs=0.01),
        None,
    ]
    assert [one.max_error for one in found.modules] == [
        pytest.approx(0.1, abs=1e-5),
        pytest.approx(0.01, abs=1e-5),
        0,
    ]
    assert not [one for one in found.modules if one.rescaled]


@pytest.mark.parametrize("scaled", ["columns", "rows", "both"])
def test_scaled_rows_and_columns_are_recognised_and_undone(tmp_path, scaled):
    weight, noise = (
        torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    columns, rows = torch.logspace(-0.5, 0.5, COLUMNS), torch.logspace(-0.5, 0.5, ROWS)[:, None]
    factors = {"columns": columns, "rows": rows, "both": columns * rows}[scaled]
    base, here = (
        plain_model(tmp_path / "base", up=weight),
        plain_model(tmp_path / "here", up=(weight + noise / 100) * factors),
    )
    (found,) = against(here, base).modules
    assert found.rescaled
    assert 37 < found.sqnr_db < 43
    assert "rows or columns rescaled" in printed(
        inspect(open_checkpoint(here), against=open_checkpoint(base))
    )


def test_another_weight_altogether_is_not_taken_for_a_rescaled_one(tmp_path):
    base, here = (
        plain_model(tmp_path / name, up=random_weight(seed=seed))
        for seed, name in enumerate(("base", "here"))
    )
    (found,) = against(here, base).modules
    assert (found.rescaled, found.sqnr_db < 0) == (False, True)


def test_the_factors_that_awq_folds_into_the_layer_before_are_undone(sample):
    found = against(sample("modelopt/INT4_AWQ"), EXAMPLE)
    assert min(one.sqnr_db for one in found.modules) > 15
    plain_rounding = against(sample("modelopt/INT4"), EXAMPLE)
    assert not [one for one in plain_rounding.modules if one.rescaled]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ct/W2A16", 1, 8),
        ("ct/W4A16", 17, 22),
        ("ct/NVFP4", 17, 22),
        ("ct/FP8_DYNAMIC", 29, 34),
        ("ct/W8A16", 42, 47),
    ],
)
def test_the_noise_of_a_scheme_is_what_its_bits_give(sample, name, low, high):
    found = against(sample(name), EXAMPLE)
    assert (len(found.modules), found.only_here, found.only_there) == (42, (), ())
    assert low < found.modules[0].sqnr_db <= found.modules[-1].sqnr_db < high


def test_two_quantized_checkpoints_are_compared_with_each_other(sample, tmp_path):
    export(sample("ct/W4A16"), to="awq", output=tmp_path / "awq")
    assert {one.sqnr_db for one in against(tmp_path / "awq", sample("ct/W4A16")).modules} == {None}
    text = printed(
        inspect(open_checkpoint(tmp_path / "awq"), against=open_checkpoint(sample("ct/W4A16")))
    )
    assert "all 42 layers equal those of" in " ".join(text.split())
    assert 17 < against(sample("ct/W8A16"), sample("ct/W4A16")).modules[0].sqnr_db < 22


def test_stacked_experts_are_compared_with_those_in_16_bits(tmp_path):
    experts = torch.randn(
        4, 64, 96, generator=torch.Generator().manual_seed(0)
    ).bfloat16()  # [experts, inputs, outputs]
    name, scheme = "model.layers.0.mlp.experts.gate_up_proj", SCHEMES["MXFP4A16"]
    weight = quantize(experts.transpose(1, 2).flatten(0, 1).contiguous(), scheme)
    packed = WRITABLE["mxfp4"].write(
        QuantizedModule(name, scheme, weight.shape, {}, experts=4), weight
    )
    base, here = (
        stored(tmp_path / "base", {}, **{name: experts}),
        stored(tmp_path / "here", {}, **{f"{name}{key}": part for key, part in packed.items()}),
    )
    (here / "config.json").write_text(
        json.dumps({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}})
    )
    (found,) = against(here, base).modules
    assert found.name == name
    assert 15 < found.sqnr_db < 20


def test_what_cannot_be_compared_is_refused(tmp_path):
    base = plain_model(
        tmp_path / "base", gate=torch.ones(ROWS, COLUMNS), up=torch.ones(ROWS, COLUMNS)
    )
    longer = plain_model(tmp_path / "longer", gate=torch.ones(ROWS + 1, COLUMNS))
    other = stored(
        tmp_path / "other", {}, **{"transformer.h.0.c_fc.weight": torch.ones(ROWS, COLUMNS)}
    )
    for folder, says in (
        (
            longer,
            r"`model\.layers\.0\.mlp\.gate_proj` is \[33, 128\] here and \[32, 128\] in the base",
        ),
        (other, "no linear layer"),
    ):
        with pytest.raises(CheckpointRefused, match=says) as caught:
            against(folder, base)
        assert caught.value.code == "E_NOT_COMPARABLE"


def test_layers_that_only_one_has_are_named(tmp_path):
    base = plain_model(
        tmp_path / "base", gate=torch.ones(ROWS, COLUMNS), up=torch.ones(ROWS, COLUMNS)
    )
    here = plain_model(
        tmp_path / "here", gate=torch.ones(ROWS, COLUMNS), down=torch.ones(ROWS, COLUMNS)
    )
    found = against(here, base)
    assert (found.only_here, found.only_there) == (
        ("model.layers.0.mlp.down_proj",),
        ("model.layers.0.mlp.up_proj",),
    )
    assert "only in the base: model.layers.0.mlp.up_proj" in printed(
        inspect(open_checkpoint(here), against=open_checkpoint(base))
    )


# The tree


def test_the_tree_joins_layers_that_are_alike_and_shows_the_one_that_is_not(tmp_path):
    four, eight = SCHEMES["W4A16"], Scheme(Weights("int8", "group", 128))
    layers = {
        f"model.layers.{number}.mlp.up_proj": eight if number == 2 else four for number in range(6)
    }
    folder = stored(
        tmp_path / "model",
        {name: (quantize(random_weight(), scheme), scheme) for name, scheme in layers.items()},
    )
    text = printed(inspect(open_checkpoint(folder)), modules=True)
    branches = [line.strip(" │├└─") for line in text[text.index("linear layers") :].splitlines()]
    assert [branch for branch in branches if re.match(r"\d", branch)] == ["0 to 1", "2", "3 to 5"]
    assert [branch.split("  ")[1] for branch in branches if branch.startswith("up_proj")] == [
        "W4A16",
        "W8A16",
        "W4A16",
    ]
    assert "32 x 128, 4.1" in text


def test_without_modules_there_is_no_tree_and_with_it_every_kind_is_there(sample):
    found = inspect(open_checkpoint(sample("gptq/dynamic")))
    assert "linear layers" not in printed(found)
    text = printed(found, modules=True)
    assert "0 to 1" in text
    assert re.search(r"down_proj +int8 g64", text)
    assert re.search(r"o_proj +16 bit", text)


# The command


def test_an_engine_that_cannot_load_it_gives_exit_code_3_and_the_whole_report(run_cli, sample):
    result = run_cli(
        "inspect",
        "--model-path",
        sample("gptq/desc_act"),
        "--engine",
        "vllm",
        "--gpu",
        "h100",
        "--json",
    )
    data = json.loads(result.stdout)
    assert (result.exit_code, data["format"], data["engine"]["loads"]) == (3, "gptq", False)
    assert [finding["code"] for finding in data["engine"]["findings"]] == ["E_ENGINE_GPTQ_ORDER"]
    assert result.stderr == ""


def test_an_engine_that_loads_it_gives_exit_code_0(run_cli, sample):
    result = run_cli(
        "inspect",
        "--model-path",
        sample("ct/W4A16"),
        "--engine",
        "sglang",
        "--gpu",
        "sm_90",
        "--tp",
        "2",
    )
    assert result.exit_code == 0, result.stderr
    assert re.search(r"SGLang .* on sm_90, tensor parallel 2: loads", result.stdout, re.IGNORECASE)


@pytest.mark.parametrize(
    "question", [["--gpu", "sm_90"], ["--tp", "2"], ["--engine-version", "0.33"]]
)
def test_a_question_to_an_engine_needs_its_name(run_cli, question):
    result = run_cli("inspect", "--model-path", EXAMPLE, *question)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_NO_ENGINE]" in result.stderr
    assert "--engine vllm" in result.stderr


def test_the_page_is_written_beside_what_is_printed(run_cli, sample, tmp_path):
    options = ["--deep", "--against", EXAMPLE, "--html", "report.html", "--json"]
    result = run_cli("inspect", "--model-path", sample("ct/mixed"), *options)
    data = json.loads(result.stdout)
    assert (result.exit_code, len(data["deep"]["modules"]), len(data["against"]["modules"])) == (
        0,
        36,
        42,
    )
    assert data["against"]["modules"][0]["sqnr_db"] < 22
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert all(part in page for part in ("model.layers.5.mlp.gate_proj", "FP8_DYNAMIC", "W4A16"))


def test_a_place_that_cannot_be_written_is_an_error_and_no_traceback(run_cli, sample):
    result = run_cli(
        "inspect", "--model-path", sample("ct/W4A16"), "--html", "no/such/folder/report.html"
    )
    assert result.exit_code == 4
    assert re.match(
        r"error\[E_OUTPUT_PLACE\]: no/such/folder/report\.html: cannot write there", result.stderr
    )


def test_a_base_of_another_shape_is_refused_by_the_command(run_cli, sample, tmp_path):
    plain_model(tmp_path / "base", up=torch.ones(3, 5))
    result = run_cli(
        "inspect", "--model-path", sample("ct/W4A16"), "--against", tmp_path / "base", "--json"
    )
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (3, "E_NOT_COMPARABLE")
