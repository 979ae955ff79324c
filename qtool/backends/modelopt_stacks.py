"""Takes the stacks of FP8 experts apart that ModelOpt writes for gpt-oss and Llama 4: each expert
becomes layers of its own, as qtool and engines read them.

Source: nvidia-modelopt 0.47, `torch/export/unified_export_hf.py`: ``gate_up_proj``
[E, inputs, outputs] with ``gate_up_proj_weight_scale`` and ``gate_up_proj_input_scale``, one each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.checkpoint.aux_files import write_json
from qtool.checkpoint.model import INDEX
from qtool.name_map import LinearWeight, NameMap

if TYPE_CHECKING:
    from torch import Tensor

WRITTEN = ("weight_scale", "input_scale", "bias")  # beside a stack, for all its experts


def split_stacks(folder: Path, names: NameMap) -> None:
    """Replace the quantized stacks in the weight files of ``folder`` by the layers in them."""
    from safetensors.torch import load_file, save_file

    files = sorted(folder.glob("*.safetensors"))
    shared = {stack: _shared(files, stack) for stack in names.stacks}
    quantized = {stack for stack, tensors in shared.items() if "weight_scale" in tensors}
    beside = {f"{stack}_{part}" for stack in quantized for part in WRITTEN}
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file in files:
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if name in quantized:
                for linear in names.stacks[name]:
                    tensors.update(_layer(linear, tensor, shared[name]))
            elif name not in beside:
                tensors[name] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if (folder / INDEX).exists():
        metadata = json.loads((folder / INDEX).read_text()).get("metadata", {})
        metadata |= {"total_size": total_bytes}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _shared(files: list[Path], stack: str) -> dict[str, Tensor]:
    """Return the tensors that ``files`` have beside ``stack``, by what they are."""
    from safetensors import safe_open

    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            for part in WRITTEN:
                if f"{stack}_{part}" in names:
                    found[part] = opened.get_tensor(f"{stack}_{part}")
    return found


def _layer(
    linear: LinearWeight, stack: Tensor, shared: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one layer of one expert.

    Args:
        linear: the layer.
        stack: FP8, [E, inputs, outputs], or [E, outputs, inputs].
        shared: what lies beside the stack: scales [], and a bias [E, outputs].
    """
    matrix = stack[linear.expert]
    matrix = matrix.T if linear.is_transposed else matrix
    yield f"{linear.name}.weight", _part(linear, matrix)
    if "bias" in shared:
        yield f"{linear.name}.bias", _part(linear, shared["bias"][linear.expert])
    for part in ("weight_scale", "input_scale"):
        yield f"{linear.name}.{part}", shared[part].clone()


def _part(linear: LinearWeight, outputs: Tensor) -> Tensor:
    """Return the outputs that are of ``linear``: a half, or every other one."""
    if linear.is_interleaved:
        return outputs[linear.part :: linear.parts].contiguous()
    return outputs.chunk(linear.parts)[linear.part].contiguous()
