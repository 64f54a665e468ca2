"""Batches from many locations at the rate of a copy: pixels go from file to batch in one step."""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from timo.data.locations import LocationSeries
from timo.data.transforms import TransformedSeries


class LocationLoader(DataLoader):
    """DataLoader of a `LocationSeries` whose workers write batches where the consumer reads them.

    Batches lie in a ring of shared memory that is made once: fresh shared memory for every batch
    would cost more than the copy itself. A place in the ring is written again only when no tensor
    refers to it any more; where a consumer keeps more batches than the ring holds, further ones
    get memory of their own. The ring takes `prefetch_factor` * workers + 2 batches.

    Args:
        dataset: the locations, as they are or without transforms.
        batch_size: samples in a batch.
        sampler: order of indices; ascending if None.
        workers: processes; 0 loads in this one.
        drop_last: leave out a last batch that is not full.
        pin: give out pinned memory, for copies to a GPU.
        options: of DataLoader, as persistent_workers or multiprocessing_context.
    """

    def __init__(
        self,
        dataset: LocationSeries | TransformedSeries,
        batch_size: int,
        sampler: Sampler | Iterable | None = None,
        workers: int = 0,
        drop_last: bool = False,
        pin: bool = False,
        **options: Any,
    ):
        if sampler is None:
            sampler = SequentialSampler(dataset)
        batches = options.get("prefetch_factor") or 2
        self._ring = _Ring(dataset, batch_size, workers * batches + 2)
        self._pin = pin
        self._reused = options.get("persistent_workers", False)
        # Sampler and batch size go to DataLoader as usual, so that Lightning can share the samples
        # among processes; only what workers are sent is replaced.
        super().__init__(
            _IntoRing(dataset, self._ring.memory),
            batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=workers,
            collate_fn=_as_it_is,
            **options,
        )
        assert isinstance(self.batch_sampler, BatchSampler)  # which DataLoader has made
        self._placed = _WithPlaces(self.batch_sampler, self._ring)

    @property
    def _index_sampler(self) -> "_WithPlaces":
        return self._placed

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]
        # Workers that live on have put away what an earlier iteration left when this one starts;
        # others end with the iteration.
        turn = self._placed.next_turn(take_over=self._reused)
        batches = super().__iter__()
        try:
            for sent in batches:
                yield self._received(sent)
        finally:
            if not self._reused:
                del batches
                self._ring.release(turn)

    def _received(self, sent: "dict | _Sent") -> dict:
        if isinstance(sent, _Sent):
            image, valid = self._ring.take(sent.place, sent.samples), sent.valid
            if valid is None:
                b, t, _, h, w = image.shape
                valid = torch.ones((), dtype=torch.bool).expand(b, t, h, w)
            batch: dict = {"image": image, "valid": valid}
            for key, value in sent.rest.items():
                batch[key] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        else:
            batch = sent
        if self._pin:
            batch["image"] = batch["image"].pin_memory()
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


class _Sent(NamedTuple):
    """A batch whose pixels lie at `place` of the ring; `valid` is None where all pixels are.

    Small tensors travel as arrays, by value: handing over a shared tensor costs more.
    """

    place: int
    samples: int
    valid: Tensor | None
    rest: dict


class _Ring:
    """Shared memory for `count` batches, and which places of it are free."""

    def __init__(self, dataset: LocationSeries | TransformedSeries, batch_size: int, count: int):
        dtype = getattr(torch, dataset.dtype.name)
        shape = (count, batch_size, *dataset.sample_shape)
        self.memory = torch.empty(shape, dtype=dtype).share_memory_()
        self.free = deque(range(count))
        self._lent: dict[int, object] = {}  # place -> turn of the iteration that fills it

    def lend(self, turn: object) -> int | None:
        if not self.free:
            return None
        place = self.free.popleft()
        self._lent[place] = turn
        return place

    def release(self, turn: object | None) -> None:
        """Take back what an iteration, or for None any, was lent and did not give out."""
        for place in [p for p, held in self._lent.items() if turn in (None, held)]:
            del self._lent[place]
            self.free.append(place)

    def take(self, place: int, count: int) -> Tensor:
        """The batch at `place`, which is free again when nothing refers to the tensor."""
        del self._lent[place]
        array = self.memory[place, :count].numpy()
        weakref.finalize(array, self.free.append, place).atexit = False
        return torch.from_numpy(array)


class _Indices(list):
    """Indices of a batch, and the place in the ring where it goes (None: none)."""

    place: int | None = None


class _WithPlaces(Sampler):
    def __init__(self, batches: BatchSampler, ring: _Ring):
        self.batches, self._ring = batches, ring
        self._turn, self._take_over = object(), False

    def next_turn(self, take_over: bool) -> object:
        self._turn, self._take_over = object(), take_over
        return self._turn

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Indices]:
        turn = self._turn
        if self._take_over:
            self._ring.release(None)
        for indices in self.batches:
            placed = _Indices(indices)
            placed.place = self._ring.lend(turn)
            yield placed


class _IntoRing(Dataset):
    """What workers run."""

    def __init__(self, dataset: LocationSeries | TransformedSeries, memory: Tensor):
        self.dataset, self._memory = dataset, memory

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: "_Indices | Sequence[int]") -> "dict | _Sent":
        place = getattr(indices, "place", None)
        if place is None:
            return self.dataset.batch(indices)
        batch = self.dataset.batch(indices, self._memory[place, : len(indices)])
        valid = batch["valid"]
        everywhere = valid.untyped_storage().nbytes() == 1 and valid.numel() > 1
        rest = {
            key: value.numpy() if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in ("image", "valid")
        }
        return _Sent(place, len(indices), None if everywhere else valid, rest)
