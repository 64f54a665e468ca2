"""The `timo` operator library: schema, kernels, fake and autograd of an op in one call."""

from collections.abc import Callable
from functools import wraps

import torch

LIBRARY = torch.library.Library("timo", "DEF")


def define(
    schema: str,
    run: Callable,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
) -> Callable:
    """Register `timo::<name>` and return it.

    Args:
        schema: name and signature, as `f(Tensor x) -> Tensor`.
        run: the implementation, for every device.
        fake: shapes, dtypes and strides of the outputs, for tracing.
        backward, save: as for `torch.library.register_autograd`; without them the op is not
            differentiable and says so.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _as_given(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"timo::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"timo::{name}", backward, setup_context=save, lib=LIBRARY)
    return getattr(torch.ops.timo, name)


def refuse_third_derivative(op: str) -> None:
    """Raise where the second derivative of `op` would have to be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"third derivatives of {op} are not implemented; take its second derivatives without "
            "create_graph=True"
        )


def _as_given(run: Callable) -> Callable:
    """`run` on the dtypes that it is given: under autocast its own products would be rounded."""

    @wraps(run)
    def call(*args):
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):
            return run(*args)

    return call
