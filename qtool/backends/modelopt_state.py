"""A calibrated, fake-quantized ModelOpt model on disk, as JSON and safetensors: reading one can run
no code.

The folder holds ``qtool-state.json`` (what ModelOpt changed in the model, the recipe, versions, the
model it is of) and ``model.safetensors`` (weights and quantizer tensors). A file of ``mto.save`` is
a pickle; it is taken only when the user trusts it, and ModelOpt then loads it with weights-only
loading.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qtool.checkpoint import Checkpoint, read_json
from qtool.checkpoint.header import read_header
from qtool.checkpoint.manifest import STATE_FILE, STATE_WEIGHTS
from qtool.checkpoint.strict_json import JsonDict
from qtool.errors import CheckpointRefused, StateRefused, UsageError, one_line
from qtool.plan import Plan
from qtool.recipe import Recipe, recipe_from

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

STATE_VERSION = 1
CALIBRATE_AGAIN = "calibrate again with --checkpoint-save-path"
STATE_KEYS = {"state_version", "modelopt_version", "model", "recipe", "tied", "modelopt_state"}
SAMPLE_BYTES = 4096
# of a recipe; a state is of one choice of these
WHAT_COUNTS = {
    "scheme",
    "algorithm",
    "kv_cache",
    "lm_head",
    "rules",
    "ignore",
}


def save_state(model: Module, folder: str, plan: Plan) -> None:
    """Write the state of ``model`` to the empty ``folder``."""
    import modelopt.torch.opt as mto
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        span = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and span in seen:
            tied[name] = seen[span]
            continue
        seen[span] = name
        tensors[name] = tensor.detach().contiguous().cpu()
    save_file(tensors, Path(folder) / STATE_WEIGHTS)
    state = {
        "state_version": STATE_VERSION,
        "modelopt_version": importlib.metadata.version("nvidia-modelopt"),
        "model": _fingerprint(plan.checkpoint),
        "recipe": plan.recipe.to_dict(),
        "tied": tied,
        "modelopt_state": _to_json(mto.modelopt_state(model)),
    }
    (Path(folder) / STATE_FILE).write_text(json.dumps(state))


def restore_state(model: Module, path: str, plan: Plan) -> None:
    """Put the state in ``path`` back onto ``model``, freshly loaded from the checkpoint it was made
    of.
    """
    import modelopt.torch.opt as mto

    if Path(path).is_file():
        try:
            mto.restore(model, path)
        except Exception as error:
            raise StateRefused(
                "E_STATE",
                f"{path}: ModelOpt cannot restore it: {one_line(error)}",
                hint=CALIBRATE_AGAIN,
            ) from error
        return
    from safetensors.torch import load_file

    state = read_state(path, plan.checkpoint)
    mto.restore_from_modelopt_state(model, modelopt_state=_from_json(state["modelopt_state"]))
    tensors = load_file(Path(path) / STATE_WEIGHTS)
    tensors |= {name: tensors[source] for name, source in state["tied"].items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        message = f"{path}: its tensors do not fit the model: {one_line(error)}"
        raise StateRefused(
            "E_STATE", message, hint="restore it onto the model it was made of"
        ) from error


def state_recipe(path: str, *, trust_pickle: bool) -> Recipe:
    """Return the recipe a state folder was made with.

    Raises: StateRefused, and UsageError for a trusted pickle, which does not say.
    """
    if Path(path).is_file():
        _check_pickle(path, trust_pickle=trust_pickle)
        message = f"{path} is a file of mto.save, which does not say by which method it was made"
        raise UsageError("E_NO_METHOD", message, hint="add --method, e.g. --method modelopt_fp8")
    return recipe_from(_read(path)["recipe"])


def check_state(path: str, plan: Plan, *, trust_pickle: bool) -> None:
    """Refuse, before any work, a state that is missing, a pickle that is not trusted, of another
    model, recipe or ModelOpt.
    """
    if Path(path).is_file():
        _check_pickle(path, trust_pickle=trust_pickle)
        return
    made, asked = read_state(path, plan.checkpoint)["recipe"], plan.recipe.to_dict()
    for key in sorted(WHAT_COUNTS):
        if made.get(key) != asked[key]:
            message = (
                f"{path} was calibrated for `{made.get('name')}`, and `{plan.recipe.name}` as "
                f"asked for differs from it in `{key}`"
            )
            raise StateRefused(
                "E_STATE_RECIPE",
                message,
                hint="leave --method and its options out: the state knows its own",
            )


def _check_pickle(path: str, *, trust_pickle: bool) -> None:
    if not trust_pickle:
        message = f"{path} is a pickle file, not a state folder written by qtool"
        raise StateRefused(
            "E_STATE_PICKLE",
            message,
            hint="if you made it with mto.save yourself, add --trust-pickle",
        )


def read_state(path: str, checkpoint: Checkpoint) -> JsonDict:
    """Return the state's JSON after checking that it belongs to ``checkpoint`` and to the installed
    ModelOpt.
    """
    state = _read(path)
    if state.get("model") != _fingerprint(checkpoint):
        message = f"{path} was made of another model than {checkpoint.source}"
        raise StateRefused(
            "E_STATE_MODEL", message, hint="give the model it was made of as --model-path"
        )
    made, installed = (
        str(state.get("modelopt_version")),
        importlib.metadata.version("nvidia-modelopt"),
    )
    if made.split(".")[:2] != installed.split(".")[:2]:
        raise StateRefused(
            "E_STATE_VERSION",
            f"{path} was made with ModelOpt {made}, installed is {installed}",
            hint="calibrate again, or install that version",
        )
    return state


def _read(path: str) -> JsonDict:
    folder = Path(path)
    if not folder.exists():
        raise StateRefused(
            "E_STATE",
            f"{path}: no such state",
            hint="`qtool quantize --checkpoint-save-path` writes one",
        )
    if not (folder / STATE_FILE).is_file():
        raise StateRefused(
            "E_STATE",
            f"{path} has no {STATE_FILE}, so it is not a state written by qtool",
            hint="give the folder that --checkpoint-save-path wrote",
        )
    try:
        state = read_json(folder / STATE_FILE)
        read_header(folder / STATE_WEIGHTS)
    except CheckpointRefused as error:
        raise StateRefused("E_STATE", error.message, hint=CALIBRATE_AGAIN) from error
    if not state.keys() >= STATE_KEYS:
        raise StateRefused(
            "E_STATE",
            f"{path}: {STATE_FILE} lacks {', '.join(sorted(STATE_KEYS - state.keys()))}",
            hint=CALIBRATE_AGAIN,
        )
    if state["state_version"] != STATE_VERSION:
        raise StateRefused(
            "E_STATE_VERSION",
            f"{path}: state version {state.get('state_version')!r} is not {STATE_VERSION}",
            hint=CALIBRATE_AGAIN,
        )
    return state


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Return a digest of what defines the model: its tensors' names, dtypes and shapes, and 4 KB of
    the middle of each.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + max(0, tensor.size_bytes - SAMPLE_BYTES) // 2)
            digest.update(file.read(min(tensor.size_bytes, SAMPLE_BYTES)))
    return digest.hexdigest()


def _to_json(value: object) -> object:
    """Encode what ModelOpt's state is made of; lists, tuples, sizes, dtypes and dictionaries with
    other keys than strings get a tag.
    """
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return _to_json_list(value)
    if isinstance(value, torch.Size | tuple):
        return {"tuple" if type(value) is tuple else "size": _to_json_list(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"dict": [_to_json_list(item) for item in value.items()]}
    raise TypeError(
        f"ModelOpt's state holds a {type(value).__name__}, which this version of the state file "
        "does not know"
    )


def _to_json_list(values: Iterable[object]) -> list[object]:
    return [_to_json(value) for value in values]


def _from_json(value: object) -> object:
    """Return what `_to_json` encoded. Raises: StateRefused, when it encoded no such thing."""
    import torch

    if isinstance(value, list):
        return _from_json_list(value)
    if not isinstance(value, dict):
        return value
    (kind, content), *rest = value.items()
    if rest or kind not in ("tuple", "size", "dtype", "dict"):
        raise StateRefused(
            "E_STATE", f"the state holds an unknown entry `{kind}`", hint=CALIBRATE_AGAIN
        )
    if kind == "dtype":
        return _dtype_named(str(content))
    if kind == "dict":
        return {_from_json(key): _from_json(item) for key, item in content}
    items = _from_json_list(content)
    return torch.Size(cast("list[int]", items)) if kind == "size" else tuple(items)


def _from_json_list(values: Iterable[object]) -> list[object]:
    return [_from_json(value) for value in values]


def _dtype_named(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateRefused(
            "E_STATE", f"the state holds an unknown dtype `{name}`", hint=CALIBRATE_AGAIN
        )
    return dtype
