"""`quantize` with a gate: the result is compared with its source before it gets its name."""

from __future__ import annotations

import os
from functools import partial
from itertools import islice
from pathlib import Path

from qtool.checkpoint import Checkpoint, open_checkpoint
from qtool.errors import GateFailed
from qtool.evaluation.gate import NAMES, Limit, parse_gate
from qtool.evaluation.report import Evaluation
from qtool.events import OnEvent, ignore_event
from qtool.options import EvalOptions, QuantizeOptions, keywords_of, make_options
from qtool.quantization import Measured, QuantizeResult, Request, prepare, run

WORST_LAYERS = 3


@keywords_of(QuantizeOptions)
def quantize(
    model_path: str | os.PathLike[str], *, on_event: OnEvent = ignore_event, **options: object
) -> QuantizeResult:
    """Quantize a model and write a complete checkpoint folder.

    Args:
        model_path: a checkpoint folder or a Hub name.
        on_event: gets what the run reports: an `Event` of `qtool.events`.
        options: the fields of `qtool.options.QuantizeOptions`.
    Raises: QtoolError. Nothing is left behind then but, when a library failed, its log; and with
        ``keep_failed`` the output that did not pass the gate.
    """
    request = prepare(model_path, make_options(QuantizeOptions, options))
    check_request(request)
    return run_gated(request, on_event=on_event)


def check_request(request: Request) -> list[Limit]:
    """Return the limits of the run's gate; none without one.

    Raises: UsageError, for a limit on what a run does not measure; DataRefused, when the gate's
        texts cannot be read; CheckpointRefused, for a model that continues no text.
    """
    if not request.gate:
        return []
    limits = parse_gate(request.gate, request.plan.recipe.schemes, NAMES.__contains__)
    # with torch, which a run without a gate does not need
    from qtool.evaluation.execution import check_source

    check_source(request.plan.checkpoint, _options(request))
    return limits


def run_gated(request: Request, *, on_event: OnEvent = ignore_event) -> QuantizeResult:
    """Run a prepared request; with a gate, what it wrote is evaluated before it is published.

    Raises: GateFailed, naming the limits and the worst layers.
    """
    measure = partial(_measure, request, on_event) if request.gate else None
    return run(request, on_event=on_event, measure=measure)


def _measure(request: Request, on_event: OnEvent, written: Path) -> Measured:
    from qtool.evaluation.execution import run_evaluation

    found = run_evaluation(written, _options(request), on_event=on_event)
    failure = _failure(request, found, written) if found.failed else None
    return Measured(evaluation=found.for_manifest(), lines=_lines(found), failure=failure)


def _options(request: Request) -> EvalOptions:
    return EvalOptions(
        reference=request.plan.checkpoint.path,
        data=request.gate_data,
        gate=request.gate,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
    )


def _failure(request: Request, found: Evaluation, written: Path) -> GateFailed:
    limits = "; ".join(str(check) for check in found.failed)
    faults = "".join(f"; {fault}" for fault in found.faults)
    worst = _worst_layers(open_checkpoint(written), request.plan.checkpoint)
    kept = "; --keep-failed keeps the output" if not request.keep_failed else ""
    return GateFailed(
        "E_GATE_FAILED",
        f"{request.output}: {limits}{faults}",
        hint=f"the layers farthest from the source: {worst}; leave them in 16 bits with --ignore, "
        f"or choose a method with more bits{kept}",
    )


def _worst_layers(quantized: Checkpoint, source: Checkpoint) -> str:
    from qtool.inspection.comparison import compare

    modules = compare(quantized, source).modules
    return ", ".join(
        f"{module.name} ({module.sqnr_db:.1f} dB)"
        for module in islice((each for each in modules if each.sqnr_db is not None), WORST_LAYERS)
    )


def _lines(found: Evaluation) -> tuple[str, ...]:
    measures = found.measures
    return (
        f"perplexity {measures['ppl'].value:.4g} ({measures['ppl_ratio'].value:.4f} of the "
        f"reference's), KL {measures['mean_kl'].value:.4g}, same first choice "
        f"{measures['top1'].value:.1%}, on {found.data.tokens:,} tokens",
        *(f"gate {check}" for check in found.checks),
    )
