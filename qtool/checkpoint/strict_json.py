"""JSON from outside, read strictly: bounded in bytes, values and depth, no key twice, no half
characters.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qtool.errors import CheckpointRefused, naming, one_line

Json = Mapping[str, Any]  # a JSON object: what it holds is checked where it is used
JsonDict = dict[str, Any]
MAX_JSON_BYTES = 32 << 20  # the largest header and index of a public model are below 30 MB
MAX_JSON_VALUES = (
    1_500_000  # 120,000 tensors in one header; each value may take 100 bytes of memory
)
SMALL_BYTES = 1 << 20  # of values alone, this much JSON takes 40 MB of memory at most
DAMAGED = "the file is damaged or was changed: download or copy it again"


def parse_object(
    data: bytes, where: str, *, parse_int: Callable[[str], int] | None = None
) -> JsonDict:
    """Return the JSON object that ``data`` is; ``where`` names it in a refusal.

    Raises: CheckpointRefused, when it is not a JSON object, or is larger than any model needs.
    """
    # one wide character makes all of them wide in memory
    check_json_size(len(data) if data.isascii() else 4 * len(data), where)
    _check_value_count(data, where)
    try:
        value = json.loads(data.decode(), object_pairs_hook=_maker(where), parse_int=parse_int)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()
    except (RecursionError, ValueError) as error:
        raise _not_json(data, where, error) from None
    if not isinstance(value, dict):
        raise refused(
            "E_JSON_TYPE",
            f"{where}: a JSON object is expected, found {type(value).__name__}",
            "it must be `{...}`: take it from its source",
        )
    return value


def _maker(where: str) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    """Return a function that makes an object of its members and refuses a key that is repeated."""

    def make(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated = next(key for key, count in counts.items() if count > 1)
            raise refused(
                "E_JSON_DUPLICATE",
                f"{where}: the key `{repeated[:200]}` appears twice",
                "two writers or a bad merge: take the file from its source",
            )
        return result

    return make


def _check_value_count(data: bytes, where: str) -> None:
    if len(data) <= SMALL_BYTES:
        return
    values = sum(data.count(mark) for mark in (b"[", b"{", b",", b":"))
    if values > MAX_JSON_VALUES:
        raise refused(
            "E_JSON_VALUES",
            f"{where}: {values:,} JSON values; the limit is {MAX_JSON_VALUES:,}",
            "split the weights into more shards",
        )


def check_json_size(size: int, where: str) -> None:
    """Raise CheckpointRefused when ``size`` bytes are more JSON than any model has."""
    if size > MAX_JSON_BYTES:
        raise refused(
            "E_JSON_SIZE",
            f"{where}: {size:,} bytes of JSON; the limit is {MAX_JSON_BYTES:,}",
            "is it JSON at all? Look at its first line",
        )


def refused(code: str, message: str, hint: str = DAMAGED) -> CheckpointRefused:
    """Return the error for a file that is not what it must be."""
    return CheckpointRefused(code, message, hint=hint)


def _not_json(data: bytes, where: str, error: RecursionError | ValueError) -> CheckpointRefused:
    """Return the error for ``data`` that cannot be read, with what it is instead."""
    if isinstance(error, RecursionError):
        message = f"{where}: JSON nested too deeply, in {len(data):,} bytes"
        return refused("E_JSON_DEEP", message, "a real file is a few levels deep")
    if isinstance(error, UnicodeDecodeError):
        message = f"{where}: not JSON in UTF-8 ({error.reason} at byte {error.start:,})"
        return refused("E_JSON_ENCODING", message, "save it again as UTF-8")
    if isinstance(error, UnicodeEncodeError):
        half = f"U+{ord(error.object[error.start]):04X}"
        message = f"{where}: {half}, half a character, stands alone"
        return refused("E_JSON_SURROGATE", message, "save it again as UTF-8")
    if isinstance(error, json.JSONDecodeError):
        return _not_json_syntax(data, where, error)
    # an integer of thousands of digits
    return refused("E_JSON_NUMBER", f"{where}: a number cannot be read ({one_line(error)})")


def _not_json_syntax(data: bytes, where: str, error: json.JSONDecodeError) -> CheckpointRefused:
    start = data[:100].lstrip()
    if start.startswith(b"version https://git-lfs"):
        return refused(
            "E_LFS_POINTER",
            f"{where}: not JSON but a Git LFS pointer",
            "run `git lfs pull` in the folder, or download again",
        )
    if start.startswith(b"<"):
        return refused(
            "E_JSON_HTML",
            f"{where}: not JSON but an HTML page",
            "the download failed: fetch it again",
        )
    if not start:
        return refused(
            "E_JSON_EMPTY",
            f"{where}: not JSON, {len(data):,} bytes of nothing",
            "the download or copy was interrupted: fetch it again",
        )
    return refused("E_JSON_SYNTAX", f"{where}: not JSON ({error})")


def read_json(path: Path) -> JsonDict:
    """Return the JSON object in ``path``, refusing what is too large, too deep, repeated or not an
    object.
    """
    size = regular_size(path)
    check_json_size(size, str(path))
    with naming(path), path.open("rb") as file:
        return parse_object(file.read(size), str(path))


def finite(value: object) -> object:
    """Return ``value`` as JSON can hold it: NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def regular_size(path: Path) -> int:
    """Return the size of the file ``path``, which must be one: reading a FIFO or a device may never
    end.
    """
    if not path.exists():
        if path.is_symlink():
            message = f"{path} is a link to {path.readlink()}, which is missing"
            raise refused(
                "E_BROKEN_LINK",
                message,
                "copy the folder with its files (`cp -rL`), or download it again",
            )
        raise refused("E_MISSING_FILE", f"{path} is missing", "download or copy it again")
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kinds = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a FIFO",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }
        raise refused(
            "E_NOT_A_FILE",
            f"{path} is not a regular file but "
            f"{kinds.get(stat.S_IFMT(found.st_mode), 'something else')}",
            "put the file itself there",
        )
    return found.st_size
