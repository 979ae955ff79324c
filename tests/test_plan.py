"""Plans: which module gets what, why another is left alone, what it costs, and which plans are
refused.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from qtool.backends import check_backend
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused, InputRefused, RecipeRefused
from qtool.plan import Plan, make_plan, sizes_by_kind
from qtool.recipe import Recipe, load_recipe, recipe_from
from qtool.scheme import SCHEMES, Weights


def recipe(scheme="W8A8", **fields) -> Recipe:
    return recipe_from(
        {"name": "made", "summary": "made", "backend": "llmcompressor", "scheme": scheme, **fields}
    )


def reasons(plan: Plan) -> dict[str, str]:
    return {module.name: module.reason for module in plan.left_alone}


def planned(plan: Plan) -> set[str]:
    return {module.name for module in plan.quantized}


@pytest.fixture
def tiny_plan(tiny_model):
    """A function that plans the tiny model."""
    return lambda scheme="W8A8", **fields: make_plan(
        open_checkpoint(tiny_model), recipe(scheme, **fields)
    )


@pytest.fixture
def plan_of(make_model):
    """A function that plans a model made of headers: tensors and config, then the recipe."""

    def plan_of(tensors, scheme="W8A8", *, config=None, **fields) -> Plan:
        return make_plan(
            open_checkpoint(make_model(tensors, **(config or {}))), recipe(scheme, **fields)
        )

    return plan_of


def refusal(plan, *arguments, **options) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        plan(*arguments, **options)
    assert caught.value.hint
    return caught.value


# The tiny model


def test_every_projection_of_the_tiny_model_is_planned_and_nothing_else(tiny_plan):
    plan = tiny_plan()
    names = [
        f"model.layers.{layer}.{part}"
        for layer in range(6)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ]
    assert len(plan.modules) == len(plan.quantized) == 42
    assert set(names) <= planned(plan)
    assert {module.shape for module in plan.modules if module.name.endswith("down_proj")} == {
        (256, 768)
    }
    assert plan.layer_count == 6


def test_bytes_of_the_tiny_model_are_those_of_its_tensors(tiny_plan):
    plan = tiny_plan("W4A16")
    weights = sum(rows * columns for rows, columns in (module.shape for module in plan.modules))
    assert plan.bytes_before == open_checkpoint(plan.checkpoint.path).size_bytes
    assert plan.bytes_before - plan.bytes_after == weights * 2 - (weights // 2 + weights // 128 * 2)
    assert plan.layer_bytes == sum(
        t.size_bytes
        for name, t in plan.checkpoint.tensors.items()
        if name.startswith("model.layers.0.")
    )


def test_a_plan_is_plain_data_for_json(tiny_plan):
    data = json.loads(json.dumps(tiny_plan("W4A16", ignore=["o_proj"]).to_dict()))
    found = {
        module["name"]: (module["scheme"], module["reason"], module["shape"])
        for module in data["modules"]
    }
    assert found["model.layers.3.mlp.up_proj"] == ("W4A16", "", [768, 256])
    assert found["model.layers.3.self_attn.o_proj"] == (None, "ignored by the recipe", [256, 256])
    assert recipe_from(data["recipe"]) == recipe("W4A16", ignore=["o_proj"])


def test_sizes_by_kind_count_modules_of_one_name_and_fate_together(tiny_plan):
    table = sizes_by_kind(
        tiny_plan(
            "W4A16",
            rules=[{"modules": "layers.0.mlp.down_proj", "scheme": "W8A16"}],
            ignore=["v_proj"],
        )
    )
    assert table["down_proj", "W8A16"] == (1, 256 * 768 * 2, 256 * 768 + 256 * 6 * 2)
    assert table["down_proj", "W4A16"][0] == 5
    assert table["v_proj", "16 bit: ignored by the recipe"] == (
        6,
        6 * 128 * 256 * 2,
        6 * 128 * 256 * 2,
    )


def test_memory_grows_with_the_samples_only_when_there_are_any(tiny_model):
    checkpoint = open_checkpoint(tiny_model)
    blind, seeing = (
        make_plan(checkpoint, load_recipe("rtn_int4")),
        make_plan(checkpoint, load_recipe("gptq_int4")),
    )
    assert blind.peak_memory(512, 2048) == blind.peak_memory(1, 16)
    whole, by_layer = seeing.peak_memory(512, 2048)
    assert whole - by_layer == checkpoint.size_bytes
    assert by_layer - seeing.peak_memory(0, 0)[1] == 2 * 2 * 512 * 2048 * 256


# Rules, patterns, the head


def test_ignore_comes_before_rules_and_the_first_rule_that_matches_counts(tiny_plan):
    rules = [
        {"modules": "re:.*layers\\.[01]\\..*", "scheme": "W8A16"},
        {"modules": "down_proj", "scheme": None},
        {"modules": "*_proj", "scheme": "W8A8"},
    ]
    plan = tiny_plan("W4A16", rules=rules, ignore=["layers.0.mlp.*"])
    fate = {module.name: module.scheme and module.scheme.name for module in plan.modules}
    assert fate["model.layers.0.mlp.down_proj"] is None
    assert fate["model.layers.1.mlp.down_proj"] == "W8A16"
    assert fate["model.layers.2.mlp.down_proj"] is None
    assert fate["model.layers.2.mlp.up_proj"] == "W8A8"
    assert reasons(plan)["model.layers.2.mlp.down_proj"] == "left alone by the rule `down_proj`"


def test_rules_alone_are_enough(tiny_plan):
    plan = tiny_plan(None, rules=[{"modules": "mlp.*", "scheme": "W4A16"}])
    assert len(plan.quantized) == 18
    assert set(reasons(plan).values()) == {"the recipe has no weight scheme"}


@pytest.mark.parametrize("where", ["ignore", "rules"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(tiny_plan, where):
    fields = (
        {"ignore": ["donw_proj"]}
        if where == "ignore"
        else {"rules": [{"modules": "donw_proj", "scheme": "W8A8"}]}
    )
    error = refusal(tiny_plan, **fields)
    assert error.code == "E_PATTERN"
    assert "`down_proj`" in error.hint


def test_embeddings_and_norms_are_no_modules_to_match(tiny_plan):
    for name in ("model.embed_tokens", "input_layernorm"):
        assert refusal(tiny_plan, ignore=[name]).code == "E_PATTERN"


def test_a_tied_head_may_be_ignored_and_cannot_be_quantized(tiny_plan):
    assert len(tiny_plan(ignore=["lm_head"]).quantized) == 42
    assert refusal(tiny_plan, lm_head=True).code == "E_TIED_HEAD"
    assert refusal(tiny_plan, rules=[{"modules": "lm_head", "scheme": "W8A8"}]).code == "E_PATTERN"


HEADED = {
    "model.embed_tokens.weight": (512, 128),
    "model.layers.0.mlp.up_proj.weight": (256, 128),
    "lm_head.weight": (512, 128),
}


def test_a_head_is_left_alone_unless_the_recipe_wants_it(plan_of, make_model):
    plan = plan_of(HEADED)
    assert reasons(plan) == {"lm_head": "output head (`lm_head: true` quantizes it)"}
    assert planned(make_plan(plan.checkpoint, recipe(lm_head=True))) == {
        "model.layers.0.mlp.up_proj",
        "lm_head",
    }
    assert planned(
        make_plan(plan.checkpoint, recipe(rules=[{"modules": "lm_head", "scheme": "W8A16"}]))
    ) == {"model.layers.0.mlp.up_proj", "lm_head"}


def test_a_tied_head_that_is_stored_all_the_same_stays_tied(plan_of):
    plan = plan_of(
        HEADED, config={"tie_word_embeddings": True}, rules=[{"modules": "*", "scheme": "W8A8"}]
    )
    assert reasons(plan) == {"lm_head": "tied to the embeddings"}


@pytest.mark.parametrize("head", ["embed_out", "output", "score"])
def test_a_head_of_another_name_is_a_head(plan_of, head):
    plan = plan_of({"layers.0.dense.weight": (128, 128), f"{head}.weight": (512, 128)})
    assert planned(plan) == {"layers.0.dense"}
    assert head in reasons(plan)


# Other models


@pytest.mark.parametrize(
    "name",
    [
        *(
            "model.embed_tokens",
            "transformer.word_embeddings",
            "model.tok_embeddings",
            "transformer.wte",
            "transformer.wpe",
            "embeddings.token_type_embeddings",
        ),
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ],
)
def test_embeddings_of_any_name_are_no_linear_modules(plan_of, name):
    plan = plan_of({f"{name}.weight": (512, 128), "layers.0.dense.weight": (128, 128)})
    assert [module.name for module in plan.modules] == ["layers.0.dense"]


@pytest.fixture
def mixture(tmp_path):
    """A small mixture of experts with real tensors in two shards."""
    torch.manual_seed(0)
    path = tmp_path / "mixture"
    path.mkdir()
    layer = "model.layers.0."
    shards = [
        {
            "model.embed_tokens.weight": (64, 128),
            layer + "self_attn.q_proj.weight": (128, 128),
            layer + "mlp.gate.weight": (4, 128),
        },
        {
            f"{layer}mlp.experts.{expert}.{name}.weight": (256, 128)
            for expert in range(4)
            for name in ("gate_proj", "up_proj")
        }
        | {
            f"{layer}mlp.shared_expert.up_proj.weight": (256, 128),
            f"{layer}mlp.shared_expert_gate.weight": (1, 128),
            "lm_head.weight": (64, 128),
        },
    ]
    for number, shard in enumerate(shards):
        save_file(
            {name: torch.randn(shape).bfloat16() for name, shape in shard.items()},
            path / f"model-{number}.safetensors",
        )
    index = {
        "weight_map": {
            name: f"model-{number}.safetensors"
            for number, shard in enumerate(shards)
            for name in shard
        }
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_moe", "num_hidden_layers": 1, "hidden_size": 128})
    )
    return path


def test_experts_are_planned_and_their_routers_left_alone(mixture):
    plan = make_plan(open_checkpoint(mixture), recipe("W4A16"))
    assert len(plan.quantized) == 8 + 1 + 1
    assert {name.rpartition(".")[2]: reason for name, reason in reasons(plan).items()} == {
        "gate": "router of experts",
        "shared_expert_gate": "router of experts",
        "lm_head": "output head (`lm_head: true` quantizes it)",
    }
    assert plan.layer_bytes == sum(
        t.size_bytes
        for name, t in plan.checkpoint.tensors.items()
        if name.startswith("model.layers.")
    )


def test_a_rule_by_expert_reaches_only_that_expert(mixture):
    plan = make_plan(
        open_checkpoint(mixture),
        recipe("W4A16", rules=[{"modules": "experts.2.*", "scheme": "W8A16"}]),
    )
    assert [module.name for module in plan.quantized if module.scheme == SCHEMES["W8A16"]] == [
        f"model.layers.0.mlp.experts.2.{name}" for name in ("gate_proj", "up_proj")
    ]


VISION = {
    "model.visual.patch_embed.proj.weight": (128, 3, 14, 14),
    "model.visual.blocks.0.attn.qkv.weight": (384, 128),
    "model.visual.merger.mlp.0.weight": (128, 128),
    "model.language_model.embed_tokens.weight": (512, 128),
    "model.language_model.layers.0.self_attn.q_proj.weight": (128, 128),
    "model.language_model.layers.0.input_layernorm.weight": (128,),
    "model.multi_modal_projector.linear_1.weight": (128, 128),
    "audio_tower.layers.0.fc1.weight": (128, 128),
    "mtp.layers.0.mlp.up_proj.weight": (128, 128),
    "lm_head.weight": (512, 128),
}


def test_only_the_language_model_of_a_multimodal_model_is_planned(plan_of):
    config = {
        "model_type": "qwen2_5_vl",
        "text_config": {"num_hidden_layers": 1, "hidden_size": 128},
    }
    plan = plan_of(VISION, config=config)
    assert planned(plan) == {"model.language_model.layers.0.self_attn.q_proj"}
    assert set(reasons(plan).values()) == {
        "not part of the language model",
        "output head (`lm_head: true` quantizes it)",
    }
    assert len(reasons(plan)) == 6
    assert plan.layer_count == 1


def test_a_rule_reaches_what_is_left_alone_by_default(plan_of):
    assert "model.visual.blocks.0.attn.qkv" in planned(
        plan_of(VISION, rules=[{"modules": "attn.qkv", "scheme": "W8A8"}])
    )


def test_transposed_projections_are_left_alone(plan_of):
    error = refusal(
        plan_of,
        {"h.0.attn.c_attn.weight": (128, 384), "h.0.mlp.c_fc.weight": (128, 512)},
        config={"model_type": "gpt2"},
    )
    assert error.code == "E_NOTHING_TO_DO"
    assert "2 x Conv1D, not Linear" in error.message


@pytest.mark.parametrize("dtype", ["I32", "F8_E4M3", "U8"])
def test_matrices_that_are_not_of_16_or_32_bit_floats_are_no_linear_modules(make_model, dtype):
    checkpoint = open_checkpoint(make_model({"layers.0.dense.weight": (128, 128)}, dtype=dtype))
    assert refusal(make_plan, checkpoint, recipe()).code == "E_NOTHING_TO_DO"


def test_a_config_without_numbers_is_no_obstacle(plan_of):
    names = ("num_hidden_layers", "hidden_size", "model_type", "tie_word_embeddings")
    plan = plan_of(
        {"layers.0.dense.weight": (128, 128), "lm_head.weight": (512, 128)},
        config=dict.fromkeys(names),
        lm_head=True,
    )
    assert plan.layer_count == 0
    assert plan.peak_memory(1, 16)[0] > 0


# Groups, blocks, stored bytes


def test_groups_that_do_not_divide_are_refused_with_one_that_does(plan_of):
    error = refusal(
        plan_of, {"layers.0.a.weight": (64, 256), "layers.0.b.weight": (64, 96)}, "W4A16"
    )
    assert error.code == "E_GROUP_SIZE"
    assert "128 does not divide the 96 inputs of `layers.0.b`" in error.message
    assert "--group-size 32" in error.hint


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4", "MXFP4"])
def test_groups_that_nothing_divides_and_groups_of_fixed_size_are_left_out(plan_of, scheme):
    error = refusal(plan_of, {"layers.0.a.weight": (64, 56)}, scheme)
    assert error.code == "E_GROUP_SIZE"
    assert error.hint == "leave the module out with --ignore"


def test_a_module_whose_groups_do_not_divide_may_be_ignored_or_ruled(plan_of):
    tensors = {"layers.0.a.weight": (64, 256), "layers.0.b.weight": (64, 96)}
    plan = plan_of(tensors, "W4A16", ignore=["b"])
    assert planned(plan) == {"layers.0.a"}
    assert planned(
        make_plan(
            plan.checkpoint, recipe("W4A16", rules=[{"modules": "b", "scheme": "W8A16_CHANNEL"}])
        )
    ) == {"layers.0.a", "layers.0.b"}


def test_every_candidate_of_a_search_must_fit(plan_of):
    algorithm = [{"auto": {"effective_bits": 6, "candidates": ["FP8", "W4A16"]}}]
    error = refusal(
        plan_of, {"layers.0.a.weight": (64, 96)}, "FP8", backend="modelopt", algorithm=algorithm
    )
    assert error.code == "E_GROUP_SIZE"


# scheme -> bytes of a weight of [256, 512], codes and scales and zero points and global scale
STORED = {
    "FP8": 256 * 512 + 2,
    "FP8_DYNAMIC": 256 * 512 + 256 * 2,
    "FP8_BLOCK": 256 * 512 + 2 * 4 * 2,
    "W8A8": 256 * 512 + 256 * 2,
    "W4A16": 256 * 256 + 256 * 4 * 2,
    "W4A16_ASYM": 256 * 256 + 256 * 4 * 2 + 256 * 4 // 2,
    "W3A16": 256 * 512 * 3 // 8 + 256 * 4 * 2,
    "NVFP4": 256 * 256 + 256 * 32 + 4,
    "MXFP4": 256 * 256 + 256 * 16,
    "MXFP8": 256 * 512 + 256 * 16,
}


@pytest.mark.parametrize(("scheme", "size"), STORED.items())
def test_bytes_after_are_codes_scales_and_zero_points(plan_of, scheme, size):
    plan = plan_of({"layers.0.a.weight": (256, 512), "norm.weight": (512,)}, scheme)
    assert plan.bytes_after == size + 512 * 2


@pytest.mark.parametrize(("name", "stored"), [("w4a8_int8", "int8"), ("w4afp8", "int4")])
def test_llm_compressor_stores_4_bit_weights_with_int8_inputs_at_8_bits(tiny_model, name, stored):
    plan = make_plan(open_checkpoint(tiny_model), load_recipe(name))
    assert plan.recipe.scheme.weights.bits == 4
    expected = Weights(stored, "group", 128)
    assert {module.bytes_after for module in plan.quantized} == {
        expected.size_bytes(*shape) for shape in {module.shape for module in plan.quantized}
    }


# Refusals


@pytest.mark.parametrize(
    ("files", "config", "method"),
    [
        ({}, {"quantization_config": {"quant_method": "gptq"}}, "by `gptq`"),
        ({}, {"quantization_config": {}}, "its config says so"),
        (
            {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {}}},
            {},
            "by `modelopt`",
        ),
        ({"hf_quant_config.json": {"producer": "someone"}}, {}, "by `someone`"),
        ({"hf_quant_config.json": {"producer": None}}, {}, "its config says so"),
    ],
)
def test_a_model_that_is_quantized_already_is_refused(make_model, files, config, method):
    path = make_model({"layers.0.a.weight": (128, 128)}, **config)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointRefused, match="quantized already") as caught:
        make_plan(open_checkpoint(path), recipe())
    assert method in caught.value.message
    assert "16-bit model" in caught.value.hint


def test_nothing_to_do_says_why(tiny_plan):
    error = refusal(tiny_plan, ignore=["self_attn.*"], rules=[{"modules": "mlp.*", "scheme": None}])
    assert error.code == "E_NOTHING_TO_DO"
    assert "24 x ignored by the recipe; 18 x left alone by the rule `mlp.*`" in error.message


def test_a_model_without_linear_modules_is_nothing_to_do(plan_of):
    error = refusal(
        plan_of,
        {
            "model.embed_tokens.weight": (512, 128),
            "norm.weight": (128,),
            "weight": (128, 128),
            ".weight": (128,),
        },
    )
    assert "no linear module was found" in error.message


def test_scales_for_the_cache_are_something_to_do(tiny_plan):
    plan = tiny_plan(None, kv_cache="fp8")
    assert plan.quantized == ()
    assert plan.bytes_after == plan.bytes_before


def test_a_backend_that_cannot_run_a_plan_names_one_that_can(tiny_plan):
    with pytest.raises(RecipeRefused) as caught:
        check_backend(tiny_plan("W8A8", backend="gptqmodel"))
    assert caught.value.code == "E_BACKEND_REFUSES"
    assert "--backend llmcompressor can run it" in caught.value.hint
    with pytest.raises(RecipeRefused, match="no algorithm") as caught:
        check_backend(tiny_plan("FP8", algorithm=["gptq", "awq"]))
    assert "no backend can run" in caught.value.hint
