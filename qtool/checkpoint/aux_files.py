"""The small files of a checkpoint: which of them are copied from the source, and what a config may
not say.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from qtool.checkpoint.model import INDEX
from qtool.checkpoint.reader import PICKLE_SUFFIXES
from qtool.checkpoint.strict_json import read_json, refused, regular_size
from qtool.errors import naming

CODE_OR_PICKLE = (".py", *PICKLE_SUFFIXES)
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""What goes beside a file that holds all else itself."""
AUX_FILES = (
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab*",
        "merges.txt",
        "*.model",
        "*.tiktoken",
        "*.jinja",
        "chat_template*",
    ),
    *(
        "tekken.json",
        "generation_config.json",
        "*preprocessor_config.json",
        "processor_config.json",
        *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    ),
    *LICENCES,
)
NAMED_TEMPLATES = "additional_chat_templates"  # transformers' folder
MODULES = "[0-9]_[A-Z]*"  # sentence-transformers' folders, e.g. 1_Pooling
AUX_FOLDERS = {NAMED_TEMPLATES: "*.jinja", MODULES: "config.json"}
"""Folders whose files are carried along, and which of them."""
CONFIGS = ("config.json", "quantize_config.json", "hf_quant_config.json")
WRITTEN = ("*.safetensors", "*.gguf", INDEX, *CONFIGS)


def aux_files(source: Path) -> list[Path]:
    """Return the auxiliary files of the model folder ``source``, in name order.

    Raises: CheckpointRefused, when one of them cannot be copied: its link is broken, it is not a
        regular file, or it is a link out of the folder to a file with another kind of name;
        OSError, when it cannot be read.
    """
    found = []
    for path in sorted(source.iterdir()):
        if _is_aux_name(path) and not _is_written(path):
            _check_copyable(path, source)
            found.append(path)
        elif path.is_dir() and (inner := _in_folder(path)):
            for each in inner:
                _check_copyable(each, source)
            found += inner
        elif path.suffix == ".json" and not (path.is_dir() or _is_dangling(path)):
            regular_size(path)  # libraries open every JSON file, and a FIFO would block them
    return found


def licences(files: Iterable[Path]) -> list[Path]:
    """Return those of the auxiliary ``files`` that say what may be done with the model."""
    return [path for path in files if any(path.match(name) for name in LICENCES)]


def links_outside(files: Iterable[Path], source: Path) -> list[str]:
    """Return a note for each of the auxiliary ``files`` that lies outside of the model folder
    ``source``.
    """
    return [
        f"{path.name} is a link out of the model folder; what {path.resolve()} holds is copied"
        for path in files
        if not _is_inside(path, source)
    ]


def modules_left_out(files: Iterable[Path], source: Path) -> list[str]:
    """Return a note if a module of sentence-transformers in the model folder ``source`` has weights
    of its own, which are not among the auxiliary ``files``.
    """
    folders = {path.parent for path in files if path.parent != source}
    names = sorted(folder.name for folder in folders if any(folder.glob("*.safetensors")))
    if not names:
        return []
    return [f"the weights in {', '.join(names)} are not carried over: copy these folders"]


def _in_folder(folder: Path) -> list[Path]:
    """Return the files of a folder in a model folder that are carried along."""
    for name, pattern in AUX_FOLDERS.items():
        if folder.match(name) and folder.name.isprintable():
            return sorted(folder.glob(pattern))
    return []


def finish_files(aux: Iterable[Path], source: Path, folder: Path) -> None:
    """Leave in ``folder`` only a checkpoint's own files, without this machine's paths, and add the
    auxiliary files ``aux`` of the model folder ``source`` as they are.
    """
    for path in folder.iterdir():
        if not _is_written(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in CONFIGS:
        if (folder / name).exists():
            write_json(folder / name, without_paths(read_json(folder / name)))
    for path in aux:
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    hidden = _umask()
    for path in folder.rglob("*"):
        # safetensors writes files that only their owner can read
        path.chmod((0o777 if path.is_dir() else 0o666) & ~hidden)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as people read it."""
    with naming(path):
        path.write_text(as_json(value))


def as_json(value: object) -> str:
    """Return ``value`` as people read it."""
    return json.dumps(value, indent=2) + "\n"


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all: what was there stays until then."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with naming(part):
            part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def without_paths(value: object) -> object:
    """Drop every entry of a config that is an absolute path: temporary folders and user names have
    no place in a checkpoint.
    """
    if isinstance(value, dict):
        return {
            key: without_paths(item)
            for key, item in value.items()
            if not (isinstance(item, str) and item.startswith(("/", "~")))
        }
    return [without_paths(item) for item in value] if isinstance(value, list) else value


def _is_written(path: Path) -> bool:
    """Whether every checkpoint has a file of its own with the name of ``path``."""
    return any(path.match(pattern) for pattern in WRITTEN)


def _is_aux_name(path: Path) -> bool:
    """Whether ``path`` has the name of an auxiliary file."""
    return path.suffix not in CODE_OR_PICKLE and any(path.match(name) for name in AUX_FILES)


def _check_copyable(path: Path, source: Path) -> None:
    """Raise CheckpointRefused or OSError when the auxiliary file ``path`` cannot be copied, or is a
    link to a file that has nothing to do with a model.
    """
    if not path.name.isprintable():
        raise refused(
            "E_FILE_NAME",
            f"{path} has a name that no manifest can hold",
            "rename it: UTF-8 without control characters",
        )
    regular_size(path)
    if not _is_inside(path, source) and not _is_aux_name(path.resolve()):
        raise refused(
            "E_LINK_OUTSIDE",
            f"{path} is a link to {path.resolve()}, outside of the model folder and with a name "
            "that no auxiliary file has",
            "put the file itself there, or remove the link",
        )
    with path.open("rb"):
        pass  # only to see that it can be read


def _is_inside(path: Path, source: Path) -> bool:
    """Whether ``path`` lies in the model folder, or in the blobs of the Hub cache that the folder
    belongs to.
    """
    target, folder = path.resolve(), source.resolve()
    return target.is_relative_to(folder) or target.is_relative_to(folder.parent.parent / "blobs")


def _is_dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
