"""Are the kernels right? Every kernel of a device, every scheme it takes, against float64; in CUDA
graphs and under torch.compile too.

    OUT=dir python tests/benchmarks/kernels_on_gpu.py [--processes 12] [--kernels humming,scaled_mm]
    [--schemes W4A16,FP8] [--device cpu]

Several processes share the GPU, because most of the time goes to compiling, and because a kernel
that breaks its CUDA context then fails alone. Prints a table, kernel by scheme, and what failed;
exits 1 if anything did. ``$OUT`` gets kernels_on_gpu.json, with the numbers, and kernels_on_gpu.md,
to be kept in results/.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor

from qtool.codes import NVFP4_RANGE
from qtool.runtime.kernels import KERNELS, Choice, LinearSpec, device_of, load_kernel
from qtool.runtime.linear import QuantizedLinear
from qtool.scheme import SCHEMES, Activations, Scheme, Weights
from qtool.weight import (
    Activation,
    QuantizedWeight,
    dequantize,
    fake_quantize_input,
    largest,
    quantize,
)

LIMIT = 1e-2  # relative Frobenius error
TOKENS = (1, 2, 7, 16, 33, 64, 256, 1000, 4096)
GRAPH_TOKENS = (1, 64)
SHAPES = ((1000, 4096), (72, 200), (48, 96), (4096, 1440), (6144, 4096))
GRAPH_SHAPES = SHAPES[:3]
# humming compiles each schedule of each layer, for 2 to 10 seconds. It gets two shapes for all
# schemes and five for some, and a schedule for up to
# 8 tokens and one for more, where `humming.STEPS` has twelve: about 160 in all, a minute and a half
# on 16 cores.
FEW_SHAPES = SHAPES[:2]
ALL_SHAPES_OF_HUMMING = ("W4A16", "FP8_DYNAMIC", "NVFP4A16")
STEPS_OF_HUMMING = (8, 1024)
GRACE = 60  # seconds that a case begun in time may take after the end
CALIBRATED = 5.0  # largest input that calibration is said to have seen

VARIANTS = {
    **{
        f"W{bits}A16_ASYM_G64": Scheme(Weights(f"int{bits}", "group", 64, symmetric=False))
        for bits in range(2, 9)
    },  # type: ignore[arg-type]
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
    """One kernel with one layer: what is multiplied, and what came out. ``compiled``: whether
    torch.compile is tried too.
    """

    kernel: str
    name: str
    spec: LinearSpec
    has_bias: bool
    compiled: bool
    worst: float = 0.0
    runs: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows, columns = self.spec.shape
        return (
            f"{self.kernel} {self.name} {rows}x{columns} "
            f"{str(self.spec.dtype)[6:]}{' bias' if self.has_bias else ''}"
        )


def cases(
    device: torch.device, kernels: list[str], schemes: list[str]
) -> tuple[list[Case], dict[tuple[str, str], str]]:
    """Return what can be tried, small first, and why a kernel takes no layer of a scheme at all."""
    found: list[Case] = []
    refused = {}
    for i, shape in enumerate(SHAPES):
        for name in schemes:
            scheme = ALL[name]
            dtype = torch.float16 if i in (1, 2) else torch.bfloat16
            spec = LinearSpec(
                scheme, shape, dtype, bool(scheme.activations and not scheme.activations.dynamic)
            )
            for kernel in kernels:
                if (
                    kernel == "humming"
                    and shape not in FEW_SHAPES
                    and name not in ALL_SHAPES_OF_HUMMING
                ):
                    continue
                reason = load_kernel(kernel).unsupported_reason(spec, device_of(device))
                if reason is None:
                    first = all(case.kernel != kernel for case in found)
                    found.append(Case(kernel, name, spec, has_bias=i % 2 == 1, compiled=first))
                else:
                    refused[kernel, name] = reason
    taken = {(case.kernel, case.name) for case in found}
    return found, {key: reason for key, reason in refused.items() if key not in taken}


def make_weight(spec: LinearSpec, device: torch.device) -> QuantizedWeight:
    """Return a weight whose rows differ in size; layers of more than 64 rows are two fused ones,
    with scales of their own.
    """
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
        weight = replace(
            weight, activation=Activation(inputs, torch.tensor(CALIBRATED / top, device=device))
        )
    return weight


def check_all(
    found: list[Case], device: torch.device, processes: int, seconds: float
) -> list[Case]:
    """Return ``found`` checked, by processes of their own.

    A process that ends fails its case, and another takes its place.
    """
    context = multiprocessing.get_context("spawn")
    began = time.monotonic()
    waiting, checked = list(range(len(found))), list(found)
    workers: dict[
        Connection, tuple[BaseProcess, int | None]
    ] = {}  # and the number of the case at work

    def start() -> None:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, device, processes), daemon=True)
        process.start()
        there.close()
        workers[here] = process, None

    for _ in range(min(processes, len(found))):
        start()
    while workers:
        ready = wait(list(workers), timeout=max(0.0, began + seconds + GRACE - time.monotonic()))
        if not ready:
            for process, case in workers.values():
                process.kill()
                if case is not None:
                    checked[case].failures.append(f"did not end in {seconds + GRACE:.0f} s")
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            process, case = workers.pop(pipe)
            try:
                result, usable = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                if case is None:
                    print(f"a process did not start, exit code {process.exitcode}", flush=True)
                    continue
                result, usable = (
                    replace(
                        found[case], failures=[f"the process ended, exit code {process.exitcode}"]
                    ),
                    False,
                )
            if case is not None:
                checked[case] = result
                for failure in result.failures:
                    print(f"FAILED {result}: {failure}", flush=True)
            late = time.monotonic() - began > seconds
            if usable and waiting and not late:
                case = take(found, waiting, workers)
                workers[pipe] = process, case
                pipe.send(found[case])
            else:
                pipe.close()
                if waiting and not late:
                    start()
    return checked


def take(
    found: list[Case], waiting: list[int], workers: dict[Connection, tuple[BaseProcess, int | None]]
) -> int:
    """Remove and return the next case: if possible of a kernel and scheme that no other process
    compiles for just now.
    """
    busy = {
        (found[case].kernel, found[case].name) for _, case in workers.values() if case is not None
    }
    free = (
        i for i, case in enumerate(waiting) if (found[case].kernel, found[case].name) not in busy
    )
    return waiting.pop(next(free, 0))


def work(pipe: Connection, device: torch.device, processes: int) -> None:
    """Check the cases that come through ``pipe`` until it closes, or until a kernel has broken the
    CUDA context of this process.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        load_kernel("humming").STEPS = STEPS_OF_HUMMING  # type: ignore[attr-defined]
    usable = True
    pipe.send((None, usable))
    while usable:
        try:
            case: Case = pipe.recv()
        except EOFError:
            return
        began = time.monotonic()
        with torch.inference_mode():
            check(case, device)
        case.seconds = round(time.monotonic() - began, 1)
        try:
            torch.zeros((), device=device).item()
        except Exception as error:
            usable = False
            fail(case, "the GPU afterwards", error)
        pipe.send((case, usable))


def check(case: Case, device: torch.device) -> None:
    """Pack a layer, multiply inputs of some sizes, and capture or compile some of that.

    An exception is a failure.
    """
    try:
        weight = make_weight(case.spec, device)
        bias = torch.randn(case.spec.shape[0], device=device) if case.has_bias else None
        # pack may reuse them
        copy = replace(
            weight, **{name: getattr(weight, name).clone() for name in ("data", "scale")}
        )
        layer = QuantizedLinear(case.spec, Choice(case.kernel, {}), copy, bias)
    except Exception as error:
        return fail(case, "pack", error)
    exact = dequantize(weight).double()
    for tokens in TOKENS if device.type == "cuda" else (1, 7, 33):
        try:
            x = inputs_of(case, tokens, 0, device)
            y = layer(x)
            error = distance(y, reference(layer, weight, x, exact))
            case.worst, case.runs = max(case.worst, error), case.runs + 1
            if not error <= LIMIT:
                case.failures.append(f"M={tokens}: error {error:.2g}")
            if y.dtype != x.dtype or y.shape != (tokens, case.spec.shape[0]):
                case.failures.append(f"M={tokens}: {y.dtype} {tuple(y.shape)}")
            if device.type == "cuda" and tokens in GRAPH_TOKENS and case.spec.shape in GRAPH_SHAPES:
                check_graph(case, layer, tokens, device)
        except Exception as error:
            fail(case, f"M={tokens}", error)
    if case.compiled:
        check_compile(case, layer, device)


def check_graph(case: Case, layer: QuantizedLinear, tokens: int, device: torch.device) -> None:
    """Capture ``layer``, replay it with another input, and compare with what it says outside of the
    graph, twice.
    """
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
        # humming adds the sums of several blocks in bf16, in any order
        if not (error := distance(y, layer(x).double())) <= LIMIT:
            case.failures.append(f"M={tokens}: a replayed graph differs by {error:.2g}")


def check_compile(case: Case, layer: QuantizedLinear, device: torch.device) -> None:
    """Trace ``layer`` with torch.compile, without Inductor, which would see the same operator."""
    try:
        x = inputs_of(case, 16, 0, device)
        expected = layer(x)
        error = distance(
            torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected.double()
        )
        if not error <= LIMIT:  # humming adds the sums of several blocks in bf16, in any order
            case.failures.append(f"torch.compile: differs by {error:.2g}")
    except Exception as error:
        fail(case, "torch.compile", error)


def inputs_of(case: Case, tokens: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed * 10_000 + tokens)
    x = torch.randn(tokens, case.spec.shape[1], generator=generator, device=device)
    return x.clamp(-CALIBRATED, CALIBRATED).to(case.spec.dtype)


def reference(layer: QuantizedLinear, weight: QuantizedWeight, x: Tensor, exact: Tensor) -> Tensor:
    inputs = layer.spec.scheme.activations
    if inputs is not None:
        x = fake_quantize_input(
            x.float(), inputs, weight.activation.scale if weight.activation else None
        )
    y = x.double() @ exact.T
    return y if layer.bias is None else y + layer.bias.double()


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def fail(case: Case, where: str, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "kernels_on_gpu" not in frame.filename
    ]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    case.failures.append(f"{where}: {type(error).__name__}{place}: {lines[0][:240]}")


def rows_of_table(
    kernels: list[str], schemes: list[str], tried: list[Case], refused: dict[tuple[str, str], str]
) -> Iterator[str]:
    yield f"| scheme | {' | '.join(kernels)} |"
    yield f"|---|{'---|' * len(kernels)}"
    for name in schemes:
        cells = []
        for kernel in kernels:
            here = [case for case in tried if (case.kernel, case.name) == (kernel, name)]
            runs, failed = (
                sum(case.runs for case in here),
                sum(bool(case.failures) for case in here),
            )
            text = (
                f"{max((case.worst for case in here), default=0):.1e} ({runs})"
                if runs
                else "not run"
            )
            cells.append(
                "refused"
                if (kernel, name) in refused
                else f"{text} FAILED {failed}"
                if failed
                else text
            )
        yield f"| {name} | {' | '.join(cells)} |"


def versions(device: torch.device) -> Iterator[str]:
    """Yield what the result depends on."""
    yield (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    for package in ("torch", "triton", "humming-kernels"):
        try:
            yield f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            yield f"no {package}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--kernels", default="", help="names, with commas; all of the device by default"
    )
    parser.add_argument("--schemes", default="", help="names, with commas; all by default")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument(
        "--seconds", type=float, default=150, help="no case is begun after this long"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    device = (
        torch.device(options.device, 0)
        if options.device == "cuda"
        else torch.device(options.device)
    )
    kernels = options.kernels.split(",") if options.kernels else list(KERNELS[device.type])
    schemes = options.schemes.split(",") if options.schemes else list(ALL)
    found, refused = cases(device, kernels, schemes)
    tried = check_all(found, device, options.processes, options.seconds)

    failures = [f"{case}: {failure}" for case in tried for failure in case.failures]
    skipped = sum(not case.runs and not case.failures for case in tried)
    seconds = time.perf_counter() - start
    title = f"{', '.join(versions(device))}: `{shlex.join(['python', *sys.argv])}`"
    report = [
        *rows_of_table(kernels, schemes, tried, refused),
        "\nEach cell: the worst relative error against float64, and how many multiplications.\n",
        *(f"- {kernel} refuses {name}: {reason}" for (kernel, name), reason in refused.items()),
        f"\n{len(failures)} failures",
        *(f"- {failure}" for failure in failures),
        f"\n{len(tried)} layers in {seconds:.0f} s, {skipped} of them not run for lack of time",
    ]
    print("\n".join(report))
    result = {
        "versions": list(versions(device)),
        "seconds": round(seconds, 1),
        "cases": [
            {
                "case": str(case),
                "worst": case.worst,
                "runs": case.runs,
                "s": case.seconds,
                "failures": case.failures,
            }
            for case in tried
        ],
        "refused": {f"{kernel} {name}": reason for (kernel, name), reason in refused.items()},
    }
    folder = Path(os.environ.get("OUT", "."))
    (folder / "kernels_on_gpu.json").write_text(json.dumps(result, indent=1))
    (folder / "kernels_on_gpu.md").write_text(
        "\n".join(["# Are the kernels right?\n", f"{title}\n", *report]) + "\n"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
