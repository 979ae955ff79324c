"""The configs that a conversion writes."""

from __future__ import annotations

import json
import re

import pytest
from support.conversion import (
    AWQ,
    CT,
    GPTQ,
    MODELOPT,
    edit,
)

from qtool.checkpoint import open_checkpoint
from qtool.conversion import export
from qtool.formats import detect

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]


def matching(dynamic, name):
    """What the engines take from ``dynamic`` for a module: the first pattern that matches, skips
    first. Source: vLLM 0.33, `gptq_utils.py`.
    """
    for pattern, options in dynamic.items():
        if re.match(pattern[2:], name):
            return False if pattern.startswith("-:") else options
    return {}


def test_dynamic_patterns_select_exactly_the_layers_they_are_meant_for(sample, tmp_path):
    export(sample("gptq/dynamic"), to=GPTQ, output=tmp_path / "out")
    dynamic = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    modules = detect(open_checkpoint(tmp_path / "out")).modules
    for layer in range(2):
        for kind in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ):
            name = f"model.layers.{layer}.{kind}"
            found = matching(dynamic, name)
            if name not in modules:
                assert (kind, found) == ("self_attn.o_proj", False)
            else:
                own = modules[name].scheme.weights
                assert (found.get("bits", 4), found.get("group_size", 128)) == (
                    own.bits,
                    own.group_size,
                )
        assert (
            matching(dynamic, f"model.layers.{layer}.self_attn.qkv_proj")
            == matching(dynamic, f"model.layers.{layer}.mlp.gate_up_proj")
            == {}
        )


@pytest.mark.exhaustive
def test_dynamic_patterns_also_name_the_layers_that_engines_fuse(sample, tmp_path):
    export(sample("ct/mixed"), to=GPTQ, output=tmp_path / "out", requantize=True)
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    fused = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    found = {name: matching(config["dynamic"], f"model.layers.5.{name}") for name in fused}
    assert [own and {**config, **own}["bits"] for own in found.values() if own != {}] == [4, False]
    assert (config["bits"], found["self_attn.qkv_proj"], found["self_attn.o_proj"]) == (8, {}, {})


@pytest.mark.parametrize(
    ("to", "where"), [(CT, "ignore"), (MODELOPT, "ignore"), (AWQ, "modules_to_not_convert")]
)
def test_a_head_tied_to_the_embeddings_is_named_as_left_in_16_bits(sample, tmp_path, to, where):
    assert "lm_head.weight" not in open_checkpoint(sample("gptq/rtn4")).tensors
    export(sample("gptq/rtn4"), to=to, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config[where] == ["lm_head"]


def test_config_keys_are_kept_and_only_the_quantization_is_replaced(copy, tmp_path):
    source = edit(
        copy("ct/W4A16"),
        config=lambda config: config.update(
            a_key_of_its_own=[1, {"x": 2}], compression_config={"old": 1}
        ),
    )
    before = json.loads((source / "config.json").read_text())
    for to in (GPTQ, "bf16"):
        export(source, to=to, output=tmp_path / to)
        after = json.loads((tmp_path / to / "config.json").read_text())
        assert {key: value for key, value in after.items() if key != "quantization_config"} == {
            key: value
            for key, value in before.items()
            if key not in ("quantization_config", "compression_config")
        }
        assert after.get("quantization_config", {}).get("quant_method") == (
            GPTQ if to == GPTQ else None
        )
    assert not (tmp_path / "bf16" / "quantize_config.json").exists()
