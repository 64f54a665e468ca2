"""Masked batch normalisation against torch's own."""

import pytest
import torch
from torch import nn

from tests.tolerance import assert_close
from timo.layers import MaskedBatchNorm
from timo.layers.norm import untracked


def pair(channels=3, dtype=torch.float64):
    torch.manual_seed(0)
    ours = MaskedBatchNorm(channels).to(dtype)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs = nn.BatchNorm1d(channels).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_without_validity_it_is_batch_norm_to_the_bit(training, dtype):
    ours, theirs = (m.train(training) for m in pair(dtype=dtype))
    x = torch.randn(8, 3, 5, dtype=dtype)
    grad, inputs = torch.randn_like(x), [x.clone().requires_grad_() for _ in range(2)]
    for layer, y in zip((ours, theirs), inputs):
        for _ in range(2):
            out = layer(y)
        out.backward(grad)
        y.out = out
    assert torch.equal(inputs[0].out, inputs[1].out)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("shape", [(40, 3), (6, 3, 4, 5)])
@pytest.mark.parametrize("whole_maps", [False, True])
def test_statistics_are_those_of_the_valid_entries(shape, whole_maps):
    """Valid entries, gradients and running statistics are batch norm's on those alone."""
    ours, theirs = pair()
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    valid = torch.rand(shape[0], *shape[2:]) > 0.4
    if whole_maps:
        valid = torch.rand(shape[0], *[1] * (len(shape) - 2)) > 0.4
    full = valid.expand(shape[0], *shape[2:])
    a, b = x.clone().requires_grad_(), x.movedim(1, -1)[full].requires_grad_()
    grad = torch.randn_like(x).movedim(1, -1) * full[..., None]
    out = ours(a, valid)
    exact = theirs(b)
    out.backward(grad.movedim(-1, 1))
    exact.backward(grad[full])
    assert_close(out.movedim(1, -1)[full], exact)
    assert_close(a.grad.movedim(1, -1)[full], b.grad)
    assert (a.grad.movedim(1, -1)[~full] == 0).all()
    assert_close(ours.weight.grad, theirs.weight.grad)
    assert_close(ours.bias.grad, theirs.bias.grad)
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name].double(), value.double(), name=name)


@pytest.mark.parametrize("masked", [True, False])
def test_entries_that_are_left_out_count_as_zeros(masked):
    ours, theirs = pair()
    x = torch.randn(6, 3, 4, dtype=torch.float64) * 3 + 1
    valid = torch.rand(6, 4) > 0.4 if masked else torch.ones(6, 4, dtype=torch.bool)
    a, b = x.clone().requires_grad_(), x.movedim(1, -1)[valid].requires_grad_()
    grad = torch.randn_like(x).movedim(1, -1) * valid[..., None]
    out = ours(a, valid if masked else None, valid.sum() + 17)
    exact = theirs(torch.cat([b, b.new_zeros(17, 3)]))[:-17]
    out.backward(grad.movedim(-1, 1))
    exact.backward(grad[valid])
    assert_close(out.movedim(1, -1)[valid], exact)
    assert_close(a.grad.movedim(1, -1)[valid], b.grad)
    assert_close(ours.weight.grad, theirs.weight.grad)
    assert_close(ours.bias.grad, theirs.bias.grad)
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name].double(), value.double(), name=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_inputs_are_float32(dtype):
    """A mean of 100 and 10⁵ entries: half sums would be far off, or infinite."""
    ours, theirs = pair(channels=1)
    x = (torch.randn(100_000, 1) + 100).to(dtype)
    valid = torch.rand(100_000) > 0.5
    out = ours.float()(x, valid)
    theirs(x[valid].double())
    assert out.dtype == dtype and out.isfinite().all()
    for name in ("running_mean", "running_var"):
        assert_close(getattr(ours, name), getattr(theirs, name), name=name)


@pytest.mark.parametrize("count", [0, 1])
def test_no_or_one_valid_entry_is_finite(count):
    ours, _ = pair()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    out = ours(x, torch.arange(4) < count)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    moved = bool((ours.running_mean != 0).any())
    assert moved == (count == 1) and ours.running_var.isfinite().all()
    assert (ours.running_var == 1).all() or count == 1


def test_a_single_entry_needs_no_validity():
    """As under a map of one pixel: torch's own refuses it."""
    ours, same = pair()[0], pair()[0]
    x = torch.randn(1, 3, 1, dtype=torch.float64, requires_grad=True)
    out = ours(x)
    out.sum().backward()
    assert torch.equal(out.flatten(), ours.bias) and (x.grad == 0).all()
    assert torch.equal(out, same(x, torch.ones(1, 1, dtype=torch.bool)))
    assert torch.equal(ours.running_mean, same.running_mean)


@pytest.mark.parametrize("masked", [True, False])
def test_without_momentum_running_statistics_are_means_over_the_batches(masked):
    """As `torch.optim.swa_utils.update_bn` asks for; a batch without a valid entry is none."""
    ours, theirs = pair()
    ours.momentum = theirs.momentum = None
    if masked:
        ours(torch.randn(7, 3, dtype=torch.float64), torch.zeros(7, dtype=torch.bool))
    for _ in range(3):
        x = torch.randn(7, 3, dtype=torch.float64)
        valid = torch.arange(7) < 5 if masked else None
        with untracked(ours):
            ours(x, valid)
        ours(x, valid)
        theirs(x[:5] if masked else x)
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name].double(), value.double(), name=name)


def test_evaluation_ignores_validity():
    ours, _ = pair()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(ours.eval()(x, torch.arange(4) < 2), ours(x))


def test_wrong_channels_are_named():
    for valid in (None, torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"\(4, 2\); it must be \(M, 3"):
            MaskedBatchNorm(3)(torch.zeros(4, 2), valid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_of_lower_precision(dtype):
    exact, _ = pair()
    layer = pair(dtype=torch.float32)[0]
    x, valid = (torch.randn(9, 3, 7) + 2).to(dtype), torch.rand(9, 7) > 0.4
    cotangent = torch.randn_like(x)
    results = []
    for module, y in ((layer, x.clone()), (exact, x.double())):
        leaves = y.requires_grad_(), module.weight, module.bias
        results.append(torch.autograd.grad(module(y, valid), leaves, cotangent.to(y.dtype)))
    for got, wanted in zip(*results):
        assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2, 2)])
def test_second_derivatives(shape):
    layer, _ = pair(channels=2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(shape[0], *shape[2:]) > 0.4

    def run(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x, valid, valid.sum() + 2))

    leaves = x, layer.weight, layer.bias
    with untracked(layer):
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_one_tensor_of_the_size_of_the_input(dtype):
    layer, x = MaskedBatchNorm(3), torch.randn(8, 3, 40, dtype=dtype, requires_grad=True)
    kept = {}

    def keep(saved):
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        layer(x, torch.rand(8, 40) < 0.7)
    one = x.numel() * x.element_size()
    assert one <= sum(kept.values()) < 1.3 * one  # the mask and what belongs to channels besides
