"""The kernels for quantized weights, and the choice of one for a layer.

A kernel is a module of this package with the functions of `Kernel`. All are called through one
operator, ``torch.ops.qtool.linear``, which `torch.compile` and CUDA graphs see as a whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from qtool.scheme import Scheme
from qtool.weight import QuantizedWeight

# device type -> modules of this package, the fastest first; `reference` supports everything
KERNELS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("int8_groups", "native", "int4pack", "onednn", "int8pack", "reference"),
    "cuda": ("triton_w8a8", "scaled_mm", "humming", "triton_weight_only", "reference"),
}
TAKE_OFFSETS = frozenset(
    {
        *("int8_groups", "native", "native_experts", "reference"),
        *("triton_weight_only", "triton_experts"),
    }
)
"""The kernels that add the ``offset`` of weights, those of experts included."""


@dataclass(frozen=True)
class FewTokens:
    """A kernel that is faster than the first of `KERNELS` for few tokens.

    It packs a second copy of the weight.
    """

    kernel: str
    most: int
    """For how many tokens it is used at most."""


# device type and format of the weights -> measured on an H200
FEW_TOKENS: Mapping[tuple[str, str], FewTokens] = {
    ("cuda", "int4"): FewTokens("triton_weight_only", 16),
    ("cuda", "fp4"): FewTokens("triton_weight_only", 16),
}


@dataclass(frozen=True)
class Device:
    """Where a layer runs."""

    type: str
    """cpu or cuda."""
    capability: int = 0
    """Of a CUDA device, 90 for sm_90."""

    def __str__(self) -> str:
        return f"sm_{self.capability}" if self.type == "cuda" else self.type


@dataclass(frozen=True)
class LinearSpec:
    """What a kernel is chosen by: a layer without its data."""

    scheme: Scheme
    shape: tuple[int, int]
    """N outputs, K inputs."""
    dtype: torch.dtype
    """Of its input and output."""
    static_input: bool = False
    """Whether the scale (and zero point) of the input comes with the weight, from calibration."""


class Kernel(Protocol):
    """One way to multiply with weights of some schemes."""

    def unsupported_reason(self, spec: LinearSpec, device: Device) -> str | None:
        """Return why this kernel does not support such layers on ``device``; None when it does."""

    def pack(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the tensors that `apply` needs, on the device of ``weight``.

        May reuse the tensors of ``weight``, which has neither ``perm`` nor ``pre_scale``.
        """

    def apply(
        self, spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None
    ) -> Tensor:
        """Return ``x`` times the weight, plus ``bias``: [M, N] of the dtype of ``x``.

        Args:
            spec: the layer.
            x: the input, [M, K], contiguous; M is at least 1.
            packed: from `pack`.
            bias: [N], or None.
        """


class CodesKernel(Kernel, Protocol):
    """A kernel that rounds its input to 8 bits, a scale for each token, or takes it rounded."""

    def apply_codes(
        self,
        spec: LinearSpec,
        codes: Tensor,
        row_scale: Tensor,
        packed: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """Return what `apply` returns, in the dtype of ``spec``, for an input rounded before.

        Args:
            spec: the layer.
            codes: [M, K], as `row_quantize` rounds.
            row_scale: the scale of each token, f32 [M, 1].
            packed: from `pack`.
            bias: [N], or None.
        """


@dataclass(frozen=True)
class Choice:
    """The kernel of a layer."""

    kernel: str
    refused: Mapping[str, str]
    """Why the faster kernels do not support the layer, by name."""
    few: FewTokens | None = None
    """Another kernel for few tokens."""

    def __str__(self) -> str:
        if self.few is None:
            return self.kernel
        return f"{self.few.kernel} to {self.few.most} tokens, then {self.kernel}"


def choose(spec: LinearSpec, device: Device, *, second_copy: bool = True) -> Choice:
    """Return the fastest kernel for ``device`` that supports ``spec``.

    Args:
        spec: the layer.
        device: where it runs.
        second_copy: whether there is memory for another packed copy, for few tokens.
    """
    refused: dict[str, str] = {}
    for name in KERNELS[device.type]:
        reason = _unsupported_reason(name, spec, device)
        if reason is None:
            break
        refused[name] = reason
    few = FEW_TOKENS.get((device.type, spec.scheme.weights.format))
    if few and (
        few.kernel == name or not second_copy or _unsupported_reason(few.kernel, spec, device)
    ):
        few = None
    return Choice(name, refused, few)


def linear_spec(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> LinearSpec:
    """Return the layer of N outputs and K inputs, ``shape``, that runs in ``scheme``."""
    inputs = scheme.activations
    return LinearSpec(scheme, shape, dtype, inputs is not None and inputs.needs_data)


cached_choice = lru_cache(maxsize=None)(choose)


def with_channel_scales(spec: LinearSpec) -> LinearSpec:
    """Return ``spec`` with one scale for each output instead of one for all."""
    weights = replace(spec.scheme.weights, granularity="channel")
    return replace(spec, scheme=replace(spec.scheme, weights=weights))


def _unsupported_reason(name: str, spec: LinearSpec, device: Device) -> str | None:
    try:
        return no_offset(name, spec) or load_kernel(name).unsupported_reason(spec, device)
    except ModuleNotFoundError as error:
        return f"needs the package `{error.name}`"


def no_offset(name: str, spec: LinearSpec) -> str | None:
    """Return why the kernel ``name`` refuses weights with an offset, if ``spec`` has one."""
    if not spec.scheme.weights.offset or name in TAKE_OFFSETS:
        return None
    return "offset: supports zero points only, and no float that is added to a group"


def units_of_rows(scale: Tensor, offset: Tensor | None) -> Tensor:
    """Return a power of two for each row, f32 [N], in which f16 holds ``scale`` and ``offset``, and
    products with codes of 8 bits.
    """
    largest = scale.abs().amax(1)
    if offset is not None:
        largest = torch.maximum(largest, offset.float().abs().amax(1))
    exponent = torch.frexp(largest).exponent - 8
    return torch.where(largest > 0, torch.exp2(exponent.clamp(-120, 120).float()), 1.0)


def not_bfloat16(spec: LinearSpec) -> str | None:
    """Return why a kernel that computes in bfloat16 alone, as all on a CPU do, refuses ``spec``."""
    if spec.dtype == torch.bfloat16:
        return None
    return f"{str(spec.dtype).removeprefix('torch.')}: supports bfloat16 only"


def no_aten_product(spec: LinearSpec) -> str | None:
    """Return why ATen's weight-only products do not run here, or not with such inputs."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs a CPU with AVX2 or AVX512"
    if reason := not_bfloat16(spec):
        return reason
    if spec.scheme.activations:
        return f"inputs {spec.scheme.activations}: supports 16 bits only"
    return None


def codes_taken(spec: LinearSpec, choice: Choice) -> Literal["fp8", "int8"] | None:
    """Return what the input of ``spec`` may be rounded to before; None when it may not.

    Each kernel of ``choice`` must be a `CodesKernel`, and each token have a scale of its own.
    """
    inputs = spec.scheme.activations
    if inputs is None or inputs.granularity != "token" or spec.static_input:
        return None
    kernels = [choice.kernel, *([choice.few.kernel] if choice.few else [])]
    if not all(hasattr(load_kernel(name), "apply_codes") for name in kernels):
        return None
    return "fp8" if inputs.format == "fp8" else "int8"


@cache
def load_kernel(name: str) -> Kernel:
    """Import and return the kernel ``name``."""
    return cast(Kernel, importlib.import_module(f"{__name__}.{name}"))


def device_of(device: torch.device) -> Device:
    """Describe the torch ``device``."""
    if device.type != "cuda":
        return Device(device.type)
    major, minor = torch.cuda.get_device_capability(device)
    return Device("cuda", major * 10 + minor)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the one that Triton and humming launch on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Call:
    """What the operator calls for one kind of layer."""

    spec: LinearSpec
    kernels: tuple[tuple[str, int | None, tuple[str, ...]], ...]
    """(kernel, for how many tokens at most, the names of its tensors), in order; None: any number.
    """


_CALLS: list[Call] = []
_NUMBERS: dict[Call, int] = {}


def number_of(call: Call) -> int:
    """Return the number by which the operator knows ``call``."""
    if call not in _NUMBERS:
        _NUMBERS[call] = len(_CALLS)
        _CALLS.append(call)
    return _NUMBERS[call]


_LIBRARY = torch.library.Library("qtool", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "linear(Tensor x, Tensor[] packed, Tensor? bias, int call, Tensor? row_scale=None) -> Tensor"
)  # type: ignore[no-untyped-call]


def linear(
    x: Tensor,
    packed: Sequence[Tensor | None],
    bias: Tensor | None,
    call: int,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Return ``x`` [T, K] times a packed matrix, [T, N].

    Args:
        x: contiguous; codes, with a ``row_scale``.
        packed: the tensors of all kernels of ``call``.
        bias: [N].
        call: see `number_of`.
        row_scale: the scale of each token, f32 [T, 1].
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        y: Tensor = torch.ops.qtool.linear(x, packed, bias, call, row_scale)
        return y
    # torch's dispatcher takes longer than the product of one token and a small matrix
    return _multiply(x, cast(Sequence[Tensor], packed), bias, call, row_scale)


def _multiply(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    call: int,
    row_scale: Tensor | None = None,
) -> Tensor:
    start = 0
    for kernel, most, names in _CALLS[call].kernels:
        if most is None or x.shape[0] <= most:
            tensors = dict(zip(names, packed[start : start + len(names)], strict=True))
            with current(x.device):
                if row_scale is not None:
                    return cast(CodesKernel, load_kernel(kernel)).apply_codes(
                        _CALLS[call].spec, x, row_scale, tensors, bias
                    )
                return load_kernel(kernel).apply(_CALLS[call].spec, x, tensors, bias)
        start += len(names)
    raise AssertionError("the last kernel takes any number of tokens")


def _fake_linear(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    call: int,
    row_scale: Tensor | None = None,
) -> Tensor:
    spec = _CALLS[call].spec
    return x.new_empty(
        x.shape[0], spec.shape[0], dtype=x.dtype if row_scale is None else spec.dtype
    )


_OPERATOR = torch.no_grad()(_multiply)
_LIBRARY.impl("linear", _OPERATOR, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("qtool::linear", _fake_linear)
