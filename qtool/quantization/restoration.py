"""Gives what a library wrote the names of the source again, and every tensor of the source that the
library lost or changed unasked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.checkpoint.aux_files import write_json
from qtool.checkpoint.encoding import makes_embeddings
from qtool.checkpoint.model import INDEX, TensorInfo
from qtool.checkpoint.shards import Shards, TensorSpec
from qtool.checkpoint.strict_json import read_json
from qtool.errors import InputRefused
from qtool.modules import last_part
from qtool.plan import Plan
from qtool.quantization.verification import wrong_output
from qtool.recipe import Awq, SmoothQuant, SpinQuant

MAX_SHARD_BYTES = 1 << 30
CHUNK_BYTES = 16 << 20
HEAD = "lm_head.weight"
# keys of configs with the names of what stays in 16 bits
UNQUANTIZED_LISTS = frozenset({"ignore", "exclude_modules", "modules_to_not_convert"})
# steps that also change weights and biases which are not quantized
TRANSFORMS = (Awq, SmoothQuant, SpinQuant)


def restore_source(plan: Plan, folder: Path) -> None:
    """Give the checkpoint in ``folder`` the names of the source, and all of its tensors.

    Raises: BackendFailed, when ``folder`` is not a checkpoint; OSError.
    """
    try:
        written = open_checkpoint(folder, is_written=True)
    except InputRefused as error:
        raise wrong_output(plan, folder, [error.message]) from error
    tensors = dict(_renamed(plan, written))
    if makes_embeddings(plan.checkpoint) and HEAD not in plan.checkpoint.tensors:
        tensors.pop(HEAD, None)  # libraries make one
    quantized = {plan.names.linears[module.name].tensor for module in plan.quantized}
    kept = [name for name in plan.checkpoint.tensors if name not in quantized]
    missing = [name for name in kept if _is_missing(plan, tensors, name)]
    is_transformed = any(isinstance(step, TRANSFORMS) for step in plan.recipe.algorithm)
    scaled = (".weight", ".bias") if is_transformed else ()
    changed = [
        name for name in kept if not name.endswith(scaled) and _is_changed(plan, tensors, name)
    ]
    for name in (*missing, *changed):
        tensors[name] = plan.checkpoint.tensors[name]
    changes = any(written.tensors.get(name) is not tensor for name, tensor in tensors.items())
    if changes or len(tensors) < len(written.tensors):
        _write(folder, written, tensors)
    _complete_config(plan, folder)


def _renamed(plan: Plan, written: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the tensors of ``written`` under the names that the source has for their layers."""
    names: dict[str, str] = {}
    for module in plan.modules:
        kind = last_part(module.layer)
        for used in (module.layer, f"{module.name.rpartition('.')[0]}.{kind}"):
            names.setdefault(used, module.name)
    source = plan.checkpoint.tensors
    for name, tensor in written.tensors.items():
        owner, _, rest = name.rpartition(".")
        if name in source or f"{owner}.weight" in source:
            yield name, tensor
        else:
            in_source = plan.names.renamed.get(name)
            yield in_source or f"{names.get(owner, owner)}.{rest}".lstrip("."), tensor


def _is_missing(plan: Plan, tensors: Mapping[str, TensorInfo], name: str) -> bool:
    """Whether the library lost the tensor ``name`` of the source."""
    if name in tensors:
        return False
    if name == HEAD and plan.checkpoint.tied_embeddings:
        return False
    stack = plan.names.stacks.get(name.removesuffix("_bias"))
    return not (stack and f"{stack[0].name}.bias" in tensors)


def _is_changed(plan: Plan, tensors: Mapping[str, TensorInfo], name: str) -> bool:
    """Whether the library wrote another tensor ``name`` than the source has."""
    return name in tensors and not is_same(plan.checkpoint.tensors[name], tensors[name])


def is_same(source: TensorInfo, found: TensorInfo) -> bool:
    """Whether two tensors, maybe of different files, have the same bytes."""
    if (source.dtype, source.shape) != (found.dtype, found.shape):
        return False
    with source.file.open("rb") as one, found.file.open("rb") as other:
        one.seek(source.offset)
        other.seek(found.offset)
        left = source.size_bytes
        while left:
            size = min(left, CHUNK_BYTES)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True


def _write(folder: Path, written: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
    """Replace the weight files in ``folder`` by shards with ``tensors``."""
    old = folder / "library"
    old.mkdir()
    for file in written.weight_files:
        file.rename(old / file.name)
    (folder / INDEX).unlink(missing_ok=True)
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with Shards(folder, specs, MAX_SHARD_BYTES) as shards:
        for name, tensor in tensors.items():
            is_written = tensor.file.parent == folder
            file = old / tensor.file.name if is_written else tensor.file
            shards.copy(name, tensor._replace(file=file))
    for file in old.iterdir():
        file.unlink()
    old.rmdir()


def _complete_config(plan: Plan, folder: Path) -> None:
    """Name the layers in the configs of the output as engines look them up: as the source has them,
    and as transformers does. Lists of what stays in 16 bits get all of it.
    """
    names = {module.layer: module.name for module in plan.modules if module.layer != module.name}
    left = dict.fromkeys(name for module in plan.left_alone for name in (module.name, module.layer))
    # of layers that the library does not see, or does not take for linear
    left |= dict.fromkeys(
        name.removesuffix(".weight") for name in plan.other_matrices if name.endswith(".weight")
    )
    for file in (folder / "config.json", folder / "hf_quant_config.json"):
        if not file.is_file():
            continue
        config = read_json(file)
        completed = _completed(plan, config, names, [*left])
        if completed != config:
            write_json(file, completed)


def _completed(plan: Plan, value: object, names: Mapping[str, str], left: list[str]) -> object:
    """Return ``value``, part of a config, with both names of a layer wherever a list has the
    library's, and ``left`` in its lists of layers in 16 bits.
    """
    if isinstance(value, dict):
        completed: dict[str, object] = {
            key: _completed(plan, each, names, left) for key, each in value.items()
        }
        for key in UNQUANTIZED_LISTS & completed.keys():
            listed = completed[key]
            if isinstance(listed, list):
                completed[key] = _with(plan, key, listed, left)
        return completed
    if isinstance(value, list) and any(isinstance(each, str) and each in names for each in value):
        both = [each for name in value for each in (names.get(name, name), name)]
        return [*dict.fromkeys(both)]
    return value


def _with(plan: Plan, key: str, listed: list[str], left: list[str]) -> list[str]:
    if key == "ignore" and plan.recipe.backend == "llmcompressor":
        return [*dict.fromkeys([*listed, *left])]
    # engines look for these inside of names
    quantized = "\n".join(module.name for module in plan.quantized)
    return [*dict.fromkeys([*listed, *(name for name in left if name not in quantized)])]
