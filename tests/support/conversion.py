"""What the tests of conversion share: names of formats, small checkpoints, and comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

from qtool.conversion import export
from qtool.errors import CheckpointRefused
from qtool.formats import WRITABLE, QuantizedModule, tensor_name
from qtool.scheme import Scheme
from qtool.weight import quantize
from support.samples import PROMPT_TOKENS, token_sequences

CT, MODELOPT, AWQ, GPTQ, GPTQ_V2, FP8, MXFP4 = (
    "compressed-tensors",
    "modelopt",
    "awq",
    "gptq",
    "gptq_v2",
    "fp8_block",
    "mxfp4",
)


def content(checkpoint):
    return {
        name: (tensor.dtype, tensor.shape, tensor.read())
        for name, tensor in checkpoint.tensors.items()
    }


def schemes(layout):
    return {name: module.scheme for name, module in layout.modules.items()}


def home(layout):
    """The target that writes the format, and the version of it, that ``layout`` has."""
    return next(iter(layout.modules.values())).variant if layout.format == GPTQ else layout.format


def refusal(source, tmp_path, to, **options):
    """What ``export`` says when it refuses; nothing may be left of it."""
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointRefused) as caught:
        export(source, to=to, output=tmp_path / "refused" / "out", **options)
    assert set(tmp_path.iterdir()) == before
    assert (caught.value.code, caught.value.exit_code) == ("E_CANNOT_HOLD", 3)
    assert f"{to} cannot hold this checkpoint" in caught.value.message
    return caught.value


def write_layers(
    folder: Path,
    layers: Mapping[str, tuple[torch.Tensor, Scheme]],
    *,
    to=CT,
    plain: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint in the format ``to`` of some linear layers, each rounded to nearest in its
    scheme.
    """
    folder.mkdir(parents=True)
    rounded = {layer: quantize(*layer) for layer in set(layers.values())}
    modules, tensors = [], dict(plain or {})
    for name, layer in layers.items():
        modules.append(
            QuantizedModule(
                name, layer[1], rounded[layer].shape, {}, to if to.startswith(GPTQ) else ""
            )
        )
        tensors |= {
            tensor_name(modules[-1], suffix): part.clone()
            for suffix, part in WRITABLE[to].write(modules[-1], rounded[layer]).items()
        }
    left = [
        name.removesuffix(".weight") for name, tensor in (plain or {}).items() if tensor.dim() == 2
    ]
    for name, values in WRITABLE[to].quantization_config(modules, left, None).items():
        (folder / name).write_text(
            json.dumps({"model_type": "llama", **values} if name == "config.json" else values)
        )
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit(folder: Path, tensors=lambda tensors: None, config=lambda config: None) -> Path:
    """Change the tensors and the config of a checkpoint of one file."""
    loaded = load_file(folder / "model.safetensors")
    tensors(loaded)
    save_file(loaded, folder / "model.safetensors")
    whole = json.loads((folder / "config.json").read_text())
    config(whole)
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def random_weight(rows=64, columns=256, seed=0, dtype=torch.bfloat16):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 20).to(
        dtype
    )


@torch.inference_mode()
def logits(model):
    return model(
        torch.tensor(token_sequences("evaluation.jsonl", 1, PROMPT_TOKENS)), use_cache=False
    ).logits.float()


def plain_transformers(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": torch.bfloat16, **options}
    ).eval()
