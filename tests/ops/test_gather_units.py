"""gather_units: every backend against tiles cut one by one in float64."""

import pytest
import torch
import torch.nn.functional as F

import timo
from tests.ops.backends import cases, places, share, skip_reason, slow
from tests.tolerance import assert_close
from timo.ops import dispatch, gather_units
from timo.ops.checks import RAW
from timo.ops.gather_units import BACKWARD, FORWARD

CASES = [  # B, T, C, H, W, unit, halo, K
    (2, 3, 3, 64, 96, 32, (3, 2), 5),
    (1, 1, 1, 32, 32, 32, (3, 2), 1),
    (2, 2, 2, 20, 13, 8, (3, 2), 6),
    (1, 4, 10, 9, 17, 4, (1, 0), 13),
    (2, 2, 2, 16, 16, 8, (0, 0), 8),
    (1, 2, 1, 11, 10, 3, (5, 7), 9),  # the halo reaches beyond the neighbours
    (1, 3, 2, 7, 5, 16, (2, 3), 2),  # the frame is smaller than a unit
]
KINDS = ("none", "date", "pixel")


def draw_ids(B, units, K, generator):
    order = torch.stack([torch.randperm(units, generator=generator) for _ in range(B)])
    return order[:, :K].sort(1).values


def make(case, kind, dtype, seed):
    """Frames in storage of other strides, ids, scale, offset and validity."""
    B, T, C, H, W, unit, _, K = case
    g = torch.Generator().manual_seed(seed)
    units = T * -(-H // unit) * -(-W // unit)
    ids = draw_ids(B, units, K, g)
    x = torch.rand(B, C, T, W, H + 1, generator=g).transpose(3, 4).transpose(1, 2)[:, :, :, 1:]
    if not dtype.is_floating_point:
        x = x * torch.iinfo(dtype).max
    scale, offset = torch.rand(C, generator=g) + 0.5, torch.randn(C, generator=g)
    size = {"none": None, "date": (B, T), "pixel": (B, T, H, W)}[kind]
    valid = None if size is None else torch.rand(size, generator=g) < 0.7
    return x.to(dtype), ids, scale, offset, valid


def spread(valid, frames):
    B, T, _, H, W = frames.shape
    if valid is None:
        return torch.ones(B, T, H, W, dtype=torch.bool)
    return valid if valid.ndim == 4 else valid[:, :, None, None].expand(B, T, H, W)


def loop(frames, ids, scale, offset, valid, unit, halo):
    """Definition: clear the masked image, pad it, cut every tile."""
    B, T, C, H, W = frames.shape
    h, w = -(-H // unit), -(-W // unit)
    usable = spread(valid, frames)
    samples = []
    for b in range(B):
        image = torch.zeros(T, C, H, W, dtype=torch.float64)
        for u in ids[b].tolist():
            t, i, j = u // (h * w), u // w % h, u % w
            box = (slice(i * unit, i * unit + unit), slice(j * unit, j * unit + unit))
            pixels = frames[b, t].to(torch.float64)[:, *box]
            pixels = pixels * scale.double().view(C, 1, 1) + offset.double().view(C, 1, 1)
            inside = torch.zeros(T, C, H, W, dtype=torch.float64)
            inside[t][:, *box] = torch.where(usable[b, t][box], pixels, 0)
            image = image + inside
        image = F.pad(image, (halo[0], w * unit + halo[1], halo[0], h * unit + halo[1]))
        size = halo[0] + unit + halo[1]
        tiles = []
        for u in ids[b].tolist():
            t, i, j = u // (h * w), u // w % h, u % w
            tiles.append(image[t, :, i * unit : i * unit + size, j * unit : j * unit + size])
        samples.append(torch.stack(tiles))
    return torch.stack(samples)


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
@pytest.mark.parametrize("kind", KINDS)
def test_parity(backend, device, dtype, kind, poisoned):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    turn = RAW.index(dtype) + KINDS.index(kind)
    for seed, case in share(CASES, backend, device, turn):
        *_, unit, halo, _ = case
        frames, ids, scale, offset, valid = make(case, kind, dtype, seed)
        exact = loop(frames, ids, scale, offset, valid, unit, halo)
        if dtype.is_floating_point:  # what hides below invalid pixels must not come through
            hidden = ~spread(valid, frames)[:, :, None].expand(frames.shape)
            frames[hidden] = torch.nan
        kept = frames.clone()
        there = [None if x is None else x.to(device) for x in (frames, ids, scale, offset, valid)]
        tiles = gather_units(
            *there[:2], scale=there[2], offset=there[3], valid=there[4], unit=unit, halo=halo,
            backend=backend,
        )  # fmt: skip
        assert tiles.dtype == (dtype if dtype.is_floating_point else torch.float32)
        assert_close(tiles.cpu(), exact, name=f"{case} {kind}")
        dark = gather_units(
            *there[:2], offset=1.0, valid=there[4], unit=unit, halo=halo, backend=backend
        )
        zero = loop(torch.ones(frames.shape), ids, scale * 0, scale * 0 + 1, valid, unit, halo) == 0
        assert torch.equal(dark.cpu() == 0, zero), "hidden pixels are not exactly 0"
        same = frames.view(torch.int16) == kept.view(torch.int16) if dtype.itemsize == 2 else (
            frames.nan_to_num() == kept.nan_to_num() if dtype.is_floating_point else frames == kept
        )  # fmt: skip
        assert same.all(), "the input was written to"


@pytest.mark.parametrize("backend, device, dtype", cases(BACKWARD))
@pytest.mark.parametrize("kind", KINDS)
def test_gradient(backend, device, dtype, kind):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    turn = RAW.index(dtype) + KINDS.index(kind)
    for seed, case in share(CASES, backend, device, turn):
        *_, unit, halo, _ = case
        frames, ids, scale, offset, valid = make(case, kind, dtype, seed)
        leaf = frames.double().requires_grad_()
        exact = loop(leaf, ids, scale, offset, valid, unit, halo)
        cotangent = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
        cotangent = cotangent.to(dtype)
        (expected,) = torch.autograd.grad(exact, leaf, cotangent.double())
        there = [None if x is None else x.to(device) for x in (ids, scale, offset, valid)]
        leaf = frames.to(device).requires_grad_()
        tiles = gather_units(
            leaf, there[0], scale=there[1], offset=there[2], valid=there[3], unit=unit, halo=halo,
            backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(tiles, leaf, cotangent.to(device))
        assert grad.dtype == dtype
        assert_close(grad.cpu(), expected, name=f"{case} {kind}")


def test_convolution_of_tiles_is_the_dense_one():
    """The reason for the halo: 7x7, stride 2, padding 3 on masked frames, then 2x2, stride 2."""
    g = torch.Generator().manual_seed(3)
    B, T, C, H, W, K = 2, 2, 3, 96, 64, 4
    frames = torch.rand(B, T, C, H, W, generator=g, dtype=torch.float64)
    ids = draw_ids(B, T * 6, K, g)
    first = torch.randn(5, C, 7, 7, generator=g, dtype=torch.float64)
    second = torch.randn(4, 5, 2, 2, generator=g, dtype=torch.float64)

    def stem(x, padding):
        return F.conv2d(F.conv2d(x, first, stride=2, padding=padding).relu(), second, stride=2)

    units = torch.zeros(B, T * 6, dtype=torch.bool).scatter(1, ids, True).view(B, T, 1, 3, 2)
    pixels = units.repeat_interleave(32, 3).repeat_interleave(32, 4)
    dense = stem((frames * pixels).flatten(0, 1), 3).view(B, T, 4, 3, 8, 2, 8)
    dense = dense.permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3)  # [B, units, 4, 8, 8]
    expected = dense.gather(1, ids.view(B, K, 1, 1, 1).expand(B, K, 4, 8, 8))
    tiles = stem(gather_units(frames, ids).flatten(0, 1), 0).view(B, K, 4, 8, 8)
    torch.testing.assert_close(tiles, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend, device", places(FORWARD))
def test_every_16_bit_number(backend, device):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    frames = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(1, 1, 1, 256, 256)
    if slow(backend, device):
        frames = frames[..., -32:, :]  # those beyond int16 among them
    units = frames[0].numel() // 1024
    there = frames.to(device), torch.arange(units, device=device)[None]
    tiles = gather_units(*there, halo=(0, 0), backend=backend).cpu()
    back = tiles.view(-1, 8, 32, 32).transpose(1, 2).reshape(-1)
    assert torch.equal(back, torch.arange(65536.0)[-len(back) :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tiles_in_another_dtype(dtype):
    frames, ids, scale, offset, _ = make(CASES[0], "none", torch.uint16, 9)
    tiles = gather_units(frames, ids, scale=scale * 1e-4, offset=offset, dtype=dtype)
    assert tiles.dtype == dtype
    assert_close(tiles, loop(frames, ids, scale * 1e-4, offset, None, 32, (3, 2)))


def test_derivatives():
    frames, ids, scale, offset, valid = make((1, 2, 2, 5, 6, 3, None, 3), "pixel", torch.float64, 4)
    frames.requires_grad_()

    def run(x):
        return gather_units(x, ids, scale=scale, offset=offset, valid=valid, unit=3, halo=(1, 2))

    assert torch.autograd.gradcheck(run, frames)
    assert torch.autograd.gradgradcheck(run, frames)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_opcheck(dtype):
    frames, ids, scale, offset, valid = make(CASES[2], "pixel", dtype, 5)
    if dtype == torch.float32:
        frames.requires_grad_()
    args = (frames, ids, scale, offset, valid, 8, 3, 2, torch.float32, "auto")
    torch.library.opcheck(torch.ops.timo.gather_units, args)
    grad = torch.randn(2, 6, 2, 13, 13, requires_grad=True)
    args = (grad, ids, scale, valid, 2, 20, 13, 8, 3, 2, torch.float32, "auto")
    torch.library.opcheck(torch.ops.timo.gather_units_backward, args)


def test_opcheck_of_the_reference_with_ids_by_columns():
    """Whose strides its tiles must not take over."""
    frames, ids, scale, offset, valid = make(CASES[2], "pixel", torch.float32, 5)
    ids = ids.t().contiguous().t()
    args = (frames, ids, scale, offset, valid, 8, 3, 2, torch.float32, "reference")
    torch.library.opcheck(torch.ops.timo.gather_units, args)


def test_compile():
    torch._dynamo.reset()
    run = torch.compile(gather_units, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (B, T, H, W, K) in enumerate([(5, 2, 64, 96, 4), (3, 4, 70, 40, 6), (4, 3, 33, 65, 7)]):
        case = (B, T, 3, H, W, 32, (3, 2), K)
        frames, ids, scale, offset, valid = make(case, "pixel", torch.float64, 20 + i)
        leaf = frames.clone().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            tiles = run(leaf, ids, scale=scale, offset=offset, valid=valid)
            cotangent = torch.randn(tiles.shape, dtype=torch.float64)
            (grad,) = torch.autograd.grad(tiles, leaf, cotangent)
        leaf = frames.clone().requires_grad_()
        exact = loop(leaf, ids, scale, offset, valid, 32, (3, 2))
        assert_close(tiles.detach(), exact.detach())
        assert_close(grad, *torch.autograd.grad(exact, leaf, cotangent))


class Layer(torch.nn.Module):
    def forward(self, frames, ids):
        return gather_units(frames, ids, scale=0.5, offset=0.25)


def test_export():
    frames, ids, *_ = make((2, 3, 3, 64, 96, 32, (3, 2), 5), "none", torch.float32, 30)
    B, T, K = (torch.export.Dim(name, min=2, max=64) for name in "BTK")
    program = torch.export.export(
        Layer(), (frames, ids), dynamic_shapes=({0: B, 1: T}, {0: B, 1: K})
    )
    frames, ids, *_ = make((4, 2, 3, 64, 96, 32, (3, 2), 7), "none", torch.float32, 31)
    assert torch.equal(program.module()(frames, ids), Layer()(frames, ids))


FRAMES = torch.zeros(2, 3, 2, 64, 64)
IDS = torch.tensor([[0, 5], [3, 11]])


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"frames": FRAMES[0]}, ValueError, r"frames has shape .* must be \(B, T, C, H, W\)"),
        ({"frames": FRAMES.int()}, TypeError, "frames is int32; .* uint8, uint16"),
        ({"visible_ids": IDS.int()}, TypeError, "visible_ids is int32"),
        ({"visible_ids": IDS[:1]}, ValueError, r"visible_ids has shape \(1, 2\)"),
        ({"visible_ids": IDS[:, :0]}, ValueError, "K is 0"),
        ({"visible_ids": IDS + 1}, ValueError, r"visible_ids holds ids from 1 to 12; .* \[0, 12\)"),
        ({"visible_ids": IDS - 1}, ValueError, "visible_ids holds ids from -1 to 10"),
        ({"visible_ids": IDS.flip(1)}, ValueError, "each row must ascend"),
        ({"visible_ids": IDS[:, [0, 0]]}, ValueError, "without repetition"),
        ({"scale": torch.ones(3)}, ValueError, r"scale has shape \(3,\); it must be \(2,\)"),
        ({"scale": torch.ones(1, 2)}, ValueError, r"scale has shape \(1, 2\)"),
        ({"offset": torch.ones(2).int()}, TypeError, "offset is int32"),
        ({"offset": [1.0, 2.0]}, TypeError, "offset is list"),
        ({"scale": torch.ones(2, requires_grad=True)}, ValueError, "scale requires a gradient"),
        ({"scale": torch.ones(2, device="meta")}, ValueError, "scale is on meta"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid is float32"),
        ({"valid": torch.ones(2, 3, 2, 2).bool()}, ValueError, r"valid has shape \(2, 3, 2, 2\)"),
        ({"unit": 0}, ValueError, "unit is 0"),
        ({"halo": (3,)}, ValueError, r"halo is \(3,\)"),
        ({"halo": (-1, 2)}, ValueError, r"halo is \(-1, 2\)"),
        ({"dtype": torch.uint8}, TypeError, "dtype is uint8"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        gather_units(**{"frames": FRAMES, "visible_ids": IDS, **changed})


def test_explain():
    choice = timo.ops.explain(gather_units, FRAMES, IDS)
    assert choice.backend in FORWARD.backends
    assert set(choice.reasons) == set(dispatch.BACKENDS) - {choice.backend}
