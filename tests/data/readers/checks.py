"""What every reader must withstand: damaged files, listings in any order, any number of workers."""

import os
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from timo.data import DataError, validate_sample

fuzz = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# A file as a broken disk or a broken download leaves it: (kind, where, what) in shares of its size.
damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    # Headers lie at the start, the directory of a TIFF may lie at the end.
    st.tuples(st.just("flip"), st.floats(0, 0.1), st.integers(1, 255)),
)


def read_damaged(path: Path, damage: tuple, open_dataset, index: int = 0) -> None:
    """Damage `path`, read sample `index` of `open_dataset()`, and mend the file again.

    The reader must raise DataError, or give a sample of the contract, of the shape and dtype that
    the sound file gives.
    """
    sound = open_dataset()[index]
    content = path.read_bytes()
    kind, where, what = damage
    at = min(int(where * len(content)), len(content) - 1)
    broken = bytearray(content[:at] if kind == "cut" else content)
    if kind == "flip":
        broken[at] ^= what
    try:
        path.write_bytes(broken)
        dataset = open_dataset()
        sample = dataset[index]
    except DataError as error:
        assert str(error)
        return
    finally:
        path.write_bytes(content)
    validate_sample(sample, dataset.bands)
    for key in ("image", "valid", "mask"):
        if key in sound:
            assert sample[key].dtype == sound[key].dtype
            assert sample[key].shape[-2:] == sound[key].shape[-2:]


def same_samples(first, second) -> None:
    """Assert that two sequences of samples are equal, key by key."""
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key


def same_lengths(dataset) -> None:
    """Assert that the data set knows the number of dates of every sample."""
    assert dataset.lengths() == [len(dataset[i]["dates"]) for i in range(len(dataset))]


def same_with_workers(dataset) -> None:
    """Assert that 0, 1 and 4 workers give the same samples in the same order."""
    plain = [dataset[i] for i in range(len(dataset))]
    same_lengths(dataset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        for workers in (0, 1, 4):
            loader = DataLoader(dataset, batch_size=None, num_workers=workers)
            same_samples(plain, list(loader))


def shuffle_listings(monkeypatch) -> None:
    """Make the operating system list folders backwards."""
    listdir, scandir = os.listdir, os.scandir

    class Backwards:
        def __init__(self, *arguments):
            with scandir(*arguments) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __iter__(self):
            return iter(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def close(self):
            pass

    monkeypatch.setattr(os, "listdir", lambda *a: sorted(listdir(*a), reverse=True))
    monkeypatch.setattr(os, "scandir", Backwards)
