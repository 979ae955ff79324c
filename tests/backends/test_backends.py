"""One contract for all backends, and one test for each silent trap of the libraries that would
otherwise reach the user.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.headers_only import HEAD, LAYER, plain, write

import qtool
from qtool.backends import BACKENDS, Job, Work, groups_of, load_backend, step_refusals
from qtool.checkpoint import open_checkpoint
from qtool.errors import BackendFailed, RecipeRefused, UsageError
from qtool.formats import QuantizedModule
from qtool.formats.compressed_tensors_config import Targets, quantization_config, weight_groups
from qtool.options import QuantizeOptions
from qtool.plan import make_plan
from qtool.quantization import prepare, verify
from qtool.recipe import BACKEND_NAMES, Gptq, catalogue, load_recipe

MODEL = EXAMPLE
DATA = str(MODEL / "calibration.jsonl")


def plan_for(method: str, **changes):
    return make_plan(open_checkpoint(MODEL), load_recipe(method).changed(**changes))


@pytest.mark.parametrize("method", catalogue())
def test_every_shipped_recipe_is_accepted_by_its_backend(method):
    plan = plan_for(method)
    assert load_backend(plan.recipe.backend).refusals(plan) == []


def test_every_backend_that_a_recipe_may_name_has_a_class():
    assert set(BACKENDS) == set(BACKEND_NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_says_no_without_importing_its_library(backend, run_python):
    code = f"""
        import sys
        from qtool.backends import load_backend
        from qtool.checkpoint import open_checkpoint
        from qtool.plan import make_plan
        from qtool.recipe import load_recipe
        from pathlib import Path
        plan = make_plan(open_checkpoint(Path({str(MODEL)!r})), load_recipe("w8a8_int8"))
        print(load_backend({backend!r}).refusals(plan))
        print({{"torch", "transformers", {backend!r}}} & set(sys.modules))
    """
    reasons, imported = run_python(code).splitlines()
    assert imported == "set()"
    assert (reasons == "[]") == (backend == "llmcompressor")


def test_a_refusal_names_a_backend_that_can():
    with pytest.raises(RecipeRefused) as caught:
        prepare(MODEL, QuantizeOptions(method="fp8_dynamic", backend="gptqmodel"))
    assert caught.value.code == "E_BACKEND_REFUSES"
    assert "--backend llmcompressor can run it" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "method", "reason"),
    [
        ({"is_encoder_decoder": True}, "w4a16_gptq", "follows an encoder"),
        ({"is_encoder_decoder": True}, "modelopt_fp8", "follows an encoder"),
        ({"is_encoder_decoder": True}, "fp8_dynamic", None),
        ({"model_type": "qwen2_audio"}, "awq_int4", "cannot cut the container"),
        ({"model_type": "qwen2_audio"}, "fp8_dynamic", None),
        ({"model_type": "kimi_linear"}, "modelopt_fp8", "joined"),
        ({"model_type": "dbrx"}, "modelopt_fp8", "exporter fails"),
    ],
)
def test_models_that_a_library_fails_on_are_refused_before_the_run(config, method, reason):
    plan = plan_for(method)
    plan.checkpoint.config.update(config)
    reasons = load_backend(plan.recipe.backend).refusals(plan)
    assert reasons == [] if reason is None else any(reason in each for each in reasons)


def test_a_chain_of_steps_no_backend_knows_is_refused():
    assert step_refusals(plan_for("gptq_int4", algorithm=["gptq", "awq"]), {("gptq",)}) == [
        "it has no algorithm `gptq + awq`"
    ]


def test_groups_name_whole_kinds_and_the_fused_layers_of_engines():
    plan = plan_for(
        "w4a16_gptq", ignore=["q_proj", "k_proj", "v_proj", "model.layers.2.mlp.up_proj"]
    )
    groups = {
        group.scheme: group for group in groups_of(plan, [module.name for module in plan.modules])
    }
    assert groups[None].patterns == (
        r"(?:.*\.)?(k_proj|q_proj|v_proj|qkv_proj)$",
        r"model\.layers\.2\.mlp\.up_proj$",
    )
    assert r"model\.layers\.0\.mlp\.up_proj$" in groups[plan.recipe.scheme].patterns


def test_batches_never_mix_lengths():
    work = Work(
        Job("", {}, "", "", "cpu", None),
        plan_for("fp8_static"),
        [[1, 2], [3], [4, 5]],
        "cpu",
        report=None,
    )
    assert [{len(sample) for sample in batch} for batch in work.batches()] == [{2}, {2}, {1}]


@pytest.fixture
def spoilt(quantized_model, tmp_path):
    """Copy the good checkpoint and change its tensors."""

    def change(edit) -> Path:
        folder = tmp_path / "spoilt"
        shutil.copytree(quantized_model, folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return change


def problem(folder: Path, method: str = "fp8_dynamic", **changes) -> str:
    with pytest.raises(BackendFailed) as caught:
        verify(plan_for(method, **changes), folder)
    assert caught.value.code == "E_VERIFY"
    return caught.value.message


def test_a_good_checkpoint_passes(quantized_model):
    verify(plan_for("fp8_dynamic"), quantized_model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_its_own_is_right_where_the_config_says_that_it_is_not_tied(
    tied, quantized_model, tmp_path
):
    folder = tmp_path / "untied"
    shutil.copytree(quantized_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    if tied:
        assert "`lm_head.weight` is not a tensor of the source" in problem(folder)
    else:
        verify(plan_for("fp8_dynamic"), folder)


def test_trap_nothing_was_quantized_without_an_error(tmp_path):
    shutil.copytree(MODEL, tmp_path / "plain")
    assert "was left in 16 bits" in problem(tmp_path / "plain")


def test_trap_embeddings_were_quantized_too(spoilt):
    def quantize_embeddings(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(
            torch.float8_e4m3fn
        )
        tensors["model.embed_tokens.weight_scale"] = torch.ones(4096, 1, dtype=torch.bfloat16)

    assert "`model.embed_tokens`" in problem(spoilt(quantize_embeddings))


def test_trap_an_ignored_module_was_quantized_all_the_same(quantized_model):
    assert "was to be left alone (ignored by the recipe)" in problem(
        quantized_model, ignore=["model.layers.3.mlp.up_proj"]
    )


def test_trap_another_scheme_was_written(quantized_model):
    assert "was to become FP8_BLOCK and is FP8_DYNAMIC" in problem(
        quantized_model, method="fp8_block"
    )


def test_trap_static_scales_are_missing_when_no_data_was_seen(quantized_model):
    assert "was to become FP8 and is" in problem(quantized_model, method="fp8_static")


def test_trap_a_scale_is_nan_infinite_or_negative(spoilt):
    for value in (float("nan"), float("inf"), -1.0):

        def spoil(tensors, value=value):
            tensors["model.layers.1.mlp.up_proj.weight_scale"][5] = value

        folder = spoilt(spoil)
        assert "`model.layers.1.mlp.up_proj.weight_scale`" in problem(folder)
        shutil.rmtree(folder)


def test_trap_kv_cache_scales_are_missing(quantized_model):
    assert "the KV cache is None, not fp8" in problem(quantized_model, kv_cache="fp8")


@pytest.mark.parametrize(
    "method", [recipe.name for recipe in catalogue().values() if recipe.needs_data]
)
def test_trap_a_method_that_needs_data_never_runs_without(method):
    with pytest.raises(UsageError) as caught:
        prepare(MODEL, QuantizeOptions(method=method))
    assert caught.value.code == "E_NEEDS_DATA"


def test_trap_w4a8_of_llm_compressor_is_stored_at_eight_bits():
    plan, packed = plan_for("w4a8_int8"), plan_for("w4a16_gptq")
    eight = plan_for("w8a16_int8")
    assert plan.bytes_after == pytest.approx(eight.bytes_after, rel=0.001)
    assert plan.bytes_after > 1.4 * packed.bytes_after


@pytest.mark.exhaustive
@pytest.mark.slow
def test_trap_actorder_without_groups_is_not_written(two_layers, tmp_path):
    options = {"calibration": DATA, "num_samples": 2, "seq_len": 64, "device": "cpu"}
    output = qtool.quantize(
        two_layers, method="w8a8_int8", output=tmp_path / "out", **options
    ).output
    for group in json.loads((output / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values():
        assert group["weights"]["actorder"] is None


def test_gptqmodel_gets_two_workers_on_any_machine():
    environment = load_backend("gptqmodel").environment(plan_for("gptq_int4"), "cpu")
    assert int(environment["GPTQMODEL_CPU_WORKERS"]) >= 2
    assert environment["GPTQMODEL_DISABLE_PACK_EXT"] == "1"
    assert "HF_HOME" in environment


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [name for name, recipe in catalogue().items() if recipe.backend == "gptqmodel"]
)
def test_gptqmodel_orders_groups_only_where_there_are_some(method, tmp_path):
    from qtool.backends.gptqmodel import _config

    recipe = load_recipe(method)
    for scheme in (recipe.scheme, recipe.scheme.with_group_size(-1)):
        plan = plan_for(method, scheme=scheme.to_dict())
        job = Job(str(MODEL), {}, str(tmp_path), str(tmp_path), "cpu", None)
        config = _config(Work(job, plan, [], "cpu", report=None))
        act_order = recipe.steps(Gptq)[0].act_order
        assert config.act_group_aware == bool(scheme.weights.group_size and not act_order)
        assert config.group_size == (scheme.weights.group_size or -1)


CHANGES = {
    "head": {"lm_head": True},
    "ignored": {"lm_head": True, "ignore": ["model.layers.0.*", "down_proj"]},
    "rules": {
        "lm_head": True,
        "rules": [
            {"modules": "down_proj", "scheme": "W8A16"},
            {"modules": "lm_head", "scheme": "FP8_DYNAMIC"},
        ],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_llm_compressor_is_given_the_config_that_export_writes(change, tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    from qtool.backends.llmcompressor import _quantization_options

    model = plain_checkpoint(tmp_path / "model")
    methods = [name for name, recipe in catalogue().items() if recipe.backend == "llmcompressor"]
    for recipe in (load_recipe(name) for name in methods if load_recipe(name).scheme):
        plan = make_plan(model, recipe.changed(**CHANGES[change]))
        job = Job(str(model.path), {}, str(tmp_path), str(tmp_path), "cpu", None)
        names = [module.name for module in plan.modules]
        options = _quantization_options(Work(job, plan, [], "cpu", report=None), names)
        options.pop("kv_cache_scheme", None)
        ours = QuantizationConfig(**options).model_dump(mode="json")
        modules = [
            QuantizedModule(module.name, module.scheme, module.shape, {})
            for module in plan.quantized
        ]
        unquantized = [module.name for module in plan.modules if module.scheme is None]
        written = quantization_config(modules, unquantized, None)["config.json"]
        exported = written["quantization_config"]
        assert set(ours["ignore"]) == set(exported["ignore"])
        groups = [Targets(weight_groups(config)) for config in (ours, exported)]
        for name in (module.name for module in modules):
            mine, theirs = (group.group_of(name) for group in groups)
            assert numbers_of(mine.weights) == numbers_of(theirs.weights), (recipe.name, name)
            assert (mine.inputs is None) == (theirs.inputs is None)
        if change != "rules":
            targets = [config["config_groups"]["group_0"]["targets"] for config in (ours, exported)]
            assert targets == [["Linear", "lm_head"]] * 2


def numbers_of(arguments):
    """The arguments that decide what codes mean."""
    block = arguments.block_structure
    return (
        *(arguments.format, arguments.symmetric, arguments.strategy, arguments.group_size),
        *(list(block) if block else None, arguments.scale_dtype),
    )


def plain_checkpoint(folder):
    """Two layers and an untied head."""
    shapes = {f"model.layers.{i}.{kind}": shape for i in range(2) for kind, shape in LAYER.items()}
    tensors = {"model.embed_tokens.weight": ("BF16", (512, 256))}
    for name, shape in (shapes | HEAD).items():
        tensors |= plain(name, shape)
    return write(folder, tensors, architectures=["LlamaForCausalLM"], num_hidden_layers=2)
