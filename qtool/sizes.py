"""How qtool prints sizes in bytes."""

from __future__ import annotations

UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def format_size(size_bytes: float) -> str:
    """Return ``size_bytes`` in the largest unit that leaves a digit before the point: ``3.94 GB``.

    A kB is 1,000 bytes, as the Hugging Face Hub and the makers of disks count.
    """
    for unit, scale in UNITS:
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes:.0f} B"
