"""The files of a model folder that a run reads or copies: checked before the run, and compared
after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qtool.checkpoint.aux_files import CONFIGS, aux_files, links_outside, modules_left_out
from qtool.checkpoint.digests import Digests, digest_files
from qtool.checkpoint.model import INDEX, Checkpoint
from qtool.errors import CheckpointRefused


class FileState(NamedTuple):
    """What changes when a file is written to; it is known without reading the file."""

    size_bytes: int
    mtime_ns: int
    inode: int
    ctime_ns: int
    """Also changes with permissions and links, and nobody can set it back."""


@dataclass(frozen=True)
class SourceFiles:
    """The files of a model folder as they were when a run began."""

    folder: Path
    aux: tuple[Path, ...]
    """The auxiliary files that are copied to the output."""
    notes: tuple[str, ...]
    """What the user should know about them."""
    states: Mapping[Path, FileState]
    digests: Digests
    """Of the small files. The weights are hashed during the run."""

    @property
    def aux_bytes(self) -> int:
        """How many bytes are copied."""
        return sum(self.states[file].size_bytes for file in self.aux if file in self.states)

    @property
    def aux_names(self) -> list[str]:
        """The names of the auxiliary files, with the folder that one is in."""
        return [file.relative_to(self.folder).as_posix() for file in self.aux]

    def check_unchanged(self, weight_digests: Digests) -> None:
        """Raise CheckpointRefused when a file is not what it was when the run began.

        Only a file whose status alone changed, e.g. by ``chmod``, is read again and compared with
        its digest.

        Args:
            weight_digests: of the weights, as they were read during the run.
        """
        digests = {**self.digests, **weight_digests}
        for file, before in self.states.items():
            now = _state_of(file)
            if now == before:
                continue
            is_same = now is not None and now[:3] == before[:3]
            if is_same and self._has_digest(file, digests):
                continue
            raise CheckpointRefused(
                "E_SOURCE_CHANGED",
                f"{file} was changed during the run",
                hint="nothing was published; run again when nobody writes to the source",
            )

    def _has_digest(self, file: Path, digests: Digests) -> bool:
        ((name, digest),) = digest_files([file], root=self.folder).items()
        return digest == digests.get(name)


def source_files(checkpoint: Checkpoint) -> SourceFiles:
    """Return the files of ``checkpoint`` that a run needs.

    Raises: CheckpointRefused, when an auxiliary file cannot be copied.
    """
    folder = checkpoint.path
    aux = aux_files(folder)
    small = [*aux, *(folder / name for name in (*CONFIGS, INDEX) if (folder / name).is_file())]
    states = {file: _state_of(file) for file in (*checkpoint.weight_files, *small)}
    return SourceFiles(
        folder=folder,
        aux=tuple(aux),
        notes=(*checkpoint.notes, *links_outside(aux, folder), *modules_left_out(aux, folder)),
        states={file: state for file, state in states.items() if state},
        digests=digest_files(small, root=folder),
    )


def _state_of(file: Path) -> FileState | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return FileState(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)
