"""The maximum over dates: value, gradient, what is kept for it."""

import pytest
import torch
import torch.nn.functional as F

from timo.models.pooling import greatest


def plain(x, valid, factor):
    """The same by one maximum over all enlarged maps."""
    maps = F.interpolate(
        x.flatten(0, 1), scale_factor=factor, mode="bilinear", align_corners=False
    ).unflatten(0, x.shape[:2])
    if valid is None:
        return maps.amax(1)
    usable = valid.view(*valid.shape[:2], 1, *(valid.shape[2:] or (1, 1)))
    if valid.ndim == 4:
        usable = F.interpolate(usable.flatten(0, 1).double(), scale_factor=factor) > 0
        usable = usable.unflatten(0, x.shape[:2])
    return torch.where(usable.any(1), torch.where(usable, maps, -torch.inf).amax(1), 0)


@pytest.mark.parametrize("kind", ["all", "dates", "positions", "none"])
@pytest.mark.parametrize("dates, factor", [(1, 1), (1, 4), (5, 1), (3, 4), (300, 2)])
def test_equals_one_maximum_over_all(dates, factor, kind):
    draw = torch.Generator().manual_seed(dates)
    shape = 2, dates, 3, 4, 5
    x = torch.randn(shape, dtype=torch.float64, generator=draw, requires_grad=True)
    valid = {
        "all": None,
        "dates": torch.rand(shape[:2], generator=draw) < 0.5,
        "positions": torch.rand(2, dates, 4, 5, generator=draw) < 0.5,
        "none": torch.zeros(shape[:2], dtype=torch.bool),
    }[kind]
    got, expected = greatest(x, valid, factor), plain(x, valid, factor)
    assert torch.equal(got, expected)
    assert torch.equal(greatest(x.detach(), valid, factor), expected)
    cotangent = torch.randn(got.shape, dtype=x.dtype, generator=draw)
    (grad,) = torch.autograd.grad(got, x, cotangent)
    (wanted,) = torch.autograd.grad(expected, x, cotangent)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2])
def test_gradients_have_gradients(factor):
    x = torch.randn(1, 3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True, False, True]])
    assert torch.autograd.gradcheck(lambda x: greatest(x, valid, factor), x)
    assert torch.autograd.gradgradcheck(lambda x: greatest(x, valid, factor), x)


def test_equal_dates_give_the_gradient_to_the_earliest():
    x = torch.ones(1, 3, 1, 1, 1, requires_grad=True)
    greatest(x, torch.tensor([[False, True, True]])).sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 0]


def test_nan_of_a_valid_date_stays_and_of_others_does_not():
    for t in range(3):
        x = torch.zeros(1, 3, 1, 1, 1)
        x[0, t] = torch.nan
        assert greatest(x, None).isnan().all()
        valid = torch.ones(1, 3, dtype=torch.bool)
        valid[0, t] = False
        assert greatest(x, valid).item() == 0


def test_no_map_at_full_resolution_is_kept():
    x, kept = torch.randn(1, 6, 8, 4, 4, requires_grad=True), []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        got = greatest(x, torch.ones(1, 6, 4, 4, dtype=torch.bool), 4)
    assert sum(kept) == got.numel()  # a byte for each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(dtype):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 2, 4, 4, generator=draw).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = greatest(x, None, 4)
    wide = x.detach().double().requires_grad_()
    expected = plain(wide, None, 4)
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)
    got.float().sum().backward()
    expected.sum().backward()
    assert x.grad.dtype == dtype
    if dtype == torch.float32:  # roundings of bfloat16 are ties
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double().sum(), wide.grad.sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_batches_of_any_size(dynamic):
    run = torch.compile(
        lambda x, valid: greatest(x, valid, 4), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for samples in (2, 3, 4):
        x = torch.randn(samples, 3, 2, 4, 4, requires_grad=True)
        valid = torch.tensor([[True, False, True], [False] * 3]).repeat(2, 1)[:samples]
        got, expected = run(x, valid), greatest(x, valid, 4)
        torch.testing.assert_close(got, expected)
        (grad,), (wanted,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, expected))
        torch.testing.assert_close(grad, wanted)


def test_gradients_of_samples_and_traces():
    x = torch.randn(4, 1, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    each = torch.vmap(torch.func.grad(lambda x: greatest(x, None, 4).square().sum()))(x)
    greatest(x.flatten(0, 1), None, 4).square().sum().backward()
    torch.testing.assert_close(each, x.grad)
    traced = torch.jit.trace(lambda x: greatest(x, None, 4), x[0])
    torch.testing.assert_close(traced(x[1]), greatest(x[1], None, 4))


def test_deterministic_algorithms_leave_the_gradient_to_interpolate():
    x = torch.randn(1, 3, 2, 4, 4, device="meta", requires_grad=True)
    assert type(greatest(x, None, 4).grad_fn).__name__.startswith("_Greatest")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert type(greatest(x, None, 4).grad_fn).__name__ == "MaximumBackward0"
        cpu = torch.randn(1, 3, 2, 4, 4, requires_grad=True)
        greatest(cpu, None, 4).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert cpu.grad is not None
