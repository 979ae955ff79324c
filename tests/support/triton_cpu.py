"""Our Triton kernels without a GPU: run by Triton's interpreter, or only compiled, for sm_90.

The interpreter (3.6) computes bfloat16 as if it were an integer, rounds fp8 wrongly, does not fuse
multiply-adds and knows no inline assembly: `repair` teaches it these.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from qtool.codes import codebook
from qtool.runtime.kernels import LinearSpec, load_kernel
from qtool.runtime.triton import tiles as triton_tiles
from qtool.weight import Activation, QuantizedWeight

TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}


def repair() -> None:
    """Patch the interpreter of this process; TRITON_INTERPRET=1 must have been set before triton
    was imported.
    """
    interpreter._convert_float = _converted
    plain_binary = InterpreterBuilder.binary_op

    def binary_op(self, left, right, operation):
        if left.dtype.scalar != tl.bfloat16:
            return plain_binary(self, left, right, operation)
        result = operation(_float32(left), _float32(right))
        return (
            TensorHandle(_converted(result, tl.float32, tl.bfloat16, None), tl.bfloat16)
            if result.dtype != bool
            else TensorHandle(result, tl.int1)
        )

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        exact = np.float64 if a.dtype.is_floating() else np.int32
        left, right = (_float32(part) if part.dtype.is_floating() else part.data for part in (a, b))
        return TensorHandle(
            (left.astype(exact) @ right.astype(exact)).astype(d.data.dtype) + d.data, d.dtype.scalar
        )

    InterpreterBuilder.binary_op, InterpreterBuilder.create_dot = binary_op, dot
    InterpreterBuilder.create_fma = lambda self, x, y, z: TensorHandle(
        (np.float64(1) * x.data * y.data + z.data).astype(np.float32), tl.float32
    )
    triton_tiles.gdc_wait = triton_tiles.gdc_launch_dependents = lambda: None
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
        _converted(np.array([value], np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16
    )
    InterpreterBuilder.create_inline_asm = _run_assembly
    interpreter.InterpretedFunction.__call__ = _call


def _call(self, *arguments, **options):
    """Call a function of a kernel. The kernel patched the language when it began: Triton does so
    again at every call, which takes a quarter of the time.
    """
    if any(tl.core.is_builtin(language.load) for language in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **options)


@functools.cache
def _languages(function) -> list:
    """Return the modules of the language that ``function`` uses."""
    values = list(function.__globals__.values())
    return [module for module in (tl, tl.core) if any(value is module for value in values)]


def _float32(handle):
    return _converted(handle.data, handle.dtype.scalar, tl.float32, None).reshape(handle.data.shape)


def _converted(data, source, target, rounding_mode):
    numbers = (
        torch.from_numpy(np.ascontiguousarray(data).copy())
        .view(TORCH[source.scalar])
        .to(TORCH[target.scalar])
    )
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.float32, 8: torch.float64}[
        numbers.element_size()
    ]
    if target.scalar == tl.float16:
        return numbers.numpy()
    array = numbers.view(whole).numpy()
    return array.view(np.uint16) if whole == torch.int16 else array


NAMED: dict[str, np.uint64] = {}  # registers that one piece of assembly leaves for others


def _run_assembly(self, assembly, constraints, values, types, is_pure, pack):
    """Run the few PTX instructions our kernels use, on pairs of 16-bit words."""
    words = np.ascontiguousarray(values[0].data)
    if assembly.startswith("prefetch"):
        return SimpleNamespace(
            get_result=lambda _: TensorHandle(np.zeros(words.shape, np.int32), tl.int32)
        )
    if "ld.global.v4" in assembly:  # to registers that stay
        names = re.findall(r"\w+_table\d", ";".join(re.findall("{.*?}", assembly)))
        numbers = (ctypes.c_uint32 * len(names)).from_address(int(words.flat[0]))
        NAMED.update(zip(names, map(np.uint64, numbers), strict=True))
        return SimpleNamespace(get_result=lambda _: TensorHandle(np.zeros(1, np.int32), tl.int32))
    if "ex2.approx" in assembly:  # 1 / (1 + 2^x)
        share = (1 / (1 + np.exp2(words.astype(np.float64)))).astype(np.float32)
        return SimpleNamespace(get_result=lambda _: TensorHandle(share, tl.float32))
    registers = {"$1": words.view(np.uint32).astype(np.uint64)}
    registers |= NAMED

    def value(name):
        return registers[name] if name in registers else np.uint64(int(name, 0))

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", assembly).split(";"):
        if not line.strip():
            continue
        name, arguments = line.strip().split(" ", 1)
        target, *sources = (part.strip() for part in arguments.split(","))
        a, *rest = (value(part) for part in sources)
        if name == "lop3.b32":
            b, c, table = rest
            bits = [
                (
                    np.bitwise_and(
                        np.bitwise_and(a if i & 4 else ~a, b if i & 2 else ~b), c if i & 1 else ~c
                    )
                )
                for i in range(8)
                if int(table) >> i & 1
            ]
            result = np.bitwise_or.reduce(np.broadcast_arrays(*bits))
        elif name == "prmt.b32":
            result = _permuted(a, *rest)
        else:
            result = OPERATIONS[name](a, rest[0])
        registers[target] = result & np.uint64(0xFFFFFFFF)
    pairs = (
        np.broadcast_to(registers["$0"], registers["$1"].shape)
        .astype(np.uint32)
        .view(np.int16)
        .reshape(words.shape)
    )
    return SimpleNamespace(get_result=lambda _: TensorHandle(pairs, tl.int16))


OPERATIONS = {
    "shr.b32": np.right_shift,
    "shl.b32": np.left_shift,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
}


def _permuted(a, b, selector):
    """PTX's `prmt`: bytes of ``b`` and ``a``, or the sign of one eight times."""
    both, selector = np.broadcast_arrays(a | b << np.uint64(32), selector)
    result = np.zeros_like(both)
    for index in range(4):
        nibble = selector >> np.uint64(4 * index) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        result |= np.where(nibble >> np.uint64(3), sign, byte) << np.uint64(8 * index)
    return result


class Hopper:
    """A driver for Triton that knows an H200 and has none: kernels are compiled, not run."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, src, metadata):
        return f"launches {src.name} with {metadata.num_warps} warps"


def compile_only(compiled: list) -> None:
    """From now on a launch in this process compiles its kernel for sm_90, adds it to ``compiled``
    and runs nothing; tensors may be meta ones.
    """
    driver.set_active(Hopper())

    def launch(self, grid):
        return lambda *args, **options: compiled.append(self.warmup(*args, grid=grid, **options))

    JITFunction.__getitem__ = launch


def resources(kernel) -> dict[str, int]:
    """Return the registers, the bytes of stack (spills) and of shared memory that
    ``kernel`` takes.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": kernel.metadata.shared}


def empty_packed(module: str, spec: LinearSpec) -> dict[str, torch.Tensor]:
    """Return what the kernel ``module`` would pack for a layer of ``spec``, on the meta device."""
    (rows, columns), weights = spec.shape, spec.scheme.weights
    group = weights.group_size or columns
    eight = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
    scale_type = {
        "e4m3": torch.float8_e4m3fn,
        "e8m0": torch.float8_e8m0fnu,
        "float": torch.bfloat16,
    }[weights.scale]
    empty = functools.partial(torch.empty, device="meta")
    weight = QuantizedWeight(
        empty(rows, columns, dtype=eight[weights.format])
        if weights.bits == 8
        else empty(rows, columns // 2, dtype=torch.uint8),
        empty(
            1 if weights.granularity == "tensor" else rows, -(-columns // group), dtype=scale_type
        ),
        empty(rows, dtype=torch.float32) if weights.scale == "e4m3" else None,
        None if weights.symmetric else empty(rows, -(-columns // group), dtype=torch.int8),
        activation=Activation(spec.scheme.activations, empty((), dtype=torch.float32))
        if spec.static_input and spec.scheme.activations
        else None,
        codebook=codebook(weights.format, torch.device("meta")),
    )
    return load_kernel(module).pack(spec, weight)
