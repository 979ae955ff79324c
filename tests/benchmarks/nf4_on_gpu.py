"""nf4 on a GPU: our kernel and bitsandbytes' own in one run, for the matmuls of a Llama-3.1-8B layer
at few tokens.

    OUT=dir python3 tests/benchmarks/nf4_on_gpu.py [--tokens 1,4,16] [--model FOLDER]

Three times each, in microseconds for all four: ``graph``, the kernels alone in a CUDA graph, with
weights that rotate past the L2 cache; ``calls``, one Python call after another, as transformers
calls `Linear4bit`. First all products are compared with float64, those of every tile of ours. With
a 16-bit model, its tokens a second at batch 1: transformers with `BitsAndBytesConfig`, and
`qtool.Engine` with ``quantization="bitsandbytes"``. ``$OUT`` gets nf4_on_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import bitsandbytes
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from gemm import BANDWIDTH, COPIES, SHAPES, microseconds

from qtool.runtime.kernels import Choice, LinearSpec, choose, device_of, load_kernel
from qtool.runtime.linear import QuantizedLinear
from qtool.scheme import SCHEMES, Scheme, Weights
from qtool.weight import dequantize, quantize

Layer = Callable[[Tensor], Tensor]
DTYPE = torch.bfloat16
LIMIT = 1e-2  # relative Frobenius error
KERNEL = "triton_weight_only"
CALLS = 200
PROMPT = list(range(10, 74))


def spec_of(rows: int, columns: int, scheme: Scheme = SCHEMES["NF4"]) -> LinearSpec:
    return LinearSpec(scheme, (rows, columns), DTYPE)


def random_weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=DTYPE) * 0.02


def ours(rows: int, columns: int) -> Layer:
    """Return a layer as a model gets it."""
    spec = spec_of(rows, columns)
    choice = choose(spec, device_of(torch.device("cuda")))
    assert choice.kernel == KERNEL, choice
    return QuantizedLinear(spec, choice, quantize(random_weight(rows, columns), spec.scheme))


def theirs(rows: int, columns: int, *, nested: bool) -> Layer:
    """Return a layer as transformers makes it."""
    layer = bitsandbytes.nn.Linear4bit(
        columns,
        rows,
        bias=False,
        compute_dtype=DTYPE,
        compress_statistics=nested,
        quant_type="nf4",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        random_weight(rows, columns),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=nested,
        module=layer,
    )
    return layer.to("cuda").eval()


MAKERS: dict[str, Callable[[int, int], Layer]] = {
    "qtool": ours,
    "bitsandbytes": partial(theirs, nested=False),
    "bitsandbytes, double": partial(theirs, nested=True),
}


def check() -> None:
    """Compare our products with float64, and our codes and scales with those of bitsandbytes; every
    tile and every width of a group.
    """
    for shape in ((1000, 4096), (72, 192), (4096, 1536), (28672, 4096)):
        for format, group in (("nf4", 64), ("nf4", 16), ("bnb_fp4", 128), ("nf4", 32)):
            spec = spec_of(*shape, Scheme(Weights(format, "group", group)))
            weight = quantize(random_weight(*shape), spec.scheme)
            layer = QuantizedLinear(spec, Choice(KERNEL, {}), weight)
            exact = dequantize(weight).double()
            for tokens in (1, 2, 9, 16, 33, 64, 256, 1000):
                x = torch.randn(tokens, shape[1], device="cuda", dtype=DTYPE)
                expected = x.double() @ exact.T
                error = float((layer(x).double() - expected).norm() / expected.norm())
                assert error <= LIMIT, f"{spec}, {tokens} tokens: relative error {error}"
    values = random_weight(256, 512)
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4")
    weight = quantize(values, SCHEMES["NF4"])
    theirs_dense = bitsandbytes.functional.dequantize_4bit(packed, state)
    differing = float((dequantize(weight, DTYPE) != theirs_dense).double().mean())
    print(f"all products are right; {differing:.2%} of codes differ from bitsandbytes on CUDA")
    assert load_kernel(KERNEL).unsupported_reason(spec, device_of(torch.device("cuda"))) is None


def microseconds_of_calls(run: Callable[[], object]) -> float:
    """Return the time of ``run`` when it is called again and again, the GPU waited for at the end."""
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS * 1e6


@torch.inference_mode()
def rows_of_table(tokens: list[int]) -> Iterator[dict[str, object]]:
    for name, make in MAKERS.items():
        copies = [[make(*shape) for shape in SHAPES] for _ in range(COPIES)]
        for count in tokens:
            inputs = [
                torch.randn(count, columns, device="cuda", dtype=DTYPE) for _, columns in SHAPES
            ]

            def run(layers: list[Layer], inputs: list[Tensor] = inputs) -> None:
                for layer, x in zip(layers, inputs, strict=True):
                    layer(x)

            def run_all(copies: list[list[Layer]] = copies) -> None:
                for layers in copies:
                    run(layers)

            yield {
                "kernel": name,
                "tokens": count,
                "graph_us": microseconds(run_all) / COPIES,
                "calls_us": microseconds_of_calls(run_all) / COPIES,
            }


def tokens_a_second(folder: str) -> dict[str, float]:
    """Return the tokens a second that both decode at batch 1."""
    return {"transformers": by_transformers(folder), "qtool": by_qtool(folder)}


def rate(generate: Callable[[int], object], count: int = 128) -> float:
    """Return the tokens a second of ``generate``, which makes that many, without the prompt."""

    def seconds(new: int) -> float:
        start = time.perf_counter()
        generate(new)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(8)
    return count / (seconds(count + 8) - seconds(8))


def by_transformers(folder: str) -> float:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=DTYPE, device_map="cuda"
    ).eval()
    prompt = torch.tensor([PROMPT], device="cuda")
    return rate(
        lambda new: model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    )


def by_qtool(folder: str) -> float:
    import qtool

    with qtool.Engine(folder, quantization="bitsandbytes", skip_tokenizer_init=True) as engine:
        return rate(
            lambda new: engine.generate(
                input_ids=PROMPT,
                sampling_params={"max_new_tokens": new, "ignore_eos": True, "temperature": 0},
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--model", help="16-bit model whose tokens a second are measured too")
    options = parser.parse_args()
    torch.manual_seed(0)
    check()
    codes = sum(rows * columns for rows, columns in SHAPES) / 2
    print(f"codes alone at {BANDWIDTH / 1e12} TB/s: {codes / BANDWIDTH * 1e6:.0f} us")
    found = list(rows_of_table([int(count) for count in options.tokens.split(",")]))
    first = {row["tokens"]: row for row in found if row["kernel"] == "qtool"}
    for row in found:
        our = first[row["tokens"]]
        ratios = [row[kind] / our[kind] for kind in ("graph_us", "calls_us")]
        print(
            f"{row['kernel']:>22} {row['tokens']:>4} tokens: graph {row['graph_us']:7.1f} us "
            f"({ratios[0]:.2f} x ours), calls {row['calls_us']:7.1f} us ({ratios[1]:.2f} x ours; "
            f"{row['calls_us'] / our['graph_us']:.2f} x our graph)"
        )
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "layers": found,
    }
    if options.model:
        report["tokens_a_second"] = speeds = tokens_a_second(options.model)
        print(f"tokens a second: {speeds}, {speeds['qtool'] / speeds['transformers']:.2f} x")
    if out := os.environ.get("OUT"):
        (Path(out) / "nf4_on_gpu.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
