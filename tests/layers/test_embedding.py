"""Stem and patch merging."""

import torch
from torch import multiprocessing, nn

from tests.models.oracle import assert_same
from tests.tolerance import assert_close
from timo.layers import PatchMerging, Stem


def test_a_tile_with_halo_gives_the_tokens_of_the_whole_frame():
    stem = Stem(3, 8).double().eval()
    frame = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    whole = stem(frame)
    assert whole.shape == (1, 24, 24, 8)
    tile = frame[..., 32 - 3 : 64 + 2, 64 - 3 : 96 + 2]
    tile = nn.functional.pad(tile, (0, 2, 0, 0))  # beyond the frame's right border
    assert_same(stem(tile, halo=True), whole[:, 8:16, 16:24])


def test_the_stem_is_the_sequence_of_its_parts():
    stem = Stem(3, 8).double().train()
    frames = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = nn.functional.conv2d(frames, stem.conv.weight, None, 2, 3)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (
        x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    x = nn.functional.conv2d(x.relu(), stem.proj.weight, stem.proj.bias, 2)
    x = x.movedim(1, -1)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert_same(stem(frames), x)
    assert stem.conv.bias is None


def test_an_exported_merging_takes_maps_of_any_size():
    """Up to sixteen tokens it computes otherwise where it runs as it is."""
    merging = PatchMerging(4, 6).double().eval()
    sides = {i: torch.export.Dim("hw"[i - 1], min=3, max=64) for i in (1, 2)}
    example = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    exported = torch.export.export(merging, (example,), dynamic_shapes=(sides,)).module()
    for h, w in ((8, 6), (3, 4), (20, 17)):
        x = torch.randn(2, h, w, 4, dtype=torch.float64)
        assert_same(exported(x), merging(x))


def test_merging_pads_each_map_with_zeros():
    merging = PatchMerging(4, 6).double()
    x = torch.randn(2, 5, 8, 4, dtype=torch.float64)
    got = merging(x)
    assert got.shape == (2, 3, 4, 6)
    padded = nn.functional.pad(x.movedim(-1, 1), (1, 1, 1, 1))
    corner = (padded[:, None, :, 4:7, 6:9] * merging.proj.weight).sum((2, 3, 4)) + merging.proj.bias
    assert_same(got[:, 2, 3], merging.norm(corner))


def compiled_small_maps(rank: int) -> None:
    torch.set_num_threads(2)

    def run(dtype, compiled=False):
        torch.manual_seed(0)
        chain = nn.Sequential(nn.LayerNorm(32, elementwise_affine=False), PatchMerging(32, 32))
        x, cotangent = torch.randn(12, 2, 2, 32), torch.randn(12, 1, 1, 32)
        chain, x = chain.to(dtype), x.to(dtype).requires_grad_()
        function = torch.compile(chain, fullgraph=True) if compiled else chain
        for _ in range(30 if compiled else 1):
            out = function(x)
            grads = torch.autograd.grad(out, (x, *chain.parameters()), cotangent.to(dtype))
        return out, *grads

    results = run(torch.float32, compiled=True), run(torch.float64), run(torch.float32)
    for got, exact, plain in zip(*results):
        assert_close(got, exact, plain)


def test_small_maps_compiled_by_inductor(tmp_path, monkeypatch):
    """The gradient of overlapping `unfold`s writes outside of its buffers with two threads."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # code of other CPUs may be cached
    multiprocessing.spawn(compiled_small_maps, nprocs=1)  # which that would end
