"""Small random models of many architectures, as they are published."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from support import EXAMPLE

ARCHITECTURES = Path(__file__).with_name("architectures.yaml")
WITH_MTP = "-mtp"  # behind the name of a model that also has layers for multi-token prediction
WEIGHTS = "model.safetensors"


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(ARCHITECTURES.read_text())
    return table


def names() -> list[str]:
    """Return the names of all models, variants included."""
    return [*_table()["models"], *(f"{name}{WITH_MTP}" for name in _table()["mtp"])]


def publish(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Any]:
    """Write the model ``name`` with the tokenizer of the example; return its folder and what
    transformers loads from there, in ``dtype``.
    """
    import transformers

    base = name.removesuffix(WITH_MTP)
    entry = _table()["models"][base]
    config = transformers.AutoConfig.for_model(entry["type"], **entry["config"])
    torch.manual_seed(0)
    model = getattr(transformers, entry["class"])(config).to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    _randomize(model)
    model.save_pretrained(folder)
    for file in EXAMPLE.iterdir():
        if file.name.startswith("tokenizer") or file.name == "chat_template.jinja":
            shutil.copy(file, folder)
    if "vision_config" in entry["config"]:
        preprocessor = {"image_processor_type": "Qwen2VLImageProcessor"}  # GPTQModel asks for one
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if name.endswith(WITH_MTP):
        _add_mtp(folder, is_apart=_table()["mtp"][base] == "apart")
    return folder, type(model).from_pretrained(folder, dtype=dtype).eval()


def _randomize(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # T5 does not divide scores by the root of the size of its heads, 8
                parameter.normal_(0, 0.0075 if name.endswith("Attention.q.weight") else 0.06)
            elif parameter.numel() > 1 and ("bias" in name or "sink" in name):
                parameter.normal_(0, 0.05)
        for name, buffer in model.named_buffers():
            if "e_score_correction" in name:
                buffer.zero_()


def _add_mtp(folder: Path, *, is_apart: bool) -> None:
    """Add a copy of the last layer, and what joins it to the model."""
    tensors = load_file(folder / WEIGHTS)
    prefix = next(name for name in tensors if ".layers.1." in name).split("layers.1.")[0]
    added = "mtp.layers.0." if is_apart else f"{prefix}layers.2."
    size = tensors[f"{prefix}embed_tokens.weight"].shape[1]
    mtp = {
        name.replace(f"{prefix}layers.1.", added): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}layers.1.")
    }
    joint = torch.randn(size, 2 * size).mul(0.06).bfloat16()
    norms = torch.ones(size, dtype=torch.bfloat16)
    if is_apart:
        mtp["mtp.fc.weight"] = joint
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            mtp[f"mtp.{name}.weight"] = norms.clone()
    else:
        mtp[f"{added}eh_proj.weight"] = joint
        for name in ("enorm", "hnorm", "shared_head.norm"):
            mtp[f"{added}{name}.weight"] = norms.clone()
        mtp[f"{added}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        mtp[f"{added}embed_tokens.weight"] = tensors[f"{prefix}embed_tokens.weight"].clone()
    save_file({**tensors, **mtp}, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    counted = config.get("text_config", config)
    counted["mtp_num_hidden_layers" if is_apart else "num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2))
