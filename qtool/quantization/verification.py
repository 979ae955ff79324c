"""What a library wrote, compared with the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qtool.backends import load_backend, version_of
from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.errors import BackendFailed, InputRefused
from qtool.formats import Layout, check_values, detect, unquantized_tensors
from qtool.modules import parse_cache_scale
from qtool.plan import Plan
from qtool.recipe import Auto
from qtool.scheme import Scheme


def verify(plan: Plan, folder: Path) -> Checkpoint:
    """Open the checkpoint in ``folder`` and compare it with the plan.

    Raises: BackendFailed, when a module does not have the planned scheme, one was changed that
        should not be, or a value is NaN or an impossible scale.
    """
    try:
        written = open_checkpoint(folder, is_written=True)
        problems = list(_problems(plan, written))
    except InputRefused as error:
        problems = [error.message]
    if problems:
        raise wrong_output(plan, folder, problems)
    return written


def wrong_output(plan: Plan, folder: Path, problems: Sequence[str]) -> BackendFailed:
    """Return the error for a library that wrote to ``folder`` what was not planned."""
    first = problems[0].replace(str(folder), "output")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = (
        f"{version_of(load_backend(plan.recipe.backend))} wrote a checkpoint that is not what "
        f"was asked for: {first}{more}"
    )
    return BackendFailed("E_VERIFY", message, hint="nothing was published; try another --backend")


def _problems(plan: Plan, written: Checkpoint) -> Iterator[str]:
    layout = detect(written)
    modules = layout.modules if layout else {}
    found = {name: module.scheme for name, module in modules.items()}
    yield from _wrong_schemes(plan, found)
    yield from _unplanned(plan, found)
    yield from _unknown_tensors(plan, written, layout)
    yield from check_values(written, layout)
    kv_cache = layout.kv_cache if layout else None
    if plan.recipe.kv_cache and kv_cache != plan.recipe.kv_cache:
        yield f"the KV cache is {kv_cache}, not {plan.recipe.kv_cache}"


def _wrong_schemes(plan: Plan, found: Mapping[str, Scheme]) -> Iterator[str]:
    """Say which modules do not have the planned scheme, or one that the search may choose."""
    searched = plan.recipe.steps(Auto)
    for module in plan.quantized:
        scheme = found.get(module.name)
        if searched and scheme in (None, *searched[0].candidates):
            continue
        planned = module.scheme and module.scheme.name
        if scheme is None:
            yield f"`{module.name}` was to become {planned} and was left in 16 bits"
        elif scheme != module.scheme:
            yield f"`{module.name}` was to become {planned} and is {scheme.name}"


def _unknown_tensors(plan: Plan, written: Checkpoint, layout: Layout | None) -> Iterator[str]:
    """Say which tensors are neither of the source nor parts of quantized layers."""
    layers = {module.name for module in plan.quantized}
    for name in unquantized_tensors(written, layout):
        owner = name.rpartition(".")[0]
        is_known = name in plan.checkpoint.tensors or owner in layers
        is_known |= name == "lm_head.weight" and _is_untied(plan, written)
        if not is_known and parse_cache_scale(name) is None:
            yield f"`{name}` is not a tensor of the source"


def _is_untied(plan: Plan, written: Checkpoint) -> bool:
    """Whether the head has become a matrix of its own, as SpinQuant's rotations make it."""
    return plan.checkpoint.tied_embeddings and not written.tied_embeddings


def _unplanned(plan: Plan, found: Mapping[str, Scheme]) -> Iterator[str]:
    """Say which modules are quantized and should not be."""
    for module in plan.left_alone:
        if module.name in found:
            yield (
                f"`{module.name}` was to be left alone ({module.reason}) and is "
                f"{found[module.name].name}"
            )
    planned = {module.name for module in plan.modules}
    for name in found:
        if name not in planned:
            yield f"`{name}` is {found[name].name} and not a linear module of the source"
