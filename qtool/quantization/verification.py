"""What a library wrote, compared with the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtool.backends import load_backend, version_of
from qtool.checkpoint import (
    Checkpoint,
    open_checkpoint,
)
from qtool.errors import (
    BackendFailed,
    InputRefused,
)
from qtool.formats import check_values, detect
from qtool.plan import Plan
from qtool.recipe import Auto


def verify(plan: Plan, folder: Path) -> Checkpoint:
    """Open the checkpoint in ``folder`` and hold it against the plan.

    Raises: BackendFailed, when a module has not the planned scheme, one was changed that should not
        be, or a value is NaN or an impossible scale.
    """
    try:
        written = open_checkpoint(folder)
        layout = detect(written)
        found = {name: module.scheme for name, module in layout.modules.items()} if layout else {}
        problems = [*_differences(plan, found), *check_values(written, layout)]
        if plan.recipe.kv_cache and (layout is None or layout.kv_cache != plan.recipe.kv_cache):
            problems.append(
                f"the KV cache is {layout.kv_cache if layout else None}, not {plan.recipe.kv_cache}"
            )
    except InputRefused as error:
        problems = [error.message]
    if problems:
        first = problems[0].replace(str(folder), "output")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        message = (
            f"{version_of(load_backend(plan.recipe.backend))} wrote a checkpoint that is not what "
            f"was asked for: {first}{more}"
        )
        raise BackendFailed(
            "E_VERIFY", message, hint="nothing was published; try another --backend"
        )
    return written


def _differences(plan: Plan, found: Mapping[str, Any]) -> Iterator[str]:
    searched = plan.recipe.steps(Auto)
    for module in plan.quantized:
        scheme = found.get(module.name)
        if searched and scheme in (None, *searched[0].candidates):
            continue
        if scheme is None:
            yield (
                f"`{module.name}` was to become {module.scheme and module.scheme.name} and was "
                "left in 16 bits"
            )
        elif scheme != module.scheme:
            yield (
                f"`{module.name}` was to become {module.scheme and module.scheme.name} and is "
                f"{scheme.name}"
            )
    for module in plan.left_alone:
        if module.name in found:
            yield (
                f"`{module.name}` was to be left alone ({module.reason}) and is "
                f"{found[module.name].name}"
            )
    planned = {module.name for module in plan.modules}
    for name in found:
        if name not in planned:
            yield f"`{name}` is {found[name].name} and is no linear module of the source"
