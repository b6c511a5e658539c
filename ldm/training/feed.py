"""Data of ours as a data module of Lightning's, of which they know nothing: what only reads them need not import it."""

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl

from ldm.types import Batch, DataModule


class Feed(pl.LightningDataModule):
    """Hands on what Lightning asks to `data`, which knows the trainer as long as this does."""

    def __init__(self, data: DataModule) -> None:
        self.data = data
        super().__init__()

    @property
    def trainer(self) -> pl.Trainer | None:
        """Lightning's, once it has begun."""
        return self.data.trainer

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        """Lightning says it."""
        self.data.trainer = trainer

    def prepare_data(self) -> None:
        """Once on each node."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """On every process."""
        self.data.setup(stage)

    def train_dataloader(self) -> Iterable[Batch]:
        """Micro-batches without end."""
        return self.data.train_dataloader()

    def val_dataloader(self) -> Iterable[Batch]:
        """Every validation sample once."""
        return self.data.val_dataloader()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """As the data have it; the stage moves a batch to its device."""
        return self.data.on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """As the data have it."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands."""
        return self.data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint stopped."""
        self.data.load_state_dict(state_dict)


def feed(data: Any) -> Any:
    """What `Trainer.fit` takes: data of ours are wrapped, a user's LightningDataModule stays as it is.

    Lightning keeps a data module's state in checkpoints under the name of its class, which is the data's.
    """
    if isinstance(data, pl.LightningDataModule):
        return data
    return type(type(data).__qualname__, (Feed,), {})(data)


def data_of(trainer: pl.Trainer) -> DataModule:
    """The data that a trainer trains on."""
    module = trainer.datamodule
    return module.data if isinstance(module, Feed) else module
