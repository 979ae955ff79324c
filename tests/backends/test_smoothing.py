"""What AWQ and SmoothQuant may scale against each other."""

from __future__ import annotations

import pytest
from support.small_models import publish

from qtool.architecture import map_names
from qtool.backends.smoothing import awq_pairs
from qtool.checkpoint import open_checkpoint
from qtool.plan import make_plan
from qtool.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]
LAYER = "model.layers.1"
EXPERTS = r"re:model\.layers\.1\.mlp\.experts\.\d+"


def mappings(model, folder, **changes):
    path, loaded = publish(model, folder / model)
    checkpoint = open_checkpoint(path)
    recipe = load_recipe("fp8_dynamic").changed(**changes)
    plan = make_plan(checkpoint, recipe, map_names(checkpoint))
    return {each.smooth: each.balance for each in awq_pairs(plan, loaded)}


def test_every_reader_of_a_norm_is_scaled_routers_and_shared_experts_included(tmp_path):
    found = mappings("qwen2_moe", tmp_path)
    block = f"{LAYER}.mlp"
    assert {name: found[name] for name in found if LAYER in name or EXPERTS[:20] in name} == {
        f"{LAYER}.input_layernorm": tuple(f"{LAYER}.self_attn.{kind}_proj" for kind in "qkv"),
        f"{LAYER}.post_attention_layernorm": (
            f"{block}.gate",
            f"{block}.shared_expert_gate",
            f"{block}.shared_expert.gate_proj",
            f"{block}.shared_expert.up_proj",
            rf"{EXPERTS}\.(gate|up)_proj$",
        ),
        f"{LAYER}.self_attn.v_proj": (f"{LAYER}.self_attn.o_proj",),
        f"{block}.shared_expert.up_proj": (f"{block}.shared_expert.down_proj",),
        rf"{EXPERTS}\.up_proj$": (rf"{EXPERTS}\.down_proj$",),
    }


def test_a_norm_stays_that_experts_read_in_another_way_and_towers_are_left_alone(tmp_path):
    found = mappings("llama4", tmp_path)
    assert not any("post_attention" in name or "vision" in name for name in found)
    experts = r"re:language_model\.model\.layers\.1\.feed_forward\.experts\.\d+\.up_proj$"
    assert experts in found


def test_what_a_clamp_or_an_offset_follows_is_not_scaled(tmp_path):
    found = mappings("gpt_oss", tmp_path)
    assert not any("experts" in name for name in found)
    assert f"{LAYER}.self_attn.v_proj" in found
