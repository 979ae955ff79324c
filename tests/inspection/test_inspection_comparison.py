"""What `inspect --against` says of two checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from support import EXAMPLE
from support.small_checkpoints import (
    COLUMNS,
    ROWS,
    against,
    plain_model,
    printed,
    random_weight,
    stored,
)

from qtool.checkpoint import open_checkpoint
from qtool.conversion import export
from qtool.errors import CheckpointRefused
from qtool.formats import WRITABLE, QuantizedModule
from qtool.inspection import inspect
from qtool.scheme import SCHEMES
from qtool.weight import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]


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
