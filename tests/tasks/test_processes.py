"""Pretraining in one process and in two: every sample hides the same units."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import Dataset

from tests.data.corpora import write_published_layout
from tests.tasks.test_tasks import SMALL, UNITS
from timo.data import open_series
from timo.data.building import SeriesSource, build_store
from timo.tasks import PretrainingTask, SeriesData


class Scenes(Dataset):
    """Sixteen series of noise."""

    bands, units, scale, offset = ("x", "y"), "DN", torch.ones(2), torch.zeros(2)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {
            "image": torch.randint(0, 255, (3, 2, 64, 64), generator=generator).byte(),
            "dates": torch.arange(3),
            "valid": torch.ones(3, 64, 64, dtype=torch.bool),
            "name": str(index),
        }


class Recorded(PretrainingTask):
    """Writes what each sample of each epoch was shown."""

    def __init__(self, folder, **options):
        options["model_options"] = SMALL | {
            "decoder_embed_dim": 16, "decoder_num_heads": 2, "decoder_depth": 1
        }  # fmt: skip
        super().__init__(("x", "y"), **UNITS, model="timo_tiny", **options)
        self.folder = folder

    def training_step(self, batch, index):
        result = self(batch)
        ids = dict(zip(batch["name"], result.visible_ids.tolist()))
        name = f"{self.current_epoch}-{self.global_rank}-{index}.pt"
        torch.save(ids, self.folder / name)
        return result.loss


def fit(folder, devices: int, batch_size: int, seed: int = 0, data=None) -> dict:
    """{(epoch, sample): visible ids} of two epochs."""
    folder.mkdir()
    task = Recorded(folder, masking="mixture")
    trainer = Trainer(
        accelerator="cpu", devices=devices, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        strategy="ddp_fork" if devices > 1 else "auto",
    )  # fmt: skip
    trainer.fit(task, SeriesData(data or Scenes(), batch_size=batch_size, augment=False, seed=seed))
    shown = {}
    for path in folder.glob("*.pt"):
        epoch = path.name.split("-")[0]
        shown |= {(epoch, name): ids for name, ids in torch.load(path).items()}
    return shown


@pytest.mark.filterwarnings("ignore")
def test_two_processes_hide_what_one_hides(tmp_path):
    two = fit(tmp_path / "two", 2, batch_size=2)
    one = fit(tmp_path / "one", 1, batch_size=4)
    assert len(one) == 32 and one == two
    assert all(len(ids) == 3 for ids in one.values())
    assert sum(one["0", str(i)] == one["1", str(i)] for i in range(16)) < 4
    other = fit(tmp_path / "other", 1, batch_size=4, seed=1)
    assert sum(one[k] == other[k] for k in one) < 8


def test_a_store_is_shared_among_processes(tmp_path):
    corpus = write_published_layout(tmp_path / "in", locations=16, t=3, size=64)
    build_store(SeriesSource(open_series(corpus)), tmp_path / "store", dates=3)
    store = open_series(tmp_path / "store", select=("B04", "B03"))
    one, two = fit(tmp_path / "one", 1, 8, data=store), fit(tmp_path / "two", 2, 4, data=store)
    assert len(one) == 32 and one == two
