"""Names of tensors and modules are taken apart in one place."""

from __future__ import annotations

import pytest

from qtool.modules import (
    CacheScale,
    decoder_layer_number,
    expert_stack,
    is_expert,
    is_head,
    is_router,
    layer_name,
    layer_number,
    parse_cache_scale,
    tower_of,
)

ATTENTION = "model.layers.3.self_attn"
CACHE_SCALES = {
    f"{ATTENTION}.k_scale": CacheScale(ATTENTION, "k", "scale"),
    f"{ATTENTION}.q_scale": CacheScale(ATTENTION, "q", "scale"),
    f"{ATTENTION}.kv_scale": CacheScale(ATTENTION, "kv", "scale"),
    f"{ATTENTION}.attn.v_scale": CacheScale(ATTENTION, "v", "scale", on_attn=True),
    f"{ATTENTION}.k_proj.k_scale": CacheScale(ATTENTION, "k", "proj.scale"),
    f"{ATTENTION}.v_proj.output_scale": CacheScale(ATTENTION, "v", "proj.output_scale"),
    f"{ATTENTION}.q_proj.output_scale": CacheScale(ATTENTION, "q", "proj.output_scale"),
}


@pytest.mark.parametrize("name", CACHE_SCALES)
def test_each_spelling_of_a_cache_scale_is_known(name):
    assert parse_cache_scale(name) == CACHE_SCALES[name]


@pytest.mark.parametrize(
    "name",
    [
        "k_scale",
        f"{ATTENTION}.k_proj.weight_scale",
        f"{ATTENTION}.o_proj.output_scale",
        f"{ATTENTION}.k_bias",
    ],
)
def test_other_scales_are_no_cache_scales(name):
    assert parse_cache_scale(name) is None


def test_layers_are_counted_where_names_say_so():
    assert layer_number("visual.blocks.7.attn.qkv") == 7
    assert decoder_layer_number("visual.blocks.7.attn.qkv") is None
    assert decoder_layer_number("model.layers.12.mlp.experts.3.w1") == 12
    assert layer_name("model.layers.12.mlp.experts.3.w1") == "model.layers.12"
    assert (layer_number("lm_head"), layer_name("lm_head")) == (None, "")


def test_roles_follow_from_the_parts_of_a_name():
    assert is_head("lm_head") and not is_head("lm_head.adapter")
    assert is_router("model.layers.0.mlp.gate") and is_router("model.layers.0.router.layer")
    assert not is_router("model.layers.0.mlp.gate_proj")
    assert tower_of("model.visual.blocks.0.mlp.fc1") == "visual"
    assert tower_of("model.layers.0.mlp.up_proj") == ""
    assert expert_stack("model.layers.0.mlp.experts.5.up_proj") == "model.layers.0.mlp.experts"
    assert not is_expert("model.layers.0.mlp.shared_expert.up_proj")
