"""Microseconds for the four matmuls of a Llama-3.1-8B layer, by kernel and number of tokens: every
kernel of the registry that takes a scheme.

On a GPU: ``OUT=dir python tests/benchmarks/gemm.py --rows W4A16,FP8_DYNAMIC --tokens 1,16 --seconds
    120``. Weights rotate past the L2 cache, each pass is one CUDA graph. Beside them cuBLAS in
    bf16, and vLLM's kernels and humming called directly where they can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qtool.codes import FP8_MAX
from qtool.runtime.kernels import KERNELS, Choice, LinearSpec, choose, device_of, load_kernel
from qtool.runtime.linear import QuantizedLinear
from qtool.scheme import SCHEMES, Scheme
from qtool.weight import Activation, QuantizedWeight, quantize

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
COPIES = 3
BANDWIDTH = 4.1e12  # bytes a second that a copy reaches on an H200
ROWS = (
    "W4A16",
    "W4A16_ASYM",
    "FP8_DYNAMIC",
    "FP8",
    "W8A8",
    "W8A16_CHANNEL",
    "FP8_W8A16",
    "NVFP4A16",
    "MXFP4A16",
)
Layer = Callable[[Tensor], Tensor]


def microseconds(run: Callable[[], object], replays: int = 20) -> float:
    """Return the median time of ``run`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(replays + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in times[2:])[replays // 2] * 1e3


def weight_of(scheme: Scheme, rows: int, columns: int) -> QuantizedWeight:
    """Return a random weight in ``scheme``, with the scale of its input where that is static."""
    weight = quantize(
        torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02, scheme
    )
    if scheme.activations is None or scheme.activations.dynamic:
        return weight
    scale = torch.tensor(
        5 / (FP8_MAX if scheme.activations.format == "fp8" else 127.0), device="cuda"
    )
    return replace(weight, activation=Activation(scheme.activations, scale))


def spec_of(scheme: Scheme, rows: int, columns: int) -> LinearSpec:
    return LinearSpec(
        scheme,
        (rows, columns),
        torch.bfloat16,
        bool(scheme.activations and not scheme.activations.dynamic),
    )


def ours(names: Sequence[str]) -> Iterator[tuple[str, float, Callable[[int, int], Layer]]]:
    """Yield (row, bits a weight, maker of a layer) for each scheme: as a model gets it, then each
    kernel that takes it, ``plain`` only alone.
    """
    device = device_of(torch.device("cuda"))
    for name in names:
        scheme = SCHEMES[name]

        def chosen(rows: int, columns: int, scheme: Scheme = scheme) -> Layer:
            spec = spec_of(scheme, rows, columns)
            return QuantizedLinear(spec, choose(spec, device), weight_of(scheme, rows, columns))

        yield f"{name} as chosen", scheme.bits_per_weight, chosen
        takers = []
        for kernel in KERNELS["cuda"]:
            try:
                if (
                    load_kernel(kernel).unsupported_reason(spec_of(scheme, *SHAPES[0]), device)
                    is None
                ):
                    takers.append(kernel)
            except Exception as error:
                print(f"{kernel} cannot be asked: {error!r}"[:200], flush=True)
        for kernel in [taker for taker in takers if taker != "plain"] or takers:

            def make(
                rows: int, columns: int, scheme: Scheme = scheme, kernel: str = kernel
            ) -> Layer:
                return QuantizedLinear(
                    spec_of(scheme, rows, columns),
                    Choice(kernel, {}),
                    weight_of(scheme, rows, columns),
                )

            yield f"{name} {kernel}", scheme.bits_per_weight, make


def bf16(rows: int, columns: int) -> Layer:
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    return lambda x: torch.nn.functional.linear(x, weight)


def others() -> Iterator[tuple[str, float, Callable[[int, int], Layer]]]:
    """Yield rows of humming and vLLM, called directly, as far as they are installed."""
    try:
        from humming.layer import HummingLayer
    except Exception as error:
        print(f"without humming: {error!r}"[:200], flush=True)
    else:

        def humming(weight: dict, inputs: dict | None = None) -> Callable[[int, int], Layer]:
            def make(rows: int, columns: int) -> Layer:
                options = {"input_config": inputs} if inputs else {}
                layer = HummingLayer(
                    shape_n=rows,
                    shape_k=columns,
                    weight_config=weight,
                    torch_dtype=torch.bfloat16,
                    **options,
                ).cuda()
                layer.load_from_unquantized(
                    torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
                )
                layer.transform()
                return lambda x: layer(x)

            return make

        yield "humming int4 g128", 4.125, humming({"dtype": "int4", "group_size": 128})
        yield (
            "humming fp8, fp8 inputs",
            8,
            humming({"dtype": "float8e4m3"}, {"dtype": "float8e4m3"}),
        )
        yield "humming int8, int8 inputs", 8, humming({"dtype": "int8"}, {"dtype": "int8"})
        yield (
            "humming nvfp4",
            4.5,
            humming({"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3"}),
        )
    try:
        import vllm._custom_ops as operators
    except Exception as error:
        print(f"without vLLM: {error!r}"[:200], flush=True)
        return

    def cutlass_fp8(rows: int, columns: int) -> Layer:
        weight = weight_of(SCHEMES["FP8_DYNAMIC"], rows, columns)
        data, scale = weight.data.t(), weight.scale.float()

        def layer(x: Tensor) -> Tensor:
            codes, scales = operators.scaled_fp8_quant(x, None, use_per_token_if_dynamic=True)
            return operators.cutlass_scaled_mm(codes, data, scales, scale, torch.bfloat16)

        return layer

    def cutlass_int8(rows: int, columns: int) -> Layer:
        weight = weight_of(SCHEMES["W8A8"], rows, columns)
        data, scale = weight.data.t(), weight.scale.float()

        def layer(x: Tensor) -> Tensor:
            codes, scales, _ = operators.scaled_int8_quant(x)
            return operators.cutlass_scaled_mm(codes, data, scales, scale, torch.bfloat16)

        return layer

    yield "vLLM CUTLASS fp8, with rounding", 8, cutlass_fp8
    yield "vLLM CUTLASS int8, with rounding", 8, cutlass_int8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="schemes, comma-separated")
    parser.add_argument("--tokens", default="1,16,64,256,2048")
    parser.add_argument(
        "--seconds", type=float, default=240, help="start no new row after this many"
    )
    parser.add_argument("--only", default="", help="only rows with this in their name")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokens = [int(count) for count in arguments.tokens.split(",")]
    began, table = time.monotonic(), {}
    rows = [
        ("bf16 cuBLAS", 16.0, bf16),
        *ours([name for name in arguments.rows.split(",") if name]),
        *others(),
    ]
    print(f"{'kernel':40s}" + "".join(f"{f'M={count}':>12s}" for count in tokens), flush=True)
    for name, bits, make in rows:
        if arguments.only not in name or time.monotonic() - began > arguments.seconds:
            continue
        try:
            layers = [[make(*shape) for shape in SHAPES] for _ in range(COPIES)]
        except Exception:
            print(f"{name}: cannot be made", flush=True)
            traceback.print_exc(limit=3)
            continue
        row = table[name] = {"floor": sum(n * k for n, k in SHAPES) * bits / 8 / BANDWIDTH * 1e6}
        for count in tokens:
            inputs = {
                columns: torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)
                for _, columns in SHAPES
            }

            def run(layers: list[list[Layer]] = layers, inputs: dict[int, Tensor] = inputs) -> None:
                for copy in layers:
                    for (_, columns), layer in zip(SHAPES, copy, strict=True):
                        layer(inputs[columns])

            try:
                row[count] = round(microseconds(run) / COPIES, 1)
            except Exception as error:
                row[count] = f"failed: {error!r}"[:160]
        print(
            f"{name:40s}"
            + "".join(
                f"{row[count] if isinstance(row[count], float) else 'failed':>12}"
                for count in tokens
            ),
            flush=True,
        )
        del layers
        torch.cuda.empty_cache()
        Path(os.environ.get("OUT", "/tmp"), "gemm.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
