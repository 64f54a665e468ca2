"""scatter_units: every backend against a loop over places."""

import pytest
import torch

import timo
from tests.ops.backends import cases, places, skip_reason
from tests.ops.test_gather_units import draw_ids
from tests.tolerance import assert_close
from timo.ops import dispatch, scatter_units
from timo.ops.scatter_units import FORWARD

SHAPES = [(1, 1, 1, 1), (2, 5, 12, 8), (3, 12, 12, 4), (2, 1, 147, 33), (4, 36, 147, 16)]  # B K L D


def make(shape, dtype, seed):
    """Tokens, ids, mask token, position and a cotangent; two of them in other strides."""
    B, K, L, D = shape
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(K, B, 2 * D, generator=g).to(dtype)[..., ::2].transpose(0, 1)
    ids = draw_ids(B, L, K, g)
    mask_token, position = torch.randn(D, generator=g), torch.randn(D, L, generator=g).T
    cotangent = torch.randn(L, B, D, generator=g).to(dtype).transpose(0, 1)
    return tokens, ids, mask_token.to(dtype), position.to(dtype), cotangent


def loop(tokens, ids, mask_token, position):
    places = [{u: k for k, u in enumerate(row)} for row in ids.tolist()]
    rows = [
        [tokens[b, place[u]] if u in place else mask_token for u in range(len(position))]
        for b, place in enumerate(places)
    ]
    # The mask token keeps its (zero) gradient where every unit is visible.
    return torch.stack([torch.stack(row) + position for row in rows]) + 0 * mask_token


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
def test_parity(backend, device, dtype, poisoned):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    for seed, shape in enumerate(SHAPES):
        tokens, ids, mask_token, position, cotangent = make(shape, dtype, seed)
        if dtype.itemsize == 2 and seed % 2:  # parameters stay float32 under autocast
            mask_token, position = mask_token.float(), position.float()
        inputs = tokens, mask_token, position
        wide = [x.double().requires_grad_() for x in inputs]
        exact = loop(wide[0], ids, *wide[1:])
        expected = exact.detach(), *torch.autograd.grad(exact, wide, cotangent.double())
        there = [x.to(device).requires_grad_() for x in inputs]
        kept = [x.detach().clone() for x in (*there, cotangent)]
        out = scatter_units(there[0], ids.to(device), *there[1:], backend=backend)
        got = out.detach(), *torch.autograd.grad(out, there, cotangent.to(device))
        assert [x.dtype for x in got] == [dtype, *(x.dtype for x in inputs)]
        for name, x, y in zip(("out", "tokens", "mask_token", "position"), got, expected):
            assert_close(x.cpu(), y, name=f"{name} {shape}")
        for x, y in zip((*there, cotangent), kept):
            assert torch.equal(x.detach(), y), "an input was written to"


@pytest.mark.parametrize("backend, device", places(FORWARD))
def test_mask_token_gradient_is_summed_in_float32(backend, device):
    """In float16 a running sum of ones stops at 2048."""
    if why := skip_reason(backend, device):
        pytest.skip(why)
    B, K, L = 2, 3, 1200
    _, ids, *_ = make((B, K, L, 1), torch.float16, 1)
    tokens, mask_token, position = (
        torch.zeros(*shape, dtype=torch.float16, device=device)
        for shape in ((B, K, 2), (2,), (L, 2))
    )
    mask_token.requires_grad_()
    out = scatter_units(tokens, ids.to(device), mask_token, position, backend=backend)
    (grad,) = torch.autograd.grad(out, mask_token, torch.ones_like(out))
    assert grad.tolist() == [float(torch.tensor(B * (L - K)).half())] * 2


def test_derivatives():
    tokens, ids, mask_token, position, _ = make((2, 3, 6, 2), torch.float64, 4)
    leaves = [x.requires_grad_() for x in (tokens, mask_token, position)]

    def run(tokens, mask_token, position):
        return scatter_units(tokens, ids, mask_token, position).square()

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_fixed_position_gets_no_gradient():
    tokens, ids, mask_token, position, cotangent = make((2, 3, 6, 2), torch.float32, 5)
    out = scatter_units(tokens.requires_grad_(), ids, mask_token, position)
    (grad,) = torch.autograd.grad(out, tokens, cotangent)
    assert torch.equal(grad, cotangent.gather(1, ids[..., None].expand(2, 3, 2)))


def test_position_gradient_is_summed_in_float32():
    """Not in its own dtype, in which neither number is held."""
    tokens, ids, mask_token, position, cotangent = make((2, 3, 6, 2), torch.float32, 5)
    position = position.half().requires_grad_()
    cotangent[0], cotangent[1] = 1e5, 1 - 1e5
    out = scatter_units(tokens, ids, mask_token, position)
    (grad,) = torch.autograd.grad(out, position, cotangent)
    assert torch.equal(grad, torch.ones_like(position))
    cotangent = cotangent.double()
    cotangent[0], cotangent[1] = 2.0**30, 0.5 - 2.0**30  # sums of float64 tokens are float64
    position = position.detach().float().requires_grad_()
    out = scatter_units(tokens.double(), ids, mask_token, position)
    (grad,) = torch.autograd.grad(out, position, cotangent)
    assert torch.equal(grad, torch.full_like(position, 0.5))


def test_opcheck():
    tokens, ids, mask_token, position, cotangent = make((2, 3, 6, 4), torch.float32, 6)
    leaves = [x.requires_grad_() for x in (mask_token, position)]
    args = (tokens.requires_grad_(), ids, *leaves, "auto")
    torch.library.opcheck(torch.ops.timo.scatter_units, args)
    args = (cotangent.requires_grad_(), ids, torch.float32, "auto")
    torch.library.opcheck(torch.ops.timo.scatter_units_backward, args)


def test_compile():
    torch._dynamo.reset()
    run = torch.compile(scatter_units, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, shape in enumerate([(2, 5, 12, 8), (4, 3, 20, 8), (3, 7, 9, 8)]):
        tokens, ids, mask_token, position, cotangent = make(shape, torch.float64, 20 + i)
        leaves = [x.contiguous().requires_grad_() for x in (tokens, mask_token, position)]
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            out = run(leaves[0], ids, *leaves[1:])
            grads = torch.autograd.grad(out, leaves, cotangent)
        exact = loop(leaves[0], ids, *leaves[1:])
        expected = torch.autograd.grad(exact, leaves, cotangent)
        for x, y in zip((out.detach(), *grads), (exact.detach(), *expected)):
            assert_close(x, y)


class Layer(torch.nn.Module):
    def forward(self, tokens, ids, mask_token, position):
        return scatter_units(tokens, ids, mask_token, position)


def test_export():
    *inputs, _ = make((2, 5, 12, 8), torch.float32, 30)
    B, K, L = (torch.export.Dim(name, min=2, max=64) for name in "BKL")
    dynamic = ({0: B, 1: K}, {0: B, 1: K}, None, {0: L})
    program = torch.export.export(Layer(), tuple(inputs), dynamic_shapes=dynamic)
    *inputs, _ = make((3, 4, 20, 8), torch.float32, 31)
    assert torch.equal(program.module()(*inputs), loop(*inputs))


@pytest.mark.parametrize(
    "index, change, error, message",
    [
        (0, lambda x: x[0], ValueError, r"tokens has shape .* must be \(B, K, D\)"),
        (0, lambda x: x.long(), TypeError, "tokens is int64"),
        (1, lambda x: x[:, :2], ValueError, r"visible_ids has shape \(2, 2\); it must be \(2, 3\)"),
        (1, lambda x: x.float(), TypeError, "visible_ids is float32"),
        (1, lambda x: x + 6, ValueError, r"visible_ids holds ids .* within \[0, 6\)"),
        (1, lambda x: x.flip(1), ValueError, "must ascend"),
        (2, lambda x: x[None], ValueError, r"mask_token has shape \(1, 2\); it must be \(D,\)"),
        (2, lambda x: x[:1], ValueError, r"mask_token has shape \(1,\); it must be \(2,\)"),
        (2, lambda x: x.to("meta"), ValueError, "mask_token is on meta"),
        (3, lambda x: x[:, :1], ValueError, r"position has shape \(6, 1\); it must be \(6, 2\)"),
        (3, lambda x: x.int(), TypeError, "position is int32"),
    ],
)
def test_errors(index, change, error, message):
    *inputs, _ = make((2, 3, 6, 2), torch.float32, 40)
    inputs[index] = change(inputs[index])
    with pytest.raises(error, match=message):
        scatter_units(*inputs)


def test_explain():
    *inputs, _ = make((2, 3, 6, 2), torch.float32, 41)
    choice = timo.ops.explain(scatter_units, *inputs)
    assert choice.backend in FORWARD.backends
    assert set(choice.reasons) == set(dispatch.BACKENDS) - {choice.backend}
