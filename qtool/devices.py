"""The names of devices, as options take them."""

from __future__ import annotations

from qtool.errors import UsageError

AUTO = "auto"
DEVICE_HINT = "one of auto, cpu, cuda, cuda:<n>"


def gpu_number(device: str) -> int | None:
    """Return the n of ``cuda:<n>``; None for any other name."""
    number = device.removeprefix("cuda:")
    return int(number) if number != device and number.isdecimal() else None


def check_device_name(device: str) -> str:
    """Return ``device``, the name of a device, or ``auto``.

    Raises: UsageError, when there are no such devices anywhere.
    """
    if device in (AUTO, "cpu", "cuda") or gpu_number(device) is not None:
        return device
    raise UsageError("E_DEVICE", f"unknown device `{device}`", hint=DEVICE_HINT)
