"""The names of devices, as options take them."""

from __future__ import annotations

import ctypes
import threading

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


def create_cuda_context(device: str) -> None:
    """Start to create the CUDA context of ``device`` in a thread, which torch then uses. Meanwhile
    torch can be imported: creation takes a second, and longer on a machine with many GPUs.

    Errors are ignored here: torch reports them when it creates the context.

    Args:
        device: the name of a device; `AUTO` stands for the first GPU. Nothing happens for a CPU.
    """
    index = gpu_number(device.lower())
    if device.lower() in (AUTO, "cuda"):
        index = 0
    if index is not None:
        threading.Thread(
            target=_retain_context, args=(index,), name="qtool-driver", daemon=True
        ).start()


def _retain_context(index: int) -> None:
    """Retain the primary context of the GPU ``index``, for as long as the process lives.

    Source: CUDA driver API, cuInit, cuDeviceGet and cuDevicePrimaryCtxRetain.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")  # its functions run without the GIL
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def check_device_name(device: str) -> str:
    """Return ``device``, the name of a device, or ``auto``.

    Raises: UsageError, when there are no such devices anywhere.
    """
    if device in (AUTO, "cpu", "cuda") or gpu_number(device) is not None:
        return device
    raise UsageError("E_DEVICE", f"unknown device `{device}`", hint=DEVICE_HINT)
