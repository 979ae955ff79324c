"""The name map of checkpoints as transformers publishes them: every matrix is compared with the one
that the loaded model multiplies with.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import publish

from qtool.architecture import check_model, map_names
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.formats.packing import expert_matrix
from qtool.modules import NOT_TEXT

MODELS = [
    "llama",
    "qwen3_seqcls",
    "qwen3_embedding",
    "phi3",
    "mixtral",  # w1, w2, w3
    "gpt_oss",  # stacks, gate and up alternate
    "granitemoe",
    "jamba",
    "gemma3",
    "qwen3_vl_moe",  # stacks that transformers transposes
    "qwen3_5_moe",
]
UNQUANTIZED = {"jamba": {"dt_proj"}}  # the layers with a reason


def used(model, linear) -> torch.Tensor:
    """Return the matrix [N, K] that the model multiplies with."""
    if not linear.parameter:
        return model.get_submodule(linear.module).weight
    holder = model.get_submodule(linear.module)
    matrix = holder.get_parameter(linear.parameter)[linear.expert]
    if getattr(holder, "is_transposed", False):
        matrix = matrix.T
    if linear.is_interleaved:
        return matrix[linear.part :: linear.parts]
    return matrix.chunk(linear.parts)[linear.part]


def stored(tensors, linear) -> torch.Tensor:
    """Return the matrix [N, K] that the checkpoint has."""
    matrix = tensors[linear.tensor]
    return expert_matrix(matrix, linear) if linear.is_stacked else matrix


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODELS)
def test_each_layer_is_mapped_to_the_matrix_that_the_model_uses(architecture, tmp_path):
    folder, model = publish(architecture, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = map_names(open_checkpoint(folder))
    for linear in names.linears.values():
        assert linear.shape == tuple(stored(tensors, linear).shape)
        assert torch.equal(stored(tensors, linear), used(model, linear)), linear
    taken = {linear.tensor for linear in names.linears.values()}
    matrices = {
        name
        for name, tensor in tensors.items()
        if tensor.dim() in (2, 3) and name.endswith(("proj", "proj.weight"))
    }
    assert {name for name in matrices if not name.endswith("bias")} <= taken
    assert not names.unused
    assert {
        linear.name.rpartition(".")[2]
        for linear in names.linears.values()
        if linear.reason and linear.reason != NOT_TEXT
    } == UNQUANTIZED.get(architecture, set())


def test_a_tower_is_not_part_of_the_language_model(tmp_path):
    folder, _ = publish("gemma3", tmp_path / "model")
    names = map_names(open_checkpoint(folder))
    towers = {name.split(".")[0] for name, each in names.linears.items() if each.reason == NOT_TEXT}
    texts = {name.split(".")[0] for name, each in names.linears.items() if not each.reason}
    assert towers == {"vision_tower"} and texts == {"language_model"}


@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.up_proj", "model.layers.2.eh_proj"])
def test_layers_that_predict_further_tokens_are_known(tmp_path, name):
    folder, _ = publish("mixtral", tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({**load_file(file), f"{name}.weight": torch.ones(32, 32)}, file, {"format": "pt"})
    assert map_names(open_checkpoint(folder)).unused == {f"{name}.weight": "multi-token prediction"}


def test_a_config_without_architectures_names_its_layers_itself(tmp_path):
    folder, _ = publish("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    linears = map_names(open_checkpoint(folder)).linears
    assert {linear.module for linear in linears.values()} == set(linears)


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen3_vl_moe"])
def test_experts_one_by_one_stand_for_a_stack_of_transformers(architecture, tmp_path):
    folder, _ = publish(architecture, tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        owner, _, kind = name.rpartition(".")
        part, is_bias, _ = kind.partition("_bias")
        if not owner.endswith("experts"):
            tensors[name] = tensor
            continue
        parts = ["gate_proj", "up_proj"] if part == "gate_up_proj" else [part]
        for number, expert in enumerate(tensor):
            for each, matrix in zip(parts, expert.chunk(len(parts), dim=-1), strict=True):
                suffix = "bias" if is_bias else "weight"
                tensors[f"{owner}.{number}.{each}.{suffix}"] = matrix.t().contiguous()
    keys = next(name for name in tensors if name.endswith(".self_attn.k_proj.weight"))
    cache_scale = keys.replace("k_proj.weight", "kv_scale")  # of old FP8 checkpoints
    save_file({**tensors, cache_scale: torch.ones(())}, file, {"format": "pt"})
    check_model(open_checkpoint(folder), None)
    tensors = {
        name: each for name, each in tensors.items() if not name.endswith("2.up_proj.weight")
    }
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointRefused, match="lacks"):
        check_model(open_checkpoint(folder), None)
