"""Fields of requests that stand in no model of `protocol`: those that change nothing here, those
that are not offered, and how an unknown one is told from a misspelled one.

Sources: OpenAI's API reference; vLLM 0.33 `entrypoints/openai/*/protocol.py`; SGLang 0.5.23
    `srt/entrypoints/openai/protocol.py`, `srt/managers/io_struct.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

LOG = logging.getLogger("qtool.serve")
MAX_LOGGED = 256  # lines in the log about words of requests
MAX_UNKNOWN = 64  # unknown fields of one object
MIN_NEAR = 4  # letters of a name that may be a misspelled one
MAX_TYPOS = 2
MAX_NAME = 40
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

OPENAI = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "prompt_cache_options verbosity prediction"
)
VLLM = (
    "length_penalty truncation_side media_io_kwargs mm_processor_kwargs priority session_id "
    "cache_salt stream_interval return_token_offsets return_mm_kwargs routed_experts_prompt_start "
    "kv_transfer_params ec_transfer_params vllm_xargs guided_decoding_backend "
    "guided_whitespace_pattern"
)
SGLANG = (
    "extra_key custom_labels custom_params ngram_corpus_id bootstrap_host bootstrap_port "
    "bootstrap_room bootstrap_pair_key decode_tp_size routed_dp_rank data_parallel_rank "
    "disagg_prefill_dp_rank kv_router_hint routing_key conversation_id http_worker_ipc no_logs "
    "log_metrics images_config max_dynamic_patch min_dynamic_patch image_max_dynamic_patch "
    "video_max_dynamic_patch use_audio_in_video video_config mm_hashes mm_content_hashes "
    "modalities routed_experts_start_len external_trace_header received_time "
    "need_wait_for_mm_inputs num_items_assigned encoder_urls multi_item_delimiter_indices "
    "return_bytes"
)
NO_EFFECT = frozenset(f"{OPENAI} {VLLM} {SGLANG}".split())
"""Fields that these define, and that change nothing here."""

_TEXT_ONLY = "this server reads and writes only text"
_NO_LORA = "this server loads no adapters"
_GUIDED = "vLLM's present name is `structured_outputs`"
_NO_FEATURES = "this server returns texts, tokens and log probabilities"
NOT_OFFERED = {
    # OpenAI
    "audio": _TEXT_ONLY,
    "functions": "their present name is `tools`",
    "function_call": "its present name is `tool_choice`",
    "web_search_options": "this server does not search",
    "moderation": "this server does not moderate",
    "suffix": "if the model can fill in text, write its fill-in tokens into the prompt",
    "best_of": "ask for several answers with `n`",
    "echo": "the prompt is not repeated here",
    # vLLM
    "use_beam_search": "tokens are sampled, or greedy with temperature 0",
    "truncate_prompt_tokens": "shorten the prompt",
    "prompt_logprobs": "`echo` with `logprobs` of /v1/completions gives those of a prompt",
    "logprob_token_ids": "`top_logprobs` gives the most likely tokens",
    "allowed_token_ids": "`logit_bias` raises or bans tokens",
    "bad_words": "`logit_bias` bans tokens",
    "add_special_tokens": "the chat template writes special tokens",
    "chat_template": "--chat-template of the server replaces the model's",
    "prompt_embeds": "send text or tokens",
    "repetition_detection": "`frequency_penalty` makes repetition less likely",
    "thinking_token_budget": "`max_tokens` limits thoughts and answer together",
    "watermarking": "texts are not marked",
    "return_tokens_as_token_ids": "/generate gives tokens",
    "return_token_ids": "/generate gives tokens",
    "return_prompt_text": "/tokenize gives the tokens of messages, and /detokenize their text",
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "guided_json_object": _GUIDED,
    # SGLang
    "stop_regex": "`stop` takes strings",
    "lora_path": _NO_LORA,
    "lora_id": _NO_LORA,
    "session_params": "send the whole prompt",
    "image_data": _TEXT_ONLY,
    "video_data": _TEXT_ONLY,
    "audio_data": _TEXT_ONLY,
    "input_embeds": "send text or input_ids",
    "input_ids": "/generate takes tokens",
    "positional_embed_overrides": "send text or input_ids",
    "custom_logit_processor": "this server runs no code of clients",
    "task": "write it into the messages",
    "background": "answers are not kept",
    "max_thinking_tokens": "`max_new_tokens` limits thoughts and answer together",
    "require_reasoning": "`regex`, `ebnf` and `json_schema` constrain an answer",
    "token_ids_logprob": "`top_logprobs_num` gives the most likely tokens",
    "return_flat_raw_top_logprobs": "`top_logprobs_num` gives lists",
    "return_flat_raw_top_logprobs_b64": "`top_logprobs_num` gives lists",
    "return_sampling_mask": _NO_FEATURES,
    "return_hidden_states": _NO_FEATURES,
    "return_routed_experts": _NO_FEATURES,
    "return_indexer_topk": _NO_FEATURES,
    "return_entropy": _NO_FEATURES,
    "return_prompt_token_ids": "/tokenize gives the tokens of a prompt",
    "return_meta_info": "/generate gives it",
    "return_cached_tokens_details": "usage has their number",
}
"""Fields that would change the answer, with what to do instead."""

_DEFAULTS: dict[str, tuple[object, ...]] = {
    "function_call": ("none", "auto"),
    "truncate_prompt_tokens": (-1,),
    "thinking_token_budget": (-1,),
    "truncate": ("NONE", "none"),
    "embed_dtype": ("float32",),
    "embedding_type": ("float",),
    "embedding_types": (["float"],),
    "output_dtype": ("float",),
    "endianness": ("native", "little"),
}
"""Values of fields that are not offered which ask for nothing."""

_logged: set[tuple[str, str]] = set()


def asks_for_nothing(value: object) -> bool:
    """Whether ``value`` is null, false or empty, or a list of such values."""
    if isinstance(value, list):
        return all(map(_is_nothing, value))
    return _is_nothing(value)


def _is_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def reason_not_offered(name: str, value: object, own: Mapping[str, str]) -> str | None:
    """Return what to do instead of the field ``name``; None if it is neither in ``own``, the table
    of a route, nor in `NOT_OFFERED`, or asks for nothing.
    """
    if value in _DEFAULTS.get(name, ()):
        return None
    return own.get(name) or NOT_OFFERED.get(name)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the name among ``known`` that ``name`` differs from in one or two letters, in case or
    in underscores; None if there is none.
    """
    plain = _plain(name)
    if not MIN_NEAR <= len(plain) <= MAX_NAME:
        return None
    most = MAX_TYPOS if len(plain) > MIN_NEAR + 1 else 1
    found = [(_distance(plain, _plain(other), most), other) for other in known]
    typos, other = min(found, default=(most + 1, ""))
    return other if typos <= most else None


def log_without_effect(name: str) -> None:
    """Log once that the field ``name`` has no effect."""
    log_once("requests have a field `%s`, which has no effect here", name)


def log_once(message: str, name: str) -> None:
    """Log ``message`` with ``name`` in it, a word of a request; each only once.

    What looks like no name is left out: it may be a client's text.
    """
    name = name if PLAIN_NAME.fullmatch(name) else "..."
    if (key := (message, name)) not in _logged and len(_logged) < MAX_LOGGED:
        _logged.add(key)
        LOG.info(message, name)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _distance(one: str, other: str, most: int) -> int:
    """Return how many letters are to be changed, added or removed; ``most + 1`` for more."""
    if abs(len(one) - len(other)) > most:
        return most + 1
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        line = [row]
        for column, its in enumerate(other, start=1):
            changed = above[column - 1] + (letter != its)
            line.append(min(changed, above[column] + 1, line[-1] + 1))
        above = line
    return min(above[-1], most + 1)
