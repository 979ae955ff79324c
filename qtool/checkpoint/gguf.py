"""A GGUF file as a checkpoint: config, tokenizer and chat template are derived from its metadata,
into a folder that lasts as long as the process; the tensors stay where they are.
"""

from __future__ import annotations

import json
from pathlib import Path

from qtool.checkpoint.config_values import check_config_values
from qtool.checkpoint.gguf_config import (
    architecture_of,
    config_of,
    generation_config_of,
    notes_on_sampling,
)
from qtool.checkpoint.gguf_header import MAGIC, SPLIT_NAME, GgufHeader, read_gguf
from qtool.checkpoint.gguf_tensors import gguf_tensors
from qtool.checkpoint.gguf_tokenizer import tokenizer_files
from qtool.checkpoint.model import Checkpoint
from qtool.checkpoint.strict_json import Json, refused
from qtool.checkpoint.temporary import write_temporary_folder
from qtool.errors import ResourceError, one_line

_FOLDERS: dict[tuple[Path, str], Path] = {}
"""Of this process: file and digest of its header -> what was derived from it."""


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that ``path`` means: itself, or the only model in a folder without
    safetensors; None when it means none.

    Raises: CheckpointRefused, when a folder holds several.
    """
    if not path.is_dir():
        return path if path.suffix == ".gguf" or _starts_as_gguf(path) else None
    return None if any(path.glob("*.safetensors*")) else _only_model(path)


def open_gguf(file: Path, *, derives_folder: bool = True) -> Checkpoint:
    """Return the model in the GGUF ``file``, any file of a split model.

    Args:
        file: what is read.
        derives_folder: whether config and tokenizer are written to a folder for those who read them
            there; else its path is that of ``file``'s folder.
    Raises: CheckpointRefused, when the file is damaged or of a kind that qtool does not read;
        ResourceError, when there is no room for temporary files.
    """
    header = read_gguf(file)
    architecture = architecture_of(header)
    config = config_of(header, architecture)
    check_config_values(header.files[0], config)
    tensors = gguf_tensors(header, architecture, config)
    folder = _derived_folder(header, config) if derives_folder else file.parent
    return Checkpoint(
        folder, config, tensors, gguf_file=header.files[0], notes=notes_on_sampling(header)
    )


def as_folder(path: Path) -> Path:
    """Return a folder with the tokenizer of ``path``, a model folder or a GGUF file."""
    file = find_gguf(path)
    return path if file is None else open_gguf(file).path


def notes_on_gguf(folder: Path) -> tuple[str, ...]:
    """Return in a line that the GGUF files in ``folder``, which has safetensors, are not read."""
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if not files:
        return ()
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return (
        f"the safetensors files are read, not {files[0]}{more}: give the path of a GGUF file to "
        "read it",
    )


def _starts_as_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _only_model(path: Path) -> Path | None:
    """Return a file of the GGUF model in the folder ``path``; None when there is none.

    Raises: CheckpointRefused, when there are several.
    """
    files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("."))
    models: dict[str, Path] = {}
    for file in files:
        found = SPLIT_NAME.fullmatch(file.name)
        models.setdefault(f"{found[1]}-of-{found[3]}" if found else file.name, file)
    if len(models) > 1:
        names = [file.name for file in models.values()]
        raise refused(
            "E_GGUF_SEVERAL",
            f"{path} holds several GGUF models: {', '.join(names[:5])}",
            "give one of the files as --model-path",
        )
    return next(iter(models.values()), None)


def _derived_folder(header: GgufHeader, config: Json) -> Path:
    """Return the folder of ``header``, written if this process has not done so."""
    source = header.files[0].absolute()
    key = (source, header.digest)
    if key in _FOLDERS and _FOLDERS[key].is_dir():
        return _FOLDERS[key]
    texts = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(generation_config_of(header), indent=2),
        **tokenizer_files(source, header.metadata, config.get("max_position_embeddings")),
    }
    try:
        _FOLDERS[key] = write_temporary_folder(texts)
    except OSError as error:
        raise ResourceError(
            "E_TEMPORARY",
            f"{source}: its config and tokenizer cannot be kept in a temporary folder "
            f"({one_line(error)})",
            hint="set TMPDIR to a folder that can be written",
        ) from error
    return _FOLDERS[key]
