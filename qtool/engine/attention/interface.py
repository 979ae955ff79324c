"""Causal attention over a paged KV cache, and its entry in transformers' attention interface.

`write` stores the keys and values of new tokens, `attend` reads those that each token may see.
Token ``t`` of a forward pass belongs to row ``rows[t]`` of the page table and sees the positions
``max(0, p - window + 1) .. p`` of that sequence, ``p = positions[t]``: its own key and value must
have been written. Position ``p`` lies in page ``table[row, p // PAGE]``, slot ``p % PAGE``. Numbers
that earlier owners left in a page never reach a result, not even as NaN.

On CUDA `triton_paged` computes; on a CPU `native_decode` reads the pages of tokens that decode, and
otherwise the visible keys and values are gathered for
`torch.nn.functional.scaled_dot_product_attention`. Models of transformers call this attention as
``"qtool"``. Inside `running` they compute; inside `recording` a dry pass finds out what their
layers need, and refuses what is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from qtool.architecture.meta import quiet_imports
from qtool.codes import to_fp8
from qtool.engine.attention import native_decode
from qtool.engine.attention.latents import Latents, attend_expanded
from qtool.engine.attention.pages import (
    PAGE,
    KVPages,
    LayerCache,
    LayerGeometry,
    Packed,
    RecurrentStates,
    StateGeometry,
)
from qtool.errors import CheckpointRefused
from qtool.runtime.kernels import current

with quiet_imports():
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

NAME = "qtool"  # the `attn_implementation` of this attention
MAX_HEAD_DIM = 256


def write(kv: KVPages, k: Tensor, v: Tensor, packed: Packed) -> None:
    """Store ``k`` [T, kv_heads, head_dim] and ``v`` [T, kv_heads, v_head_dim] of the new tokens;
    latents are stored with ``k``.
    """
    if k.is_cuda:
        with current(k.device):
            _kernels().write(kv, k, v, packed)
        return
    rows, positions = packed.rows.long(), packed.positions.long()
    pages = packed.table[rows, positions // PAGE].long()
    slots = positions % PAGE
    parts = ((kv.k, k, kv.k_scale), (kv.v, v, kv.v_scale))
    for cached, new, scale in parts[: 1 if kv.keeps_latents else 2]:
        if cached.dtype == torch.float8_e4m3fn:
            new = to_fp8(new.float() / scale)
        cached[pages, :, slots] = new.to(cached.dtype)


def attend(
    q: Tensor,
    kv: KVPages,
    packed: Packed,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of ``q`` [T, heads, head_dim]: [T, heads, v_head_dim], of its dtype.

    Args:
        q: queries of all tokens.
        kv: the pages of the layer.
        packed: the tokens of the pass.
        scaling: what logits are multiplied with.
        window: how many positions a token sees, itself included; None for all before it.
        softcap: if given, logits then become ``softcap * tanh(logits / softcap)``.
        sinks: a logit for each head, [heads], that takes part in the softmax and has no value.
    """
    if not q.is_cuda:
        return _attend_on_cpu(q, kv, packed, scaling, window, softcap, sinks)
    out = q.new_empty(q.shape[0], q.shape[1], kv.v.shape[3])
    others: tuple[object, ...] = (window, softcap, sinks)
    if kv.keeps_latents:
        assert window is None and not softcap and sinks is None
        others = ()
    kernels = _latent_kernels() if kv.keeps_latents else _kernels()
    with current(q.device):
        if packed.decodes:
            kernels.decode(q, kv, packed, out, scaling, *others)
        if packed.starts is not None and packed.longest:
            kernels.prefill(q, kv, packed, out, scaling, *others)
    return out


def attend_latents(
    latent: Latents, q: Tensor, q_rope: Tensor, kv: KVPages, packed: Packed, *, scaling: float
) -> Tensor:
    """Return the attention of queries where ``kv`` keeps latents: [T, heads, value width].

    Args:
        latent: takes queries to latents and latents to values, or makes keys and values.
        q: queries of all tokens without their rotary part, [T, heads, key width].
        q_rope: the rotary part, [T, heads, rotary].
        kv: the pages of the layer.
        packed: the tokens of the pass.
        scaling: what logits are multiplied with.
    """
    expanded = packed.expanded
    if expanded is None:
        return latent.values(attend(latent.queries(q, q_rope), kv, packed, scaling=scaling))
    value_width = latent.weight.shape[1] - latent.key_width
    out = q.new_empty(q.shape[0], q.shape[1], value_width)
    if first := expanded.token:
        queries = latent.queries(q[:first], q_rope[:first])
        gathered = attend(queries, kv, packed.without(expanded), scaling=scaling)
        out[:first] = latent.values(gathered)
    if q.is_cuda:
        attend_expanded(latent, q, q_rope, kv, packed, out, scaling)
    else:
        _attend_expanded_on_cpu(latent, torch.cat([q, q_rope], -1), kv, packed, out, scaling)
    return out


def _kernels() -> ModuleType:
    from qtool.engine.attention import triton_paged  # needs triton

    return triton_paged


def _latent_kernels() -> ModuleType:
    from qtool.engine.attention import triton_latent  # needs triton

    return triton_latent


def _attend_on_cpu(
    q: Tensor,
    kv: KVPages,
    packed: Packed,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    out = q.new_empty(q.shape[0], q.shape[1], kv.v.shape[3])
    done = native_decode.decode(q, kv, packed, out, scaling, window, softcap, sinks)
    if done == len(q):
        return out
    for begin, end, first in packed.spans():
        if begin < done:
            continue
        last = first + end - begin - 1
        low = 0 if window is None else max(0, first - window + 1)
        row = packed.table[packed.rows[begin]]
        k, v = (
            _gather(part, row, scale, low, last, q.dtype)
            for part, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale))
        )
        out[begin:end] = _attend_one(
            q[begin:end], k, v, first, low, scaling, window, softcap, sinks
        )
    return out


def _attend_expanded_on_cpu(
    latent: Latents, q: Tensor, kv: KVPages, packed: Packed, out: Tensor, scaling: float
) -> None:
    """Do what `attend_expanded` does, with ``q`` [T, heads, key width + rotary]."""
    assert packed.expanded is not None
    rank = kv.v.shape[3]
    for begin, end, first in packed.spans():
        if begin < packed.expanded.token:
            continue
        last = first + end - begin - 1
        kept = _gather(kv.k, packed.table[packed.rows[begin]], kv.k_scale, 0, last, q.dtype)
        k, v = latent.expand(kept[..., :rank], kept[..., rank:])
        out[begin:end] = _attend_one(q[begin:end], k, v, first, 0, scaling)


def _gather(
    cached: Tensor, row: Tensor, scale: float, low: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Return positions ``low`` to ``last`` of the sequence whose pages are in ``row`` of the table
    as [kv_heads, positions, head_dim].
    """
    pages = row[low // PAGE : last // PAGE + 1].long()
    heads, head_dim = cached.shape[1], cached.shape[3]
    found = cached[pages].transpose(0, 1).reshape(heads, -1, head_dim)
    begin = low % PAGE
    found = found[:, begin : begin + last - low + 1].to(dtype)
    return found if scale == 1 else found * scale


def _attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    low: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of one sequence.

    Args:
        q: [n, heads, head_dim].
        k: [kv_heads, positions, head_dim].
        v: [kv_heads, positions, v_head_dim].
        first: the position of the first query.
        low: the position of the first key.
        scaling: as in `attend`.
        window: as in `attend`.
        softcap: as in `attend`.
        sinks: as in `attend`.
    """
    tokens = q.shape[0]
    is_whole = first == 0 and (window is None or window >= tokens)
    mask = None
    is_plain = not softcap and sinks is None
    if tokens > 1 and not (is_plain and is_whole):
        own = torch.arange(first, first + tokens)[:, None]
        seen = torch.arange(low, low + k.shape[1])[None, :]
        mask = seen <= own
        if window is not None:
            mask &= seen > own - window
    if not is_plain:
        return _attend_by_parts(q, k, v, mask, scaling=scaling, softcap=softcap, sinks=sinks)
    return nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=is_whole and tokens > 1,
        scale=scaling,
        enable_gqa=True,
    )[0].transpose(0, 1)


def _attend_by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    heads = q.shape[1]
    k, v = (part.float().repeat_interleave(heads // part.shape[0], dim=0) for part in (k, v))
    logits = torch.matmul(q.transpose(0, 1).float(), k.transpose(1, 2)) * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits.masked_fill_(~mask, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(-1, q.shape[0], 1)], -1)
    shares = torch.softmax(logits, dim=-1)[..., : k.shape[1]]
    return torch.matmul(shares, v).transpose(0, 1).to(q.dtype)


@dataclass
class Recording:
    """What a dry pass found."""

    layers: list[LayerGeometry] = field(default_factory=list)
    """In the order of their calls."""
    states: list[StateGeometry] = field(default_factory=list)
    """Of the layers that keep a state for each sequence."""
    windows: set[int | None] = field(default_factory=set)
    """Of the masks that the model made; None for a causal one."""


RUNNING: ContextVar[tuple[Packed, Mapping[int, LayerCache]]] = ContextVar("running")
RECORDING: ContextVar[Recording] = ContextVar("recording")


@contextmanager
def running(packed: Packed, layers: Mapping[int, LayerCache]) -> Iterator[None]:
    """Run the model over ``packed``, with the pages or the states of each ``layer_idx``.

    Call the model with ``input_ids`` and ``position_ids`` [1, T] and ``use_cache=False``, without a
    mask.
    """
    token = RUNNING.set((packed, layers))
    try:
        yield
    finally:
        RUNNING.reset(token)


def packed_tokens() -> Packed:
    """Return the tokens of the pass that runs."""
    return RUNNING.get()[0]


def pages_of(layer_idx: int) -> KVPages:
    """Return the pages of a layer that attends."""
    found = RUNNING.get()[1][layer_idx]
    assert isinstance(found, KVPages)
    return found


def states_of(layer_idx: int) -> RecurrentStates:
    """Return the states of a layer that keeps them."""
    found = RUNNING.get()[1][layer_idx]
    assert isinstance(found, RecurrentStates)
    return found


@contextmanager
def recording() -> Iterator[Recording]:
    """Note each layer's geometry; the model's attention returns zeros.

    Call the model with ``input_ids`` [1, T] of one sequence, ``use_cache=False``, not on the meta
    device: transformers looks at the positions.
    Raises: CheckpointRefused, from the pass or at its end, when the model needs an attention that
        is not supported.
    """
    found = Recording()
    token = RECORDING.set(found)
    # Only while recording, since transformers looks at the positions for each mask, which waits for
    # the GPU; without this it makes no masks.
    AttentionMaskInterface.register(NAME, _record_mask)
    try:
        yield found
    finally:
        RECORDING.reset(token)
        AttentionMaskInterface._global_mapping.pop(NAME, None)
    for layer in found.layers:
        if found.windows and layer.window not in found.windows:
            raise _refused(
                f"layer {layer.layer_idx} has the window {layer.window}, and the model's masks "
                f"have {found.windows}"
            )


def _refused(reason: str) -> CheckpointRefused:
    return CheckpointRefused(
        "E_ATTENTION",
        f"the model's attention is not supported: {reason}",
        hint="`--engine vllm` hands the checkpoint to vLLM",
    )


# Arguments that models pass through to every attention, and that can be ignored here or repeat what
# `Packed` says.
_IGNORED = {
    "position_ids",
    "cache_position",
    "past_key_value",
    "past_key_values",
    "use_cache",
    "seq_idx",
    "deterministic",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "num_items_in_batch",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend for a model of transformers.

    ``query`` is [1, heads, T, head_dim], keys and values likewise; ``s_aux`` are attention sinks,
    [heads]; the result is [1, T, heads, v_head_dim].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    found = RECORDING.get(None)
    latent: Latents | None = getattr(module, "latent", None)
    if found is not None:
        if latent and (sliding_window or softcap or s_aux is not None):
            raise _refused("its latents have a window, a soft cap or sinks")
        if reason := _unsupported_reason(module, query, key, value, attention_mask, others):
            raise _refused(reason)
        _, heads, tokens, head_dim = query.shape
        kv_heads = key.shape[1]
        v_head_dim = value.shape[-1]
        geometry = LayerGeometry(
            layer_idx,
            heads,
            kv_heads,
            key.shape[-1] if latent else head_dim,
            v_head_dim,
            sliding_window or None,
            softcap or None,
            float(scaling),
            keeps_latents=latent is not None,
        )
        found.layers.append(geometry)
        zeros = query.new_zeros(tokens, heads, v_head_dim)
        return (latent.values(zeros) if latent else zeros)[None], None
    packed = packed_tokens()
    kv = pages_of(layer_idx)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    write(kv, k, v, packed)
    if latent:
        own, q_rope = q[..., : latent.key_width], q[..., latent.key_width :]
        return attend_latents(latent, own, q_rope, kv, packed, scaling=scaling)[None], None
    out = attend(
        q,
        kv,
        packed,
        scaling=scaling,
        window=sliding_window or None,
        softcap=softcap or None,
        sinks=s_aux,
    )
    return out[None], None


def _unsupported_reason(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    others: Mapping[str, object],
) -> str | None:
    """Return why the attention of ``module`` cannot be computed here; None when it can."""
    if not isinstance(getattr(module, "layer_idx", None), int):
        return f"{type(module).__name__} has no `layer_idx` to tell which layer it is"
    is_causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return "it is bidirectional"
    own_tokens = query.shape[2] == key.shape[2] and query.shape[0] == 1
    if getattr(module, "is_cross_attention", False) or not own_tokens:
        return "it attends to other tokens than its own sequence's"
    if attention_mask is not None:
        return "it makes a mask of its own"
    given = {name for name, value in others.items() if value is not None}
    if unknown := sorted(given - _IGNORED - {"is_causal"}):
        return f"it passes `{unknown[0]}`"
    return None if hasattr(module, "latent") else _unsupported_heads(query, key, value)


def _unsupported_heads(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    grouped = query.shape[1] % key.shape[1] == 0 and value.shape[1] == key.shape[1]
    if grouped and max(query.shape[3], value.shape[3]) <= MAX_HEAD_DIM:
        return None
    shapes = ", ".join(str(list(part.shape[1::2])) for part in (query, key, value))
    return f"query, key and value heads of shape {shapes}"


def _record_mask(
    *, mask_function: Callable[..., Tensor], device: torch.device | str = "cpu", **_: object
) -> None:
    """Note the window of a mask that a model makes during `recording`.

    A token must see an unbroken range of positions up to its own.
    """
    found = RECORDING.get(None)
    if found is None:  # another thread, with a model of its own
        return
    windows = []
    zero = torch.zeros((), dtype=torch.long, device=device)
    for own in (1000, 150_001, 262_142):
        seen = torch.arange(own + 2, device=device)
        try:
            mask = mask_function(zero, zero, torch.full_like(seen, own), seen).expand(own + 2).cpu()
        except IndexError:
            raise _refused("its mask depends on the input") from None
        # the mask of a window of 0: a model without such layers makes one
        if not bool(mask.any()):
            return
        first = int(mask.int().argmax())
        if not bool(mask[first : own + 1].all()) or bool(mask[own + 1]):
            raise _refused("its mask is not causal")
        windows.append(own + 1 - first)
    last = windows[-1]
    if windows == [1001, 150_002, 262_143]:
        found.windows.add(None)
    elif windows == [min(last, 1001), min(last, 150_002), last]:
        found.windows.add(last)
    else:
        raise _refused("its mask sees chunks of the sequence")


AttentionInterface.register(NAME, _forward)
