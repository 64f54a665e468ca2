"""Triton kernels, one file per op. Imported by `timo.ops` when a kernel is about to run.

ptxas 12.8, with which Triton 3.5 to 3.7 assemble for GPUs before Blackwell, at times takes a
descriptor of `wgmma` from a register that holds something else, a kernel's parameter: sums on
Hopper are then wrong, without an error. Later ones do not (tests/descriptors.py tells them apart),
and from 3.6 on Triton brings one along, for Blackwell. Where a Hopper GPU is, that one assembles.
"""

import ctypes
import warnings

import torch
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas_version


def sound_ptxas() -> str | None:
    """Path of the ptxas to assemble with in place of Triton's choice; None to leave that alone.

    Warns where the choice is faulty and there is no other, or none whose code the driver loads.
    """
    if knobs.nvidia.ptxas.version != "12.8" or not has_hopper():
        return None
    newer = getattr(knobs.nvidia, "ptxas_blackwell", None)
    if newer and int(newer.version.split(".")[0]) <= driver_major():
        return newer.path
    warnings.warn(
        f"Triton assembles by {knobs.nvidia.ptxas.path}, version 12.8, whose code for Hopper GPUs "
        "can be wrong; set TRITON_PTXAS_PATH to the ptxas of CUDA 12.9, or of a later CUDA that "
        "the GPU's driver supports, or install Triton 3.6, which brings one along",
        stacklevel=2,
    )
    return None


def has_hopper() -> bool:
    devices = range(torch.cuda.device_count())
    return any(torch.cuda.get_device_capability(device)[0] == 9 for device in devices)


def driver_major() -> int:
    """CUDA's major version up to which the driver loads code; 0 without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


def assemble_by(ptxas: str) -> None:
    """For all of Triton, and for processes that compile, whose environment names it too."""
    knobs.nvidia.ptxas = ptxas
    get_ptxas_version.cache_clear()


if path := sound_ptxas():
    assemble_by(path)
