"""Are the kernels right? Every kernel of a device, every scheme it takes, against float64; in CUDA graphs and under torch.compile too.

    python tests/benchmarks/kernels_on_gpu.py [--kernels humming,scaled_mm] [--schemes W4A16,FP8] [--seconds 150] [--device cpu]

Prints a table, kernel by scheme, and what failed; exits 1 if anything did. ``$OUT/kernels_on_gpu.json`` keeps the numbers. Two phases: layers
are packed by some threads, because humming compiles for seconds as it packs; then one thread multiplies.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from qtool.runtime.kernels import KERNELS, Choice, LinearSpec, device_of, load_kernel
from qtool.runtime.linear import QuantizedLinear
from qtool.scheme import SCHEMES, Activations, Scheme, Weights
from qtool.weight import NVFP4_RANGE, Activation, QuantizedWeight, dequantize, fake_quantize_input, largest, quantize

LIMIT = 1e-2  # relative Frobenius error
TOKENS = (1, 2, 7, 16, 33, 64, 256, 1000, 4096)
GRAPH_TOKENS = (1, 64)
SHAPES = ((1000, 4096), (72, 200), (48, 96), (4096, 1440), (6144, 4096))
GRAPH_SHAPES = SHAPES[:3]
# humming compiles each schedule of each layer, for 2 to 10 seconds. It gets two shapes for all schemes and five for some, and a schedule for up to
# 8 tokens and one for more, where `humming.STEPS` has twelve: about 160 in all, a minute and a half on 16 cores.
FEW_SHAPES = SHAPES[:2]
ALL_SHAPES_OF_HUMMING = ("W4A16", "FP8_DYNAMIC", "NVFP4A16")
STEPS_OF_HUMMING = (8, 1024)
THREADS = 12  # each compiles its schedules in parallel
LOCKS: dict[str, threading.Lock] = {}  # by description of a layer: humming cannot compile one from two threads
CALIBRATED = 5.0  # largest input that calibration is said to have seen

VARIANTS = {
    **{f"W{bits}A16_ASYM_G64": Scheme(Weights(f"int{bits}", "group", 64, symmetric=False)) for bits in range(2, 9)},  # type: ignore[arg-type]
    "W4A16_G32": Scheme(Weights("int4", "group", 32)),
    "W4A16_CHANNEL": Scheme(Weights("int4", "channel")),
    "W4A16_CHANNEL_ASYM": Scheme(Weights("int4", "channel", symmetric=False)),
    "W4A8_CHANNEL": Scheme(Weights("int4", "channel"), Activations("int8", "token")),
    "W4AFP8_G64": Scheme(Weights("int4", "group", 64), Activations("fp8", "token")),
    "FP8_TENSOR_DYNAMIC": Scheme(Weights("fp8", "tensor"), Activations("fp8", "tensor")),
    "FP8_TENSOR_TOKEN": Scheme(Weights("fp8", "tensor"), Activations("fp8", "token")),
}
ALL = {**SCHEMES, **VARIANTS}


@dataclass
class Case:
    """One kernel with one layer: what is multiplied, and what came out."""

    kernel: str
    name: str
    spec: LinearSpec
    has_bias: bool
    layer: QuantizedLinear | None = None
    weight: QuantizedWeight | None = None
    worst: float = 0.0
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows, columns = self.spec.shape
        return f"{self.kernel} {self.name} {rows}x{columns} {str(self.spec.dtype)[6:]}{' bias' if self.has_bias else ''}"


def cases(device: torch.device, kernels: list[str], schemes: list[str]) -> tuple[list[Case], dict[tuple[str, str], str]]:
    """Return what can be tried, small first, and why a kernel takes no layer of a scheme at all."""
    found, refused = [], {}
    for i, shape in enumerate(SHAPES):
        for name in schemes:
            scheme = ALL[name]
            dtype = torch.float16 if i in (1, 2) else torch.bfloat16
            spec = LinearSpec(scheme, shape, dtype, bool(scheme.activations and not scheme.activations.dynamic))
            for kernel in kernels:
                if kernel == "humming" and shape not in FEW_SHAPES and name not in ALL_SHAPES_OF_HUMMING:
                    continue
                objection = load_kernel(kernel).objection(spec, device_of(device))
                if objection is None:
                    found.append(Case(kernel, name, spec, has_bias=i % 2 == 1))
                else:
                    refused[kernel, name] = objection
    taken = {(case.kernel, case.name) for case in found}
    return found, {key: objection for key, objection in refused.items() if key not in taken}


def make_weight(spec: LinearSpec, device: torch.device) -> QuantizedWeight:
    """Return a weight whose rows differ in size; layers of more than 64 rows are two fused ones, with scales of their own."""
    (rows, columns), weights, inputs = spec.shape, spec.scheme.weights, spec.scheme.activations
    generator = torch.Generator(device).manual_seed(rows + columns)
    values = torch.randn(rows, columns, generator=generator, device=device) * 0.02
    values *= torch.rand(rows, 1, generator=generator, device=device) * 1.5 + 0.5
    weight = quantize(values.to(spec.dtype), spec.scheme)
    if rows in (1000, 4096):
        other = 0.4
        if weight.scale2 is not None:
            weight.scale2[rows // 2 :] *= other
        elif weights.granularity == "tensor":
            weight.scale[rows // 2 :] *= other
    if inputs is not None and inputs.needs_data:
        top = NVFP4_RANGE if inputs.scale == "e4m3" else largest(inputs)
        weight = replace(weight, activation=Activation(inputs, torch.tensor(CALIBRATED / top, device=device)))
    return weight


def make_layer(case: Case, device: torch.device) -> None:
    """Pack ``case``; an exception is its failure."""
    try:
        case.weight = make_weight(case.spec, device)
        bias = torch.randn(case.spec.shape[0], device=device) if case.has_bias else None
        copy = replace(case.weight, **{name: getattr(case.weight, name).clone() for name in ("data", "scale")})  # pack may reuse them
        with lock_of(case, device):
            case.layer = QuantizedLinear(case.spec, Choice(case.kernel, {}), copy, bias)
    except Exception as error:
        fail(case, "pack", error)


def lock_of(case: Case, device: torch.device) -> AbstractContextManager[object]:
    if case.kernel != "humming":
        return nullcontext()
    config, _ = load_kernel("humming")._config(case.spec, device, case.spec.scheme.weights.scale == "e4m3")
    return LOCKS.setdefault(config.to_str(), threading.Lock())


def check(case: Case, device: torch.device) -> None:
    """Multiply inputs of some sizes, and capture some of that."""
    layer, weight = case.layer, case.weight
    assert layer is not None and weight is not None
    exact = dequantize(weight).double()
    for tokens in TOKENS if device.type == "cuda" else (1, 7, 33):
        try:
            x = inputs_of(case, tokens, 0, device)
            y = layer(x)
            error = distance(y, reference(case, x, exact))
            case.worst, case.runs = max(case.worst, error), case.runs + 1
            if not error <= LIMIT:
                case.failures.append(f"M={tokens}: error {error:.2g}")
            if y.dtype != x.dtype or y.shape != (tokens, case.spec.shape[0]):
                case.failures.append(f"M={tokens}: {y.dtype} {tuple(y.shape)}")
            if device.type == "cuda" and tokens in GRAPH_TOKENS and case.spec.shape in GRAPH_SHAPES:
                check_graph(case, layer, tokens, device)
        except Exception as error:
            fail(case, f"M={tokens}", error)


def check_graph(case: Case, layer: QuantizedLinear, tokens: int, device: torch.device) -> None:
    """Capture ``layer``, replay it with another input, and compare with what it says outside of the graph, twice."""
    x = inputs_of(case, tokens, 0, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x)
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in (1, 2):
        x.copy_(inputs_of(case, tokens, seed, device))
        graph.replay()
        if not (error := distance(y, layer(x).double())) <= LIMIT:  # humming adds the sums of several blocks in bf16, in any order
            case.failures.append(f"M={tokens}: a replayed graph differs by {error:.2g}")


def check_compile(case: Case, device: torch.device) -> None:
    """Trace ``case`` with torch.compile, without Inductor, which would see the same operator."""
    assert case.layer is not None
    try:
        x = inputs_of(case, 16, 0, device)
        expected = case.layer(x)
        torch._dynamo.reset()
        error = distance(torch.compile(case.layer, fullgraph=True, backend="aot_eager")(x), expected.double())
        if not error <= 3e-3:
            case.failures.append(f"torch.compile: differs by {error:.2g}")
    except Exception as error:
        fail(case, "torch.compile", error)


def inputs_of(case: Case, tokens: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed * 10_000 + tokens)
    x = torch.randn(tokens, case.spec.shape[1], generator=generator, device=device)
    return x.clamp(-CALIBRATED, CALIBRATED).to(case.spec.dtype)


def reference(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    assert case.layer is not None and case.weight is not None
    static = case.weight.activation
    if case.spec.scheme.activations is not None:
        x = fake_quantize_input(x.float(), case.spec.scheme.activations, static.scale if static else None)
    y = x.double() @ weight.T
    return y if case.layer.bias is None else y + case.layer.bias.double()


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def fail(case: Case, where: str, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "kernels_on_gpu" not in frame.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    case.failures.append(f"{where}: {type(error).__name__}{place}: {lines[0][:240]}")


def rows_of_table(kernels: list[str], schemes: list[str], tried: list[Case], refused: dict[tuple[str, str], str]) -> Iterator[str]:
    yield f"| scheme | {' | '.join(kernels)} |"
    yield f"|---|{'---|' * len(kernels)}"
    for name in schemes:
        cells = []
        for kernel in kernels:
            here = [case for case in tried if (case.kernel, case.name) == (kernel, name)]
            runs, failed = sum(case.runs for case in here), sum(bool(case.failures) for case in here)
            text = f"{max((case.worst for case in here), default=0):.1e} ({runs})" if runs else "not run"
            cells.append("refused" if (kernel, name) in refused else f"{text} FAILED {failed}" if failed else text)
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", default="", help="names, with commas; all of the device by default")
    parser.add_argument("--schemes", default="", help="names, with commas; all by default")
    parser.add_argument("--seconds", type=float, default=150, help="no case is begun after this long")
    options = parser.parse_args()
    start = time.perf_counter()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    kernels = options.kernels.split(",") if options.kernels else list(KERNELS[device.type])
    schemes = options.schemes.split(",") if options.schemes else list(ALL)
    if device.type == "cuda":
        torch.zeros((), device=device)  # a context, before there are threads
    tried, refused = cases(device, kernels, schemes)
    if any(case.kernel == "humming" for case in tried):
        load_kernel("humming").STEPS = STEPS_OF_HUMMING

    with ThreadPoolExecutor(THREADS if device.type == "cuda" else 1) as pool:
        futures = [pool.submit(make_layer, case, device) for case in tried]
        wait(futures, timeout=options.seconds * 0.7)
        pool.shutdown(cancel_futures=True)  # what is being compiled ends first
    packed = time.perf_counter() - start
    compiled = set()
    with torch.inference_mode():
        for case in tried:
            if case.layer is None or time.perf_counter() - start > options.seconds:
                continue
            check(case, device)
            if case.kernel not in compiled:
                compiled.add(case.kernel)
                check_compile(case, device)
            case.layer = case.weight = None

    print("\n".join(rows_of_table(kernels, schemes, tried, refused)))
    print("\nEach cell: the worst relative error, and how many multiplications.")
    print("".join(f"- {kernel} refuses {name}: {objection}\n" for (kernel, name), objection in refused.items()))
    failures = [f"{case}: {failure}" for case in tried for failure in case.failures]
    print(f"\n{len(failures)} failures" + "".join(f"\n- {failure}" for failure in failures))
    skipped = sum(not case.runs and not case.failures for case in tried)
    print(f"\n{len(tried)} layers, {skipped} of them not run for lack of time; packed in {packed:.0f} s, {time.perf_counter() - start:.0f} s in all")
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "cases": [{"case": str(case), "worst": case.worst, "runs": case.runs, "failures": case.failures} for case in tried],
        "refused": {f"{kernel} {name}": objection for (kernel, name), objection in refused.items()},
    }
    Path(os.environ.get("OUT", "."), "kernels_on_gpu.json").write_text(json.dumps(result, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
