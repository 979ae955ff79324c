"""Arguments of SGLang's ``Engine`` that qtool's has not: what asks for nothing is taken, and the
rest is refused with a hint.

Source: SGLang 0.5.23 `srt/server_args.py`, `srt/entrypoints/engine.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from qtool.engine.sampling_params import MAX_TOP_LOGPROBS
from qtool.errors import UsageError, nearest

LOG = logging.getLogger("qtool.engine")
_ONE_GPU = "the engine runs on one GPU; `qtool serve --engine sglang` hands a model over to several"
_TEXT_ONLY = "the engine reads and writes only text"
_NO_LORA = "`qtool export --merge-lora` merges an adapter into a checkpoint"
NEUTRAL: dict[str, tuple[object, str]] = {
    **dict.fromkeys(
        ("tp_size", "tp", "dp_size", "dp", "pp_size", "pp", "ep_size", "nnodes"), (1, _ONE_GPU)
    ),
    "node_rank": (0, _ONE_GPU),
    "tokenizer_mode": ("auto", "the engine has fast tokenizers"),
    "grammar_backend": ("xgrammar", "grammars are xgrammar's"),
    "page_size": (1, "pages have a fixed size"),
    "cpu_offload_gb": (0, "all weights are on the device; quantization makes them smaller"),
    "modelopt_quant": (None, "quantization takes the schemes of ModelOpt"),
}
"""Name -> the value that changes nothing, and a hint for others."""

NO_EFFECT = frozenset(
    (
        "served_model_name",
        "attention_backend",
        "prefill_attention_backend",
        "decode_attention_backend",
        "sampling_backend",
        "schedule_policy",
        "schedule_conservativeness",
        "stream_interval",
        "host",
        "port",
        "nccl_port",
        "base_gpu_id",
        "log_level_http",
        "log_requests",
        "log_requests_level",
        "show_time_cost",
        "enable_metrics",
        "watchdog_timeout",
        "skip_server_warmup",
        "trust_remote_code",
        "cuda_graph_max_bs",
        "cuda_graph_bs",
        "max_prefill_tokens",
        "enable_mixed_chunk",
        "disable_custom_all_reduce",
        "enable_p2p_check",
        "disable_cuda_graph_padding",
        "triton_attention_num_kv_splits",
    )
)
"""Names that choose among SGLang's own kernels and schedules, or are for a server."""

NOT_OFFERED = {
    "image_data": _TEXT_ONLY,
    "audio_data": _TEXT_ONLY,
    "video_data": _TEXT_ONLY,
    "lora_path": _NO_LORA,
    "lora_paths": _NO_LORA,
    "enable_lora": _NO_LORA,
    "custom_logit_processor": "`logit_bias` raises or bans tokens",
    "return_hidden_states": "the engine returns texts, tokens and log probabilities",
    "return_routed_experts": "the engine returns texts, tokens and log probabilities",
    "token_ids_logprob": f"top_logprobs_num gives up to {MAX_TOP_LOGPROBS} of the most likely",
    "session_params": "send the whole prompt; the prefix cache keeps what was computed",
}


def engine_options(given: Mapping[str, object], known: Iterable[str]) -> dict[str, object]:
    """Return those of ``given`` that are options of the engine, among ``known``.

    A level of the log is set here, and ``torchao_config`` and ``enable_torch_compile`` are
    translated.

    Raises: UsageError, for an option that would change something and is not offered.
    """
    options = dict(given)
    level = options.pop("log_level", None)
    if level is not None:
        _set_log_level(level)
    torchao_config = options.pop("torchao_config", None)
    if torchao_config:
        from qtool.runtime.online import flag_named

        quantization = options.get("quantization")
        options["quantization"] = flag_named(
            None if quantization is None else str(quantization), str(torchao_config)
        )
    if options.pop("enable_torch_compile", None):
        options.setdefault("compile", "decode")
    names = list(known)
    for name in [name for name in options if name not in names]:
        check_other(name, options.pop(name), names, what="option")
    return options


def check_other(name: str, value: object, known: Iterable[str], *, what: str) -> None:
    """Take an argument that the engine has not, if it asks for nothing.

    Raises: UsageError, with a hint.
    """
    if value is None or value is False or value in ("", [], {}):
        return
    if name in NO_EFFECT:
        LOG.info("`%s` has no effect in qtool's engine", name)
        return
    neutral, hint = NEUTRAL.get(name, (None, ""))
    if hint and value == neutral:
        return
    hint = hint or NOT_OFFERED.get(name, "")
    if hint:
        raise UsageError("E_NOT_OFFERED", f"{name}={value!r:.60} is not offered", hint=hint)
    hint = nearest(name, known, count=1) or "docs/engine.md lists what the engine takes"
    raise UsageError("E_UNKNOWN_OPTION", f"unknown {what} `{name[:100]}`", hint=hint)


def _set_log_level(level: object) -> None:
    number = logging.getLevelNamesMapping().get(str(level).upper())
    if number is None:
        raise UsageError(
            "E_LOG_LEVEL", f"log_level is `{level}`", hint="debug, info, warning or error"
        )
    logging.getLogger("qtool").setLevel(number)
