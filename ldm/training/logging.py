"""Loggers that Lightning's own classes do not cover by a config alone."""

from collections.abc import Iterable

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor


def wandb_logger(run_id: str, project: str, folder: str, offline: bool = False) -> WandbLogger:
    """wandb under the run's own id: a resumed run continues the same curve."""
    return WandbLogger(
        name=run_id, id=run_id.replace("/", "-"), project=project, save_dir=folder, offline=offline, log_model=False
    )


def log_picture(loggers: Iterable[Logger], name: str, picture: Tensor, step: int) -> None:
    """picture: (3, h, w) in [0, 1], to the loggers that show pictures."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step)
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=step)


def close(loggers: Iterable[Logger]) -> None:
    """Ends wandb's run, which would otherwise take in the next job of a multirun too."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
