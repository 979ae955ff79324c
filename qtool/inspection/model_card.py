"""A model card: the `README.md` of a checkpoint, made of its manifest and headers, with the
metadata that the Hugging Face Hub reads.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from qtool.checkpoint import Checkpoint, digest_files, open_checkpoint
from qtool.checkpoint.aux_files import as_json, replace_text
from qtool.checkpoint.manifest import MANIFEST, is_edited, read_manifest
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.errors import one_line
from qtool.events import NoteEvent, OnEvent
from qtool.inspection.engines import EngineReport, check_engines
from qtool.inspection.report import Inspection, inspect
from qtool.sizes import format_size
from qtool.strict_yaml import YAML_ERRORS, YamlLimitExceeded, parse_yaml
from qtool.terminal import printable

CARD = "README.md"
MAX_SOURCE_CARD = 64 << 10  # bytes of the source's card that are looked at
FRONT_MATTER = re.compile(rb"---\r?\n(.*?)\r?\n---\s", re.DOTALL)
WORD = re.compile(r"[\w.+-]{1,100}")
LINK = re.compile(r"https?://[^\s<>\"'`]{1,500}|[\w.-]{1,100}")  # no path of this machine
CARRIED = {  # from the source's card: field of the Hub's metadata -> what it may hold
    "license": WORD,
    "license_name": WORD,
    "license_link": LINK,
    "language": WORD,
    "pipeline_tag": WORD,
}
COMMANDS = {  # engine -> what starts it with a checkpoint
    "sglang": "python -m sglang.launch_server --model-path {path}",
    "vllm": "vllm serve {path}",
}
LABELS = {"sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM", "vllm": "vLLM"}
MEASURES = {  # name in an evaluation -> row of the card
    "reference_ppl": "perplexity in 16 bits",
    "ppl": "perplexity",
    "ppl_ratio": "ratio of the perplexities",
    "mean_kl": "KL divergence, mean",
    "p99_kl": "KL divergence, 99th percentile",
    "top1": "same most likely token",
}
REASONS = 8  # rows of layers in 16 bits


def write_card(written: Checkpoint, name: str, manifest: Json, on_event: OnEvent) -> list[Path]:
    """Write the model card of a checkpoint, as `render_card` makes it, and return it.

    Without a card a checkpoint is complete all the same: what goes wrong is a note.
    """
    try:
        text = render_card(written, name, manifest)
    except Exception as error:
        on_event(NoteEvent(f"the model card could not be written: {one_line(error)}"))
        return []
    card = written.path / CARD
    card.write_text(text, encoding="utf-8")
    return [card]


def record_evaluation(folder: Path, evaluation: Json) -> None:
    """Put what was measured of the checkpoint in ``folder`` into its manifest, and into its model
    card, unless somebody has edited that.

    Args:
        folder: a checkpoint that qtool wrote.
        evaluation: as `render_card` takes it.
    Raises: CheckpointRefused, when there is no manifest.
    """
    manifest = {**read_manifest(folder), "evaluation": evaluation}
    card = folder / CARD
    listed = manifest["files"].get(CARD)
    if listed and card.is_file() and not is_edited(card, listed):
        name = folder.resolve().name
        replace_text(card, render_card(open_checkpoint(folder), name, manifest))
        manifest["files"] = {**manifest["files"], **digest_files([card])}
    replace_text(folder / MANIFEST, as_json(manifest))


def source_metadata(source: Checkpoint) -> JsonDict:
    """Return what the card of a model made from ``source`` says of it: its name on the Hub, and
    licence, language and task from its own card. What is not sound there is left out.
    """
    found: JsonDict = {}
    if source.hub_name:
        found["base_model"] = source.hub_name
    given = _front_matter(source.published_folder / CARD)
    for key, pattern in CARRIED.items():
        value = given.get(key)
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(one, str) and pattern.fullmatch(one) for one in values):
            found[key] = value
    return found


def render_card(checkpoint: Checkpoint, name: str, manifest: Json) -> str:
    """Return the card of ``checkpoint`` as Markdown.

    Args:
        checkpoint: what the card is of.
        name: of the model.
        manifest: of the checkpoint; ``files`` need not be there yet. ``source`` is what
            `source_metadata` returned; ``evaluation``, if it was measured, has ``measures`` (name
            -> value, low, high), ``data`` (tokens, documents), ``tasks`` and ``speed`` (lists of
            rows: a ``name``, ``reference``, ``quantized`` and ``ratio``).
    """
    found = inspect(checkpoint)
    is_gguf = (manifest.get("conversion") or {}).get("to") == "gguf"
    engines = [] if is_gguf else check_engines(checkpoint)
    blocks = [
        _metadata(found, manifest, engines, is_gguf=is_gguf),
        f"# {_text(name)}",
        _introduction(found, manifest),
        _table(("", ""), _facts(found, manifest)),
        "## How it was made",
        *_making(manifest),
        "## How good it is",
        *_quality(manifest),
        *_speed(manifest),
        "## How to serve it",
        *_serving(name, engines, checkpoint.gguf_file),
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(card: Path) -> Json:
    """Return the metadata at the beginning of a card; empty when there is none to be read."""
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        found = FRONT_MATTER.match(file.read(MAX_SOURCE_CARD))
    try:
        value = parse_yaml(found[1]) if found else None
    except (YamlLimitExceeded, *YAML_ERRORS):
        return {}
    return {str(key): one for key, one in value.items()} if isinstance(value, dict) else {}


def _metadata(
    found: Inspection, manifest: Json, engines: Iterable[EngineReport], *, is_gguf: bool
) -> str:
    metadata = dict(_said(manifest, "source"))
    if "base_model" in metadata and found.quantized:
        metadata["base_model_relation"] = "quantized"
    if any(report.engine == "transformers" and report.loads for report in engines):
        metadata["library_name"] = "transformers"
    formats = sorted({row.scheme.lower() for row in found.quantized})
    tags = ["qtool", *(["gguf"] if is_gguf else []), *([found.format] if found.format else [])]
    tags += formats
    metadata["tags"] = [tag.replace(" ", "-") for tag in dict.fromkeys(tags)]
    written = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{written}---"


def _introduction(found: Inspection, manifest: Json) -> str:
    base = _said(manifest, "source").get("base_model")
    model = _code(str([*_history(manifest)][-1].get("model", "a model")))
    link = f"[{base}](https://huggingface.co/{base})" if base else model
    schemes = ", ".join(dict.fromkeys(row.scheme for row in found.quantized)) or "16 bits"
    return f"{link} in {_text(schemes)}, made by qtool {_versions(manifest).get('qtool', '')}."


def _facts(found: Inspection, manifest: Json) -> Iterator[tuple[str, str]]:
    for scheme in dict.fromkeys(row.scheme for row in found.quantized):
        rows = [row for row in found.quantized if row.scheme == scheme]
        kinds = ", ".join(_code(row.kind) for row in rows)
        yield _text(scheme), f"{sum(row.count for row in rows)} layers: {kinds}"
    reasons = Counter((one.kind, one.reason) for one in found.modules if one.scheme is None)
    for (kind, reason), count in reasons.most_common(REASONS):
        why = f" ({reason})" if reason else ""
        yield "16 bits", f"{count} {'layer' if count == 1 else 'layers'}: {_code(kind)}{_text(why)}"
    yield "KV cache", found.kv_cache or "not quantized"
    yield "format on disk", found.format or "16 bits"
    share = found.size_bytes / found.unquantized_bytes if found.unquantized_bytes else 1
    size = f"{format_size(found.size_bytes)}, {share:.0%} of 16 bits"
    yield "size", f"{size}, {found.bits_per_weight:.2f} bits a parameter"


def _making(manifest: Json) -> Iterator[str]:
    conversion = manifest.get("conversion")
    if conversion:
        rounded = len(conversion.get("rounded") or ())
        more = f"; {rounded} layers were rounded to nearest" if rounded else ""
        source = _text(str(conversion.get("from") or "16 bits"))
        kinds = f"from {source} to {_text(str(conversion.get('to')))}"
        yield f"`qtool export` converted it {kinds}{more}."
    recipe = _said(manifest, "recipe")
    if recipe:
        summary = _text(str(recipe.get("summary")))
        yield f"{summary}. The recipe, which `qtool quantize --recipe` takes:"
        yield f"```yaml\n{yaml.safe_dump(_without_empty(recipe), sort_keys=False)}```"
        yield _calibration(_said(manifest, "calibration"))
    known = {**_said([*_history(manifest)][-1], "versions"), **_versions(manifest)}
    versions = (f"{name} {version}" for name, version in known.items())
    yield f"Versions: {_text(', '.join(versions))}."


def _without_empty(value: object) -> object:
    """Return a recipe without what it does not say."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without_empty(one) for key, one in value.items() if one not in (None, [], {}, "")}


def _calibration(data: Json) -> str:
    if not data:
        return "No calibration data was needed."
    source = _code(str(data.get("source")))
    return f"Calibration: {data.get('used')} samples, {data.get('tokens'):,} tokens, from {source}."


def _quality(manifest: Json) -> Iterator[str]:
    evaluation = manifest.get("evaluation") or {}
    measures = evaluation.get("measures") or {}
    rows = [
        (label, _number(measures[name]["value"]), _interval(measures[name]))
        for name, label in MEASURES.items()
        if name in measures
    ]
    if rows:
        data = evaluation.get("data") or {}
        tokens, documents = data.get("tokens", 0), data.get("documents", 0)
        yield f"Compared with the model in 16 bits on {tokens:,} tokens of {documents:,} texts:"
        yield _table(("measure", "value", "95 % interval"), rows)
    tasks = list(_compared(evaluation.get("tasks") or ()))
    if tasks:
        yield _table(("task", "16 bits", "quantized", "recovery"), tasks)
    if not rows and not tasks:
        yield "It was not measured. `qtool eval` compares it with the model in 16 bits."


def _speed(manifest: Json) -> Iterator[str]:
    rows = list(_compared((manifest.get("evaluation") or {}).get("speed") or ()))
    if rows:
        yield "## How fast it is"
        yield _table(("measure", "16 bits", "quantized", "ratio"), rows)


def _compared(rows: Iterable[Json]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        numbers = (_number(row.get(key)) for key in ("reference", "quantized", "ratio"))
        yield (_text(str(row.get("name"))), *numbers)


def _serving(name: str, engines: Sequence[EngineReport], gguf_file: Path | None) -> Iterator[str]:
    path = shlex.quote(f"./{name}")
    commands = [f"qtool serve --model-path {path}"]
    if gguf_file:
        commands.append(f"llama-server -m {shlex.quote(f'./{name}/{gguf_file.name}')}")
    refusals = []
    for report in engines:
        label = f"{LABELS.get(report.engine, report.engine)} {report.version}"
        if not report.loads:
            why = next(one.message for one in report.findings if one.severity == "refused")
            refusals.append(f"- {label} does not load it: {_text(why)}")
        elif report.engine in COMMANDS:
            command = COMMANDS[report.engine].format(path=path)
            emulated = "" if report.native else ", in 16 bits"
            commands.append(f"{command}  # {label}{emulated}")
    shown = "\n".join(map(printable, commands))
    yield f"```sh\n{shown}\n```"
    if refusals:
        yield "\n".join(refusals)


def _history(manifest: Json) -> Iterator[Json]:
    """Yield ``manifest`` and those of what it was converted from."""
    yield manifest
    while isinstance(made := manifest.get("source_manifest"), Mapping):
        manifest = made
        yield manifest


def _said(manifest: Json, key: str) -> Json:
    """Return the latest value of ``key`` in the history of a checkpoint; empty without one."""
    return next((made[key] for made in _history(manifest) if made.get(key)), {})


def _versions(manifest: Json) -> Mapping[str, str]:
    return manifest.get("versions") or {}


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _interval(measure: Mapping[str, object]) -> str:
    low, high = _number(measure.get("low")), _number(measure.get("high"))
    return f"{low} to {high}" if low and high else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """Return a name from files as Markdown's code, which knows no escapes but in tables."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"


def _text(text: str) -> str:
    """Return text from files as it may stand in Markdown: a line without markup."""
    return re.sub(r"[|`<>\[\]\\*_#]", lambda found: f"\\{found[0]}", printable(text))
