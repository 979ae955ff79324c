"""`export --merge-lora`: the merged checkpoint computes what PEFT's model does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.small_models import publish
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)

from qtool.checkpoint import open_checkpoint
from qtool.conversion import export
from qtool.conversion.adapter import read_adapter
from qtool.errors import CheckpointRefused, UsageError

IDS = torch.tensor([[5, 9, 100, 7, 11, 60, 4000, 21]])
ADAPTERS = {
    "all layers": {"target_modules": "all-linear", "r": 4, "lora_alpha": 32},
    "some layers, by pattern": {
        "target_modules": ["q_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 24,
        "rank_pattern": {r"layers\.1\..*q_proj": 8},
        "alpha_pattern": {"down_proj": 40},
        "use_rslora": True,
    },
    "DoRA": {"target_modules": ["v_proj", "gate_proj"], "use_dora": True, "lora_alpha": 16},
    "embeddings and a whole head": {
        "target_modules": ["embed_tokens", "k_proj"],
        "modules_to_save": ["lm_head"],
        "lora_alpha": 16,
    },
    "norms as a whole": {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm"]},
}


def train(model, folder, **options):
    """Give ``model`` an adapter of random numbers, save it in ``folder``, and return the logits."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    publish("llama", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_a_merged_checkpoint_computes_what_the_adapter_did(llama, tmp_path, options):
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    expected = train(base, tmp_path / "adapter", **options)
    result = export(llama, to="bf16", merge_lora=tmp_path / "adapter", output=tmp_path / "out")
    assert "adapter merged into" in result.summary()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = found(input_ids=IDS).logits
    scale = (expected - expected.mean(-1, keepdim=True)).std()
    assert float((logits - expected).abs().max() / scale) < 0.1  # of bf16
    manifest = json.loads((tmp_path / "out" / "qtool-manifest.json").read_text())
    assert manifest["conversion"]["adapter"]["name"] == "adapter"


def test_names_of_a_container_are_those_of_its_modules(tmp_path):
    _, model = publish("gemma3", tmp_path / "base", dtype=torch.float32)
    expected = train(model, tmp_path / "adapter", target_modules=r".*language_model.*\.q_proj")
    export(tmp_path / "base", to="bf16", merge_lora=tmp_path / "adapter", output=tmp_path / "out")
    found = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = found(input_ids=IDS).logits
    assert float((logits - expected).abs().max() / expected.std()) < 0.1


@pytest.fixture
def adapter(llama, tmp_path):
    """A folder with an adapter, and a function that changes it."""
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    train(base, tmp_path / "adapter", target_modules=["q_proj"])

    def change(tensors=None, **config):
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if tensors:
            weights = tmp_path / "adapter" / "adapter_model.safetensors"
            found = load_file(weights)
            tensors(found)
            save_file(found, weights)
        return tmp_path / "adapter"

    return change


def rename(old, new):
    def change(tensors):
        name = next(name for name in tensors if old in name)
        tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def cut(tensors):
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name][:-1].contiguous()


def make_scalars(tensors):
    tensors.update({name: torch.tensor(1.0) for name in tensors})


def repeat(tensors):
    name = next(iter(tensors))
    tensors[name.replace(".weight", ".default.weight")] = tensors[name] + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"r": 0}, "positive numbers"),
        ({"r": 16}, "rank 16"),
        ({"use_dora": True}, "not all tensors"),
        ({"rank_pattern": {"(": 8}}, "not a regular expression"),
        ({"tensors": rename("q_proj", "x_proj")}, "not all tensors"),
        ({"tensors": rename("lora_B", "lora_C")}, "belongs to no matrix"),
        ({"tensors": cut}, "of another model"),
        ({"tensors": make_scalars}, "of another model"),
        ({"tensors": repeat}, "for the same matrix"),
        ({"tensors": dict.clear}, "is empty"),
        ({"lora_alpha": 1e300}, "no 32-bit number"),
    ],
    ids=[
        *("kind", "parameters", "no rank", "other rank", "DoRA", "pattern"),
        *("no matrix", "no B", "shape", "scalars", "repeated", "empty", "scaling"),
    ],
)
def test_what_is_not_merged_is_refused_and_nothing_is_left(llama, adapter, tmp_path, change, said):
    with pytest.raises(CheckpointRefused, match=said):
        export(llama, to="bf16", merge_lora=adapter(**change), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


CHOICES = {
    "all": {},
    "all-linear": {"target_modules": "all-linear"},
    "no name": {"target_modules": ["k_proj"]},
    "a whole name": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    "a pattern": {"target_modules": r".*\.0\..*q_proj"},
    "the start of a pattern": {"target_modules": r".*q_pro"},
    "excluded": {"exclude_modules": ["layers.1.self_attn.q_proj"]},
    "excluded by pattern": {"exclude_modules": r".*self_attn.*"},
    "another excluded": {"exclude_modules": ["o_proj"]},
    "one layer": {"layers_to_transform": 1},
    "both layers": {"layers_to_transform": [0, 1]},
    "layers by name": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layers by another name": {"layers_to_transform": [0, 1], "layers_pattern": ["blocks"]},
    "saved as a whole": {"modules_to_save": ["self_attn"]},
}


@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)
def test_what_peft_leaves_out_is_refused(llama, adapter, config):
    folder = adapter(**config)
    base = AutoModelForCausalLM.from_pretrained(llama)
    given = LoraConfig.from_pretrained(folder)
    try:
        adapted = get_peft_model(base, given)
        found = sum(name.endswith("q_proj.lora_A.default") for name, _ in adapted.named_modules())
    except ValueError:  # no module is left
        found = 0
    if found == 2:
        assert len(read_adapter(folder, open_checkpoint(llama)).low_rank) == 2
        return
    with pytest.raises(CheckpointRefused, match="PEFT leaves out"):
        read_adapter(folder, open_checkpoint(llama))


def test_an_adapter_wants_a_16_bit_source_and_result(llama, adapter, tmp_path):
    fp8 = {"to": "fp8_block", "requantize": True, "scheme": "FP8_BLOCK"}
    export(llama, output=tmp_path / "fp8", **fp8)
    for source, options in ((llama, fp8), (tmp_path / "fp8", {"to": "bf16"})):
        with pytest.raises(UsageError, match="16-bit checkpoint"):
            export(source, merge_lora=adapter(), output=tmp_path / "out", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.embed_tokens"]},
    ],
)
def test_a_matrix_that_two_layers_share_is_not_changed_for_one(llama, tmp_path, options):
    tied = shutil.copytree(llama, tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    train(base, tmp_path / "adapter", **options)
    with pytest.raises(CheckpointRefused, match="untie"):
        export(tied, to="bf16", merge_lora=tmp_path / "adapter", output=tmp_path / "out")


def test_the_layer_says_how_its_matrix_lies_whatever_the_config_says(llama, adapter, tmp_path):
    found = read_adapter(adapter(fan_in_fan_out=True), open_checkpoint(llama))
    assert not any(each.is_transposed for each in found.low_rank.values())
    config = GPT2Config(vocab_size=4096, n_positions=64, n_embd=64, n_layer=1, n_head=4)
    base = GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "gpt2")
    train(base, tmp_path / "conv1d", target_modules=["attn.c_proj", "wpe"], fan_in_fan_out=True)
    path = tmp_path / "conv1d" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": False}))
    found = read_adapter(path.parent, open_checkpoint(tmp_path / "gpt2"))
    assert sorted(found.low_rank) == [
        "transformer.h.0.attn.c_proj.weight",
        "transformer.wpe.weight",
    ]
    assert all(each.is_transposed for each in found.low_rank.values())
