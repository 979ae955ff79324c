"""Options as frozen dataclasses: those of `quantize` and `export`, and what they all share.

A field's meaning stands under it as a string literal; the command line shows it as help.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, cast

from qtool.errors import UsageError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from qtool.recipe import Recipe

P = ParamSpec("P")
T = TypeVar("T")
Owner = TypeVar("Owner")
Options = TypeVar("Options", bound="DataclassInstance")
PARTS = ("modules", "blocks")  # what `eval` puts into the reference one at a time
LARGEST = 2**31 - 1  # for numbers without a maximum: libraries keep them in a C int


@dataclass(frozen=True)
class Bounds:
    """The numbers that an option may be."""

    minimum: int
    maximum: int | None = None
    whole: bool = True
    own_maximum: int | None = None
    """The maximum of qtool's own engine; other engines may go further."""

    def reason(self, value: object) -> str:
        """Return what ``value`` must be; empty when it is within the bounds."""
        maximum = self.maximum if self.own_maximum is None else self.own_maximum
        if maximum is None:
            maximum = LARGEST
        kinds = (int,) if self.whole else (int, float)
        if type(value) in kinds:
            number = cast(float, value)
            if self.minimum <= number <= maximum:
                return ""
        noun = "a whole number" if self.whole else "a number"
        return f"{noun} from {self.minimum} to {maximum}"


def bounded(
    default: T,
    minimum: int,
    maximum: int | None = None,
    *,
    whole: bool = True,
    own_maximum: int | None = None,
) -> T:
    """Return a dataclass field whose value is None or within `Bounds`."""
    bounds = Bounds(minimum, maximum, whole=whole, own_maximum=own_maximum)
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def bounds_of(field: dataclasses.Field[object]) -> Bounds | None:
    """Return the bounds of an option; None when it has none."""
    return field.metadata.get("bounds")


def check_bounds(options: DataclassInstance, owner: type[DataclassInstance]) -> None:
    """Check those fields of ``options`` that ``owner`` itself declares.

    Raises: UsageError, for a number out of its bounds.
    """
    declared = inspect.get_annotations(owner)
    for field in fields(owner):
        bounds = bounds_of(field)
        value = getattr(options, field.name)
        if bounds is None or value is None or field.name not in declared:
            continue
        reason = bounds.reason(value)
        if reason:
            raise UsageError("E_LIMIT", f"{field.name} is {value!r}", hint=reason)


def make_options(kind: type[Options], keywords: Mapping[str, object]) -> Options:
    """Return the options that ``keywords`` name.

    Raises: UsageError, for a name that ``kind`` has not.
    """
    known = [field.name for field in fields(kind)]
    for name in keywords:
        if name not in known:
            raise UsageError(
                "E_UNKNOWN_OPTION", f"unknown option `{name}`", hint=nearest(name, known)
            )
    return kind(**keywords)


def keywords_of(
    kind: type[DataclassInstance],
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Show the fields of ``kind`` in the signature of a function, in place of ``**options``."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
        options = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for each in inspect.signature(kind).parameters.values()
        ]
        shown = signature.replace(parameters=[*own, *options])
        function.__signature__ = shown  # type: ignore[attr-defined]
        return function

    return decorate


def arguments_of(
    kind: Callable[P, object],
) -> Callable[[Callable[Concatenate[Owner, ...], T]], Callable[Concatenate[Owner, P], T]]:
    """Give a method the signature of ``kind``, in place of ``*arguments, **options``."""

    def decorate(
        method: Callable[Concatenate[Owner, ...], T],
    ) -> Callable[Concatenate[Owner, P], T]:
        signature = inspect.signature(method)
        owner = next(iter(signature.parameters.values()))
        arguments = inspect.signature(kind).parameters.values()
        shown = signature.replace(parameters=[owner, *arguments])
        method.__signature__ = shown  # type: ignore[attr-defined]
        return method

    return decorate


def flag_of(name: str) -> str:
    """Return the flag of an option; it leaves out the unit."""
    return f"--{name.removesuffix('_s').replace('_', '-')}"


@cache
def field_docs(kind: type[DataclassInstance]) -> Mapping[str, str]:
    """Return the documentation of each field: the string literal under it, on one line."""
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if is_dataclass(owner):
            docs.update(_own_docs(owner))
    return docs


def _own_docs(kind: type) -> Iterator[tuple[str, str]]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    for field, below in pairwise(cast(ast.ClassDef, tree).body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            yield ast.unparse(field.target), " ".join(text.split())


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What every command that writes a checkpoint has."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""

    checkpoint_restore_path: str | os.PathLike[str] | None = None
    """ModelOpt: skip calibration and load the state saved here."""

    trust_pickle: bool = False
    """Accept a state file of mto.save; ModelOpt loads it with weights-only loading."""

    overwrite: bool = False
    """Replace an existing output, once the new one is complete."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(WriteOptions):
    """Everything that `quantize` takes apart from the model; None stands for the recipe's value."""

    method: str | None = None
    """Quantization method; --list shows them."""

    recipe: str | Recipe | None = None
    """A recipe file instead of a method."""

    backend: str | None = None
    """llmcompressor, gptqmodel, modelopt or torchao. [recipe]"""

    output: str | os.PathLike[str] | None = None
    """Folder to write. [default: ./MODEL-METHOD]"""

    calibration: str | None = None
    """File (.jsonl .json .txt .parquet) or Hub data set NAME[:CONFIG][:SPLIT]."""

    text_column: str | None = None
    """The field that holds the text."""

    num_samples: int | None = bounded(None, 1)
    """Calibration samples. [recipe: 512]"""

    seq_len: int | None = bounded(None, 16)
    """Maximum tokens of a sample. [recipe: 2048]"""

    batch_size: int | None = bounded(None, 1)
    """Samples in one forward pass, all of one length. [recipe: 1]"""

    pack: bool | None = None
    """Join texts and cut them at SEQ_LEN, or cut each text."""

    seed: int | None = bounded(None, 0, 2**32 - 1)
    """Seed for shuffling and for the library. [recipe: 0]"""

    group_size: int | None = bounded(None, -1)
    """Inputs that share a scale; -1 for one scale per row. [recipe]"""

    kv_cache: str | None = None
    """KV cache scales: fp8 or nvfp4. [recipe]"""

    lm_head: bool | None = None
    """Quantize the output head too. [recipe: no]"""

    ignore: str | Sequence[str] = ()
    """Leave modules in 16 bits: name, glob or re:REGEX. May repeat."""

    fast: bool = False
    """Round to nearest instead of the recipe's algorithm."""

    gate: str | Sequence[str] = ()
    """A limit that the result must keep, such as mean_kl<=0.05; `default`: those of the scheme.
    May repeat. [recipe]"""

    gate_data: str | None = None
    """Texts that the gate measures on; a file or a Hub data set. [with --gate: none]"""

    keep_failed: bool = False
    """Keep an output that fails the gate."""

    checkpoint_save_path: str | os.PathLike[str] | None = None
    """ModelOpt: save the calibrated state here."""

    backend_python: str | None = None
    """Python interpreter whose environment has the library."""

    def __post_init__(self) -> None:
        check_bounds(self, QuantizeOptions)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(WriteOptions):
    """Everything that `export` takes apart from the model."""

    output: str | os.PathLike[str]
    """Folder to write."""

    to: str | None = None
    """compressed-tensors, gptq, gptq_v2, awq, modelopt, fp8_block, mxfp4, bf16, f16 or gguf."""

    type: str | None = None
    """Type of a GGUF file, e.g. Q8_0 or Q4_K_M (or Q4_K); 16-bit layers are rounded to it. [as they
    are]
    """

    requantize: bool = False
    """Round weights again that the format cannot hold as they are."""

    scheme: str | None = None
    """Scheme that --requantize rounds to, e.g. W4A16. [the nearest]"""

    merge_lora: str | os.PathLike[str] | None = None
    """LoRA adapter of PEFT to merge into a 16-bit checkpoint: folder or Hub name."""

    max_shard_size: str | None = None
    """Maximum size of one weight file. [5GB; a GGUF file is not split]"""

    method: str | None = None
    """Method that made the state, for files of mto.save."""


def no_gate(option: str) -> UsageError:
    """Return the error for an ``option`` of gates that is given without one."""
    return UsageError(
        "E_NO_GATE",
        f"{option} has a meaning only with a gate",
        hint="add --gate default, or leave it out",
    )


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Everything that `eval` takes apart from the model."""

    reference: str | os.PathLike[str]
    """The 16-bit model: folder or Hub name."""

    data: str
    """File (.jsonl .json .txt .parquet) or Hub data set NAME[:CONFIG][:SPLIT]."""

    text_column: str | None = None
    """The field that holds the text."""

    max_tokens: int = bounded(32_768, 2, 1 << 30)
    """Tokens of all texts together, at most. [32768]"""

    seq_len: int = bounded(2048, 16)
    """Tokens that a model sees at once, at most. [2048]"""

    stride: int | None = bounded(None, 1)
    """How far windows of one text move. [SEQ_LEN]"""

    seed: int = bounded(0, 0, 2**32 - 1)
    """Which texts are drawn; of the bootstrap too. [0]"""

    answers: int = bounded(8, 0, 4096)
    """Greedy answers to look for collapse in. [8]"""

    tasks: str | None = None
    """Tasks of lm-eval, with commas between: gsm8k,mmlu. Both models run them."""

    task_limit: int | None = bounded(None, 1)
    """Documents of each task. [all]"""

    speed: bool = False
    """Time both models: a token at batch 1, 16 and 64, and prompts."""

    by_layer: str | None = None
    """Put one part at a time into the reference, and measure it: modules or blocks."""

    record: bool = False
    """Write the numbers into the checkpoint's manifest."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""

    dtype: str | None = None
    """What unquantized layers compute in: bfloat16, float16 or float32. [the model's]"""

    gate: str | Sequence[str] = ()
    """A limit such as mean_kl<=0.05; `default`: those of the scheme. May repeat."""

    strict: bool = False
    """Fail too when a limit lies inside the interval of what was measured."""

    cache_dir: str | os.PathLike[str] | None = None
    """Keep the reference's log-probabilities here, and use them again."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    trust_remote_code: bool = False
    """Run tokenizer code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        check_bounds(self, EvalOptions)
        if self.stride is not None and self.stride > self.seq_len:
            raise UsageError(
                "E_LIMIT",
                f"stride is {self.stride}, and windows have {self.seq_len} tokens",
                hint="tokens between two windows would not be measured; 1 to SEQ_LEN",
            )
        if self.strict and not self.gate:
            raise no_gate("strict")
        if self.task_limit is not None and not self.tasks:
            raise UsageError(
                "E_NO_TASKS",
                "task_limit has a meaning only with tasks",
                hint="add --tasks gsm8k, or leave it out",
            )
        if self.by_layer not in (None, *PARTS):
            raise UsageError(
                "E_PARTS", f"by_layer is `{self.by_layer}`", hint=f"one of {', '.join(PARTS)}"
            )
