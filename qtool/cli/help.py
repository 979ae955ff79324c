"""`--help` of a command: its options in groups, every name whole at 80 columns."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from typer.core import TyperCommand

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        *("model_path", "revision", "trust_remote_code", "tokenizer_path", "skip_tokenizer_init"),
        *("served_model_name", "dtype", "context_length", "chat_template"),
    ),
    "Method": (
        *("method", "recipe", "backend", "group_size", "kv_cache", "lm_head", "ignore", "fast"),
        *("seed", "list_methods", "all_methods", "backend_python", "quantization"),
        *("torchao_config", "to", "requantize", "scheme"),
    ),
    "Calibration": (
        *("calibration", "num_samples", "seq_len", "batch_size", "text_column", "pack"),
        *("checkpoint_save_path", "checkpoint_restore_path", "trust_pickle"),
    ),
    "Comparison": (
        *("reference", "data", "max_tokens", "stride", "answers", "cache_dir"),
        *("tasks", "task_limit", "speed", "by_layer"),
    ),
    "Gate": ("gate", "gate_data", "keep_failed", "strict", "junit"),
    "Report": (
        *("modules", "deep", "verify", "against", "html", "record"),
        *("engine_version", "gpu", "tensor_parallel"),
    ),
    "Server": (
        *("host", "port", "api_key", "max_queued_requests", "drain_timeout_s"),
        *("watchdog_timeout_s", "log_requests"),
        *("log_level", "tool_call_parser", "sampling_defaults"),
    ),
    "Engine": (
        *("engine", "engine_python", "device", "kv_cache_dtype", "mem_fraction_static"),
        *("max_running_requests", "max_total_tokens", "chunked_prefill_size"),
        *("disable_cuda_graph", "random_seed"),
        *("disable_radix_cache", "disable_overlap_schedule", "enable_torch_compile"),
    ),
    "Parallelism": ("tp", "pp", "dp", "nnodes", "node_rank", "dist_init_addr"),
    "Output": ("output", "overwrite", "max_shard_size", "dry_run"),
    "General": ("as_json", "quiet", "verbose", "debug", "help"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


ORDER = list(GROUP_OF)


def _place(parameter: Any) -> int:
    return ORDER.index(parameter.name) if parameter.name in ORDER else -1


class GroupedCommand(TyperCommand):
    """A command whose help shows its options by `GROUPS`; an option of no group stands first."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what libraries print goes to stderr, as it is not the result."""
        with contextlib.redirect_stdout(sys.stderr):
            return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group under its heading; names are never cut."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], **{name: [] for name in GROUPS}}
        for parameter in sorted(self.get_params(ctx), key=_place):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups[GROUP_OF.get(str(parameter.name), "Options")].append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
