"""Parity on random shapes, strides, validity and energies; every tier and dtype, between guards.

A sample of the shapes runs with the suite. TIMO_FUZZ=all (`make fuzz`) runs all of them,
TIMO_FUZZ=17 shape 17 alone, TIMO_FUZZ=17,33 two of them.
"""

import os
from contextlib import nullcontext

import pytest
import torch

from tests.ops import fuzz, fuzz_maximum, fuzz_units, tiers
from timo.ops import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHECKS = fuzz.CHECKS | fuzz_maximum.CHECKS | fuzz_units.CHECKS
# Shapes, of which the suite takes every so-many-th; and multiplications of a shape.
COUNT, EVERY, WORK = (63, 8, 50_000) if INTERPRETED else (1008, 24, 3_000_000)


def numbers() -> list[int]:
    wanted = os.environ.get("TIMO_FUZZ", "")
    if wanted in ("", "all"):
        return list(range(0, COUNT, 1 if wanted else EVERY))
    return [int(number) for number in wanted.split(",")]


@pytest.fixture(autouse=True)
def one_thread():
    """Small shapes: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """In the interpreter, half of the shapes by tiles of 16: several blocks of everything."""
    if INTERPRETED and request.node.callspec.params["number"] // EVERY % 2:
        from timo.kernels import gyroscope_attention_config as config

        monkeypatch.setattr(
            config,
            "tile",
            lambda _, dates, head_dim, *rest: config.Tile(
                config.widths(dates, 64, head_dim, 64), 16, 16, 4, 1
            ),
        )


def choices(backend: str, op: str, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """What to run: backend, and of the compiled kernels the instruction set."""
    if backend == dispatch.TRITON:
        names = (backend, dispatch.TRITON_ATOMIC)
        return [(name, None) for name in names if name in dispatch.OPS[op].backends]
    return [("reference", None), *(("cpp", tier) for tier in tiers.available(op, dtype))]


@pytest.mark.parametrize("number", numbers())
@pytest.mark.parametrize("backend", ["triton" if INTERPRETED else "cpu"])
@pytest.mark.parametrize("op", CHECKS)
def test_parity(op, backend, number):
    """One shape with every validity and dtype; in the interpreter with one dtype for each."""
    for i, kind in enumerate(fuzz.KINDS):
        for j, dtype in enumerate(DTYPES):
            if INTERPRETED and (i + j + number) % 3:
                continue
            case = fuzz.random_case(number, kind, dtype, WORK)
            check = CHECKS[op](case)
            for chosen, tier in choices(backend, op, dtype):
                with tiers.forced(tier) if tier else nullcontext():
                    try:
                        check(backend=chosen)
                    except AssertionError as error:
                        again = f"TIMO_FUZZ={number} pytest tests/ops/test_fuzz.py -k {op}"
                        again = "TRITON_INTERPRET=1 " * INTERPRETED + again
                        raise AssertionError(
                            f"{tier or chosen}: {error}\n{case}\n{again}"
                        ) from error
