"""Parity on random shapes, strides, validity and energies; every tier and dtype, between guards.

A sample of the shapes runs with the suite. TIMO_FUZZ=all (`make fuzz`) runs all of them,
TIMO_FUZZ=17 shape 17 alone, TIMO_FUZZ=17,33 two of them.
"""

import os
from contextlib import contextmanager

import pytest
import torch

from tests.ops import fuzz, fuzz_units
from timo.ops import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TIERS = ("portable", "avx2", "avx512", "amx")
CHECKS = fuzz.CHECKS | fuzz_units.CHECKS
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
                config.widths(dates, 64, head_dim), 16, 16, 4, 1
            ),
        )


@contextmanager
def capped(level: int | None):
    """Compiled kernels of at most this instruction set."""
    if level is None:
        yield
        return
    dispatch.compiled().cap_isa(level)
    try:
        yield
    finally:
        dispatch.compiled().cap_isa(99)


def choices(backend: str) -> list[tuple[str, int | None, str]]:
    """What to run: name, instruction set to cap to, backend."""
    if backend == dispatch.TRITON:
        return [("triton", None, "triton")]
    tiers = () if dispatch.unavailable("cpp") else TIERS[: dispatch.compiled().isa_level() + 1]
    compiled = [(name, level, "cpp") for level, name in enumerate(tiers)]
    return [("reference", None, "reference"), *compiled]


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
            for name, level, chosen in choices(backend):
                with capped(level):
                    try:
                        check(backend=chosen)
                    except AssertionError as error:
                        again = f"TIMO_FUZZ={number} pytest tests/ops/test_fuzz.py -k {op}"
                        again = "TRITON_INTERPRET=1 " * INTERPRETED + again
                        raise AssertionError(f"{name}: {error}\n{case}\n{again}") from error
