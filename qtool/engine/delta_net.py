"""`GatedDeltaNet`: a layer with a state for each sequence, in place of transformers' own
(Qwen3-Next, Qwen3.5), where both compute the same.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

from qtool.architecture.meta import quiet_loading
from qtool.engine.attention.interface import RECORDING, packed_tokens, running, states_of
from qtool.engine.attention.pages import Packed, StateGeometry
from qtool.engine.delta_rule import CHUNK, DeltaWeights, Shape, mix
from qtool.engine.gated_norm import GatedNorm
from qtool.engine.joined import Linear, codes_of, multiply, side_by_side
from qtool.engine.kv_cache import allocate_states
from qtool.engine.norms import distance, random_input, tolerance_of
from qtool.errors import one_line
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.kernels import current

TOKENS = CHUNK + 9  # of the input that layers are compared with
LOG = logging.getLogger("qtool.engine")
INPUTS = (
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)


def is_delta_net(module: nn.Module) -> bool:
    """Whether ``module`` has the parts of a gated delta net."""
    parts = {name for name, _ in module.named_children()}
    known = any({*names, "conv1d", "norm", "out_proj"} == parts for names in INPUTS)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return known and own == {"A_log", "dt_bias"}


def has_delta_nets(model: CausalLM) -> bool:
    """Whether ``model`` has gated delta nets."""
    return any(map(is_delta_net, model.modules()))


def replace_delta_nets(model: CausalLM) -> None:
    """Put a `GatedDeltaNet` in place of each gated delta net of ``model``, if both compute the
    same.
    """
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if is_delta_net(child) and (own := _seen_in(child)):
                setattr(holder, name, own)


def _seen_in(net: nn.Module) -> GatedDeltaNet | None:
    """Return ``net`` as one, None if it computes something else."""
    try:
        own = GatedDeltaNet(net)
        off = _distance(own, net)
    except Exception as error:  # the code of an architecture may raise anything
        LOG.info("%s runs as transformers has it: %s", type(net).__name__, one_line(error))
        return None
    if off <= tolerance_of(net, own.conv_weight.dtype):
        return own
    LOG.info("%s is not a gated delta net (relative error %.1e)", type(net).__name__, off)
    return None


def _distance(own: GatedDeltaNet, net: nn.Module) -> float:
    """Return how far ``own`` is from ``net`` at a random sequence, of which it sees two chunks, and
    the last token as a decode.
    """
    x = random_input((1, TOKENS, own.hidden_size), own.conv_weight)
    with quiet_loading():  # it misses kernels that are not needed
        expected = net(x)
    states = allocate_states(1, [own.geometry], x.dtype, x.device)
    ints = partial(torch.tensor, dtype=torch.int32, device=x.device)
    results = []
    for first, count in ((0, TOKENS - 4), (TOKENS - 4, 3), (TOKENS - 1, 1)):
        positions = ints(range(first, first + count))
        packed = Packed(ints([[0]]), positions * 0, positions, decodes=1)
        if count > 1:
            starts = ints([0, count])
            packed = replace(packed, decodes=0, starts=starts, longest=count)
        with running(packed, states):
            results.append(own(x[:, first : first + count]))
    return distance(torch.cat(results, dim=1), expected, expected)


class GatedDeltaNet(nn.Module):
    """A gated delta net with its states in `RecurrentStates`; ``net`` is transformers' own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layer_idx, self.hidden_size = _number(net, "layer_idx"), _number(net, "hidden_size")
        self.shape = Shape(
            *(
                _number(net, name)
                for name in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
            )
        )
        self.inputs = next(names for names in INPUTS if hasattr(net, names[0]))
        for name in (*self.inputs, "norm", "out_proj"):
            setattr(self, name, getattr(net, name))
        self.b_and_a: nn.Module | None = None
        self.gated_norm = GatedNorm.of(net.get_submodule("norm"))
        if len(self.inputs) == 4:
            heads = self.shape.value_heads
            parts = [cast(Linear, net.get_submodule(name)) for name in self.inputs[2:]]
            self.b_and_a, self.b_and_a_at = side_by_side(parts, [heads, heads])
        conv = net.get_submodule("conv1d")
        self.conv_weight = nn.Parameter(
            conv.get_parameter("weight").squeeze(1).contiguous(), requires_grad=False
        )
        decay = -net.get_parameter("A_log").float().exp()
        self.decay = nn.Parameter(decay, requires_grad=False)
        self.dt_bias = nn.Parameter(net.get_parameter("dt_bias").float(), requires_grad=False)

    @property
    def geometry(self) -> StateGeometry:
        """What a sequence keeps."""
        return self.shape.geometry(self.layer_idx, self.conv_weight.shape[1])

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        """Return the outputs [1, T, H] of the tokens of a pass, [1, T, H]."""
        qkv, z, b, a = self._project(hidden_states[0])
        mixed = self._mix(qkv, b, a)
        out_proj = self.get_submodule("out_proj")
        scale = None
        if self.gated_norm:
            mixed, scale = self.gated_norm(mixed, z, codes_of(out_proj))
        else:
            width = self.shape.value_width
            mixed = self.get_submodule("norm")(mixed.reshape(-1, width), z.reshape(-1, width))
        return multiply(out_proj, mixed.view(len(qkv), -1), scale)[None]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys and values [T, C], gates [T, heads, D], and what the learning rate
        and the decay of each head are made of, [T, heads].
        """
        shape = self.shape
        heads = self.shape.value_heads
        if self.b_and_a is not None:
            qkv, z = (self.get_submodule(name)(x) for name in self.inputs[:2])
            both = self.b_and_a(x)
            b, a = (both[:, at : at + heads] for at in self.b_and_a_at)
            return qkv, z.view(len(x), heads, -1), b, a
        outputs = [self.get_submodule(name)(x) for name in self.inputs]
        # the parts of each key head stand side by side
        values = shape.shared * shape.value_width
        q, k, v, z = (
            outputs[0]
            .view(len(x), shape.key_heads, -1)
            .split([shape.key_width, shape.key_width, values, values], dim=-1)
        )
        b, a = outputs[1].view(len(x), shape.key_heads, -1).chunk(2, dim=-1)
        qkv = torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1)
        return qkv, z.reshape(len(x), shape.value_heads, -1), b.flatten(1), a.flatten(1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _mix(self, qkv: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """Return the values [T, heads, D] that the states hold for the queries, and update them."""
        if found := RECORDING.get(None):
            found.states.append(self.geometry)
            return qkv.new_zeros(len(qkv), self.shape.value_heads, self.shape.value_width)
        packed = packed_tokens()
        states = states_of(self.layer_idx)
        weights = DeltaWeights(self.shape, self.conv_weight, self.decay, self.dt_bias)
        if qkv.is_cuda:
            with current(qkv.device):
                return cast(Tensor, _kernels().mix(qkv, b, a, weights, states, packed))
        return mix(qkv, b, a, weights, states, packed)


def _number(module: nn.Module, name: str) -> int:
    number: int = getattr(module, name)
    return number


def _kernels() -> ModuleType:
    from qtool.engine import triton_delta_net  # needs triton

    return triton_delta_net
