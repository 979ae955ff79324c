"""`--help` of a command: its options in groups, every name whole at 80 columns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

from typer.core import TyperCommand

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        *("model_path", "revision", "trust_remote_code", "tokenizer_path", "skip_tokenizer_init"),
        *("served_model_name", "dtype", "context_length", "chat_template", "is_embedding"),
    ),
    "Method": (
        *("method", "recipe", "backend", "group_size", "kv_cache", "lm_head", "ignore", "fast"),
        *("seed", "list_methods", "all_methods", "backend_python", "quantization", "load_format"),
        *("torchao_config", "to", "type", "requantize", "scheme", "merge_lora"),
    ),
    "Calibration": (
        *("calibration", "num_samples", "seq_len", "batch_size", "text_column", "pack"),
        *("checkpoint_save_path", "checkpoint_restore_path", "trust_pickle"),
    ),
    "Comparison": (
        *("reference", "data", "text_column", "max_tokens", "seq_len", "stride"),
        *("seed", "answers", "cache_dir", "tasks", "task_limit", "speed", "by_layer"),
    ),
    "Gate": ("gate", "gate_data", "keep_failed", "strict", "junit"),
    "Report": (
        *("modules", "deep", "verify", "against", "html", "record"),
        *("engine_version", "gpu", "tensor_parallel"),
    ),
    "Server": (
        *("host", "port", "api_key", "allowed_origins", "max_queued_requests", "drain_timeout_s"),
        *("watchdog_timeout_s", "strict_fields", "reference", "log_requests", "log_level"),
        *("tool_call_parser", "reasoning_parser", "sampling_defaults"),
    ),
    "Engine": (
        *("engine", "engine_python", "device", "kv_cache_dtype", "mem_fraction_static"),
        *("max_running_requests", "max_total_tokens", "chunked_prefill_size"),
        *("disable_cuda_graph", "random_seed"),
        *("disable_radix_cache", "disable_overlap_schedule", "enable_torch_compile"),
        *("speculative_algorithm", "speculative_num_steps", "speculative_num_draft_tokens"),
        "speculative_ngram_min_match_window_size",
        "speculative_ngram_max_match_window_size",
    ),
    "Parallelism": ("tp", "pp", "dp", "nnodes", "node_rank", "dist_init_addr"),
    "Output": ("output", "overwrite", "max_shard_size", "dry_run"),
    "General": ("as_json", "quiet", "verbose", "debug", "help"),
}
GROUPED = frozenset(name for names in GROUPS.values() for name in names)


class GroupedCommand(TyperCommand):
    """A command whose help shows its options by `GROUPS`; an option of no group stands first."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what libraries print goes to stderr, as it is not the result."""
        with contextlib.redirect_stdout(sys.stderr):
            return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group under its heading; names are never cut."""
        parameters = {str(each.name): each for each in self.get_params(ctx)}
        for heading, names in _sections(parameters):
            records = [parameters[name].get_help_record(ctx) for name in names]
            if shown := [record for record in records if record is not None]:
                with formatter.section(heading):
                    formatter.write_dl(shown)


def _sections(names: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each heading and the options ``names`` under it.

    In a command that compares, an option that could also stand elsewhere stands under that.
    """
    compared = GROUPS["Comparison"] if "reference" in names else ()
    yield "Options", [name for name in names if name not in GROUPED]
    for heading, members in GROUPS.items():
        others = compared if heading != "Comparison" else ()
        if heading != "Comparison" or compared:
            yield heading, [name for name in members if name in names and name not in others]
