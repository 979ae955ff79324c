"""The names of devices, as options take them."""

from __future__ import annotations

import ctypes

from qtool.errors import UsageError

AUTO = "auto"
DEVICE_HINT = "one of auto, cpu, cuda, cuda:<n>"


def gpu_number(device: str) -> int | None:
    """Return the n of ``cuda:<n>``; None for any other name."""
    number = device.removeprefix("cuda:")
    return int(number) if number != device and number.isdecimal() else None


def gpu_count() -> int:
    """Return how many NVIDIA GPUs this process may use, as their driver says; imports no torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def check_device_name(device: str) -> str:
    """Return ``device``, the name of a device, or ``auto``.

    Raises: UsageError, when there are no such devices anywhere.
    """
    if device in (AUTO, "cpu", "cuda") or gpu_number(device) is not None:
        return device
    raise UsageError("E_DEVICE", f"unknown device `{device}`", hint=DEVICE_HINT)
