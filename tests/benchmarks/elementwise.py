"""Are the elementwise kernels right on this GPU, and what does one launch of each add? For the
sizes of Llama-3.1-8B.

    python tests/benchmarks/elementwise.py [--tokens 1,16,64,256,8192] [--warps 512,1024]

Each is compared with the plain functions of `qtool.engine.decoder_layers`, then timed in a CUDA
graph, as a chain of launches. Prints microseconds a launch and, for many tokens, terabytes a
second; exits 1 if a result is wrong. ``$OUT/elementwise.json`` keeps the numbers. ``--warps``: how
many numbers each warp takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qtool.engine import decoder_layers as fused
from qtool.engine import elementwise, fused_attention
from qtool.engine.attention.pages import PAGE, KVPages, Packed
from qtool.engine.norm_kind import NormKind
from qtool.engine.norms import Norm, Sum, add_norm
from qtool.runtime.triton import row_quantize

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
AT = (0, HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM)
LAUNCHES = 32  # of a chain, each of the next of some inputs
# bytes of inputs between two uses of one, past the L2 cache, for many tokens; few tokens come from
# the L2 in a model too
TURNOVER = 200e6

# what is timed, what checks it, bytes it moves
Case = tuple[Callable[[], object], Callable[[], None], int]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def close(name: str, result: Tensor, expected: Tensor) -> None:
    error = float((result.float() - expected.float()).norm() / expected.float().norm())
    # bf16 is 2e-3; what 16 bits round otherwise moves some of the numbers in fp8 by a whole code
    if not error <= (4e-3 if result.dtype.itemsize > 1 else 1.5e-2):
        raise AssertionError(f"{name}: relative error {error:.1e}")


def same_codes(
    name: str, result: tuple[Tensor, Tensor | None], rounded: Tensor, codes: str
) -> None:
    """Compare with the codes of ``rounded``, which another kernel made: the compiler may have
    ordered its sums otherwise.
    """
    expected, scale = row_quantize.quantize_rows(rounded, codes)
    differ = float((result[0].view(torch.uint8) != expected.view(torch.uint8)).float().mean())
    if (
        result[1] is None
        or not differ < 1e-4
        or not torch.allclose(result[1], scale, rtol=1e-6, atol=0)
    ):
        raise AssertionError(
            f"{name}: {differ:.1e} of the codes are not those of row_quantize, or the scales are "
            "not"
        )


def norm_case(tokens: int, codes: str | None, parts: str = "") -> Case:
    """``parts``: "after" is the norm of the output, as Gemma has it; "other" a second output, as
    Cohere has it, with LayerNorms.
    """
    x, residual, other = (random(tokens, HIDDEN) for _ in range(3))
    kind = {
        "": NormKind(1e-5),
        "after": NormKind(1e-6, plus_one=True, late=True),
        "other": NormKind(1e-5, late=True, centered=True),
    }[parts]
    norm, after = (Norm(nn.Parameter(random(HIDDEN), requires_grad=False), kind) for _ in range(2))
    states = Sum(x, residual)
    if parts == "after":
        states.after = after
    elif parts == "other":
        states.other = other

    def check() -> None:
        out, _, total = add_norm(states, norm)
        close("norm", out, norm.normalize(total))
        close("sum", total, states.total())
        if not parts and not torch.equal(total, residual + x):
            raise AssertionError("norm: the sum is wrong")
        if codes:
            same_codes("norm", add_norm(states, norm, codes)[:2], out, codes)

    size = tokens * HIDDEN * (6 + 2 * (parts == "other") + (1 if codes else 2))
    return lambda: add_norm(states, norm, codes), check, size


def gated_case(tokens: int, codes: str | None) -> Case:
    x = random(tokens, 2 * INNER)

    def check() -> None:
        out, _ = fused.gated(x, (0, INNER), INNER, "silu")
        close("gated", out, nn.functional.silu(x[:, :INNER]) * x[:, INNER:])
        if codes:
            same_codes("gated", fused.gated(x, (0, INNER), INNER, "silu", codes), out, codes)

    return (
        lambda: fused.gated(x, (0, INNER), INNER, "silu", codes),
        check,
        tokens * INNER * (4 + (1 if codes else 2)),
    )


def rotary_case(
    tokens: int,
    norms: str,
    dtype: torch.dtype,
    kind: fused_attention.Angles = "twice",
) -> Case:
    """``norms``: over each "head", over all at once ("whole"), or none."""
    qkv = random(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    sizes = [heads * HEAD_DIM if norms == "whole" else HEAD_DIM for heads in (HEADS, KV_HEADS)]
    q_norm, k_norm = (
        Norm(nn.Parameter(random(size), requires_grad=False), NormKind(1e-6)) if norms else None
        for size in sizes
    )
    angles = torch.rand(tokens, HEAD_DIM // 2, device="cuda") * 6
    angles = angles.repeat_interleave(2, dim=1) if kind == "repeated" else angles.repeat(1, 2)
    rotary = fused_attention.Rotary(angles.cos().bfloat16(), angles.sin().bfloat16(), kind)
    prefill = tokens > 1024
    pages = tokens // PAGE + 2 if prefill else tokens * 8 + 1
    caches = [
        KVPages(
            *(
                torch.zeros(pages, KV_HEADS, PAGE, HEAD_DIM, device="cuda").to(dtype)
                for _ in range(2)
            ),
            0.02,
            0.02,
        )
        for _ in range(2)
    ]
    ints = {"dtype": torch.int32, "device": "cuda"}
    if prefill:
        table, rows, positions = (
            torch.arange(1, pages, **ints)[None],
            torch.zeros(tokens, **ints),
            torch.arange(tokens, **ints),
        )
    else:
        table, rows = torch.arange(1, pages, **ints).view(tokens, 8), torch.arange(tokens, **ints)
        positions = torch.arange(tokens, **ints) * 13 % (8 * PAGE)
    packed = Packed(table, rows, positions, 0 if prefill else tokens)

    def run() -> Tensor:
        return fused_attention.rotate_and_write(
            qkv, AT, HEADS, HEAD_DIM, q_norm, k_norm, rotary, caches[0], packed
        )

    def check() -> None:
        on_cpu = KVPages(caches[1].k.cpu(), caches[1].v.cpu(), 0.02, 0.02)
        places = Packed(table.cpu(), rows.cpu(), positions.cpu(), packed.decodes)
        plain_norms = [
            None if norm is None else Norm(nn.Parameter(norm.weight.cpu()), norm.kind)
            for norm in (q_norm, k_norm)
        ]
        plain_rotary = fused_attention.Rotary(rotary.cos.cpu(), rotary.sin.cpu(), kind)
        expected = fused_attention.rotate_and_write(
            *(qkv.cpu(), AT, HEADS, HEAD_DIM, *plain_norms, plain_rotary, on_cpu, places)
        )
        close("queries", run().cpu(), expected)
        for name in ("k", "v"):
            close(f"cached {name}", getattr(caches[0], name).cpu(), getattr(on_cpu, name))

    heads = 2 * HEADS + 4 * KV_HEADS - (2 * KV_HEADS if dtype.itemsize == 1 else 0) / 2
    return run, check, int(tokens * heads * HEAD_DIM * 2)


def round_case(tokens: int, codes: str) -> Case:
    """The launch after attention, for comparison: `row_quantize` as `triton_w8a8` calls it."""
    x = random(tokens, HIDDEN)
    return lambda: row_quantize.quantize_rows(x, codes, pdl=True), lambda: None, tokens * HIDDEN * 3


CASES: dict[str, Callable[[int], Case]] = {
    "add_norm": lambda tokens: norm_case(tokens, None),
    "add_norm fp8": lambda tokens: norm_case(tokens, "fp8"),
    "add_norm int8": lambda tokens: norm_case(tokens, "int8"),
    "add_norm after": lambda tokens: norm_case(tokens, None, "after"),
    "add_norm after fp8": lambda tokens: norm_case(tokens, "fp8", "after"),
    "add_norm other fp8": lambda tokens: norm_case(tokens, "fp8", "other"),
    "rotate_and_write": lambda tokens: rotary_case(tokens, "", torch.bfloat16),
    "rotate_and_write, norms, fp8 pages": lambda tokens: rotary_case(
        tokens, "head", torch.float8_e4m3fn
    ),
    "rotate_and_write, whole norms": lambda tokens: rotary_case(tokens, "whole", torch.bfloat16),
    "rotate_and_write, interleaved": lambda tokens: rotary_case(
        tokens, "", torch.bfloat16, "interleaved"
    ),
    "rotate_and_write, repeated": lambda tokens: rotary_case(
        tokens, "", torch.bfloat16, "repeated"
    ),
    "gated": lambda tokens: gated_case(tokens, None),
    "gated fp8": lambda tokens: gated_case(tokens, "fp8"),
    "gated int8": lambda tokens: gated_case(tokens, "int8"),
    "quantize_rows fp8": lambda tokens: round_case(tokens, "fp8"),
}


def microseconds(runs: list[Callable[[], object]]) -> float:
    """Return the time of one launch in a chain of them, in a CUDA graph: the best of some
    replays.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    kept = []
    with torch.cuda.graph(graph, stream=stream):
        for i in range(LAUNCHES):
            kept.append(runs[i % len(runs)]())
            if i >= len(runs):
                kept[i - len(runs)] = None  # memory is reused, as in a model
    events = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return min(start.elapsed_time(stop) for start, stop in events[2:]) * 1000 / LAUNCHES


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1,16,64,256,8192")
    parser.add_argument("--warps", default=str(elementwise.WARP))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows, failures = [], []
    for warp in map(int, options.warps.split(",")):
        elementwise.WARP = warp
        for name, make in CASES.items():
            times = []
            for tokens in map(int, options.tokens.split(",")):
                try:
                    run, check, size = make(tokens)
                    check()
                    copies = [
                        run,
                        *(
                            make(tokens)[0]
                            for _ in range(min(7, int(TURNOVER // size)) if tokens > 1024 else 0)
                        ),
                    ]
                    took = microseconds(copies)
                except Exception as error:
                    failures.append(f"{name}, {tokens} tokens: {type(error).__name__}: {error}")
                    continue
                rows.append(
                    {
                        "kernel": name,
                        "tokens": tokens,
                        "warp": warp,
                        "us": round(took, 2),
                        "tb_s": round(size / took / 1e6, 2),
                    }
                )
                times.append(
                    f"{tokens}: {took:7.2f} us"
                    + (f" ({size / took / 1e6:.2f} TB/s)" if tokens > 1024 else "")
                )
            print(f"{name:36} warps of {warp:4}  " + "  ".join(times), flush=True)
    print("\n".join(failures) or "all right")
    if out := os.environ.get("OUT"):
        (Path(out) / "elementwise.json").write_text(
            json.dumps(
                {"device": torch.cuda.get_device_name(), "rows": rows, "failures": failures},
                indent=1,
            )
        )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
