"""Initial values of the weights."""

import math

from torch import nn


def initialise(module: nn.Module) -> None:
    """Initialise one module's own parameters; for `nn.Module.apply`.

    Linear layers, and 1×1 convolutions, which are the same: truncated normal of standard deviation
    0.02. Other convolutions: normal by fan-out. Biases 0; norms keep torch's 1 and 0.
    """
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return
    if isinstance(module, nn.Linear) or module.kernel_size == (1, 1):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        fan_out = math.prod(module.kernel_size) * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if module.bias is not None:
        nn.init.zeros_(module.bias)
