"""Reads all data of a checkpoint: saturated codes, dead channels, scales, and file digests."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.manifest import ManifestCheck, check_manifest, has_manifest
from qtool.formats import Layout, read

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight


@dataclass(frozen=True)
class ModuleNumbers:
    """The numbers of one quantized layer. Scales that are NaN or infinite are left out."""

    name: str
    saturated: float
    """Share of the codes at either end of the format's range."""
    dead_rows: int
    """Outputs whose weights are all zero."""
    dead_columns: int
    """Inputs whose weights are all zero."""
    scale_min: float
    """The smallest scale; for NVFP4, of both levels multiplied."""
    scale_max: float
    scale_histogram: tuple[tuple[int, int], ...]
    """(exponent e, count of scales in [2^e, 2^(e+1))), in order."""


@dataclass(frozen=True)
class DeepReport:
    """The numbers of all quantized layers, and whether the files match the manifest."""

    modules: tuple[ModuleNumbers, ...]
    """In the order of the headers."""
    digests: str
    """The result of comparing files with the manifest, in words."""
    changed: tuple[str, ...] = ()
    """The files that differ from the manifest, or are missing or added."""

    def to_dict(self) -> dict[str, object]:
        """Return the numbers for ``--json``."""
        return asdict(self)


def measure(
    checkpoint: Checkpoint, layout: Layout | None
) -> tuple[DeepReport, ManifestCheck | None]:
    """Read every quantized layer and every file; a few layers are in memory at a time.

    The comparison with the manifest is None when there is none.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            comparing = None
            if has_manifest(checkpoint.published_folder):
                comparing = pool.submit(check_manifest, checkpoint.published_folder)
            modules: tuple[ModuleNumbers, ...] = ()
            if layout:
                numbers = partial(_numbers, checkpoint, layout)
                modules = tuple(pool.map(numbers, layout.modules))
            check = comparing.result() if comparing else None
    finally:
        torch.set_num_threads(before)
    if check is None:
        return DeepReport(modules, "there is no manifest to compare the files with"), None
    names = (*check.changed, *check.missing, *check.added)
    return DeepReport(modules, check.summary(), names), check


def _numbers(checkpoint: Checkpoint, layout: Layout, name: str) -> ModuleNumbers:
    import torch

    weights = layout.modules[name].scheme.weights
    weight = read(checkpoint, layout, name)
    saturated, zero = _marks(weight, weights.bits)
    # A scale of the whole matrix stands in every row, and counts once.
    stored = slice(None, 1 if weights.granularity == "tensor" else None)
    scale = weight.scale[stored].float().abs()
    if weight.scale2 is not None:
        scale = scale * weight.scale2[stored].abs()[:, None]
    scale = scale[scale.isfinite()]  # others are damage, by `check_values`
    exponents, counts = torch.unique(scale[scale > 0].log2().floor().int(), return_counts=True)
    return ModuleNumbers(
        name=name,
        saturated=int(torch.count_nonzero(saturated)) / saturated.numel(),
        dead_rows=int(zero.all(dim=1).sum()),
        dead_columns=int(zero.all(dim=0).sum()),
        scale_min=float(scale.min()) if scale.numel() else 0.0,
        scale_max=float(scale.max()) if scale.numel() else 0.0,
        scale_histogram=tuple(zip(exponents.tolist(), counts.tolist(), strict=True)),
    )


def _marks(weight: QuantizedWeight, bits: int) -> tuple[Tensor, Tensor]:
    """Return which codes are at either end of their format, and which mean zero, bool [N, K]."""
    import torch

    from qtool.codes import FP4_SCALES, unpack_pairs
    from qtool.weight import codes_to_values, spread

    if weight.data.dtype == torch.float8_e4m3fn:
        magnitude = weight.data.view(torch.uint8) & 0x7F
        return magnitude == 0x7E, magnitude == 0
    if weight.codebook is not None:
        magnitudes = codes_to_values(
            weight.data, weight.scale.dtype, codebook=weight.codebook
        ).abs()
        return magnitudes == weight.codebook.abs().max(), magnitudes == 0
    if weight.data.dtype == torch.uint8 and weight.scale.dtype in FP4_SCALES:
        magnitude = unpack_pairs(weight.data) & 7
        return magnitude == 7, magnitude == 0
    codes = (
        unpack_pairs(weight.data).view(torch.int8) - 8
        if weight.data.dtype == torch.uint8
        else weight.data
    )
    top = 2 ** (bits - 1)
    if weight.offset is not None:  # codes count from 0, and each group has another zero
        codes = codes.view(torch.uint8) + (8 if weight.data.dtype == torch.uint8 else 0)
        return (codes == 0) | (codes == 2 * top - 1), torch.zeros_like(codes, dtype=torch.bool)
    zero = 0 if weight.zero is None else spread(weight.zero, codes.shape[1], weight.tile[1], dim=1)
    return (codes == -top) | (codes == top - 1), codes == zero
