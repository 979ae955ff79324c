"""How long the CPU kernels take for one layer of 4096 x 4096, beside a bfloat16 one, as a table in
markdown.

`python cpu_kernels.py` measures all variants in turn, so that what else the machine does falls on
all. The floor is the time in which as many bytes
as the weight has are read, with the same threads: a weight that stays in a large cache can be read
faster than from memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from qtool.runtime.kernels import KERNELS, Choice, Device, LinearSpec, choose, load_kernel
from qtool.runtime.linear import QuantizedLinear
from qtool.scheme import SCHEMES
from qtool.weight import quantize

NAMES = ("W8A8", "W4A16", "NVFP4A16", "FP8_W8A16", "W8A16_CHANNEL", "W8A16")


def measure(
    variants: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Return the median and the least milliseconds of each variant."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 2):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if index >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(measured), min(measured)) for name, measured in times.items()}


def cpu_name() -> str:
    """Return what Linux calls the CPU, and its family and model: a virtual machine may hide the
    name.
    """
    fields = {
        key.strip(): value.strip()
        for key, _, value in (
            line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()
        )
    }
    name, family, model = (fields[key] for key in ("model name", "cpu family", "model"))
    return f"{name}, family {family} model {model}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--all",
        action="store_true",
        help="measure each kernel that takes a layer, not only the first",
    )
    parser.add_argument("--reference", action="store_true", help="measure the reference kernel too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    shape = (arguments.size, arguments.size)
    dense = torch.randn(shape, dtype=torch.bfloat16) / 50
    layers, sizes = {}, {"bf16": dense.nbytes}
    for name in NAMES:
        spec = LinearSpec(SCHEMES[name], shape, torch.bfloat16)
        device, first = Device("cpu"), choose(spec, Device("cpu"))
        later = KERNELS["cpu"][len(first.refused) + 1 : -1] if arguments.all else ()
        others = [
            kernel
            for kernel in later
            if load_kernel(kernel).unsupported_reason(spec, device) is None
        ] + ["reference"] * arguments.reference
        for choice in (first, *(Choice(kernel, {}) for kernel in others)):
            label = f"{name}, {choice.kernel}"
            layers[label] = QuantizedLinear(spec, choice, quantize(dense, spec.scheme))
            sizes[label] = SCHEMES[name].weights.size_bytes(*shape)
    words = {label: torch.ones(size // 8, dtype=torch.int64) for label, size in sizes.items()}
    floors = measure({label: words[label].sum for label in sizes}, arguments.rounds)
    columns = {}
    for tokens in arguments.tokens:
        x = torch.randn(tokens, arguments.size, dtype=torch.bfloat16)
        variants = {
            "bf16": partial(linear, x, dense),
            **{label: partial(layer, x) for label, layer in layers.items()},
        }
        columns[tokens] = measure(variants, max(5, arguments.rounds // (1 + tokens // 64)))

    print(
        f"{cpu_name()}, {arguments.threads} threads, torch {torch.__version__}: milliseconds, "
        "median (least)\n"
    )
    print("| layer | floor |" + "".join(f" M = {tokens} |" for tokens in columns))
    print("| --- |" + " --- |" * (1 + len(columns)))
    for label in sizes:
        cells = [floors[label], *(column[label] for column in columns.values())]
        print(f"| {label} |" + "".join(f" {median:.2f} ({least:.2f}) |" for median, least in cells))


if __name__ == "__main__":
    main()
