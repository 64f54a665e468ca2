"""Random changes that make harder samples: crops of other scales, lost bands, clouds.

Transforms as in `timo.data.transforms`, for single samples in the workers: they change which
pixels are valid, and tasks count those before a batch leaves the host.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class RandomResizedCrop:
    """Cut a square at a random place, of a random share of the area, and resize it.

    Pixels are interpolated (averaged where the square is larger than `size`); one is valid where
    all that it was made from are. Labels are those of the nearest pixel. Where the square has no
    valid pixel but the sample does, one of `size` pixels is cut around a valid pixel instead.

    Args:
        size: pixels of a side of the result.
        area: smallest and largest share of the largest square within the sample.
    """

    def __init__(self, size: int, area: tuple[float, float] = (0.25, 1.0)):
        if size < 1 or not 0 < area[0] <= area[1] <= 1:
            raise ValueError(
                f"size: must be at least 1 and area two ascending shares in 0 ... 1, got {size} "
                f"and {area}"
            )
        self.size, self.area = size, area

    def __call__(self, sample: dict, generator: Generator) -> dict:
        h, w = sample["image"].shape[-2:]
        share, top, left = torch.rand(3, generator=generator).tolist()
        share = self.area[0] + share * (self.area[1] - self.area[0])
        side = max(1, round(min(h, w) * share**0.5))
        row, col = int(top * (h - side + 1)), int(left * (w - side + 1))
        out = self._cut(sample, row, col, side)
        if out["valid"].any() or not sample["valid"].any():
            return out
        places = sample["valid"].any(0).nonzero()
        row, col = places[torch.randint(len(places), (), generator=generator)].tolist()
        side = min(self.size, h, w)
        row, col = (max(0, at - side // 2) for at in (row, col))
        return self._cut(sample, min(row, h - side), min(col, w - side), side)

    def _cut(self, sample: dict, row: int, col: int, side: int) -> dict:
        """`sample` cut to a square and resized."""
        cut = {
            key: sample[key][..., row : row + side, col : col + side]
            for key in ("image", "valid", "mask")
            if key in sample
        }
        valid = cut["valid"][:, None].float()
        weight = self._resized(valid)  # (T, 1, size, size)
        usable = weight > 0.999
        image = self._resized(cut["image"].float() * valid) / weight.clamp(min=0.5) * usable
        changed = {"image": _as_type(image, cut["image"].dtype), "valid": usable[:, 0]}
        if "mask" in cut:
            nearest = ((torch.arange(self.size) + 0.5) * (side / self.size)).long()
            changed["mask"] = cut["mask"][..., nearest[:, None], nearest]
        return sample | changed

    def _resized(self, frames: Tensor) -> Tensor:
        size = (self.size, self.size)
        return F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=True)


class BandDropout:
    """Set each band of a sample to 0 on all dates with a probability; one band at least stays."""

    def __init__(self, probability: float):
        if not 0 <= probability < 1:
            raise ValueError(f"probability: must be in 0 ... 1, 1 excluded, got {probability}")
        self.probability = probability

    def __call__(self, sample: dict, generator: Generator) -> dict:
        bands = sample["image"].shape[1]
        lost = torch.rand(bands, generator=generator) < self.probability
        lost[torch.randint(bands, (), generator=generator)] &= bool((~lost).any())
        if not lost.any():
            return sample
        image = sample["image"]
        kept = (~lost).float()[:, None, None]
        return sample | {"image": _as_type(image.float() * kept, image.dtype)}


class RandomClouds:
    """Cover a random part of each date, with a probability, by a cloud; it is not valid there.

    Clouds have ragged, half transparent edges: noise of four scales above a threshold that leaves
    10 to 90 % of the pixels clear. A sample that would have no valid pixel left stays as it is.

    Args:
        probability: of a cloud on a date.
        brightness: raw value of a thick cloud, one number or one for each band.
    """

    def __init__(self, probability: float, brightness: float | Sequence[float] | Tensor):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability: must be in 0 ... 1, got {probability}")
        self.probability = probability
        self.brightness = torch.as_tensor(brightness, dtype=torch.float32).reshape(-1, 1, 1)

    def __call__(self, sample: dict, generator: Generator) -> dict:
        t, _, h, w = sample["image"].shape
        cloudy = torch.rand(t, generator=generator) < self.probability
        if not cloudy.any():
            return sample
        dates = cloudy.nonzero().flatten()
        noise = torch.zeros(len(dates), h, w)
        for octave in range(4):
            grid = torch.randn(len(dates), 1, 2 + 2**octave, 2 + 2**octave, generator=generator)
            grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)
            noise += grid[:, 0] / 2**octave
        clear = 0.1 + 0.8 * torch.rand(len(dates), generator=generator)
        ranked = noise.flatten(1).sort(dim=1).values
        threshold = ranked.gather(1, (clear[:, None] * (h * w - 1)).long())[..., None]
        opacity = ((noise - threshold) / 0.3).clamp(0, 1)
        image, valid = sample["image"].float(), sample["valid"].clone()
        kept = sample["valid"][dates]  # pixels without data stay 0
        ground, share = image[dates], (opacity * kept)[:, None]
        image = image.index_copy(0, dates, ground + share * (self.brightness - ground))
        valid[dates] = kept & (opacity == 0)
        if not valid.any():
            return sample
        return sample | {"image": _as_type(image, sample["image"].dtype), "valid": valid}


def _as_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` rounded and cut to the range of an integer `dtype`."""
    if dtype.is_floating_point:
        return values.to(dtype)
    return values.round().clamp(0, torch.iinfo(dtype).max).to(dtype)
