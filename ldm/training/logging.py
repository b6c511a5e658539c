"""Loggers that Lightning's own classes do not cover by a config alone."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import is_part

KEPT = (None, "model", "all")


class Wandb(WandbLogger):
    """wandb, to which what was trained is given as artefacts.

    Args:
        artifacts: None for none; `model`, the finished model with its card; `all`, each checkpoint too, when it is saved.
        settings: as WandbLogger's.
    """

    def __init__(self, artifacts: str | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.artifacts = artifacts

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Gives the newest checkpoint, a file or a folder; none where the disk failed."""
        path = Path(checkpoint_callback.best_model_path)
        if self.artifacts == "all" and path.exists():
            self._give("checkpoint", [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()), path.parent)

    def give_model(self, folder: Path, card: str) -> None:
        """Gives the model at rest in `folder`, its parts in sub-folders, and its card, Markdown."""
        if self.artifacts is not None:
            self._give("model", sorted(p for depth in ("*", "*/*") for p in folder.glob(depth) if is_part(p)), folder, card)

    def _give(self, kind: str, files: Iterable[Path], home: Path, card: str | None = None) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self.experiment.id}", kind, description=card)
        for path in files:
            artifact.add_file(str(path), path.relative_to(home).as_posix())
        if card is not None:
            with artifact.new_file("README.md", encoding="utf-8") as file:
                file.write(card)
        self.experiment.log_artifact(artifact)


def wandb_logger(run_id: str, project: str, folder: str, offline: bool = False, artifacts: str | None = None) -> Wandb:
    """wandb under the run's own id: a resumed run continues the same curve.

    Args:
        run_id: also the name that is shown.
        project: wandb's, which the run is listed in.
        folder: where wandb writes what it has yet to send.
        offline: it sends nothing by itself; `wandb sync` does later.
        artifacts: `model` for the finished model with its card, `all` for each checkpoint too, None for neither.

    Raises:
        Refusal: `artifacts` is another word.
    """
    if artifacts not in KEPT:
        raise Refusal(f"logger.wandb.artifacts={artifacts}: wanted null, model, or all (checkpoints too).")
    return Wandb(artifacts, name=run_id, id=run_id.replace("/", "-"), project=project, save_dir=folder, offline=offline)


def give_model(loggers: Iterable[Logger], folder: Path, card: Callable[[], str]) -> None:
    """Hands the finished model in `folder` to the loggers that take one; called by one process."""
    for logger in loggers:
        if isinstance(logger, Wandb) and logger.artifacts is not None:
            logger.give_model(folder, card())


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
