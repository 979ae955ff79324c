"""A GGUF file as a model folder: config, tokenizer and chat template are derived from its metadata
and kept in a cache; the tensors stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from qtool.checkpoint.gguf_config import architecture_of, config_of, generation_config_of
from qtool.checkpoint.gguf_header import MAGIC, SPLIT_NAME, GgufHeader, read_gguf
from qtool.checkpoint.gguf_tensors import gguf_tensors
from qtool.checkpoint.gguf_tokenizer import tokenizer_files
from qtool.checkpoint.model import Checkpoint, TensorInfo
from qtool.checkpoint.strict_json import Json, refused
from qtool.errors import ResourceError, one_line

VERSION = 2
"""Of what is derived: another one makes new folders."""


def as_folder(path: Path) -> Path:
    """Return the model folder of ``path``: derived, if it is a GGUF file or a folder with one and
    without safetensors; else ``path``.

    Raises: CheckpointRefused, when the file is damaged or of a kind that qtool does not read;
        ResourceError, when the cache cannot be written.
    """
    file = _gguf_of(path)
    if file is None:
        return path
    header = read_gguf(file)
    architecture = architecture_of(header)
    config = config_of(header, architecture)
    gguf_tensors(header, architecture, config)
    return _write(header, config)


def open_gguf(file: Path) -> Checkpoint:
    """Return config and tensors of a GGUF ``file``, without a folder for its tokenizer.

    Raises: what `as_folder` does.
    """
    header = read_gguf(file)
    architecture = architecture_of(header)
    config = config_of(header, architecture)
    return Checkpoint(file.parent, config, gguf_tensors(header, architecture, config))


def derived_tensors(folder: Path, config: Json) -> dict[str, TensorInfo] | None:
    """Return the tensors of a folder that `as_folder` made; None for others."""
    if not _is_derived(folder):
        return None
    links = [path for path in folder.iterdir() if path.suffix == ".gguf"]
    if len(links) != 1:
        return None
    header = read_gguf(source_of(folder) or links[0])
    return gguf_tensors(header, architecture_of(header), config)


def is_from_gguf(checkpoint: Checkpoint) -> bool:
    """Whether the weights of ``checkpoint`` lie in a GGUF file."""
    return _is_derived(checkpoint.path)


def source_of(folder: Path) -> Path | None:
    """Return the GGUF file that the model folder ``folder`` was derived from; None for others."""
    if not _is_derived(folder):
        return None
    links = [path for path in folder.iterdir() if path.suffix == ".gguf" and path.is_symlink()]
    return links[0].readlink() if len(links) == 1 else None


def _gguf_of(path: Path) -> Path | None:
    """Return the GGUF file that ``path`` means, if it means one."""
    if not path.is_dir():
        return path if path.suffix == ".gguf" or _starts_as_gguf(path) else None
    has_others = _is_derived(path) or any(path.glob("*.safetensors*"))
    return None if has_others else _only_model(path)


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


def _root() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache_home) if cache_home else Path("~/.cache").expanduser()) / "qtool" / "gguf"


def _is_derived(folder: Path) -> bool:
    return folder.resolve().parent.parent == _root().resolve()


def _write(header: GgufHeader, config: Json) -> Path:
    """Return the folder of ``header``, written if it is not there."""
    source = header.files[0].absolute()
    said = f"{VERSION}\0{source}\0{header.digest}".encode(errors="surrogateescape")
    key = hashlib.sha256(said).hexdigest()[:16]
    found = SPLIT_NAME.fullmatch(source.name)
    stem = found[1] if found else source.name.removesuffix(".gguf")
    folder = _root() / key / (re.sub(r"[^\w.-]", "_", stem) or "model")
    if folder.is_dir():
        return folder
    texts = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(generation_config_of(header), indent=2),
        **tokenizer_files(source, header.metadata, config.get("max_position_embeddings")),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            for name, text in texts.items():
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_text(text, encoding="utf-8")
            (staging / f"{folder.name}.gguf").symlink_to(source)
            staging.chmod(0o755)
            _publish(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            "E_CACHE",
            f"{folder}: the config and tokenizer of {source.name} cannot be kept there "
            f"({one_line(error)})",
            hint="set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return folder


def _publish(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process was not first
            raise
