"""Tensors that end or begin where memory that cannot be touched does."""

import ctypes
import mmap
from contextlib import contextmanager

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
NO_ACCESS, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


@contextmanager
def fences(at_end: bool):
    """Give `fence(x)`: a copy of x in its strides, beside a page that faults when it is touched."""
    maps = []

    def fence(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        bytes_ = extent * x.element_size()
        pages = -(-bytes_ // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        start = PAGE + (pages * PAGE - bytes_) * at_end
        copy = torch.frombuffer(memory, dtype=torch.uint8, count=bytes_, offset=start)
        copy = copy.view(x.dtype).as_strided(x.shape, x.stride()).copy_(x)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (first, first + (pages + 1) * PAGE):
            protect(page, NO_ACCESS)
            maps.append((page, memory))
        return copy

    yield fence
    for page, _ in maps:
        protect(page, READ_WRITE)


def protect(page: int, access: int) -> None:
    done = ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), access)
    assert done == 0, "mprotect failed"
