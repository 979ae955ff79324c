"""What an engine decides before it starts: what it loads, its limits, the scales of the KV cache,
the tokenizer and the tokens that end a text.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import cast

import torch

from qtool import formats
from qtool.checkpoint import Checkpoint, resolve_model
from qtool.checkpoint.encoding import Encoding, find_encoding
from qtool.checkpoint.gguf import as_folder
from qtool.engine.config import EngineConfig
from qtool.engine.prompts import PromptTokenizer
from qtool.engine.requirements import check_by_name, check_speculation
from qtool.engine.scheduler import Limits
from qtool.errors import CheckpointRefused, UsageError
from qtool.formats import Layout
from qtool.runtime.causal_lm import CausalLM, ModelConfig
from qtool.runtime.devices import device_named
from qtool.runtime.load import cache_scales
from qtool.runtime.load_plan import LoadPlan, plan_load

KV_DTYPES = ("auto", "fp8_e4m3", "fp8")  # the last is vLLM's name of the one before it
MAX_RUNNING = {"cpu": 32, "cuda": 256}
MIN_SNAPSHOTS = 8  # of states; otherwise a quarter of the requests that run
TOKEN_BUDGET = {"cpu": 2048, "cuda": 8192}
DEFAULT_CONTEXT = 4096  # of models whose config does not have it


def plan_engine(checkpoint: Checkpoint, config: EngineConfig) -> LoadPlan:
    """Return what an engine loads of ``checkpoint``. Raises: CheckpointRefused, UsageError."""
    check_load_format(checkpoint, config)
    encoding = find_encoding(checkpoint, is_embedding=config.is_embedding)
    if encoding is not None and config.speculation is not None:
        message = f"{checkpoint.source} generates no tokens that could be drafted"
        raise UsageError("E_SPECULATION", message, hint="leave speculative_algorithm out")
    return plan_load(
        checkpoint,
        device_named(config.device),
        config.quantization,
        config.dtype or "auto",
        mtp=config.uses_mtp,
        encoding=encoding,
    )


@dataclass(frozen=True)
class EngineStart:
    """What `decide_start` decides before the weights are read."""

    limits: Limits
    cache_scales: dict[int, tuple[float, float]] | None
    """Layer number to the scales of keys and of values in an FP8 KV cache; None: 16 bits."""
    tokenizer: PromptTokenizer | None
    """None with ``skip_tokenizer_init``."""


def decide_start(plan: LoadPlan, config: EngineConfig) -> EngineStart:
    """Return how an engine of ``plan`` starts. Raises: CheckpointRefused, UsageError."""
    check_by_name(plan)
    check_speculation(plan, config.speculation)
    checkpoint = plan.checkpoint
    limits = limits_of(plan.skeleton.config, plan.device, config, plan.encoding)
    scales = scales_of(checkpoint, plan.layout, config.kv_cache_dtype or "auto")
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = open_tokenizer(checkpoint, config.tokenizer_path)
    return EngineStart(limits, scales, tokenizer)


def check_load_format(checkpoint: Checkpoint, config: EngineConfig) -> None:
    """Raise UsageError when ``load_format`` names other weights than ``checkpoint`` has."""
    layout = formats.detect(checkpoint)
    found = {"gguf" if checkpoint.gguf_file else "safetensors"}
    if config.quantization == "bitsandbytes" or (layout and layout.format == "bitsandbytes"):
        found.add("bitsandbytes")
    if config.load_format not in {*found, "auto"}:
        raise UsageError(
            "E_LOAD_FORMAT",
            f"load_format is `{config.load_format}`, and {checkpoint.source} holds "
            f"{' of '.join(sorted(found, reverse=True))}",
            hint="leave it out: qtool sees what the weights are",
        )


def limits_of(
    model_config: ModelConfig,
    device: torch.device,
    config: EngineConfig,
    encoding: Encoding | None = None,
) -> Limits:
    """Return how much an engine runs at once. Raises: UsageError E_CONTEXT."""
    context_length = config.context_length
    longest = (
        getattr(model_config.get_text_config(), "max_position_embeddings", None)
        or context_length
        or DEFAULT_CONTEXT
    )
    if context_length is not None and context_length > longest:
        raise UsageError(
            "E_CONTEXT",
            f"context_length is {context_length}, and the model knows {longest} positions",
            hint=f"1 to {longest}",
        )
    if encoding is not None and encoding.max_tokens is not None:
        longest = min(longest, encoding.max_tokens)
    running = config.max_running_requests or MAX_RUNNING[device.type]
    return Limits(
        running,
        config.chunked_prefill_size or TOKEN_BUDGET[device.type],
        context_length or longest,
        drafts=0 if config.speculation is None else config.speculation.drafts,
        lookahead=0 if config.speculation is None else config.speculation.lookahead,
        snapshots=0 if config.disable_radix_cache else max(MIN_SNAPSHOTS, running // 4),
    )


def scales_of(
    checkpoint: Checkpoint, layout: Layout | None, kv_cache_dtype: str
) -> dict[int, tuple[float, float]] | None:
    """Return the scales of the KV cache by layer where it is kept in 8 bits; layers without have 1.

    None: it is kept in 16 bits.
    """
    if kv_cache_dtype not in KV_DTYPES:
        raise UsageError(
            "E_KV_DTYPE",
            f"unknown kv_cache_dtype `{kv_cache_dtype}`",
            hint=f"one of {', '.join(KV_DTYPES)}",
        )
    scales = cache_scales(checkpoint) if layout and layout.kv_cache else {}
    if kv_cache_dtype == "auto" and not scales:
        return None
    if not scales:
        warnings.warn(
            "the checkpoint has no scales for an 8-bit KV cache: 1.0 is used, and quality may "
            "suffer",
            stacklevel=3,
        )
    return scales


def open_tokenizer(checkpoint: Checkpoint, path: str | os.PathLike[str] | None) -> PromptTokenizer:
    """Return the tokenizer of ``checkpoint``, or that of ``path``: a folder, a GGUF file or a name
    on the Hub. It neither truncates nor pads, whatever tokenizer.json says.

    Raises: CheckpointRefused E_TOKENIZER.
    """
    from transformers import AutoTokenizer

    source = resolve_model(os.fspath(path)) if path else checkpoint.source
    folder = as_folder(source) if path else checkpoint.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a file from outside makes of it
        hint = "tokenizer_path names another folder; skip_tokenizer_init takes input_ids"
        raise CheckpointRefused(
            "E_TOKENIZER",
            f"{source} has no tokenizer that loads ({type(error).__name__})",
            hint=hint,
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointRefused(
            "E_TOKENIZER",
            f"{source} has no tokenizer.json",
            hint="save the tokenizer again with a recent transformers",
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return cast(PromptTokenizer, tokenizer)


def eos_ids_of(model: CausalLM, tokenizer: PromptTokenizer | None) -> tuple[int, ...]:
    """Return the end tokens of the model and of the tokenizer, without -1 and ids beyond the
    vocabulary.
    """
    config = model.config if model.generation_config is None else model.generation_config
    configured = config.eos_token_id
    ids: list[int | None] = (
        list(configured) if isinstance(configured, (list, tuple)) else [configured]
    )
    if tokenizer is not None:
        ids.append(tokenizer.eos_token_id)
    size = model.get_output_embeddings().out_features
    return tuple({each for each in ids if isinstance(each, int) and 0 <= each < size})
