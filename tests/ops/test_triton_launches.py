"""How Triton kernels are launched: grids, devices, precision. Nothing runs here."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)
from triton.runtime.jit import JITFunction  # noqa: E402

from timo.kernels import (  # noqa: E402
    gather_units,
    gyroscope_attention,
    masked_pixel_loss,
    scatter_units,
    temporal_maximum,
    temporal_median,
)
from timo.kernels.launch import MOST, grid  # noqa: E402

OTHERS = 65_535  # programs along the second and the third axis (CUDA programming guide)
B = 70_000  # samples


@pytest.fixture
def grids(monkeypatch):
    """Grid of every launch, by kernel."""
    seen = {}
    monkeypatch.setattr(
        JITFunction, "run", lambda kernel, *_, grid, **__: seen.update({kernel.__name__: grid})
    )
    return seen


def launch_median():
    x = torch.zeros(B, 2, 1, 1, 8)
    temporal_median.forward(x, None, x[:, 0], x[:, 0].long())
    temporal_median.backward(x[:, 0], x[:, 0].long(), x)


def launch_maximum():
    x = torch.zeros(B, 2, 1, 1, 8)
    values, dates, size = x[:, 0], x[:, 0].short(), (B, 2, 8, 1, 1)
    temporal_maximum.forward(x, None, values, dates, size, 1)
    temporal_maximum.backward(x, values, dates, size, 1)


def launch_gather():
    frames, ids = torch.zeros(B, 1, 1, 2, 2), torch.zeros(B, 1, dtype=torch.int64)
    tiles = gather_units.forward(frames, ids, None, None, None, 2, 0, 0, torch.float32)
    gather_units.backward(tiles, ids, None, None, 1, 2, 2, 2, 0, 0, torch.float32)


def launch_scatter():
    tokens, ids = torch.zeros(B, 1, 8), torch.zeros(B, 1, dtype=torch.int64)
    sequence = scatter_units.forward(tokens, ids, tokens[0, 0], tokens[:3, 0])
    scatter_units.backward(sequence, ids, torch.float32)


def launch_loss():
    frames, ids = torch.zeros(B, 1, 1, 2, 2), torch.zeros(B, 1, dtype=torch.int64)
    arguments = torch.zeros(B, 1, 4), frames, ids, None, None, None, 2
    saved = masked_pixel_loss.forward(*arguments, "batch")
    masked_pixel_loss.backward(saved[0], *arguments, *saved[1:])


def launch_gyroscope():
    x, valid = torch.zeros(B, 2, 1, 1, 8), torch.ones(B, 2, 1, dtype=torch.bool)
    inputs = x, x, x, x[:, 0], x[:, 0], x[..., 0], valid, 1.0
    out, lse, spatial = gyroscope_attention.forward(*inputs)
    gyroscope_attention.backward(out, *inputs, out, lse, spatial)


@pytest.mark.parametrize(
    "launch, kernels",
    [
        (launch_median, 2),
        (launch_maximum, 2),
        (launch_gather, 3),
        (launch_scatter, 3),
        (launch_loss, 4),
        (launch_gyroscope, 7),
    ],
)
def test_any_number_of_samples_fits_into_a_grid(launch, kernels, grids):
    launch()
    assert len(grids) == kernels
    for kernel, size in grids.items():
        assert 1 <= size[0] <= MOST and all(1 <= n <= OTHERS for n in size[1:]), (kernel, size)
        assert size[0] >= B or kernel in ("batch_kernel", "total_kernel"), (kernel, size)


def test_more_programs_than_a_grid_holds_are_an_error():
    assert grid(2**16, 2**15 - 1) == (2**31 - 2**16,)
    with pytest.raises(ValueError, match=r"65,536 x 32,768 = 2,147,483,648 programs.* split the"):
        grid(2**16, 2**15)


@pytest.fixture
def products():
    """The settings of matrix products, put back after the test."""
    whole, own = torch.backends, torch.backends.cuda.matmul
    kept = whole.fp32_precision, own.fp32_precision
    yield
    whole.fp32_precision, own.fp32_precision = kept


def test_tf32_only_where_torch_may_use_it(products):
    """By default float32 is exact; both of torch's settings are heard."""
    half, single = torch.float16, torch.float32
    precision = gyroscope_attention.precision
    assert precision(single) == "ieee" and precision(half) == "tf32"
    torch.set_float32_matmul_precision("high")
    assert precision(single) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert precision(single) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert precision(single) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert precision(single) == "ieee"
