"""Masking: the draw against its definition in plain integers, and what each strategy promises."""

import math

import pytest
import torch

from timo.models.masking import STRATEGIES, draw_units, usable_units, visible_count, words

GRIDS = [(3, 7, 7), (1, 4, 5), (10, 2, 3), (4, 1, 1)]


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def seen(ids: torch.Tensor, grid) -> torch.Tensor:
    """(B, K) ids -> (B, T, rows, columns) bool."""
    out = torch.zeros(len(ids), math.prod(grid), dtype=torch.bool)
    return out.scatter(1, ids, True).unflatten(1, grid)


def mix(x: int) -> int:
    x = (x + 0x9E3779B9) % 2**32
    x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
    x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def word(key: int, purpose: int, index: int) -> int:
    return mix(mix(mix(key >> 32) ^ (key % 2**32)) ^ mix(purpose * 2**26 + index))


def order(key: int, grid, strategy: str) -> list[int]:
    """Units of a sample, those to keep first, from the words alone."""
    T, rows, columns = grid
    units = [(t, i, j) for t in range(T) for i in range(rows) for j in range(columns)]
    last = {u: word(key, 0, n) >> 2 for n, u in enumerate(units)}
    if strategy == "mixture":
        strategy = STRATEGIES[word(key, 6, 0) % 4]
    if strategy == "random":
        first = {u: word(key, 0, n) for n, u in enumerate(units)}
    elif strategy == "date":
        first = {u: word(key, 1, u[0]) for u in units}
    elif strategy == "location":
        first = {u: word(key, 2, u[1] * columns + u[2]) for u in units}
    else:
        height, width = (rows + 1) // 2, (columns + 1) // 2
        spans = rows + height - 1, columns + width - 1
        missed = 1 - height * width / (spans[0] * spans[1])
        share = 1 / (4 * rows * columns)
        count = math.ceil(math.log(share) / math.log(missed)) if missed else 1
        hidden_first = dict.fromkeys(units, 2**32 - 1)
        for n in range(T * count):
            top = word(key, 4, n) % spans[0] - height + 1
            left = word(key, 5, n) % spans[1] - width + 1
            for i in range(top, top + height):
                for j in range(left, left + width):
                    u = (n // count, i, j)
                    if u in hidden_first:
                        hidden_first[u] = min(hidden_first[u], word(key, 3, n))
        first = {u: 2**32 - 1 - hidden_first[u] for u in units}
    return sorted(range(len(units)), key=lambda n: (first[units[n]], last[units[n]], n))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_the_definition(strategy, grid):
    units, key = math.prod(grid), torch.cat([keys(5), torch.tensor([0, 2**63 - 1])])
    usable = torch.rand(len(key), units, generator=torch.Generator().manual_seed(1)) > 0.3
    usable[:, :2] = True
    for mask, keep in ((None, visible_count(units, 0.75)), (usable, int(usable.sum(1).min()))):
        ids = draw_units(key, grid, keep, strategy, mask)
        for b, k in enumerate(key.tolist()):
            drawn = [n for n in order(k, grid, strategy) if mask is None or mask[b, n]]
            assert ids[b].tolist() == sorted(drawn[:keep])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clouds_elsewhere_in_the_batch_change_how_many_stay_not_their_order(strategy):
    """Few units of one sample are usable: the others show the first of what they would have."""
    grid, key = (3, 4, 5), keys(4)
    usable = torch.rand(4, 60, generator=torch.Generator().manual_seed(1)) > 0.3
    usable[3, 30:] = False
    shown = {}
    for samples in (slice(0, 3), slice(0, 4)):
        keep = visible_count(int(usable[samples].sum(1).min()), 0.5)
        shown[keep] = draw_units(key[samples], grid, keep, strategy, usable[samples])[:3].tolist()
    assert len(shown) == 2
    few, many = (shown[keep] for keep in sorted(shown))
    assert all(set(a) < set(b) for a, b in zip(few, many))


def test_one_graph_serves_every_number_of_units():
    """Clouds change how many stay, which is not compiled for each value."""
    torch.compiler.reset()
    graphs = []
    run = torch.compile(
        draw_units,
        fullgraph=True,
        backend=lambda graph, _: (graphs.append(graph), graph.forward)[1],
    )
    key = keys(3)
    for keep in range(5, 15):
        got = run(key, (6, 2, 6), keep, "mixture")
        assert torch.equal(got, draw_units(key, (6, 2, 6), keep, "mixture"))
    assert len(graphs) == 2


def test_words_never_change():
    """A run can be repeated with a later version only while these stay as they are."""
    key = torch.tensor([0, 1, 2**63 - 1])
    expected = [[555055639, 3198446699], [362586749, 3337003859], [3533787532, 97517494]]
    assert words(key, 3, 2).tolist() == expected


def test_words_are_uniform_and_unrelated():
    key = torch.arange(4096)  # neighbouring keys, the hardest case
    bits = (words(key, 0, 64)[..., None] >> torch.arange(32)) & 1
    for dims in ((0,), (1,), (2,)):
        share = bits.double().mean(dims)
        n = bits.shape[dims[0]]
        assert (share - 0.5).abs().max() < 6 * 0.5 / math.sqrt(n)
    flipped = words(key ^ 1, 0, 64) ^ words(key, 0, 64)
    changed = ((flipped[..., None] >> torch.arange(32)) & 1).double().mean((0, 1))
    assert (changed - 0.5).abs().max() < 0.01


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_unit_is_as_likely(strategy):
    grid, count = (3, 4, 5), 8000
    ids = draw_units(keys(count), grid, 15, strategy)
    assert ids.shape == (count, 15) and (ids.diff() > 0).all()
    share = seen(ids, grid).double().mean(0)
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / count)


def test_dates_are_hidden_whole():
    for keep in (7, 15, 50, 98):
        kept = seen(draw_units(keys(50), (5, 4, 5), keep, "date"), (5, 4, 5)).sum((2, 3))
        assert ((kept == 20).sum(1) == keep // 20).all()
        assert ((kept > 0) & (kept < 20)).sum(1).le(1).all()


def test_locations_are_hidden_at_all_dates():
    for keep in (7, 15, 50, 98):
        kept = seen(draw_units(keys(50), (5, 4, 5), keep, "location"), (5, 4, 5)).sum(1)
        assert ((kept == 5).sum((1, 2)) == keep // 5).all()
        assert ((kept > 0) & (kept < 5)).sum((1, 2)).le(1).all()


def test_blocks_are_rectangles():
    """Where no more is hidden than the first block covers, it is a rectangle of one frame."""
    whole = 0
    for key in keys(200):
        hidden = ~seen(draw_units(key[None], (2, 6, 8), 96 - 12, "block"), (2, 6, 8))[0]
        low, high = hidden.nonzero().aminmax(dim=0)  # of date, row and column
        whole += (high - low + 1).tolist() == [1, 3, 4]
    assert whole > 30  # a block in 4.4 lies wholly inside the frame
    # Hidden units lie together: fewer neighbours differ than in a random mask.
    edges = {}
    for strategy in ("random", "block"):
        kept = seen(draw_units(keys(100), (3, 8, 8), 48, strategy), (3, 8, 8))
        edges[strategy] = (kept[..., 1:] != kept[..., :-1]).double().mean()
    assert edges["block"] < 0.6 * edges["random"]


def test_a_mixture_takes_every_strategy():
    key, grid = keys(40), (3, 4, 4)
    ids = draw_units(key, grid, 12, "mixture")
    own = {s: draw_units(key, grid, 12, s) for s in STRATEGIES[:4]}
    chosen = [[s for s in own if torch.equal(own[s][b], ids[b])] for b in range(40)]
    assert all(len(c) == 1 for c in chosen)
    assert {c[0] for c in chosen} == set(own)


def test_units_without_a_valid_pixel_are_not_usable():
    frames, valid = torch.zeros(1, 2, 3, 64, 40), torch.ones(1, 2, 64, 40, dtype=torch.bool)
    assert usable_units(frames, None) is None
    assert usable_units(frames, valid).tolist() == [[True] * 8]
    valid[0, 0, :32, 32:] = valid[0, 1, 32:, :32] = False
    valid[0, 1, 40, 3] = True
    assert usable_units(frames, valid).tolist() == [[True, False] + [True] * 6]
    dates = usable_units(frames, torch.tensor([[False, True]]))
    assert dates.tolist() == [[False] * 4 + [True] * 4]


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="masking is 'tube'.*random, date, location, block, mix"):
        draw_units(keys(1), (1, 2, 2), 1, "tube")
    for ratio in (0, 1.0, -0.5, "0.75"):
        with pytest.raises(ValueError, match="mask_ratio is .*between 0 and 1"):
            visible_count(4, ratio)
