"""What commands print: the methods and the plan, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtool.backends import host_memory_bytes
from qtool.checkpoint.strict_json import JsonDict
from qtool.plan import Plan, sizes_by_kind
from qtool.recipe import Auto, Recipe, catalogue
from qtool.sizes import format_size
from qtool.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from qtool.quantization import Request
    from qtool.runtime.load_plan import Group, LoadPlan


def methods_dict(with_experimental: bool) -> list[JsonDict]:
    """Return one entry for each method, for ``--json``."""
    return [
        {
            "method": recipe.name,
            "aliases": recipe.aliases,
            "backend": recipe.backend,
            "scheme": _scheme(recipe),
            "bits_per_weight": recipe.scheme and round(recipe.scheme.bits_per_weight, 3),
            "needs_calibration": recipe.needs_data,
            "quantizes_on": recipe.runs_on,
            "native_gpu": _native_gpu(recipe),
            "experimental": recipe.experimental,
            "summary": recipe.summary,
        }
        for recipe in catalogue().values()
        if with_experimental or not recipe.experimental
    ]


def methods(with_experimental: bool) -> RenderableType:
    """Return the table of ``--list``."""
    from rich import box
    from rich.table import Table

    hidden = sum(recipe.experimental for recipe in catalogue().values())
    table = Table(
        box=box.SIMPLE,
        pad_edge=False,
        caption=None
        if with_experimental
        else f"{hidden} experimental methods more with --list --all",
    )
    for heading in (
        "method",
        "backend",
        "scheme",
        "bits",
        "data",
        "quantizes on",
        "native from",
        "summary",
    ):
        table.add_column(heading, no_wrap=heading != "summary")
    for entry in methods_dict(with_experimental):
        table.add_row(
            ", ".join([entry["method"], *entry["aliases"]]),
            entry["backend"],
            entry["scheme"],
            f"{entry['bits_per_weight']:.2f}" if entry["bits_per_weight"] else "-",
            "yes" if entry["needs_calibration"] else "no",
            ", ".join(entry["quantizes_on"]),
            entry["native_gpu"],
            ("experimental: " if entry["experimental"] else "") + entry["summary"],
        )
    return table


def plan(request: Request) -> RenderableType:
    """Return what ``--dry-run`` shows."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    plan, recipe = request.plan, request.plan.recipe
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("module", "scheme", "count", "before", "after"):
        table.add_column(heading, justify="left" if heading in ("module", "scheme") else "right")
    for (kind, scheme), (count, before, after) in sizes_by_kind(plan).items():
        table.add_row(kind, scheme, str(count), format_size(before), format_size(after))
    others = Counter[str]()
    for name, reason in plan.other_matrices.items():
        others[reason] += plan.checkpoint.tensors[name].size_bytes
    for reason, size in others.items():
        table.add_row("other", f"16 bit: {reason}", "", format_size(size), format_size(size))
    rest = plan.bytes_before - others.total() - sum(each.bytes_before for each in plan.modules)
    table.add_row("embeddings, norms", "16 bit", "", format_size(rest), format_size(rest))
    table.add_row(
        "all", "", "", format_size(plan.bytes_before), format_size(plan.bytes_after), style="bold"
    )
    return Group(
        f"{recipe.name}: {recipe.summary}",
        f"backend {recipe.backend}, algorithm "
        f"{' + '.join(step.name for step in recipe.algorithm)}, {_data(request)}",
        *(
            f"sizes are those of {recipe.schemes[0].name} everywhere; the search chooses within "
            f"{step.effective_bits:g} bits"
            for step in recipe.steps(Auto)
        ),
        table,
        f"quantized: {plan.quantized_share:.0%} of the language model's matrices",
        f"memory: {_memory(plan)}; runs native from {_native_gpu(recipe)}",
        f"output: {request.output}" + (" (exists)" if request.output.exists() else ""),
        *(f"note: {note}" for note in request.notes),
    )


def _data(request: Request) -> str:
    recipe = request.plan.recipe
    kv_cache = f", {recipe.kv_cache} scales for the KV cache" if recipe.kv_cache else ""
    if not recipe.needs_data:
        return f"no calibration data{kv_cache}"
    data = recipe.calibration
    missing = " (--calibration is still missing)" if request.calibration is None else ""
    return f"{data.num_samples} samples of up to {data.seq_len} tokens{missing}{kv_cache}"


def _memory(plan: Plan) -> str:
    recipe = plan.recipe
    host = f"about {format_size(host_memory_bytes(plan))} with Python and the libraries"
    if recipe.backend == "gptqmodel":
        return f"{host} (layer by layer)"
    if recipe.backend == "llmcompressor" and recipe.needs_data:
        data = recipe.calibration
        _, by_layer = plan.peak_memory(data.num_samples, data.seq_len)
        return f"{host}, on the GPU about {format_size(by_layer)}"
    return host


def _scheme(recipe: Recipe) -> str:
    scheme = recipe.scheme.name if recipe.scheme else "-"
    return f"{scheme} + {recipe.kv_cache} KV cache" if recipe.kv_cache else scheme


def _native_gpu(recipe: Recipe) -> str:
    natives = [scheme.native_gpu for scheme in recipe.schemes] + (
        ["sm_89"] if recipe.kv_cache else []
    )
    return max(natives, key=lambda native: int(native.removeprefix("sm_")))


def kernels(plan: LoadPlan) -> RenderableType:
    """Return what ``serve --dry-run`` shows: a line for each kind of layer and the kernel that
    takes it.
    """
    from rich import box
    from rich.table import Table

    from qtool.runtime.kernels import device_of

    counts = Counter(
        (
            _kind([source.name for source in group.sources]),
            group.spec.scheme.name,
            _kernels(group),
            _reasons(group),
        )
        for group in plan.groups
    )
    title = f"{plan.checkpoint.name} on {device_of(plan.device)}"
    table = Table(box=box.SIMPLE, pad_edge=False, title=title, title_justify="left")
    for heading in ("layers", "fused", "scheme", "kernel", "not taken by"):
        table.add_column(heading, no_wrap=heading != "not taken by")
    for (kind, scheme, kernel, reasons), count in counts.items():
        table.add_row(str(count), kind, scheme, _lines(kernel), _lines(reasons))
    if not counts:
        table.caption = "no quantized layers: all run in 16 bits"
    return table


def _kind(names: Sequence[str]) -> str:
    return " | ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _kernels(group: Group) -> tuple[str, ...]:
    names = str(group.choice).split(", ")
    return *(f"{name}," for name in names[:-1]), names[-1]


def _reasons(group: Group) -> tuple[str, ...]:
    return tuple(f"{kernel}: {reason}" for kernel, reason in group.choice.refused.items())


def _lines(lines: Sequence[str]) -> Text:
    from rich.text import Text

    return Text("\n").join(Text(printable(line)) for line in lines)
