"""`PackedModule`: a module whose weights are packed for kernels."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.scheme import Scheme

HUGE_PAGE_BYTES = 2 << 20  # of x86; a smaller tensor is not copied


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a copy of ``tensor`` in memory for which Linux is asked to use huge pages: a CPU has
    fewer TLB misses, and reads weights a few percent faster. Tensors that are small, not contiguous
    or not on a CPU are returned as they are.
    """
    if (
        tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or tensor.nbytes < HUGE_PAGE_BYTES
    ):
        return tensor
    if not tensor.is_contiguous() or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    try:
        memory = mmap.mmap(-1, tensor.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # Linux was built without huge pages, or `ulimit -v` is near
        return tensor
    copied = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    return copied.copy_(tensor)


class PackedModule(nn.Module):
    """Holds packed weights as buffers that move and are shared whole, and never change."""

    def register_packed(self, name: str, tensor: Tensor) -> None:
        """Keep ``tensor``, which a kernel packed, as the buffer ``name``."""
        self.register_buffer(name, in_huge_pages(tensor), persistent=False)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme of each matrix that it multiplies with."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device of the same type, and keep all dtypes: codes must not be cast."""
        for name, tensor in self.named_buffers(recurse=False):
            device = fn(torch.empty(0, dtype=torch.uint8, device=tensor.device)).device
            if device.type != tensor.device.type:
                raise UsageError(
                    "E_PACKED",
                    f"the weights are packed for {tensor.device.type} and cannot move to {device}",
                    hint=f"load it with device=`{device}`",
                )
            if device != tensor.device:
                self._buffers[name] = tensor.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Share the weights: they never change."""
        twin = copy.copy(self)
        twin._buffers = dict(self._buffers)
        return twin

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        raise UsageError(
            "E_PACKED",
            "a model cannot be saved once its weights are packed for a kernel",
            hint="`qtool export` converts the checkpoint it was loaded from",
        )
