"""Gated delta nets: the definition against itself, token by token, and the kernels against it.

The kernels run in a process of their own (`python tests/engine/test_delta_net.py interpret`).
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.engine import delta_net, delta_rule
from qtool.engine.attention.pages import Packed, RecurrentStates
from qtool.engine.gated_norm import GatedNorm
from qtool.engine.kv_cache import allocate_states

SHAPES = (delta_rule.Shape(1, 2, 16, 32), delta_rule.Shape(1, 3, 24, 40))
KERNEL = 4


def ints(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def states_of(shape: delta_rule.Shape, dtype: torch.dtype, drafts: int = 0) -> RecurrentStates:
    """States that other sequences left."""
    geometry = [shape.geometry(0, KERNEL)]
    states = allocate_states(5, geometry, dtype, torch.device("cpu"), drafts)[0]
    for part in (states.conv_state, states.recurrent_state, states.drafted):
        part.copy_(torch.randn(part.shape))
    return states


def inputs_of(tokens: int, shape: delta_rule.Shape, dtype: torch.dtype) -> list:
    """The arguments of `mix` before the states."""
    channels, heads = sum(shape.sizes), shape.value_heads
    qkv, b, a = (torch.randn(tokens, size).to(dtype) for size in (channels, heads, heads))
    weight = torch.randn(channels, KERNEL).to(dtype) / 2
    decay, dt_bias = -torch.rand(heads) * 2, torch.randn(heads)
    return [qkv, b, a, delta_rule.DeltaWeights(shape, weight, decay, dt_bias)]


def pass_of(chunks, decodes: int) -> Packed:
    """Chunks of (row, first position, tokens); the first ``decodes`` are decodes."""
    rows = [row for row, _, count in chunks for _ in range(count)]
    positions = [first + i for _, first, count in chunks for i in range(count)]
    starts = [0]
    for _, _, count in chunks[decodes:]:
        starts.append(starts[-1] + count)
    longest = max((count for _, _, count in chunks[decodes:]), default=0)
    more = {"starts": ints(starts), "longest": longest} if longest else {}
    table = torch.zeros(5, 4, dtype=torch.int32)
    return Packed(table, ints(rows), ints(positions), decodes, **more)


def test_a_sequence_is_the_same_whole_in_chunks_and_token_by_token():
    torch.manual_seed(0)
    shape, tokens = SHAPES[0], delta_rule.CHUNK * 2 + 7
    qkv, b, a, *rest = inputs_of(tokens, shape, torch.float32)
    found = []
    for sizes in ([tokens], [3, delta_rule.CHUNK, tokens - 3 - delta_rule.CHUNK], [1] * tokens):
        states, first, parts = states_of(shape, torch.float32), 0, []
        for count in sizes:
            own = slice(first, first + count)
            packed = pass_of([(2, first, count)], decodes=int(count == 1 and first > 0))
            parts.append(delta_rule.mix(qkv[own], b[own], a[own], *rest, states, packed))
            first += count
        found.append((torch.cat(parts), states.conv_state[2], states.recurrent_state[2]))
    for other in found[1:]:
        for result, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


# (tokens of a step, how many of them are right): a prompt, decodes with and without drafts
STEPS = [(5, 5), (4, 1), (4, 4), (1, 1), (3, 2), (4, 3), (4, 4), (4, 1), (2, 2), (1, 1)]


def steps_with_drafts(mix, shape, inputs, states, steps=STEPS):
    """Run ``steps`` of row 2, beside decodes of row 3, as ``mix`` computes them; return the outputs
    of the tokens that were right.
    """
    qkv, b, a, weights = inputs
    wrong = [torch.randn_like(each) for each in (qkv, b, a)]
    first, parts = 0, []
    for number, (count, right) in enumerate(steps):
        own = slice(first, first + right)
        rest = slice(first + right, first + count)
        mine = [
            torch.cat([each[own], other[rest]])
            for each, other in zip((qkv, b, a), wrong, strict=True)
        ]
        if number:
            chunks = [(3, number - 1, 1), (2, first, count), (4, 0, 1), (4, 0, 1)]  # padding
            beside = (each[[number, 0, 0]] for each in (qkv, b, a))
            mine = [
                torch.cat([other[:1], each, other[1:]])
                for each, other in zip(mine, beside, strict=True)
            ]
            packed = pass_of(chunks, decodes=len(chunks))
            packed.decodes, packed.starts = len(packed.rows), None
        else:
            packed = pass_of([(2, 0, count)], decodes=0)
        out = mix(*mine, weights, states, packed)
        skipped = int(number > 0)
        parts.append(out[skipped : skipped + right])
        first += right
    return torch.cat(parts)


def test_drafts_that_were_wrong_leave_nothing_behind():
    torch.manual_seed(0)
    shape, tokens = SHAPES[0], sum(right for _, right in STEPS)
    inputs = inputs_of(tokens + 3, shape, torch.float32)
    plain, drafting = states_of(shape, torch.float32), states_of(shape, torch.float32, drafts=3)
    found = steps_with_drafts(delta_rule.mix, shape, inputs, drafting)
    *parts, weights = inputs
    whole = [each[:tokens] for each in parts]
    expected = delta_rule.mix(*whole, weights, plain, pass_of([(2, 0, tokens)], decodes=0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        drafting.recurrent_state[2], plain.recurrent_state[2], rtol=1e-4, atol=1e-5
    )


def test_a_net_that_computes_something_else_is_left_alone():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **{"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 0},
        **{"linear_num_value_heads": 2, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
        layer_types=["linear_attention"] * 2,
    )
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    layers = model.model.layers
    layers[1].linear_attn.activation = "gelu"
    with torch.no_grad():
        delta_net.replace_delta_nets(model)
    kinds = [isinstance(layer.linear_attn, delta_net.GatedDeltaNet) for layer in layers]
    assert kinds == [True, False]


def test_the_kernels_compute_what_the_definition_does(run_here):
    assert "compared" in run_here("interpret")


@pytest.mark.exhaustive
def test_the_kernels_compile_for_hopper(run_here):
    assert "compiled" in run_here("compile")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_on_a_gpu(run_here):
    assert "compared" in run_here("gpu")


def compare(device: str = "cpu") -> None:
    torch.manual_seed(0)
    # a decode; a prompt, an empty chunk, one that goes on, a long one
    chunks = [(3, 7, 1), (0, 0, 2), (0, 0, 0), (2, 9, 2), (4, 30, 70)]
    for dtype, shape in zip((torch.float32, torch.bfloat16), SHAPES, strict=True):
        for packed, tokens, alike in (
            (pass_of(chunks, 1), 75, False),
            (pass_of(chunks[:1], 1), 1, False),
            (pass_of(chunks[4:], 0), 70, True),
        ):
            arguments = inputs_of(tokens, shape, dtype)
            if alike:  # one key again and again, never forgotten
                arguments[0][:, : sum(shape.sizes[:2])] = 1.0
                arguments[1][:], arguments[2][:] = 10.0, -20.0
            states = states_of(shape, dtype)
            own = moved_to(device, states)
            expected = delta_rule.mix(*arguments, states, packed)
            result = on_device(device)(*arguments, own, packed)
            check_alike(dtype, (result, expected), own, states)
        compare_drafts(device, dtype, shape)
    for dtype, heads, width in ((torch.float32, 3, 24), (torch.bfloat16, 4, 32)):
        compare_norm(device, dtype, heads, width)
    print("compared")


def moved_to(device: str, states: RecurrentStates) -> RecurrentStates:
    parts = (states.conv_state, states.recurrent_state, states.length, states.drafted)
    return RecurrentStates(*(part.clone().to(device) for part in parts))


def columns_of_more(x: Tensor, device: str) -> Tensor:
    """``x`` as the product of several layers at once has it."""
    return torch.cat((torch.full_like(x, torch.nan), x), dim=1).to(device)[:, x.shape[1] :]


def on_device(device: str):
    """`mix` of the kernels, of arguments that are still on the host."""
    from qtool.engine import triton_delta_net

    def mix(qkv, b, a, weights, states, packed):
        moved = {part: getattr(weights, part).to(device) for part in ("conv", "decay", "dt_bias")}
        parts = (columns_of_more(each, device) for each in (qkv, b, a))
        there = [*parts, replace(weights, **moved)]
        for name in ("table", "rows", "positions", "starts"):
            part = getattr(packed, name)
            setattr(packed, name, None if part is None else part.to(device))
        return triton_delta_net.mix(*there, states, packed).cpu()

    return mix


def check_alike(dtype, results, own: RecurrentStates, states: RecurrentStates) -> None:
    for name, one, other in (
        ("out", *results),
        ("conv", own.conv_state, states.conv_state),
        ("matrix", own.recurrent_state, states.recurrent_state),
        ("drafted", own.drafted, states.drafted),
    ):
        error = float((one.cpu().float() - other.float()).norm()) / (float(other.norm()) or 1.0)
        assert error <= (2e-5 if dtype == torch.float32 else 1e-2), f"{name}: {error}"


def compare_drafts(device: str, dtype: torch.dtype, shape: delta_rule.Shape) -> None:
    inputs = inputs_of(sum(right for _, right in STEPS) + 3, shape, dtype)
    states = states_of(shape, dtype, drafts=3)
    own, seed = moved_to(device, states), torch.seed()
    steps = STEPS if device == "cuda" else STEPS[:6]  # the interpreter is slow
    results = []
    for mix, kept in ((on_device(device), own), (delta_rule.mix, states)):
        torch.manual_seed(seed)
        results.append(steps_with_drafts(mix, shape, inputs, kept, steps))
    assert own.length.tolist() == states.length.tolist()
    check_alike(dtype, results, own, states)


@torch.no_grad()
def compare_norm(device: str, dtype: torch.dtype, heads: int, width: int) -> None:
    from qtool.engine import triton_delta_net
    from qtool.runtime.triton.row_quantize import quantize_rows

    x, gates = torch.randn(5, heads, width).to(dtype), torch.randn(5, 2 * heads, width).to(dtype)
    gate = gates[:, heads:]
    for weight_dtype in {dtype, torch.float32}:
        norm = GatedNorm(torch.nn.Parameter(torch.randn(width).to(weight_dtype)), 1e-6)
        there = [part.to(device) for part in (x, gate, norm.weight)]
        result, _ = triton_delta_net.gated_norm(*there, norm.eps, None)
        expected = norm.normalize(x, gate).flatten(1)
        torch.testing.assert_close(
            result.cpu(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5
        )
        for codes in ("fp8", "int8"):
            own, scale = triton_delta_net.gated_norm(*there, norm.eps, codes)
            wanted, wanted_scale = quantize_rows(result, codes)
            assert torch.equal(own.view(torch.uint8), wanted.view(torch.uint8))
            assert torch.equal(scale, wanted_scale)


def interpret() -> None:
    from support import triton_cpu

    triton_cpu.repair()
    compare()


def compile_all() -> None:
    from support import triton_cpu

    from qtool.engine import triton_delta_net

    compiled: list = []
    triton_cpu.compile_only(compiled)
    shape = delta_rule.Shape(16, 32, 128, 128)  # Qwen3-Next's
    *parts, weights = inputs_of(9, shape, torch.bfloat16)
    parts = [each.to("meta") for each in parts]  # for Hopper
    for drafts in (0, 3):
        geometry = [shape.geometry(0, KERNEL)]
        states = allocate_states(5, geometry, torch.bfloat16, torch.device("meta"), drafts)[0]
        triton_delta_net.mix(*parts, weights, states, pass_of([(3, 7, 1), (0, 0, 8)], 1))
    heads = torch.empty(8, 32, 128, dtype=torch.bfloat16, device="meta")
    for codes in (None, "fp8"):
        triton_delta_net.gated_norm(heads, heads, heads[0, 0], 1e-6, codes)
    for kernel in compiled:
        used = triton_cpu.resources(kernel)
        # `_solve` spills a few registers
        assert used["stack"] <= 64 and used["shared"] <= 232448, (kernel.metadata.name, used)
    print(f"{len(compiled)} compiled")


if __name__ == "__main__":
    {
        "interpret": interpret,
        "compile": compile_all,
        "gpu": lambda: compare("cuda"),
    }[sys.argv[1]]()
