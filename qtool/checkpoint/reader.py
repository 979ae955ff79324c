"""Open a checkpoint folder from its headers alone: bounded, checked, without torch, and never a
pickle.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from pathlib import Path

from qtool.checkpoint.config_check import check_config
from qtool.checkpoint.config_values import check_config_values
from qtool.checkpoint.expert_stacks import with_experts_apart
from qtool.checkpoint.gguf import find_gguf, notes_on_gguf, open_gguf
from qtool.checkpoint.header import MAX_NAME, read_header
from qtool.checkpoint.model import INDEX, Checkpoint, TensorInfo
from qtool.checkpoint.strict_json import (
    JsonDict,
    read_json,
    refused,
)
from qtool.errors import CheckpointRefused, file_errors, is_there
from qtool.memory import no_collection

MAX_FILE_NAME = 255
MAX_SHARDS = 10_000
# of memory, for what is known of all tensors: a third of a million, as Kimi K2 has
MAX_TENSOR_BYTES = 128 << 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(path: Path, *, is_written: bool = False) -> Checkpoint:
    """Read config, index and every safetensors header below ``path``; or the header of a GGUF
    file, for which a folder is derived.

    Args:
        path: the folder, or a GGUF file.
        is_written: whether this run wrote it: then a file that cannot be read is an error of the
            disk, not a refused input.
    Raises: CheckpointRefused, naming the file, the tensor and the numbers that do not fit.
    """
    with file_errors(reading=[] if is_written else [path]):
        if not path.exists():
            what = "file" if path.suffix == ".gguf" else "folder"
            raise refused(
                "E_NO_MODEL",
                f"{path}: no such {what}",
                "give a checkpoint folder or a Hub name such as `org/model`",
            )
        with no_collection():
            gguf_file = None if is_written else find_gguf(path)
            if gguf_file:
                return _checked(open_gguf(gguf_file))
        if not path.is_dir():
            raise refused(
                "E_NOT_A_FOLDER",
                f"{path} is a file, not a model folder",
                "give the folder that holds config.json, or a .gguf file",
            )
        if not is_there(path / "config.json") and is_there(path / "params.json"):
            raise refused(
                "E_NOT_A_MODEL",
                f"{path}: params.json and no config.json: this is Mistral's own format, which "
                "qtool does not read",
                "vLLM loads it; take the folder with config.json, which Mistral publishes for most "
                "models",
            )
        if not is_there(path / "config.json"):
            raise refused(
                "E_NOT_A_MODEL",
                f"{path}: no config.json, so this is not a model folder",
                "give the folder that holds config.json",
            )
        with no_collection():
            config = _read_config(path / "config.json")
            tensors = _read_tensors(path)
            found = Checkpoint(path, config, tensors, notes=notes_on_gguf(path))
            return _checked(with_experts_apart(found))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint``. Raises: CheckpointRefused, when config and tensors do not agree."""
    check_config(checkpoint)
    return checkpoint


def _read_config(path: Path) -> JsonDict:
    config = read_json(path)
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        hint = 'a config says, for instance, "architectures": ["LlamaForCausalLM"]'
        raise refused(
            "E_CONFIG_FIELD",
            f"{path}: `architectures` is {reprlib.repr(names)}, and must be a list of names",
            hint,
        )
    check_config_values(path, config)
    return config


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    single, index_file = path / "model.safetensors", path / INDEX
    # transformers takes it first; others, such as consolidated.safetensors, are not of the model
    if is_there(single):
        return _read_shards([single])
    if is_there(index_file):
        return _read_indexed(path, index_file)
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
    if files:
        return _read_shards(files)
    raise _no_weights(path)


def _no_weights(path: Path) -> CheckpointRefused:
    """Return the error for a folder without safetensors files, by what it has instead."""
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        message = (
            f"{path}: the weights are pickle files ({', '.join(pickles[:3])}), which qtool never "
            "opens"
        )
        return refused(
            "E_PICKLE",
            message,
            "convert them to safetensors first, or take a revision that has them",
        )
    return refused(
        "E_NO_WEIGHTS",
        f"{path}: no safetensors file",
        "give the folder with the model's safetensors files, or one .gguf file of the Hub as "
        "`org/model:Q4_K_M`; pickle files are never taken",
    )


def _read_indexed(path: Path, index_file: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refused(
            "E_INDEX_MAP",
            f"{index_file}: `weight_map` is missing, empty or no object",
            "an index maps each tensor to its file: download it again",
        )
    files: dict[str, Path] = {}
    for tensor, shard in weight_map.items():
        if type(shard) is not str or shard not in files:
            files[shard] = _shard_path(path, index_file, tensor, shard)
    tensors = _read_shards(files.values())
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file is not files[shard]:
            message = (
                f"{index_file}: tensor `{name[:MAX_NAME]}` is not in {shard}, where the index "
                "puts it"
            )
            raise refused(
                "E_INDEX_TENSOR",
                message,
                "index and shards are of different downloads: fetch all of them again",
            )
    return tensors


def _shard_path(path: Path, index_file: Path, tensor: str, shard: object) -> Path:
    said = f"{index_file}: tensor `{tensor[:MAX_NAME]}` is said to be in {reprlib.repr(shard)}"
    if not isinstance(shard, str):
        raise refused("E_INDEX_TYPE", f"{said}, which is not a file name")
    if Path(shard).name != shard or not shard.isprintable() or len(shard) > MAX_FILE_NAME:
        raise refused(
            "E_INDEX_PATH",
            f"{said}, which is not a file of this folder",
            "do not trust this model: an index names files beside it, never others",
        )
    if not shard.endswith(".safetensors"):
        raise refused(
            "E_INDEX_SUFFIX",
            f"{said}, which is not a safetensors file",
            "take a revision of the model with safetensors weights",
        )
    if not is_there(path / shard):
        raise refused(
            "E_MISSING_SHARD",
            f"{path / shard} is named by the index and missing",
            "download or copy it again",
        )
    return path / shard


def _read_shards(files: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    files, memory = list(files), 0
    if len(files) > MAX_SHARDS:
        raise refused(
            "E_SHARD_COUNT",
            f"{files[0].parent}: {len(files):,} safetensors files; the limit is {MAX_SHARDS:,}",
            "merge the shards",
        )
    for file in files:
        found = read_header(file)
        if not tensors.keys().isdisjoint(found):
            name = next(name for name in found if name in tensors)
            hint = (
                "remove the file that is not part of the model, or add its "
                "model.safetensors.index.json"
            )
            raise refused(
                "E_DUPLICATE",
                f"tensor `{name}` is in {tensors[name].file} and in {file.name}",
                hint,
            )
        tensors |= found
        memory += 300 * len(found) + sum(map(len, found))
        if memory > MAX_TENSOR_BYTES:
            raise refused(
                "E_TENSOR_COUNT",
                f"{file}: with it the model has {len(tensors):,} tensors, more than any model "
                "known",
                "is it one model?",
            )
    if not tensors:
        raise refused(
            "E_NO_TENSORS",
            f"{', '.join(str(file) for file in files[:3])}: no tensor inside",
            "the weights were not saved: export them again",
        )
    return tensors
