"""masked_pixel_loss: every backend against a loop over units in float64."""

import pytest
import torch

import timo
from tests.ops.backends import cases, places, share, skip_reason, slow
from tests.ops.test_gather_units import draw_ids, spread
from tests.ops.test_gather_units import make as make_frames
from tests.tolerance import assert_close
from timo.ops import dispatch, masked_pixel_loss
from timo.ops.checks import FLOATS, RAW
from timo.ops.gather_units import NARROW
from timo.ops.masked_pixel_loss import FORWARD

CASES = [  # B, T, C, H, W, unit, -, M
    (2, 3, 3, 64, 96, 32, None, 9),
    (2, 2, 2, 20, 13, 8, None, 7),
    (1, 4, 10, 9, 17, 4, None, 13),
    (1, 3, 2, 7, 5, 16, None, 2),
    (1, 1, 1, 2, 2, 1, None, 1),
]
KINDS = ("none", "date", "pixel")
NORMS = ("none", "patch", "batch")


def loop(pred, frames, ids, scale, offset, valid, unit, norm):
    """Definition, unit by unit: lists of the values that count."""
    B, T, C, H, W = frames.shape
    h, w = -(-H // unit), -(-W // unit)
    usable = spread(valid, frames)
    targets, guesses = [], []
    for b in range(B):
        for m, u in enumerate(ids[b].tolist()):
            t, i, j = u // (h * w), u // w % h, u % w
            box = (slice(i * unit, i * unit + unit), slice(j * unit, j * unit + unit))
            counts = usable[b, t][box]
            guess = pred[b, m].view(C, unit, unit)[:, : counts.shape[0], : counts.shape[1]]
            y = frames[b, t].to(torch.float64)[:, *box]
            y = y * scale.double().view(C, 1, 1) + offset.double().view(C, 1, 1)
            targets.append(y[:, counts].flatten())
            guesses.append(guess[:, counts].flatten())
    if norm == "batch":
        targets, guesses = [torch.cat(targets)], [torch.cat(guesses)]
    error, count = pred.new_zeros(()), 0
    for y, guess in zip(targets, guesses):
        if norm != "none" and len(y):
            variance = y.var() if len(y) > 1 else 0.0
            y = (y - y.mean()) / (variance + 1e-6) ** 0.5
        error = error + (guess - y).square().sum()
        count += len(y)
    return error / max(count, 1)


def make(case, kind, dtype, frames_dtype, seed):
    frames, ids, scale, offset, valid = make_frames(case, kind, frames_dtype, seed)
    _, _, C, _, _, unit, _, M = case
    if not frames_dtype.is_floating_point:
        scale = scale / torch.iinfo(frames_dtype).max
    g = torch.Generator().manual_seed(seed + 100)
    pred = torch.randn(len(ids), C * unit**2, M, generator=g).to(dtype).transpose(1, 2)
    return pred, frames, ids, scale, offset, valid


def check(got, exact, name=""):
    """Parity; float64 sums of many pixels, in another order, must be exact to 1e-13."""
    if got.dtype == torch.float64:
        error = (got - exact).abs().max().item()
        assert error <= 1e-13 * exact.abs().max().item(), f"{name}: error {error:.1e}"
    else:
        assert_close(got, exact, name=name)


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(backend, device, dtype, kind, norm, poisoned):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    turn = KINDS.index(kind) + NORMS.index(norm) + FLOATS.index(dtype)
    pixels = RAW if backend == dispatch.REFERENCE else NARROW
    for seed, case in share(CASES, backend, device, turn):
        frames_dtypes = pixels if seed == 1 else (torch.uint16, torch.float32)
        if slow(backend, device):
            frames_dtypes = (pixels[(turn + KINDS.index(kind)) % len(pixels)],)
        for frames_dtype in frames_dtypes:
            unit = case[5]
            args = make(case, kind, dtype, frames_dtype, seed)
            pred, frames, ids, scale, offset, valid = args
            leaf = pred.double().requires_grad_()
            exact = loop(leaf, *args[1:], unit, norm)
            exact_grad = torch.zeros_like(leaf)
            if exact.requires_grad:
                (exact_grad,) = torch.autograd.grad(exact, leaf, torch.tensor(0.75).double())
            if frames_dtype.is_floating_point:
                hidden = ~spread(valid, frames)[:, :, None].expand(frames.shape)
                frames[hidden] = torch.nan
            there = [None if x is None else x.to(device) for x in args]
            leaf = there[0].requires_grad_()
            kept = leaf.detach().clone()
            loss = masked_pixel_loss(
                leaf, *there[1:3], scale=there[3], offset=there[4], valid=there[5], unit=unit,
                norm=norm, backend=backend,
            )  # fmt: skip
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.75))
            assert grad.dtype == dtype
            name = f"{case} {kind} {norm} {frames_dtype}"
            check(loss.detach().cpu(), exact.detach(), name)
            check(grad.cpu(), exact_grad, f"gradient {name}")
            assert torch.equal(leaf.detach(), kept), "the input was written to"


@pytest.mark.parametrize("backend, device", places(FORWARD))
@pytest.mark.parametrize("norm", NORMS)
def test_nothing_to_score(backend, device, norm):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    pred, frames, ids, *_ = make(CASES[1], "none", torch.float32, torch.float32, 3)
    frames.fill_(torch.nan)
    pred.fill_(torch.nan)
    valid = torch.zeros(2, 2, dtype=torch.bool)
    pred, frames, ids, valid = (x.to(device) for x in (pred, frames, ids, valid))
    pred.requires_grad_()
    loss = masked_pixel_loss(pred, frames, ids, valid=valid, unit=8, norm=norm, backend=backend)
    (grad,) = torch.autograd.grad(loss, pred)
    assert loss.item() == 0 and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend, device", places(FORWARD))
@pytest.mark.parametrize("norm", ["patch", "batch"])
def test_one_value_has_no_variance(backend, device, norm):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    frames = torch.full((1, 1, 1, 4, 4), torch.nan, device=device)
    frames[0, 0, 0, 1, 2] = 5.0
    pred = torch.full((1, 1, 16), 3.0, requires_grad=True, device=device)
    valid, ids = frames[:, :, 0] == 5, torch.zeros(1, 1, dtype=torch.int64, device=device)
    loss = masked_pixel_loss(pred, frames, ids, valid=valid, unit=4, norm=norm, backend=backend)
    (grad,) = torch.autograd.grad(loss, pred)
    assert loss.item() == 9.0  # the target is (5 - 5) / sqrt(0 + 1e-6)
    assert grad.nonzero().tolist() == [[0, 0, 6]] and grad[0, 0, 6] == 6.0


@pytest.mark.parametrize("backend, device", places(FORWARD))
def test_statistics_of_large_numbers(backend, device):
    """Digital numbers far from zero with little spread: variance by two passes."""
    if why := skip_reason(backend, device):
        pytest.skip(why)
    g = torch.Generator().manual_seed(8)
    frames = (torch.randn(1, 2, 2, 32, 32, generator=g) * 3 + 20000).round().to(torch.uint16)
    pred = torch.randn(1, 2, 2048, generator=g)
    ids = torch.tensor([[0, 1]])
    one, zero = torch.ones(2), torch.zeros(2)
    for norm in ("patch", "batch"):
        exact = loop(pred.double(), frames, ids, one, zero, None, 32, norm)
        there = [x.to(device) for x in (pred, frames, ids)]
        loss = masked_pixel_loss(*there, norm=norm, backend=backend)
        assert abs(loss - exact) < 1e-3 * exact, norm


@pytest.mark.parametrize("norm", NORMS)
def test_derivatives(norm):
    pred, frames, ids, scale, offset, valid = make(
        (1, 2, 2, 5, 6, 2, None, 3), "pixel", torch.float64, torch.float32, 4
    )
    pred.requires_grad_()

    def run(x):
        return masked_pixel_loss(
            x, frames, ids, scale=scale, offset=offset, valid=valid, unit=2, norm=norm
        ).square()

    assert torch.autograd.gradcheck(run, pred)
    assert torch.autograd.gradgradcheck(run, pred)
    (first,) = torch.autograd.grad(run(pred), pred, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives of masked_pixel_loss"):
        torch.autograd.grad(first, pred, torch.ones_like(first), create_graph=True)


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm):
    pred, frames, ids, scale, offset, valid = make(
        CASES[1], "pixel", torch.float32, torch.uint16, 5
    )
    tensors = (pred.requires_grad_(), frames, ids, scale, offset, valid)
    op = torch.ops.timo.masked_pixel_loss
    torch.library.opcheck(op, (*tensors, 8, norm, "auto"))
    saved = op(*tensors, 8, norm, "auto")[1:]
    grad = torch.tensor(0.3, requires_grad=True)
    args = (grad, *tensors, 8, *saved, "auto")
    torch.library.opcheck(torch.ops.timo.masked_pixel_loss_backward, args)


def test_compile():
    torch._dynamo.reset()
    run = torch.compile(masked_pixel_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (B, T, H, W, M) in enumerate([(5, 2, 64, 96, 4), (3, 4, 70, 40, 6), (4, 3, 33, 65, 7)]):
        case = (B, T, 3, H, W, 32, None, M)
        args = make(case, "pixel", torch.float64, torch.float32, 20 + i)
        pred, frames, ids, scale, offset, valid = args
        leaf = pred.requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            loss = run(leaf, frames, ids, scale=scale, offset=offset, valid=valid, norm="patch")
            (grad,) = torch.autograd.grad(loss, leaf)
        exact = loop(leaf, *args[1:], 32, "patch")
        check(loss.detach(), exact.detach())
        check(grad, *torch.autograd.grad(exact, leaf))


class Layer(torch.nn.Module):
    def forward(self, pred, frames, ids):
        return masked_pixel_loss(pred, frames, ids, unit=8, norm="batch")


def test_export():
    pred, frames, ids, *_ = make(CASES[1], "none", torch.float32, torch.float32, 30)
    B, M = (torch.export.Dim(name, min=2, max=64) for name in "BM")
    dynamic = ({0: B, 1: M}, {0: B}, {0: B, 1: M})
    program = torch.export.export(Layer(), (pred, frames, ids), dynamic_shapes=dynamic)
    case = (3, *CASES[1][1:-1], 5)
    pred, frames, ids, *_ = make(case, "none", torch.float32, torch.float32, 31)
    assert torch.equal(program.module()(pred, frames, ids), Layer()(pred, frames, ids))


PRED = torch.zeros(2, 2, 2 * 32 * 32)
FRAMES = torch.zeros(2, 3, 2, 64, 64)
IDS = draw_ids(2, 12, 2, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"pred": PRED[0]}, ValueError, "pred has shape"),
        ({"pred": PRED[..., :-1]}, ValueError, r"pred has shape .* must be \(2, 2, 2048\)"),
        ({"pred": PRED.int()}, TypeError, "pred is int32"),
        ({"pred": PRED.to("meta")}, ValueError, "pred is on meta but frames is on cpu"),
        ({"frames": FRAMES[0]}, ValueError, r"frames has shape .* must be \(B, T, C, H, W\)"),
        ({"frames": FRAMES.int()}, TypeError, "frames is int32; .* uint8, uint16"),
        ({"masked_ids": IDS.int()}, TypeError, "masked_ids is int32"),
        ({"masked_ids": IDS + 12}, ValueError, r"masked_ids holds ids .* \[0, 12\)"),
        ({"masked_ids": IDS.flip(1)}, ValueError, "must ascend"),
        ({"scale": torch.ones(3)}, ValueError, r"scale has shape \(3,\); it must be \(2,\)"),
        ({"offset": torch.ones(2, requires_grad=True)}, ValueError, "offset requires a gradient"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid is float32"),
        ({"valid": torch.ones(2, 3, 2, 2).bool()}, ValueError, r"valid has shape \(2, 3, 2, 2\)"),
        ({"unit": 0}, ValueError, "unit is 0"),
        ({"norm": "image"}, ValueError, "norm is 'image'; it must be one of none, patch, batch"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        masked_pixel_loss(**{"pred": PRED, "frames": FRAMES, "masked_ids": IDS, **changed})


def test_explain():
    choice = timo.ops.explain(masked_pixel_loss, PRED, FRAMES, IDS)
    assert choice.backend in FORWARD.backends
    assert set(choice.reasons) == set(dispatch.BACKENDS) - {choice.backend}
