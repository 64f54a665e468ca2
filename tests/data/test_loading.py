import numpy as np
import pytest
import torch

from tests.data.corpora import write_published_layout
from timo.data import LocationLoader, PublishedCorpus, TransformedSeries
from timo.data.transforms import sample_generator
from timo.tasks.data import SeededShuffle


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten locations; the last has a pixel without data."""
    root = write_published_layout(tmp_path_factory.mktemp("c") / "in", locations=10, size=20)
    pixels = np.load(root / "000009.npy")
    pixels[:, :, 9:11, 9:11] = 0
    np.save(root / "000009.npy", pixels)
    return root


def make(corpus, **options):
    return PublishedCorpus(corpus, **{"tile": 16, "dates": 3, "seed": 4} | options)


def equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        same = torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        assert same, key


@pytest.mark.parametrize(
    "workers, options",
    [(0, {}), (1, {}), (2, {"persistent_workers": True}), (4, {"multiprocessing_context": "fork"})],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_those_of_the_data_set(corpus, workers, options):
    data, reference = TransformedSeries(make(corpus), []), make(corpus)
    loader = LocationLoader(data, 4, workers=workers, **options)
    for epoch in range(3):
        data.set_epoch(epoch)
        reference.set_epoch(epoch)
        batches = [{k: v for k, v in batch.items()} for batch in loader]  # more than the ring has
        assert [len(batch["name"]) for batch in batches] == [4, 4, 2]
        for number, batch in enumerate(batches):
            indices = range(4 * number, min(10, 4 * number + 4))
            keys = [sample_generator(0, epoch, index).initial_seed() for index in indices]
            equal(batch, reference.batch(indices) | {"key": torch.tensor(keys)})
    assert len(LocationLoader(data, 4, drop_last=True)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_batches_are_never_overwritten(corpus, workers):
    loader = LocationLoader(make(corpus), 1, workers=workers, persistent_workers=workers > 0)
    kept = [(batch, batch["image"].clone()) for _ in range(3) for batch in loader]
    assert len(kept) == 30
    for batch, image in kept:
        assert torch.equal(batch["image"], image)
    slices = [batch["image"][0, 1] for batch, _ in kept]
    del kept, batch
    copies = [part.clone() for part in slices]  # a view keeps its batch
    for _ in loader:
        pass
    assert all(torch.equal(a, b) for a, b in zip(slices, copies))


@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True)])
def test_memory_is_used_again(corpus, workers, persistent):
    loader = LocationLoader(make(corpus), 1, workers=workers, persistent_workers=persistent)
    ring = loader._ring
    first = ring.memory.data_ptr()
    last = first + ring.memory.nbytes
    for epoch in range(4):
        for number, batch in enumerate(loader):
            assert first <= batch["image"].data_ptr() < last
            if epoch == 1 and number == 3:
                break  # what is on its way when a loop ends early comes back
        del batch
    assert len(ring.free) + len(ring._lent) == len(ring.memory)
    assert persistent or not ring._lent


def test_two_iterations_at_once(corpus):
    loader = LocationLoader(make(corpus), 2, workers=1)
    for a, b in zip(loader, loader, strict=True):
        equal(a, b)


def test_shuffled_and_uint16(tmp_path):
    root = write_published_layout(tmp_path / "in", locations=5, size=8)
    for k in range(5):
        np.save(root / f"00000{k}.npy", np.load(root / f"00000{k}.npy").astype("uint16") * 300)
    data = PublishedCorpus(root)
    sampler = SeededShuffle(5, seed=3)
    batch = next(iter(LocationLoader(data, 5, sampler, workers=1)))
    assert batch["image"].dtype == torch.uint16
    equal(batch, data.batch(list(sampler)))


def test_errors_of_workers_reach_the_loop(corpus, tmp_path):
    root = write_published_layout(tmp_path / "in", locations=3, size=8)
    (root / "000002.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="000002.npy: cannot be read"):
        list(LocationLoader(PublishedCorpus(root), 1, workers=1))
