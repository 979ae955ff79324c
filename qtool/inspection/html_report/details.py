"""What the HTML report knows of each module, and the row label that it goes under."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtool.inspection.comparison import Difference
from qtool.inspection.deep import ModuleNumbers
from qtool.inspection.html_report.formatting import decibel_text, number_text, short
from qtool.inspection.report import Inspection, Module
from qtool.modules import tower_of
from qtool.sizes import format_size

MAX_ROWS = 32  # rarer kinds share a row, so that the report stays small whatever the names are
MAX_LABEL = 40
USUAL_ORDER = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w3", "w2", "fc1", "fc2"),
)


@dataclass(frozen=True)
class ModuleDetails:
    """All linear modules, and what was measured of each, by name."""

    modules: tuple[Module, ...]
    differences: Mapping[str, Difference]
    """From the base checkpoint; empty when there is none."""
    numbers: Mapping[str, ModuleNumbers]
    """Empty when the data was not read."""

    @classmethod
    def of(cls, inspection: Inspection) -> ModuleDetails:
        """Return the details that ``inspection`` holds."""
        compared = inspection.against.modules if inspection.against else ()
        measured = inspection.deep.modules if inspection.deep else ()
        return cls(
            modules=inspection.modules,
            differences={module.name: module for module in compared},
            numbers={module.name: module for module in measured},
        )

    def describe(self, module: Module) -> list[str]:
        """Return the lines of one module's tooltip, its name first."""
        lines = [
            short(module.name),
            f"{stored_as(module)}, {module.shape[0]:,} × {module.shape[1]:,}",
            f"{format_size(module.size_bytes)}, {module.bits_per_weight:.2f} bits per weight",
        ]
        if difference := self.differences.get(module.name):
            undone = ", after undoing a rescaling" if difference.rescaled else ""
            lines.append(
                f"SQNR {decibel_text(difference.sqnr_db)}, largest error "
                f"{number_text(difference.max_error)}{undone}"
            )
        if numbers := self.numbers.get(module.name):
            lines += _number_lines(numbers)
        return lines


def _number_lines(numbers: ModuleNumbers) -> list[str]:
    scales = f"{number_text(numbers.scale_min)} to {number_text(numbers.scale_max)}"
    lines = [f"{numbers.saturated:.2%} saturated, scales {scales}"]
    if numbers.dead_rows or numbers.dead_columns:
        lines.append(f"{numbers.dead_rows:,} dead outputs, {numbers.dead_columns:,} dead inputs")
    return lines


def stored_as(module: Module) -> str:
    """Return the scheme of ``module``, or that it has none and why."""
    if module.scheme:
        return module.scheme
    return f"not quantized ({module.reason})" if module.reason else "not quantized"


def row_label(module: Module) -> str:
    """Return the kind of ``module``, behind its tower and its kind of expert."""
    parents = module.name.split(".")[:-1]
    tower = tower_of(".".join(parents))
    expert = next((part for part in parents if "expert" in part), "")
    return short(" ".join(filter(None, (tower, expert, module.kind))), MAX_LABEL)


def row_labels(modules: Sequence[Module]) -> dict[str, str]:
    """Return the row label of each module by name; the rarest labels become ``others``."""
    labels = {module.name: row_label(module) for module in modules}
    common = {label for label, _ in Counter(labels.values()).most_common(MAX_ROWS)}
    return {name: label if label in common else "others" for name, label in labels.items()}


def row_rank(label: str) -> tuple[int, int, str]:
    """Return the key that sorts row labels in the order of a decoder layer."""
    *parents, kind = label.split(" ")
    rank = USUAL_ORDER.index(kind) if kind in USUAL_ORDER else len(USUAL_ORDER)
    return len(parents), rank, label
