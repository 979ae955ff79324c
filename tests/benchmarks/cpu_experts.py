"""Experts on a CPU beside a dense layer that reads as many weights: milliseconds a token.

    python tests/benchmarks/cpu_experts.py [--layers 10] [--tokens 1,4,32]

8 experts of 2, a billion active parameters in W4A16 in 10 layers. The floor is what the same kernel
takes for one dense layer of the size of two experts; both by turns, the best of several rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from support.experts import GATES, Case  # noqa: E402

from qtool.runtime.experts.grouped import ExpertsSpec, ExpertWeights, GroupedExperts  # noqa: E402
from qtool.runtime.kernels import Device, LinearSpec, choose  # noqa: E402
from qtool.runtime.linear import QuantizedLinear  # noqa: E402
from qtool.scheme import SCHEMES  # noqa: E402
from qtool.weight import QuantizedWeight, quantize  # noqa: E402

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 2048, 8192
SCHEME = SCHEMES["W4A16"]


def spec_of(outputs: int, inputs: int) -> LinearSpec:
    return LinearSpec(SCHEME, (outputs, inputs), torch.bfloat16)


def random_weight(spec: LinearSpec) -> QuantizedWeight:
    return quantize((torch.randn(spec.shape) * 0.02).bfloat16(), SCHEME)


def experts() -> GroupedExperts:
    spec = ExpertsSpec(EXPERTS, spec_of(2 * INNER, HIDDEN), spec_of(HIDDEN, INNER), GATES["silu"])
    up, down = (random_weight(linear) for linear in (spec.up, spec.down))
    # packing copies them
    return GroupedExperts(spec, "native_experts", ExpertWeights([up] * EXPERTS, [down] * EXPERTS))


def dense() -> tuple[QuantizedLinear, QuantizedLinear]:
    specs = spec_of(TOP_K * 2 * INNER, HIDDEN), spec_of(HIDDEN, TOP_K * INNER)
    up, down = (
        QuantizedLinear(spec, choose(spec, Device("cpu")), random_weight(spec)) for spec in specs
    )
    return up, down


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--tokens", default="1,4,32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    mixtures = [experts() for _ in range(options.layers)]
    layers = [dense() for _ in range(options.layers)]
    own = GATES["silu"].own
    print(f"{torch.get_num_threads()} threads, dense kernel: {layers[0][0].choice}")
    for tokens in map(int, options.tokens.split(",")):
        case = Case("W4A16", experts=EXPERTS, hidden=HIDDEN, tokens=tokens, top_k=TOP_K)
        x, chosen, weights = case.inputs()

        def mixed(x: Tensor = x, chosen: Tensor = chosen, weights: Tensor = weights) -> None:
            for layer in mixtures:
                layer(x, chosen, weights)

        def plain(x: Tensor = x) -> None:
            for up, down in layers:
                down(own(up(x)))

        best = {"experts": float("inf"), "dense": float("inf")}
        for _ in range(options.rounds):
            for name, run in (("experts", mixed), ("dense", plain)):
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
        read = len(chosen.unique()) / TOP_K
        print(
            f"{tokens} tokens: experts {best['experts'] * 1e3:.1f} ms, dense "
            f"{best['dense'] * 1e3:.1f} ms, ratio {best['experts'] / best['dense']:.3f}; experts "
            f"read {read:.1f} times as many weights",
            flush=True,
        )


if __name__ == "__main__":
    main()
