"""Quantize a small random model of every architecture by one method of each kind, and try what
comes out: the table in docs/models.md.

    python tests/benchmarks/architectures.py [NAME ...] [--methods A,B] [--work DIR]
        [--results FILE.json] [--jobs 2] [--write docs/models.md]

A cell is `right`, with the share of the language model that is quantized; or it is `refused`, by
the dry run, with a reason and a way on; or it is `WRONG`. Right means: the run does what its dry run
said; every tensor of the source is in the output, as it was or quantized; `inspect --deep` finds
nothing; a matrix is as close to the source as its bits allow; `qtool.load` computes what the
dequantized model does; the engine continues a prompt alone and beside another as that model does, or
refuses the model by name; `export --to bf16` gives the same model; and where `inspect --engine
transformers` says that it loads, it does and computes the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
DATA = ROOT / "examples" / "tiny-python-llama" / "calibration.jsonl"
METHODS = ("fp8_dynamic", "modelopt_fp8", "w4a16_gptq", "gptq_int4", "awq_int4", "nvfp4")
START, END = "<!-- table: tests/benchmarks/architectures.py -->", "<!-- end -->"
PROMPTS = ([*range(20, 44)], [*range(300, 360)])
# KL divergence to the dequantized model, by the bits of inputs
BOUNDS = {16: 0.002, 8: 0.05, 4: 0.15}
SCALED_BOUND = 0.3  # to the source, where only the product of norms and matrices is kept
LEAST_SQNR_DB = {4: 12.0, 8: 25.0}
TOKENS = 8


@dataclass(frozen=True)
class Cell:
    """What came of one method on one model."""

    state: str
    """`right`, `refused` or `WRONG`."""
    share: float | None = None
    """Of the parameters in matrices of the language model that are quantized."""
    what: str = ""
    """Why it was refused, what is wrong, or what the engine lacks."""


class Wrong(Exception):
    """What came out is not right."""


def try_method(name: str, method: str, work: Path) -> Cell:
    """Quantize the model ``name`` and check the result."""
    from qtool.errors import QtoolError
    from qtool.options import QuantizeOptions
    from qtool.quantization.execution import run
    from qtool.quantization.request import prepare
    from qtool.quantization.restoration import TRANSFORMS

    model, output = work / "models" / name, work / "outputs" / f"{name}-{method}"
    shutil.rmtree(output, ignore_errors=True)
    warnings.simplefilter("ignore")
    options = QuantizeOptions(
        method=method,
        calibration=str(DATA),
        num_samples=8,
        seq_len=64,
        device="cpu",
        output=str(output),
        overwrite=True,
    )
    try:
        request = prepare(model, options)
    except QtoolError as error:
        if not error.hint or error.exit_code == 1:
            return Cell("WRONG", what=f"refused without a way on: {error.message}")
        return Cell("refused", what=f"{error.message}; {error.hint}")
    share = request.plan.quantized_share
    try:
        run(request)
        is_scaled = any(isinstance(step, TRANSFORMS) for step in request.plan.recipe.algorithm)
        lacks = check(model, output, is_scaled=is_scaled)
    except QtoolError as error:
        return Cell("WRONG", share, f"{error.code} after the dry run: {error.message}")
    except Wrong as wrong:
        return Cell("WRONG", share, str(wrong))
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
        return Cell("WRONG", share, what)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return Cell("right", share, lacks)


def check(model: Path, output: Path, *, is_scaled: bool) -> str:
    """Raise Wrong unless ``output`` is ``model`` quantized; return what the engine lacks for it.

    With ``is_scaled``, norms and matrices are scaled against each other before they are rounded.
    """
    import torch

    import qtool
    from qtool import formats
    from qtool.checkpoint import open_checkpoint
    from qtool.evaluation.perplexity import load_dequantized
    from qtool.inspection.report import inspect

    source, written = open_checkpoint(model), open_checkpoint(output)
    layout = formats.detect(written)
    if layout is None:
        raise Wrong("nothing is quantized")
    report = inspect(written, deep=True, against=source)
    if report.damage or report.warnings:
        raise Wrong(f"inspect --deep: {(*report.damage, *report.warnings)[0]}")
    check_tensors(source, written, layout, is_scaled=is_scaled)
    if report.against is not None:
        check_matrices(report.against.modules, layout)
    check_expert_tokens(written, layout)
    dequantized = load_dequantized(written)
    expected = logits(dequantized)
    bits = min(input_bits(each.scheme) for each in layout.modules.values())
    bound = BOUNDS[bits]
    is_mixture = "experts" in "".join(written.tensors)
    if is_mixture:
        bound *= 3  # a rounding may choose other experts of a random router
    if is_scaled:
        compare("the source", expected, logits(load_dequantized(source)), SCALED_BOUND)
    loaded = qtool.load(output, device="cpu")
    compare("qtool.load", logits(loaded), expected, bound)
    lacks = check_engine(output, loaded, is_coarse=is_mixture or bits < 8)
    plain = output.with_name(f"{output.name}-bf16")
    try:
        qtool.export(output, to="bf16", output=plain, overwrite=True)
        found = logits(load_dequantized(open_checkpoint(plain)))
        if bits == 16:
            compare("export --to bf16", found, expected, bound)
    finally:
        shutil.rmtree(plain, ignore_errors=True)
    verdict = inspect(written, engine="transformers").engine
    if verdict is not None and verdict.loads:
        compare("transformers", logits(load_in_transformers(written)), expected, bound)
    torch.set_num_threads(1)
    return lacks


def input_bits(scheme: Any) -> int:
    """Return how many bits inputs have."""
    from qtool.scheme import FORMAT_BITS

    return FORMAT_BITS[scheme.activations.format] if scheme.activations else 16


def check_expert_tokens(written: Any, layout: Any) -> None:
    """Raise Wrong unless the manifest has, for each layer of experts, a count of all tokens."""
    from qtool.checkpoint.expert_tokens import read_expert_tokens
    from qtool.checkpoint.manifest import read_manifest
    from qtool.modules import expert_stack

    calibration = read_manifest(written.path)["calibration"]
    stacks = {expert_stack(name) for name in layout.modules} - {None}
    if not calibration or not stacks:
        return
    tokens = read_expert_tokens(written.path)
    counted = tokens.counts if tokens else {}
    if counted.keys() != stacks:
        raise Wrong(f"tokens of {len(counted)} of {len(stacks)} layers of experts were counted")
    each = {sum(counts) / calibration["tokens"] for counts in counted.values()}
    if len(each) > 1 or not each.pop().is_integer():
        raise Wrong(f"experts got {counted} of {calibration['tokens']} tokens")


def check_tensors(source: Any, written: Any, layout: Any, *, is_scaled: bool) -> None:
    """Raise Wrong when a tensor of the source is neither there as it was nor quantized.

    With ``is_scaled``, it may have other values.
    """
    from qtool.architecture import map_names
    from qtool.quantization.restoration import is_same

    names = map_names(source)
    quantized = {names.linears[name].tensor for name in layout.modules if name in names.linears}
    tied = {"lm_head.weight"} if source.tied_embeddings else set()
    for name, tensor in source.tensors.items():
        if name in quantized or name in tied:
            continue
        stack = names.stacks.get(name.removesuffix("_bias"))
        if stack and f"{stack[0].name}.bias" in written.tensors:
            continue
        if name not in written.tensors:
            raise Wrong(f"`{name}` is lost")
        found = written.tensors[name]
        is_kept = tensor.dtype != found.dtype or is_same(tensor, found)
        if not (tensor.shape == found.shape if is_scaled else is_kept):
            raise Wrong(f"`{name}` was changed")


def check_matrices(differences: Any, layout: Any) -> None:
    """Raise Wrong when a quantized matrix is too far from its source."""
    for each in differences:
        module = layout.modules.get(each.name)
        if module is None or each.sqnr_db is None or each.rescaled:
            continue
        least = LEAST_SQNR_DB[8 if module.scheme.weights.bits == 8 else 4]
        if each.sqnr_db < least:
            raise Wrong(f"`{each.name}` is {each.sqnr_db:.1f} dB from the source")


def logits(model: Any) -> Any:
    """Return the log probabilities [T, V] after each token of a prompt."""
    import torch

    ids = torch.tensor([PROMPTS[1]])
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    if model.main_input_name == "input_features":  # sounds
        config = model.config
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        given["input_features"] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        given["input_features"] = given["input_features"].to(model.dtype)
        del given["input_ids"]
    with torch.no_grad():
        output = model(**given, use_cache=False)
    found = output.logits if hasattr(output, "logits") else output[0]
    return found[0].float().log_softmax(-1)


def compare(what: str, found: Any, expected: Any, bound: float) -> None:
    """Raise Wrong when the KL divergence is above ``bound``."""
    off = float((expected.exp() * (expected - found)).sum(-1).mean())
    if not off <= bound:
        raise Wrong(f"{what}: KL {off:.1e} to the dequantized model, bound {bound}")


def check_engine(folder: Path, model: Any, *, is_coarse: bool) -> str:
    """Raise Wrong when the engine answers wrongly; return what it lacks, if it refuses.

    Where a rounding may change much (``is_coarse``), half of the tokens must be near.
    """
    import torch

    import qtool
    from qtool.errors import CheckpointRefused

    greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    options = {"device": "cpu", "max_total_tokens": 2048, "disable_radix_cache": True}
    try:
        engine = qtool.Engine(folder, skip_tokenizer_init=True, **options)
    except CheckpointRefused as error:
        if error.code not in ("E_ATTENTION", "E_ARCHITECTURE"):
            raise
        return "engine: " + error.message.removeprefix(f"{folder}: ")
    with engine:
        alone = engine.generate(input_ids=PROMPTS[0], sampling_params=greedy, return_logprob=True)
        both = engine.generate(
            input_ids=[*reversed(PROMPTS)], sampling_params=greedy, return_logprob=True
        )
    ids = alone["output_ids"]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([[*PROMPTS[0], *ids]]), use_cache=False).logits[0]
    expected = whole.float().log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    for answer, how in ((alone, "alone"), (both[1], "beside another prompt")):
        if answer["output_ids"] != ids:
            first = next(n for n in range(TOKENS) if answer["output_ids"][n] != ids[n])
            here, there = (expected[first, each["output_ids"][first]] for each in (answer, alone))
            if abs(float(here - there)) > 0.1 and not is_coarse:
                raise Wrong(f"engine: another answer {how}")
            continue
        found = [each[0] for each in answer["meta_info"]["output_token_logprobs"]]
        off = sorted(
            abs(logprob - float(expected[number, token]))
            for number, (logprob, token) in enumerate(zip(found, ids, strict=True))
        )
        if off[TOKENS // 2 if is_coarse else -1] > 0.5:
            raise Wrong(f"engine: log probabilities are off {how}: {off}")
    return ""


def load_in_transformers(checkpoint: Any) -> Any:
    """Return the checkpoint as transformers loads it."""
    import torch

    from qtool.architecture.meta import class_of

    model_class = class_of(checkpoint)
    return model_class.from_pretrained(checkpoint.path, dtype=torch.bfloat16).eval()


def make_model(name: str, work: Path) -> None:
    """Write the model."""
    from support.small_models import publish

    publish(name, work / "models" / name)


def try_cell(name: str, method: str, work: Path) -> dict[str, Any]:
    """Return the cell of a model and a method, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    return asdict(try_method(name, method, work))


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the results in Markdown, with a list of the reasons below."""
    methods = [method for method in METHODS if any(method in row for row in results.values())]
    lines = [
        f"| model | {' | '.join(f'`{method}`' for method in methods)} |",
        f"|---|{'---|' * len(methods)}",
    ]
    reasons: dict[str, int] = {}
    for name, row in sorted(results.items()):
        cells = []
        for method in methods:
            cell = row.get(method)
            if cell is None:
                cells.append("")
                continue
            text = cell["state"]
            if cell["state"] == "right":
                text = f"{cell['share']:.0%}"
            if cell["what"]:
                number = reasons.setdefault(cell["what"].replace(name, "MODEL"), len(reasons) + 1)
                text += f" [{number}]"
            cells.append(text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


def main() -> None:
    """Try what was asked for, print one line a cell, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, default=Path("architectures.json"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="also what is in the results already")
    parser.add_argument("--write", type=Path, help="put the table of the results in this file")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    if arguments.write:
        text = arguments.write.read_text()
        before, rest = text.split(START, 1)
        after = rest.split(END, 1)[1]
        arguments.write.write_text(f"{before}{START}\n{table(results)}\n{END}{after}")
        return
    from support.small_models import names

    work = arguments.work or Path(tempfile.mkdtemp())
    methods = arguments.methods.split(",")
    cells = [
        (name, method)
        for name in arguments.names or names()
        for method in methods
        if arguments.again or method not in results.get(name, {})
    ]
    with ProcessPoolExecutor(arguments.jobs, max_tasks_per_child=1) as pool:
        missing = [name for name in dict(cells) if not (work / "models" / name).exists()]
        for made in [pool.submit(make_model, name, work) for name in missing]:
            made.result()
        waiting = {pool.submit(try_cell, *cell, work): cell for cell in cells}
        for done in as_completed(waiting):
            name, method = waiting[done]
            cell = results.setdefault(name, {})[method] = done.result()
            shown = "" if cell["share"] is None else f"{cell['share']:.0%}"
            print(f"{name} {method}: {cell['state']} {shown} {cell['what']}", flush=True)
            unfinished = arguments.results.with_suffix(".part")
            unfinished.write_text(json.dumps(results, indent=1))
            unfinished.replace(arguments.results)


if __name__ == "__main__":
    main()
