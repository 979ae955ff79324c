"""GGUF files as llama.cpp and those who publish its files make them: mixes of types by tensor.

Rows of a small model are shorter than a block of 256, where llama.cpp takes a type of 32, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from support.gguf_files import write_gguf
from support.published import Expected, layout
from support.published.models import Model, llama, qwen3_moe, write

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TABLES = {"token_embd": "model.embed_tokens", "output": "lm_head"}
STACKS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
IMATRIX = {"quantize.imatrix.file": "model.imatrix", "quantize.imatrix.entries_count": 16}


def publish(
    folder: Path,
    model: Model,
    name: str,
    types: Mapping[str, str],
    *,
    extra: Mapping[str, Any] | None = None,
) -> Expected:
    """Write ``model`` to the file ``name`` in ``folder``; the last of ``types`` is that of tensors
    that no pattern matches.
    """
    folder.mkdir(parents=True)
    with TemporaryDirectory() as place:
        write(Path(place, "model"), model, {}, None)
        *_, rest = types.values()
        dense = write_gguf(Path(place, "model"), folder / name, rest, types=types, extra=extra)
    config, _ = model
    return dict(_layers(config, dense))


def _layers(
    config: Mapping[str, Any], dense: Mapping[str, np.ndarray[Any, Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the quantized matrices by their names in safetensors."""
    for name, values in dense.items():
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        owner = f"model.layers.{stem.removeprefix('blk.')}."
        if kind in TABLES:
            yield TABLES[kind], torch.from_numpy(values)
        elif kind in STACKS:
            for expert, matrix in enumerate(values):
                part = f"{owner}mlp.experts.{expert}.{STACKS[kind]}"
                yield part, torch.from_numpy(np.ascontiguousarray(matrix))
        elif kind in NAMES:
            if config["model_type"] == "llama" and kind in ("attn_q", "attn_k"):
                pairs = values.reshape(-1, config["head_dim"] // 2, 2, values.shape[1])
                values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
            yield owner + NAMES[kind], torch.from_numpy(values)


@layout("gguf-q4_k_m")
def q4_k_m(folder: Path) -> Expected:
    """Q4_K_M: Q4_K, Q6_K for the head and some values, Q5_0 where rows have no whole blocks of 256."""
    types = {"output.weight|blk.0.attn_v": "Q6_K", "ffn_down": "Q5_0", "": "Q4_K"}
    return publish(folder, llama(), "model-Q4_K_M.gguf", types)


@layout("gguf-q4_0")
def q4_0(folder: Path) -> Expected:
    """Q4_0, made with an importance matrix, and a head of Q6_K."""
    types = {"output.weight": "Q6_K", "": "Q4_0"}
    return publish(folder, llama(), "model-Q4_0.gguf", types, extra=IMATRIX)


@layout("gguf-q8_0")
def q8_0(folder: Path) -> Expected:
    """Q8_0 for every matrix."""
    return publish(folder, llama(), "model-Q8_0.gguf", {"": "Q8_0"})


@layout("gguf-dynamic-q2_k")
def dynamic_q2_k(folder: Path) -> Expected:
    """unsloth's dynamic mixes, here of Q2_K to Q6_K and IQ4_NL, by layer."""
    types = {
        "output.weight": "Q6_K",
        "token_embd|attn_v": "Q5_K",
        "blk.0.ffn_down": "Q5_1",
        "blk.1.ffn_down": "IQ4_NL",
        "attn_output": "Q3_K",
        "": "Q2_K",
    }
    return publish(folder, llama(), "model-UD-Q2_K_XL.gguf", types, extra=IMATRIX)


@layout("gguf-moe-q4_k_m")
def experts(folder: Path) -> Expected:
    """A mixture: the experts of a layer in one stack, its router in F32."""
    types = {
        "output.weight|attn_v": "Q6_K",
        "ffn_down_exps": "Q8_0",
        "ffn_gate_inp": "F32",
        "": "Q4_K",
    }
    return publish(folder, qwen3_moe(), "model-Q4_K_M.gguf", types)


@layout("gguf-moe-mxfp4")
def mxfp4_experts(folder: Path) -> Expected:
    """MXFP4_MOE: experts in MXFP4, all other matrices in Q8_0."""
    types = {"_exps": "MXFP4", "ffn_gate_inp": "F32", "": "Q8_0"}
    return publish(folder, qwen3_moe(), "model-MXFP4_MOE.gguf", types)
