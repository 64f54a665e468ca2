"""Initial values of the weights."""

import math

from torch import nn


def initialise(module: nn.Module) -> None:
    """Initialise one module's own parameters; for `nn.Module.apply`.

    Linear layers: truncated normal of standard deviation 0.02. Convolutions: normal by fan-out.
    Biases 0; norms keep torch's 1 and 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
