"""Loggers that Lightning's own classes do not cover by a config alone."""

from collections.abc import Iterable

from pytorch_lightning.loggers import Logger, WandbLogger


def wandb_logger(run_id: str, project: str, folder: str, offline: bool = False) -> WandbLogger:
    """wandb under the run's own id: a resumed run continues the same curve."""
    return WandbLogger(
        name=run_id, id=run_id.replace("/", "-"), project=project, save_dir=folder, offline=offline, log_model=False
    )


def close(loggers: Iterable[Logger]) -> None:
    """Ends wandb's run, which would otherwise take in the next job of a multirun too."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
