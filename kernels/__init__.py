"""Triton kernels, one file per op. Imported by `timo.ops` when a kernel is about to run.

ptxas 12.8, with which Triton 3.5 to 3.7 assemble for GPUs before Blackwell, at times takes a
descriptor of `wgmma` from a register that holds something else, a kernel's parameter: sums on
Hopper are then wrong, without an error. Later ones do not (tests/descriptors.py tells them apart),
and from 3.6 on Triton brings one along, for Blackwell.
"""

import os
import warnings

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas_version

if "TRITON_PTXAS_PATH" not in os.environ and knobs.nvidia.ptxas.version == "12.8":
    newer = getattr(knobs.nvidia, "ptxas_blackwell", None)
    if newer is None:
        warnings.warn(
            f"Triton assembles by {knobs.nvidia.ptxas.path}, version 12.8, whose code for Hopper "
            "GPUs can be wrong; set TRITON_PTXAS_PATH to the ptxas of CUDA 12.9 or later, or "
            "install Triton 3.6 or later",
            stacklevel=2,
        )
    else:
        knobs.nvidia.ptxas = newer.path  # sets the variable too, for processes that compile
        get_ptxas_version.cache_clear()
