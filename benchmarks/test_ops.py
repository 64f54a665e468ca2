"""The registry under pytest-benchmark: `pytest benchmarks --benchmark-only`.

On a GPU if there is one. A test whose implementation is wrong fails before it is timed.
"""

from functools import lru_cache

import pytest
import torch

from .ops import OPS, load
from .runner import DIRECTIONS, disagreement

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def cases() -> list[tuple[str, tuple[int, ...], str]]:
    """Op, shape and implementation, shapes together so that a problem is made once."""
    found = []
    for op in OPS:
        module = load(op)
        small = module.problem((1,) * len(module.LAYOUT.split(",")), DTYPE, DEVICE)
        names = dict.fromkeys((*small.calls, *small.skipped))
        for shape in module.CPU_SHAPES if DEVICE.type == "cpu" else module.SHAPES:
            found += [(op, shape, name) for name in names]
    return found


@lru_cache(maxsize=1)
def problem(op, shape):
    made = load(op).problem(shape, DTYPE, DEVICE)
    return made, made.exact()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op, shape, name", cases(), ids=str)
def test_op(benchmark, op, shape, name, direction):
    made, (outputs, gradients) = problem(op, shape)
    why = made.skipped.get(name)
    if direction != "forward":
        why = why or made.forward_only.get(name) or (None if made.leaves else "has no gradient")
    if why:
        pytest.skip(why)
    call = made.calls[name]

    def backward(results):
        results = results[: len(made.cotangents)]
        grads = torch.autograd.grad(results, made.leaves, made.cotangents, materialize_grads=True)
        return wait(grads)

    def forward():
        with torch.no_grad():
            return wait(call())

    got = forward()
    assert not (wrong := disagreement(got, outputs[: len(got)], DTYPE)), wrong
    benchmark.group = f"{op} {shape} {direction}"
    if direction == "forward":
        benchmark.pedantic(forward, rounds=5, warmup_rounds=1)
        return
    assert not (wrong := disagreement(backward(call()), gradients, DTYPE)), wrong
    if direction == "both":
        benchmark.pedantic(lambda: backward(call()), rounds=5)
    else:
        benchmark.pedantic(backward, setup=lambda: ((call(),), {}), rounds=5)


def wait(results):
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return results
