"""The manifest of a checkpoint that qtool wrote, and whether its files are still the same."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qtool.checkpoint.digests import Digests, digest_files
from qtool.checkpoint.strict_json import JsonDict, read_json, refused
from qtool.errors import CheckpointRefused, is_there

MANIFEST = "qtool-manifest.json"
MANIFEST_VERSION = 1
STATE_FILE = "qtool-state.json"  # of a saved ModelOpt state, which has no manifest
STATE_WEIGHTS = "model.safetensors"
MAX_DIFFERENCES = 100  # that are said one by one
DOCUMENTATION = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


@dataclass(frozen=True)
class ManifestCheck:
    """The files of a folder, compared with its manifest: all but the documentation."""

    files: int
    """How many files the manifest lists."""
    changed: tuple[str, ...]
    """Listed files of another size or digest."""
    missing: tuple[str, ...]
    """Listed files that are not there."""
    added: tuple[str, ...]
    """What is there and not listed, without hidden names such as `.git` and `.cache`: tools that
    copy checkpoints leave them, and no loader reads them.
    """
    digests: Digests = field(repr=False)
    """Of the listed files that are there; empty when only names and sizes were compared."""

    @property
    def matches(self) -> bool:
        """Whether nothing differs."""
        return not (self.changed or self.missing or self.added)

    def differences(self) -> list[str]:
        """Return the first differences in words, and how many more there are."""
        found = [
            *(f"{name} is not the file that the manifest describes" for name in self.changed),
            *(f"{name} is in the manifest and missing" for name in self.missing),
            *(f"{name} is not in the manifest" for name in self.added),
        ]
        more = len(found) - MAX_DIFFERENCES
        return found[:MAX_DIFFERENCES] + ([f"{more:,} more files differ"] if more > 0 else [])

    def summary(self) -> str:
        """Return the result in a line."""
        if self.matches:
            return f"all {self.files} files match the manifest"
        counts = {"changed": self.changed, "missing": self.missing, "added": self.added}
        parts = [f"{len(names)} {what}" for what, names in counts.items() if names]
        return f"the files are not those of the manifest: {', '.join(parts)}"

    def to_dict(self) -> JsonDict:
        """Return the result for ``--json``."""
        values = asdict(self)
        del values["digests"]
        return {"matches": self.matches, **values}

    def refusal(self, folder: Path) -> CheckpointRefused:
        """Return the error for a source that differs from its manifest."""
        others = len(self.changed) + len(self.missing) + len(self.added) - 1
        more = f" (and {others:,} more)" if others else ""
        return refused(
            "E_MANIFEST_DIFFERS",
            f"{folder}: {self.differences()[0]}{more}",
            f"copy or download it again; if the change is meant, remove {MANIFEST} first",
        )


def has_manifest(folder: Path) -> bool:
    """Whether ``folder`` has a manifest, readable or not."""
    return is_there(folder / MANIFEST)


def read_manifest(folder: Path) -> JsonDict:
    """Return the manifest of ``folder``.

    Raises: CheckpointRefused, when there is none or it is not one of qtool's.
    """
    path = folder / MANIFEST
    if not has_manifest(folder):
        raise refused(
            "E_NO_MANIFEST",
            f"{folder} has no {MANIFEST}, so there is nothing to verify it with",
            "only checkpoints that qtool wrote have one",
        )
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, Mapping) or not all(
        _is_inside(name) and isinstance(entry, Mapping) for name, entry in files.items()
    ):
        raise refused("E_MANIFEST", f"{path}: `files` does not list files of the folder")
    return manifest


def check_manifest(
    folder: Path, *, read_data: bool = True, stop: threading.Event | None = None
) -> ManifestCheck:
    """Compare the files of ``folder`` with its manifest.

    Documentation may differ: people edit a model card and add pictures, and no engine reads them.

    Args:
        folder: a checkpoint that has a manifest.
        read_data: whether digests are compared, or names and sizes only.
        stop: once it is set, reading ends and the result is useless.
    Raises: CheckpointRefused, when there is no manifest or it cannot be read.
    """
    files_listed: Mapping[str, Mapping[str, object]] = read_manifest(folder)["files"]
    listed = {
        name: entry for name, entry in files_listed.items() if not _is_documentation_name(name)
    }
    present = {
        name: path
        for name, path in entries_of(folder, listed).items()
        if name != MANIFEST and not _is_documentation(path)
    }
    files = [path for name, path in present.items() if name in listed and path.is_file()]
    digests = digest_files(files, root=folder, stop=stop) if read_data else {}
    changed = [
        name
        for name, entry in sorted(listed.items())
        if name in present
        and (not _has_size(present[name], entry) or (read_data and digests.get(name) != entry))
    ]
    return ManifestCheck(
        files=len(listed),
        changed=tuple(changed),
        missing=tuple(sorted(listed.keys() - present.keys())),
        added=tuple(sorted(name for name in present.keys() - listed.keys() if name[0] != ".")),
        digests=digests,
    )


def entries_of(folder: Path, listed: Collection[str]) -> dict[str, Path]:
    """Return what is in ``folder`` by name; of a folder that ``listed`` has files in, these and
    whatever is beside them, as ``folder/name``.
    """
    folders = {name.partition("/")[0] for name in listed if "/" in name}
    found: dict[str, Path] = {}
    for path in folder.iterdir():
        if path.name in folders and path.is_dir() and not path.is_symlink():
            found |= {f"{path.name}/{each.name}": each for each in path.iterdir()}
        else:
            found[path.name] = path
    return found


def _is_inside(name: str) -> bool:
    """Whether ``name`` is that of a file in a folder, or in a folder there."""
    parts = name.split("/")
    return len(parts) <= 2 and not {"", ".", ".."} & {*parts}


def written_files(folder: Path) -> set[str]:
    """Return the names of the files in ``folder`` that qtool wrote, by its manifest or as a saved
    state; a model card that somebody has edited is not one of them.
    """
    try:
        if has_manifest(folder):
            files = read_manifest(folder)["files"]
            edited = {name for name in files if is_edited(folder / name, files[name])}
            return {MANIFEST, *files} - edited
        if is_there(folder / STATE_FILE) and "state_version" in read_json(folder / STATE_FILE):
            return {STATE_FILE, STATE_WEIGHTS}
    except CheckpointRefused:
        pass  # nothing shows that qtool wrote them
    return set()


def is_edited(path: Path, entry: Mapping[str, object]) -> bool:
    """Whether ``path`` is documentation that is not what ``entry`` of the manifest describes."""
    if not _is_documentation(path):
        return False
    return not _has_size(path, entry) or digest_files([path])[path.name] != entry


def _is_documentation_name(name: str) -> bool:
    return Path(name).suffix.lower() in DOCUMENTATION


def _is_documentation(path: Path) -> bool:
    return _is_documentation_name(path.name) and path.is_file()


def _has_size(path: Path, entry: Mapping[str, object]) -> bool:
    return path.is_file() and path.stat().st_size == entry.get("size_bytes")
