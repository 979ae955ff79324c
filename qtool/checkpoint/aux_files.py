"""The small files of a checkpoint: which of them are copied from the source, and what a config may
not say.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from qtool.checkpoint.reader import PICKLE_SUFFIXES
from qtool.checkpoint.strict_json import read_json
from qtool.errors import naming

MANIFEST = "qtool-manifest.json"
MANIFEST_VERSION = 1
CODE_OR_PICKLE = (".py", *PICKLE_SUFFIXES)
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
        "LICENSE*",
        "NOTICE*",
        "USE_POLICY*",
    ),
)
CONFIGS = ("config.json", "quantize_config.json", "hf_quant_config.json")
WRITTEN = ("*.safetensors", "model.safetensors.index.json", *CONFIGS)


def finish_files(source: Path, folder: Path) -> None:
    """Leave in ``folder`` only a checkpoint's own files, without this machine's paths, and add the
    auxiliary files of ``source`` as they are.
    """
    for path in folder.iterdir():
        if not _is_written(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in CONFIGS:
        if (folder / name).exists():
            write_json(folder / name, without_paths(read_json(folder / name)))
    for path in source.iterdir():
        if _is_aux_file(path, source) and not _is_written(path):
            shutil.copyfile(path, folder / path.name)
    mode = 0o666 & ~_umask()
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors writes files that only their owner can read


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as people read it."""
    with naming(path):
        path.write_text(json.dumps(value, indent=2) + "\n")


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


def _is_aux_file(path: Path, source: Path) -> bool:
    """Whether ``path`` is an auxiliary file to copy.

    A link must stay in the model folder, or in the blobs of the Hub cache that the folder belongs
    to.
    """
    if (
        path.suffix in CODE_OR_PICKLE
        or not path.is_file()
        or not any(path.match(pattern) for pattern in AUX_FILES)
    ):
        return False
    target = path.resolve()
    return target.is_relative_to(source.resolve()) or target.is_relative_to(
        source.resolve().parent.parent / "blobs"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
