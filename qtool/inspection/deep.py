"""What the numbers of a checkpoint look like: saturated codes, dead channels, the range of the
scales; and whether its files are as digested.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import Checkpoint, digest_files, read_json
from qtool.checkpoint.aux_files import MANIFEST
from qtool.formats import Layout, read

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight


@dataclass(frozen=True)
class ModuleNumbers:
    """The numbers of one quantized layer.

    ``saturated``: share of the codes at either end of the format's range. ``dead_rows`` and
        ``dead_columns``: outputs and inputs whose weights are
    all zero. ``scale_histogram``: (exponent e, count of scales in [2^e, 2^(e+1))), in order; of the
    effective scale, both levels of NVFP4 together. Scales that are NaN or infinite are left out of
    all three.
    """

    name: str
    saturated: float
    dead_rows: int
    dead_columns: int
    scale_min: float
    scale_max: float
    scale_histogram: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DeepReport:
    """All quantized layers' numbers, in the order of the headers; ``digests``: what comparing with
    the manifest gave, ``changed`` the files it is
    wrong about."""

    modules: tuple[ModuleNumbers, ...]
    digests: str
    changed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for ``--json``."""
        return asdict(self)


def measure(checkpoint: Checkpoint, layout: Layout | None) -> DeepReport:
    """Read every quantized layer and every file of ``checkpoint``, a few layers in memory at a
    time.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = pool.submit(_compared_digests, checkpoint)
            modules = (
                tuple(pool.map(lambda name: _numbers(checkpoint, layout, name), layout.modules))
                if layout
                else ()
            )
            text, changed = digests.result()
    finally:
        torch.set_num_threads(before)
    return DeepReport(modules, text, changed)


def _numbers(checkpoint: Checkpoint, layout: Layout | None, name: str) -> ModuleNumbers:
    import torch

    assert layout is not None
    weight, bits = read(checkpoint, layout, name), layout.modules[name].scheme.weights.bits
    saturated, zero = _marks(weight, bits)
    # a common one stands in every row
    stored = slice(None, 1 if layout.modules[name].scheme.weights.granularity == "tensor" else None)
    scale = weight.scale[stored].float().abs()
    if weight.scale2 is not None:
        scale = scale * weight.scale2[stored].abs()[:, None]
    scale = scale[scale.isfinite()]  # others are among the warnings
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
    """Return which codes, bool [N, K], are at either end of their format, and which stand
    for zero.
    """
    import torch

    from qtool.weight import FP4_SCALES, spread, unpack_pairs

    if weight.data.dtype == torch.float8_e4m3fn:
        magnitude = weight.data.view(torch.uint8) & 0x7F
        return magnitude == 0x7E, magnitude == 0
    if weight.data.dtype == torch.uint8 and weight.scale.dtype in FP4_SCALES:
        magnitude = unpack_pairs(weight.data) & 7
        return magnitude == 7, magnitude == 0
    codes = (
        unpack_pairs(weight.data).view(torch.int8) - 8
        if weight.data.dtype == torch.uint8
        else weight.data
    )
    top = 2 ** (bits - 1)
    zero = 0 if weight.zero is None else spread(weight.zero, codes.shape[1], weight.tile[1], dim=1)
    return (codes == -top) | (codes == top - 1), codes == zero


def _compared_digests(checkpoint: Checkpoint) -> tuple[str, tuple[str, ...]]:
    path = checkpoint.path / MANIFEST
    if not path.is_file():
        return "there is no manifest to compare the files with", ()
    expected = read_json(path).get("files")
    if not isinstance(expected, Mapping):
        return "the manifest lists no files", ()
    present = [
        checkpoint.path / name
        for name in expected
        if os.sep not in name and (checkpoint.path / name).is_file()
    ]
    found = digest_files(present)
    changed = tuple(name for name, digest in expected.items() if found.get(name) != digest)
    return (
        f"{len(changed)} of {len(expected)} files are not those of the manifest"
        if changed
        else f"all {len(expected)} files match the manifest"
    ), changed
