"""Trains one stage:  python train.py experiment=emoji/text  optimizer.lr=3e-4  resume=auto"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.command.line import command


def train(config: DictConfig) -> Path:
    """Trains into runs/<run_id>, going on from the newest checkpoint there; -> that folder."""
    import pytorch_lightning as pl

    from ldm.build import allowed, build, build_members, build_stage
    from ldm.data.usual import usual_of
    from ldm.nn.empty import weightless
    from ldm.training.callback.profile import Profile
    from ldm.training.logging import close
    from ldm.training.plan import plan
    from ldm.training.resume import Changes
    from ldm.training.run import fit

    folder = Path(config.folder)
    if config.plan:
        trainer = build(config.trainer, allowed(config), logger=False, callbacks=[])
        with weightless():  # what is reckoned needs no numbers
            stage = build_stage(OmegaConf.merge(config, {"model": {"init": None}}))
        print(plan(stage, build(config.data, allowed(config)), trainer, str(config.plan)))
        return folder
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build(config.data, allowed(config))
    stage = build_stage(config)
    stage.recipe = {**stage.recipe, "usual": usual_of(OmegaConf.to_container(config.data, resolve=True))}
    callbacks, always, loggers = (list(build_members(config, group).values()) for group in ("callback", "always", "logger"))
    profile = [Profile(folder / "profile")] if config.profile else []
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    changes = Changes(OmegaConf.to_yaml(config), _plain(config), lambda path: _plain(OmegaConf.load(path)), folder)
    trainer = build(config.trainer, allowed(config), callbacks=[*callbacks, *always, *profile, changes], logger=loggers)
    try:
        fit(stage, data, trainer, folder, config.resume)
    finally:
        close(loggers)
    return folder


def _plain(config: DictConfig) -> tuple[Any, Any]:
    """As it is written, and with its interpolations resolved."""
    return OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True)


main = command("train")(train)
