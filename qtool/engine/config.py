"""`EngineConfig`: the options of `Engine`, their defaults and their bounds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qtool.errors import UsageError
from qtool.options import bounded, check_bounds

if TYPE_CHECKING:
    import torch

COMPILE = ("off", "decode", "all")
MAX_TOKENS = 1 << 20
MAX_RUNNING_REQUESTS = 4096


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a model. None stands for the default in brackets."""

    tokenizer_path: str | os.PathLike[str] | None = None
    """Where the tokenizer is, if not with the model."""

    skip_tokenizer_init: bool = False
    """No text: /generate takes and gives tokens."""

    device: str | None = None
    """cpu, cuda or cuda:<n>. [a GPU, if there is one]"""

    dtype: str | torch.dtype | None = None
    """Data type of unquantized layers: bfloat16, float16 or float32. [the model's]"""

    quantization: str | None = None
    """Quantize a model while it loads, e.g. fp8; of a quantized one, what it must be."""

    kv_cache_dtype: str | None = None
    """auto or fp8_e4m3. [auto: as the checkpoint says]"""

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
        share = self.mem_fraction_static
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share is not None and not (is_number and 0 < share < 1):
            raise UsageError(
                "E_FRACTION", f"mem_fraction_static is {share!r}", hint="a number between 0 and 1"
            )
        check_bounds(self, EngineConfig)
