"""`EngineConfig`: the options of `Engine`, their defaults and their bounds."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from qtool.errors import UsageError
from qtool.options import bounded, check_bounds

if TYPE_CHECKING:
    import torch

COMPILE = ("off", "decode", "all")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "bitsandbytes")
MAX_TOKENS = 1 << 20
MAX_RUNNING_REQUESTS = 4096
MAX_DRAFT_TOKENS = 32
NUM_DRAFT_TOKENS = 8
NUM_MTP_STEPS = 3  # SGLang's default for DeepSeek-V3
# SGLang's names of a model's own layer and vLLM's, for the models whose layers qtool knows
MTP_ALGORITHMS = (
    *("NEXTN", "EAGLE", "mtp"),
    *("deepseek_mtp", "glm4_moe_mtp", "qwen3_next_mtp", "qwen3_5_mtp"),
)
MATCH_WINDOW = (2, 12)


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted."""

    drafts: int
    """Tokens drafted for a request in a step."""
    min_window: int
    """The tokens at the end of a request that must have come before, at least."""
    max_window: int
    """So many of them are looked for, at most."""
    mtp: bool = False
    """Whether the model's own layer for multi-token prediction drafts, and no windows count."""

    @property
    def lookahead(self) -> int:
        """Tokens after those of a step whose keys and values are made while drafting."""
        return self.drafts - 1 if self.mtp else 0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a model. None stands for the default in brackets."""

    tokenizer_path: str | os.PathLike[str] | None = None
    """Where the tokenizer is, if not with the model."""

    skip_tokenizer_init: bool = False
    """No text: /generate takes and gives tokens."""

    is_embedding: bool = False
    """Make embeddings with a language model; embedding models need no option."""

    device: str | None = None
    """cpu, cuda or cuda:<n>. [a GPU, if there is one]"""

    dtype: str | torch.dtype | None = None
    """Data type of unquantized layers: bfloat16, float16 or float32. [the model's]"""

    quantization: str | None = None
    """Quantize a model while it loads, e.g. fp8; of a quantized one, what it must be."""

    load_format: str = "auto"
    """What the weights must be: auto, safetensors, gguf or bitsandbytes, as SGLang names them."""

    kv_cache_dtype: str | None = None
    """auto, or fp8_e4m3 (fp8 for short). [auto: as the checkpoint says]"""

    mem_fraction_static: float | None = None
    """Share of the GPU's memory for weights and KV cache. [0.85]"""

    context_length: int | None = bounded(None, 1, own_maximum=MAX_TOKENS)
    """Tokens of prompt and answer together. [the model's]"""

    max_running_requests: int | None = bounded(None, 1, own_maximum=MAX_RUNNING_REQUESTS)
    """Requests that are computed at once; others wait. [256; 32 on a CPU]"""

    max_total_tokens: int | None = bounded(None, 1)
    """Tokens that the KV cache holds. [what fits]"""

    chunked_prefill_size: int | None = bounded(None, 1, own_maximum=MAX_TOKENS)
    """Tokens of a step; longer prompts are computed in chunks. [8192; 2048 on a CPU]"""

    disable_cuda_graph: bool = False
    """Run without CUDA graphs."""

    disable_radix_cache: bool = False
    """Do not reuse the common prefixes of prompts."""

    disable_overlap_schedule: bool = False
    """Do not launch a step before the last one is read."""

    compile: Literal["off", "decode", "all"] = "off"
    """Run decoder layers that qtool has no kernels for through torch.compile, in decode steps or in
    all; starts take longer."""

    speculative_algorithm: str | None = None
    """NGRAM: what followed the last tokens where they came before in the request is drafted, and
    verified in one step. NEXTN, also EAGLE, mtp, deepseek_mtp, glm4_moe_mtp, qwen3_next_mtp,
    qwen3_5_mtp: the checkpoint's own layer for multi-token prediction (MTP) drafts."""

    speculative_num_steps: int | None = bounded(None, 1, own_maximum=MAX_DRAFT_TOKENS - 1)
    """Tokens drafted for a request in a step. [one less than speculative_num_draft_tokens; 3 with
    NEXTN]"""

    speculative_num_draft_tokens: int | None = bounded(None, 2, own_maximum=MAX_DRAFT_TOKENS)
    """Tokens of a request in a step: the drafted ones, and the one before them. [8; 4 with
    NEXTN]"""

    speculative_ngram_min_match_window_size: int | None = bounded(None, 1)
    """Tokens that must have come before for a draft of NGRAM, at least. [2]"""

    speculative_ngram_max_match_window_size: int | None = bounded(None, 1)
    """Tokens that NGRAM looks for, at most: the longest match counts. [12]"""

    random_seed: int | None = bounded(None, 0, own_maximum=2**64 - 1)
    """Makes requests without a seed repeat."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check each field by itself, before anything is loaded.

        Raises: UsageError.
        """
        if self.compile not in COMPILE:
            raise UsageError(
                "E_COMPILE", f"compile is `{self.compile}`", hint=f"one of {', '.join(COMPILE)}"
            )
        if self.load_format not in LOAD_FORMATS:
            raise UsageError(
                "E_LOAD_FORMAT",
                f"load_format is `{self.load_format}`",
                hint=f"one of {', '.join(LOAD_FORMATS)}",
            )
        share = self.mem_fraction_static
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share is not None and not (is_number and 0 < share < 1):
            raise UsageError(
                "E_FRACTION", f"mem_fraction_static is {share!r}", hint="a number between 0 and 1"
            )
        check_bounds(self, EngineConfig)
        _check_speculation(self)

    @property
    def uses_mtp(self) -> bool:
        """Whether the checkpoint's own layer drafts tokens."""
        return self.speculative_algorithm in MTP_ALGORITHMS

    @property
    def speculation(self) -> Speculation | None:
        """How tokens are drafted; None if they are not."""
        if self.speculative_algorithm is None:
            return None
        drafts = self.speculative_num_steps
        if drafts is None:
            default = NUM_MTP_STEPS + 1 if self.uses_mtp else NUM_DRAFT_TOKENS
            drafts = (self.speculative_num_draft_tokens or default) - 1
        if self.uses_mtp:
            return Speculation(drafts, 0, 0, mtp=True)
        shortest = self.speculative_ngram_min_match_window_size
        longest = self.speculative_ngram_max_match_window_size
        if shortest is None:
            shortest = min(MATCH_WINDOW[0], longest or MATCH_WINDOW[1])
        return Speculation(drafts, shortest, longest or max(MATCH_WINDOW[1], shortest))


def _check_speculation(config: EngineConfig) -> None:
    """Raise UsageError for an algorithm that qtool lacks, and for options that do not agree."""
    names = [field.name for field in fields(EngineConfig) if "speculative_" in field.name]
    algorithm = config.speculative_algorithm
    if algorithm not in (None, "NGRAM", *MTP_ALGORITHMS):
        message = f"speculative_algorithm is `{algorithm}`"
        if algorithm in ("EAGLE3", "STANDALONE"):
            message += ": the engine runs no second model that drafts"
        hint = "NGRAM, or NEXTN for the checkpoint's own layer"
        raise UsageError("E_SPECULATION", message, hint=hint)
    given = [name for name in names if getattr(config, name) is not None]
    windows = [name for name in given if "ngram" in name]
    if windows and config.uses_mtp:
        message = f"{windows[0]} is given, and speculative_algorithm is `{algorithm}`"
        raise UsageError("E_SPECULATION", message, hint="it belongs to NGRAM")
    if algorithm is None and given:
        message = f"{given[0]} is given, and speculative_algorithm is not"
        raise UsageError("E_SPECULATION", message, hint="speculative_algorithm NGRAM")
    steps, tokens = config.speculative_num_steps, config.speculative_num_draft_tokens
    if steps is not None and tokens is not None and steps + 1 != tokens:
        raise UsageError(
            "E_SPECULATION",
            f"speculative_num_steps is {steps} and speculative_num_draft_tokens {tokens}",
            hint="give one of them, or one more draft token than steps",
        )
    speculation = config.speculation
    if speculation is not None and speculation.min_window > speculation.max_window:
        message = (
            f"speculative_ngram_min_match_window_size is {speculation.min_window} and "
            f"speculative_ngram_max_match_window_size {speculation.max_window}"
        )
        raise UsageError("E_SPECULATION", message, hint="the largest is not less than the smallest")
