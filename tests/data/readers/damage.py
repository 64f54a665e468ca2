"""Damage to files on disk, and what a reader must then do."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.readers.checks import damages, fuzz
from timo.data import DataError, validate_sample


def assert_survives(folder: Path, open_all, examples: int) -> None:
    """Flip a byte or cut the file, each of `examples` times, in files drawn from `folder`.

    `open_all()` gives datasets. All that may come of it is a DataError, or samples that keep the
    contract with the shape and types that they had; nothing may be written into `folder`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sound = {(i, s["name"]): _form(s) for i, s in _samples(open_all)}

    @settings(fuzz, max_examples=examples)
    @given(st.integers(0, len(files) - 1), damages)
    def survive(number, damage):
        path, (kind, where, mask) = files[number], damage
        before = path.read_bytes()
        at = min(int(where * len(before)), len(before) - 1)
        changed = before[at : at + 1]
        after = before[:at]
        if kind == "flip":
            after += bytes(byte ^ mask for byte in changed) + before[at + 1 :]
        path.write_bytes(after)
        try:
            for i, sample in _samples(open_all):
                # A damaged list may name the samples otherwise; their form stays.
                assert (
                    _form(sample) in sound.values()
                    if (i, sample["name"]) not in sound
                    else (_form(sample) == sound[i, sample["name"]])
                ), (path, damage)
        except DataError as error:
            assert str(folder) in str(error), f"the error names no file: {error}"
        finally:
            path.write_bytes(before)
        assert sorted(path for path in folder.rglob("*") if path.is_file()) == files

    survive()


def _samples(open_all):
    for number, dataset in enumerate(open_all()):
        for index in range(len(dataset)):
            sample = dataset[index]
            validate_sample(sample, dataset.bands)
            yield number, sample


def _form(sample: dict) -> dict:
    return {
        key: (tuple(value.shape), value.dtype) for key, value in sample.items() if key != "name"
    }
