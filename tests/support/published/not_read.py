"""Published layouts that qtool does not read, small, with the tensors that tell what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.gguf_bytes import Gguf, tensor
from support.published.models import llama, write

LAYER = "model.layers.0.mlp.up_proj"
BYTES, WORDS, HALF = torch.uint8, torch.int32, torch.float16
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class NotRead:
    """A layout that is refused by name."""

    write: Callable[[Path], object]
    """Writes it to a folder that does not exist."""
    code: str
    """Of the refusal."""
    words: tuple[str, ...]
    """What message and hint must say: what it is, and who reads it."""


def _zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _checkpoint(
    config: Mapping[str, Any] | None,
    parts: Mapping[str, Tensor],
    *,
    keep_weight: bool = False,
    layer: str = LAYER,
    **fields: Any,
) -> Callable[[Path], object]:
    """Return a writer of a Llama, one of whose layers has the tensors ``parts``."""

    def writer(folder: Path) -> object:
        model, weights = llama()
        kept = {
            name: weight
            for name, weight in weights.items()
            if keep_weight or name != f"{layer}.weight"
        }
        tensors = {f"{layer}.{suffix}": part for suffix, part in parts.items()}
        return write(folder, ({**model, **fields}, kept), {}, config, tensors=tensors)

    return writer


def _gguf(kind: int) -> Callable[[Path], object]:
    """Return a writer of a GGUF file, one of whose tensors is of the type ``kind``."""

    def writer(folder: Path) -> object:
        folder.mkdir(parents=True)
        file = Gguf()
        tensor(2, dims=(256, 32), kind=kind)(file)
        return file.write(folder / "model.gguf")

    return writer


SPARSE = {
    "quant_method": "compressed-tensors",
    "format": "marlin-24",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 128, "type": "int", "strategy": "group"},
        }
    },
}
EXL3_PARTS = {
    "trellis": _zeros(torch.int16, 16, 24, 64),
    "suh": _zeros(HALF, 256),
    "svh": _zeros(HALF, 384),
}
INT8 = {"weight": _zeros(torch.int8, 384, 256), "weight_scale": torch.ones(384, 1)}
NOT_READ: Mapping[str, NotRead] = {
    "mlx-community-4bit": NotRead(
        _checkpoint(
            {"group_size": 64, "bits": 4},
            {
                "weight": _zeros(torch.uint32, 384, 32),
                "scales": _zeros(HALF, 384, 4),
                "biases": _zeros(HALF, 384, 4),
            },
            quantization={"group_size": 64, "bits": 4},
        ),
        "E_QUANT_METHOD",
        ("MLX", "mlx-lm"),
    ),
    "turboderp-exl2": NotRead(
        _checkpoint(
            {"quant_method": "exl2", "bits": 4.25, "head_bits": 6, "version": "0.2.4"},
            {"q_weight": _zeros(WORDS, 34, 384), "q_scale": _zeros(WORDS, 2, 48)},
        ),
        "E_QUANT_METHOD",
        ("EXL2", "exllamav2"),
    ),
    "turboderp-exl3": NotRead(
        _checkpoint({"quant_method": "exl3", "bits": 4.0, "version": "0.0.6"}, EXL3_PARTS),
        "E_QUANT_METHOD",
        ("EXL3", "exllamav3"),
    ),
    "exl3-without-config": NotRead(
        _checkpoint(None, EXL3_PARTS), "E_QUANT_METHOD", ("EXL3", "exllamav3")
    ),
    "mobiuslabs-hqq": NotRead(
        _checkpoint(
            {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
            {"W_q": _zeros(BYTES, 32, 1536), "scale": _zeros(HALF, 1, 1536)},
        ),
        "E_QUANT_METHOD",
        ("HQQ", "hqq"),
    ),
    "ista-aqlm-2bit": NotRead(
        _checkpoint(
            {"quant_method": "aqlm", "nbits_per_codebook": 16, "num_codebooks": 1},
            {"codes": _zeros(torch.int16, 384, 32, 1), "codebooks": _zeros(HALF, 1, 65536, 1, 8)},
        ),
        "E_QUANT_METHOD",
        ("AQLM", "transformers"),
    ),
    "relaxml-quip-sharp": NotRead(
        _checkpoint(
            None,
            {
                "Qidxs": _zeros(torch.int64, 384, 8),
                "SU": _zeros(HALF, 256),
                "SV": _zeros(HALF, 384),
            },
            quip_params={"codebook": "E8P12", "lora_rank": 0},
        ),
        "E_QUANT_METHOD",
        ("QuIP#", "authors"),
    ),
    "vptq-community": NotRead(
        _checkpoint(
            {"quant_method": "vptq", "config_for_layers": {}},
            {"indices": _zeros(WORDS, 1, 384, 16), "centroids.weight": _zeros(HALF, 1, 65536)},
        ),
        "E_QUANT_METHOD",
        ("VPTQ", "vptq"),
    ),
    "ista-spqr": NotRead(
        _checkpoint(
            {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16},
            {"dense_weights": _zeros(torch.int64, 1536), "row_offsets": _zeros(WORDS, 385)},
        ),
        "E_QUANT_METHOD",
        ("SpQR", "spqr_quant"),
    ),
    "eetq-int8": NotRead(
        _checkpoint(
            {"quant_method": "eetq", "weights": "int8"},
            {"qweight": _zeros(torch.int8, 256, 384), "weight_scales": _zeros(HALF, 384)},
        ),
        "E_QUANT_METHOD",
        ("EETQ", "eetq"),
    ),
    "quanto-int4": NotRead(
        _checkpoint(
            {"quant_method": "quanto", "weights": "int4"},
            {"weight._data": _zeros(BYTES, 192, 256), "weight._scale": _zeros(HALF, 384, 2)},
        ),
        "E_QUANT_METHOD",
        ("quanto", "optimum-quanto"),
    ),
    "microsoft-bitnet-b1.58": NotRead(
        _checkpoint(
            {"quant_method": "bitnet", "linear_class": "autobitlinear"},
            {"weight": _zeros(BYTES, 96, 256), "weight_scale": torch.ones(1)},
        ),
        "E_QUANT_METHOD",
        ("BitNet", "bitnet.cpp"),
    ),
    "neuralmagic-sparse24": NotRead(
        _checkpoint(
            SPARSE, {"weight_packed": _zeros(WORDS, 8, 768), "meta": _zeros(torch.int16, 384, 8)}
        ),
        "E_SPARSE",
        ("marlin-24", "sparsity"),
    ),
    "ista-higgs": NotRead(
        _checkpoint({"quant_method": "higgs", "bits": 4}, {"tables": _zeros(HALF, 16)}),
        "E_QUANT_METHOD",
        ("HIGGS", "flute"),
    ),
    "ista-fp-quant": NotRead(
        _checkpoint({"quant_method": "fp_quant"}, {"qweight": _zeros(BYTES, 384, 128)}),
        "E_QUANT_METHOD",
        ("FP-Quant", "rotated"),
    ),
    "gptq-marlin": NotRead(
        _checkpoint(
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
            {"B": _zeros(WORDS, 16, 768), "s": _zeros(HALF, 2, 384)},
        ),
        "E_KERNEL_LAYOUT",
        ("marlin",),
    ),
    "awq-gemv": NotRead(
        _checkpoint(
            {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
            {"qweight": _zeros(WORDS, 384, 32)},
        ),
        "E_KERNEL_LAYOUT",
        ("gemv",),
    ),
    "qqq-w4a8": NotRead(
        _checkpoint({"quant_method": "qqq"}, {"B": _zeros(WORDS, 16, 768)}),
        "E_QUANT_METHOD",
        ("QQQ", "vLLM"),
    ),
    "sglang-w8a8-int8": NotRead(
        _checkpoint({"quant_method": "w8a8_int8"}, INT8), "E_QUANT_METHOD", ("int8", "SGLang")
    ),
    "meituan-block-int8": NotRead(
        _checkpoint({"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}, INT8),
        "E_QUANT_METHOD",
        ("int8 in blocks", "SGLang"),
    ),
    "ascend-modelslim": NotRead(
        _checkpoint({"quant_method": "modelslim"}, INT8), "E_QUANT_METHOD", ("ModelSlim", "Ascend")
    ),
    "gguf-iq4_xs": NotRead(_gguf(23), "E_GGUF_TYPE", ("IQ4_XS", "llama.cpp", "Q4_K")),
    "gguf-iq2_xxs": NotRead(_gguf(16), "E_GGUF_TYPE", ("IQ2_XXS", "llama.cpp", "Q2_K")),
    "gguf-tq1_0": NotRead(_gguf(34), "E_GGUF_TYPE", ("TQ1_0", "llama.cpp")),
    "z-lab-paroquant": NotRead(
        _checkpoint(
            {"quant_method": "paroquant", "bits": 4, "group_size": 128, "krot": 8},
            {"qweight": _zeros(WORDS, 256, 48), "theta": _zeros(HALF, 8, 128)},
        ),
        "E_QUANT_METHOD",
        ("ParoQuant", "GPTQModel"),
    ),
    "gptqmodel-gguf-blocks": NotRead(
        _checkpoint(
            {"quant_method": "gguf", "bits": "q4_k_m"}, {"qweight": _zeros(BYTES, 384, 144)}
        ),
        "E_QUANT_METHOD",
        ("GGUF", "safetensors", "GPTQModel"),
    ),
    "mit-qserve-w4a8": NotRead(
        _checkpoint({"quant_method": "qoq", "wbits": 4}, {"qweight": _zeros(torch.int8, 384, 128)}),
        "E_QUANT_METHOD",
        ("QServe", "SGLang"),
    ),
    "baidu-ernie-4.5-paddle": NotRead(
        _checkpoint(
            {
                "dense_quant_type": "wint8",
                "moe_quant_type": "wint4",
                "quantization": "mix_quant",
            },
            {"quant_weight": _zeros(torch.int8, 256, 192)},
        ),
        "E_QUANT_METHOD",
        ("PaddlePaddle", "FastDeploy"),
    ),
    "stepfun-step-3.5-fp8": NotRead(
        _checkpoint(
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {
                "down_proj.weight": _zeros(FP8, 4, 256, 384),
                "down_proj.weight_scale_inv": torch.ones(4, 2, 3),
            },
            layer="model.layers.0.moe",
        ),
        "E_EXPERT_STACK",
        ("down_proj.weight", "stack", "vLLM"),
    ),
    "pytorch-int4-hqq": NotRead(
        _checkpoint(
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}},
            },
            {"_weight_qdata": _zeros(BYTES, 384, 128), "_weight_scale": _zeros(HALF, 2, 384)},
        ),
        "E_QUANT_CLASS",
        ("Int4WeightOnlyConfig", "torchao", "transformers"),
    ),
    "torchao-before-0.10": NotRead(
        _checkpoint({"quant_method": "torchao", "quant_type": "int4_weight_only"}, {}),
        "E_QUANT_CLASS",
        ("int4_weight_only", "transformers"),
    ),
    "autoround-rotated": NotRead(
        _checkpoint(
            {
                "quant_method": "auto-round",
                "bits": 4,
                "group_size": 128,
                "rotation_config": {"a": 1},
            },
            {"qweight": _zeros(WORDS, 32, 384)},
        ),
        "E_TRANSFORM",
        ("rotation_config", "16-bit"),
    ),
    "autoround-mx_int4": NotRead(
        _checkpoint(
            {
                "quant_method": "auto-round",
                "packing_format": "auto_round:llm_compressor",
                "bits": 4,
                "group_size": 32,
                "data_type": "mx_int",
            },
            {"weight_packed": _zeros(BYTES, 384, 128)},
        ),
        "E_KERNEL_LAYOUT",
        ("mx_int", "transformers"),
    ),
}
