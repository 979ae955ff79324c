"""Tasks of lm-eval on qtool's engine: `run_tasks`, and `recovery`, what a quantized model keeps."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from qtool.errors import BackendFailed, QtoolError, ResourceError, UsageError, nearest, one_line
from qtool.events import OnEvent, ignore_event

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

BOOTSTRAPS = 1000  # resamplings for metrics whose standard error has no formula
Document: TypeAlias = tuple[str, int]  # a task and the number of a document in it
_SAME = 1e-9


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    """E.g. ``exact_match``, or ``exact_match (strict-match)`` where answers are read in several
    ways.
    """
    value: float
    stderr: float | None
    """None where lm-eval has none, e.g. of a single document."""
    higher_is_better: bool
    documents: int
    by_document: Mapping[Document, float] = field(default_factory=dict, repr=False)
    """The value of each document, when the metric is their mean; else empty."""

    def to_dict(self) -> dict[str, object]:
        """Return the score for ``--json``."""
        values = vars(self)
        return {name: value for name, value in values.items() if name != "by_document"}


@dataclass(frozen=True)
class Recovery:
    """The share of a score that a quantized model keeps; above 1 it is better than its base."""

    value: float | None
    """None when the base has nothing to keep."""
    stderr: float | None
    paired: bool
    """Whether documents were compared one by one, which makes the standard error smaller."""


@dataclass(frozen=True)
class KnownTasks:
    """Tasks of lm-eval that exist."""

    names: Sequence[str]
    """Of tasks and groups."""

    has_groups: bool
    """Whether more tasks than those of ``names`` get a score."""

    def may_score(self, name: str) -> bool:
        """Whether the task ``name`` may be one that gets a score."""
        return self.has_groups or name in self.names


def find_tasks(tasks: Sequence[str]) -> KnownTasks:
    """Return the tasks that names, or patterns such as ``arc_*``, stand for.

    Raises: UsageError, for an unknown task; ResourceError, when lm-eval is not installed.
    """
    if not tasks:
        return KnownTasks((), has_groups=False)
    _check_installed()
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stdout(sys.stderr), _failures(tasks):
        manager = TaskManager()
        names = _known(tasks, manager)
        return KnownTasks(names, has_groups=not set(names).issubset(manager.all_subtasks))


def run_tasks(
    model_path: str | os.PathLike[str],
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    task_folder: str | os.PathLike[str] | None = None,
    device: str | None = None,
    on_event: OnEvent = ignore_event,
    **options: object,
) -> list[TaskScore]:
    """Return the scores of a checkpoint at tasks of lm-eval, in the order of ``tasks``; the first
    metric of a task is the one that it names first.

    Args:
        model_path: a checkpoint folder or a name on the Hub.
        tasks: names of tasks or groups, or patterns such as ``arc_*``.
        limit: documents of each task; None: all.
        num_fewshot: examples in each prompt; None: what the task says.
        chat_template: whether prompts are written as the turns of a chat.
        task_folder: a folder with tasks as YAML files, which take the place of lm-eval's own.
        device: cpu, cuda or cuda:<n>; None: a GPU, if there is one.
        on_event: gets what the run reports.
        options: further fields of `EngineConfig`.
    Raises: UsageError, for an unknown task; ResourceError, when lm-eval is not installed or data
        of a task cannot be had; BackendFailed, when lm-eval fails.
    """
    _check_installed()
    import lm_eval
    from lm_eval.tasks import TaskManager

    from qtool.evaluation.engine_lm import EngineLM

    with contextlib.redirect_stdout(sys.stderr), _failures(tasks):
        folder = None if task_folder is None else os.fspath(task_folder)
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        names = _known(tasks, manager)
        model = EngineLM(os.fspath(model_path), device=device, on_event=on_event, **options)
        with model.engine:
            found = lm_eval.simple_evaluate(
                model,
                tasks=names,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat_template,
                bootstrap_iters=BOOTSTRAPS,
                task_manager=manager,
            )
    return list(_scores(found))


def recovery(base: TaskScore, quantized: TaskScore) -> Recovery:
    """Return the share of ``base`` that ``quantized`` keeps: their ratio, or its inverse where
    lower is better, with its standard error by the delta method, paired by document where both
    have the same documents.
    """
    if not base.higher_is_better:
        base, quantized = quantized, base
    if base.value == 0:
        return Recovery(None, None, paired=False)
    ratio = quantized.value / base.value
    if base.by_document and base.by_document.keys() == quantized.by_document.keys():
        return Recovery(ratio, _paired_stderr(base, quantized, ratio), paired=True)
    if base.stderr is None or quantized.stderr is None:
        return Recovery(ratio, None, paired=False)
    stderr = math.hypot(quantized.stderr, ratio * base.stderr) / abs(base.value)
    return Recovery(ratio, stderr, paired=False)


def _paired_stderr(base: TaskScore, quantized: TaskScore, ratio: float) -> float | None:
    """Return the standard error of a ratio of means: that of the mean of ``q - ratio * b``."""
    rest = [
        quantized.by_document[document] - ratio * value
        for document, value in base.by_document.items()
    ]
    if len(rest) < 2:
        return None
    return statistics.stdev(rest) / math.sqrt(len(rest)) / abs(base.value)


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            "E_LM_EVAL",
            f"tasks need lm-eval, which cannot be imported: {one_line(error)}",
            hint="pip install 'qtool[eval]'",
        ) from error


def _known(tasks: Sequence[str], manager: TaskManager) -> list[str]:
    """Return the names that ``tasks`` stand for. Raises: UsageError, for an unknown one."""
    names: list[str] = []
    for task in tasks:
        found = manager.match_tasks([task])
        if not found:
            alike = [name for name in manager.all_tasks if name[:2] == task[:2]]  # of thousands
            hint = nearest(task, alike) or "`lm-eval ls tasks` shows them"
            raise UsageError("E_TASK", f"unknown task `{task}`", hint=hint)
        names += [name for name in found if name not in names]
    return names


@contextlib.contextmanager
def _failures(tasks: Sequence[str]) -> Iterator[None]:
    """Turn what lm-eval raises into a QtoolError."""
    try:
        yield
    except QtoolError:
        raise
    except OSError as error:  # those of data sets and of the Hub too
        raise ResourceError(
            "E_TASK_DATA",
            f"the data of {', '.join(tasks)} cannot be had: {one_line(error)}",
            hint="check the network, or load it where there is one and set HF_HOME to that cache",
        ) from error
    except Exception as error:
        raise BackendFailed(
            "E_TASK_FAILED",
            f"lm-eval failed ({type(error).__name__}): {one_line(error)}",
            hint="--debug shows where",
        ) from error


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Yield every metric of what lm-eval returned."""
    for task, metrics in {**found["results"], **found.get("groups", {})}.items():
        better = found["higher_is_better"].get(task, {})
        for key, value in metrics.items():
            name, _, reading = key.partition(",")
            if not reading or name.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{name}_stderr,{reading}")
            score = TaskScore(
                task=task,
                metric=name if reading == "none" else f"{name} ({reading})",
                value=float(value),
                stderr=stderr if isinstance(stderr, float) else None,
                higher_is_better=better.get(name) is not False,
                documents=int(metrics.get("sample_len", 0)),
            )
            yield replace(score, by_document=_by_document(found, score, name, reading))


def _by_document(
    found: Mapping[str, Any], score: TaskScore, metric: str, reading: str
) -> dict[Document, float]:
    """Return the value of each document; nothing, unless the score is their mean."""
    values = {
        (task, sample["doc_id"]): float(sample[metric])
        for task in _leaves(found, score.task)
        for sample in found["samples"].get(task, ())
        if sample["filter"] == reading and isinstance(sample.get(metric), bool | int | float)
    }
    if not values or abs(statistics.fmean(values.values()) - score.value) > _SAME:
        return {}
    return values


def _leaves(found: Mapping[str, Any], task: str) -> list[str]:
    """Return the tasks of a group; of a task, itself."""
    children = found.get("group_subtasks", {}).get(task) or ()
    return [leaf for child in children for leaf in _leaves(found, child)] or [task]
