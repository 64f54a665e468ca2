"""Linear layers, as fast as the CPU at hand allows."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timo.ops import dispatch

ROWS = 128  # from here on the convolution was faster in every shape of the models


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: (..., in), (out, in), (out,) -> (..., out).

    MKL, which PyTorch takes for float32, does not use AVX-512 on AMD processors; a 1×1 convolution
    is the same product by oneDNN, which does. Forward and backward together take 0.45 to 0.75 of
    the time there. Elsewhere, and in other dtypes, this is `torch.nn.functional.linear`.
    """
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    plain = plain and x.device.type == "cpu"
    # Sizes come last: where graphs are exported, a test of them would bind the dynamic ones.
    if not (plain and _slow_mkl() and x.numel() >= ROWS * x.shape[-1]):
        return F.linear(x, weight, bias)
    y = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last, as it lies
    y = F.conv2d(y, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@dispatch.assume_constant_result
def _slow_mkl() -> bool:
    return not torch.compiler.is_exporting() and _mkl_on_amd()  # a graph may run elsewhere


@cache
def _mkl_on_amd() -> bool:
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    cpu = Path("/proc/cpuinfo")
    amd = cpu.exists() and "AuthenticAMD" in cpu.read_text()
    return libraries and amd and torch.backends.cpu.get_cpu_capability() == "AVX512"
