"""What a conversion is asked to do. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qtool.checkpoint import Checkpoint
from qtool.conversion.adapter import Adapter
from qtool.conversion.targets import GGUF, UNQUANTIZED, format_of
from qtool.errors import CheckpointRefused, UsageError
from qtool.formats import Format, Layout, detect
from qtool.scheme import Scheme

MODEL_DTYPES = ("BF16", "F16", "F32")
GGUF_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class ConversionRequest:
    """A checkpoint, the target it is converted to, and whether layers may be rounded for that."""

    checkpoint: Checkpoint
    layout: Layout | None
    """None for an unquantized checkpoint."""
    to: str
    """A name in `TARGETS`."""
    requantize: bool
    """Whether layers that the target cannot hold are rounded to nearest."""
    scheme: Scheme | None
    """What layers are rounded to; None for the nearest scheme that the target holds."""
    dtype: str
    """Of weights that are not quantized in the result, as safetensors names it."""
    adapter: Adapter | None = None
    """A LoRA adapter that is merged into the weights."""

    @property
    def dequantizes(self) -> bool:
        """Whether nothing is quantized in the result."""
        return self.to in UNQUANTIZED

    @property
    def format(self) -> Format:
        """The format that is written; there is none when the conversion dequantizes."""
        return format_of(self.to)

    def cannot_hold(self, constraint: str, hint: str) -> CheckpointRefused:
        """Return the error for what the target has no way to say."""
        return CheckpointRefused(
            "E_CANNOT_HOLD", f"{self.to} cannot hold this checkpoint: {constraint}", hint=hint
        )


def make_request(
    checkpoint: Checkpoint, to: str, *, requantize: bool, scheme: Scheme | None
) -> ConversionRequest:
    """Return the request to convert ``checkpoint`` to ``to``.

    Raises: CheckpointRefused, when its inputs are rotated at run time; UsageError, when there is
        nothing to convert.
    """
    layout = detect(checkpoint)
    request = ConversionRequest(
        checkpoint=checkpoint,
        layout=layout,
        to=to,
        requantize=requantize,
        scheme=scheme,
        dtype=UNQUANTIZED.get(to) or model_dtype(checkpoint),
    )
    if layout and layout.rotates_inputs:
        raise request.cannot_hold(
            "rotations: inputs are rotated at run time (QuIP, SpinQuant R3/R4)",
            "quantize the original again",
        )
    if layout is None and not request.dequantizes and not scheme and to != GGUF:
        raise UsageError(
            "E_NOT_QUANTIZED",
            f"{checkpoint.source} is not quantized, so there is nothing to convert",
            hint=(
                "`--requantize --scheme FP8_BLOCK` rounds it to nearest; `qtool quantize` has "
                "better methods"
            ),
        )
    return request


def model_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most unquantized tensors: BF16, F16 or F32.

    F32 counts only in matrices, as norms may be F32 in any model. Of a GGUF file, what its config
    says: routers are F32 there, too.
    """
    if checkpoint.gguf_file:
        return GGUF_DTYPES[checkpoint.config["dtype"]]
    tensors = checkpoint.tensors.values()
    matrices = Counter(tensor.dtype for tensor in tensors if len(tensor.shape) == 2)
    counts = Counter({dtype: matrices[dtype] for dtype in matrices if dtype in MODEL_DTYPES})
    counts += Counter(tensor.dtype for tensor in tensors if tensor.dtype in ("BF16", "F16"))
    return counts.most_common(1)[0][0] if counts else "BF16"
