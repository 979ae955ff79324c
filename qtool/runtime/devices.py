"""Which torch device and which dtype a name stands for."""

from __future__ import annotations

import torch

from qtool.devices import AUTO, check_device_name
from qtool.errors import ResourceError, UsageError

DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "half": torch.float16,
    "float": torch.float32,
}


def device_named(name: str | torch.device | None) -> torch.device:
    """Return the device ``name``; for None and ``auto``, the first GPU or else the CPU.

    Raises: UsageError for an unknown device, ResourceError for one that this machine lacks.
    """
    name = check_device_name(str(name or AUTO).lower())
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            "E_NO_DEVICE",
            f"there is no device `{name}`: torch sees {torch.cuda.device_count()} CUDA devices",
            hint="use --device cpu",
        )
    return device


def dtype_named(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype ``name``; None for ``auto``.

    Raises: UsageError for a dtype that models do not compute in.
    """
    key = str(name or "auto").removeprefix("torch.").lower()
    if key not in DTYPES:
        raise UsageError("E_DTYPE", f"unknown dtype `{name}`", hint=f"one of {', '.join(DTYPES)}")
    return DTYPES[key]
