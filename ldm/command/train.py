"""Trains one stage:  python train.py experiment=emoji/text  optimizer.lr=3e-4  resume=auto"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.check import SLOW, check_nodes
from ldm.command.line import command
from ldm.errors import Refusal
from ldm.files.moved import moved
from ldm.files.process import first


def train(config: DictConfig) -> Path:
    """Trains into runs/<run_id>, going on from the newest checkpoint there; -> that folder."""
    return _train(config)[0]


def run(config: DictConfig) -> float | None:
    """Trains; -> the logged number that `optimize` names, for a sweeper.

    Raises:
        Refusal: training logged no such number.
    """
    from ldm.files.folder import write_text

    folder, numbers = _train(config)
    if config.optimize is None or config.plan or config.coordinates:
        return None
    file = folder / "optimized.json"
    if numbers and first():
        write_text(json.dumps(numbers), file)
    if not numbers and file.is_file():  # a sweeper may try the same settings twice, and the run was finished before
        numbers = json.loads(file.read_text(encoding="utf-8"))
    if config.optimize not in numbers:
        logged = ", ".join(sorted(numbers)) or "nothing, as the run was finished before"
        raise Refusal(f"optimize={config.optimize}: no such number was logged in {folder}; what was: {logged}.")
    return numbers[config.optimize]


def _train(config: DictConfig) -> tuple[Path, dict[str, float]]:
    """-> the run's folder, and the numbers that were logged last."""
    from ldm.build import allowed

    _check(config, allowed(config))
    if not config.coordinates:
        return _checked(config)
    from ldm.command.coordinates import check, said

    folder = Path(config.folder)
    print(said(check(config, folder), folder))
    return folder, {}


def _checked(config: DictConfig) -> tuple[Path, dict[str, float]]:
    import pytorch_lightning as pl

    from ldm.build import allowed, build, build_members, build_stage
    from ldm.command.usual import drawn_as
    from ldm.data.usual import usual_of
    from ldm.interop.card import of_run
    from ldm.training.callback.profile import Profile
    from ldm.training.logging import close, give_model
    from ldm.training.parallel.layout import pays_to_search
    from ldm.training.resume import Changes
    from ldm.training.run import fit, quiet

    quiet()
    folder = Path(config.folder)
    if config.plan:
        print(_planned(config))
        return folder, {}
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if config.debug:
        OmegaConf.update(config, "data.workers", 0)
    data = build(config.data, allowed(config))
    stage = build_stage(config)
    drawn = {} if stage.latent_model() is None else drawn_as(config)
    drawn |= of_base(config)
    _say_tokens(data, stage)
    stage.recipe = {**stage.recipe, "usual": usual_of(OmegaConf.to_container(config.data, resolve=True)) | drawn}
    callbacks, always, loggers = (list(build_members(config, group).values()) for group in ("callback", "always", "logger"))
    profile = [Profile(folder / "profile")] if config.profile else []
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    changes = Changes(OmegaConf.to_yaml(config), _plain(config), lambda path: _plain(OmegaConf.load(path)), folder)
    debug = {"detect_anomaly": True, "devices": 1, "num_nodes": 1, "strategy": "auto"} if config.debug else {}
    search = {"benchmark": pays_to_search(stage)} if config.trainer.get("benchmark") is None else {}
    trainer = _trainer(config, callbacks=[changes, *callbacks, *always, *profile], logger=loggers, **search, **debug)
    try:
        if fit(stage, data, trainer, folder, config.resume) and trainer.is_global_zero:
            give_model(loggers, folder, lambda: of_run(folder))
    finally:
        close(loggers)
    return folder, {name: float(value) for name, value in trainer.callback_metrics.items()}


def _check(config: DictConfig, allow: Sequence[str]) -> None:
    """Names a mistake in a setting of the config before what is slow to import is imported."""
    plain = moved(OmegaConf.to_container(config, resolve=True))
    plain["training"] = plain.pop("training")  # which repeats the parts that stand beside it
    check_nodes(plain, allow, later=SLOW)


def _say_tokens(data: Any, stage: Any) -> None:
    """Of DreamBooth's prompt: whether a rare word is one token is seen here."""
    from ldm.condition.text import Text
    from ldm.data.dreambooth import DreamBooth

    if not isinstance(data, DreamBooth) or data.prompt is None or stage.latent_model() is None or not first():
        return
    for text in (part for part in stage.latent_model().conditioner.modules() if isinstance(part, Text)):
        print(f"data.prompt: {'|'.join(text.tokens(data.prompt))}", flush=True)
        return


def _planned(config: DictConfig) -> str:
    """What a run will take, with those callbacks that change how much memory it has."""
    from ldm.build import allowed, build, build_stage, chosen
    from ldm.nn.empty import planned
    from ldm.training.callback.bfloat16 import Bfloat16
    from ldm.training.callback.frozen import Frozen
    from ldm.training.callback.recompute import Recompute
    from ldm.training.plan import plan

    nodes = chosen(OmegaConf.to_container(config.callback, resolve=True), "callback").values()
    count = {f"{kind.__module__}.{kind.__qualname__}" for kind in (Bfloat16, Frozen, Recompute)}
    trainer = _trainer(config, logger=False, callbacks=[build(node) for node in nodes if node["_target_"] in count])
    with planned():  # what is reckoned needs no numbers
        stage = build_stage(config, begins=False)
    return plan(stage, build(config.data, allowed(config)), trainer, str(config.plan))


def of_base(config: DictConfig) -> dict[str, Any]:
    """How the model that training=finetune begins from is usually drawn, but for its size and data."""
    from ldm.adapt import ADAPTED
    from ldm.rest import at_rest, recipe_of

    if OmegaConf.select(config, "training.model._target_") != ADAPTED:
        return {}
    usual = recipe_of(at_rest(config.model.init)).get("usual", {})
    return {name: usual[name] for name in ("sampler", "guidance", "precision") if name in usual}


def _trainer(config: DictConfig, **settings: Any) -> Any:
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.build import allowed, build

    try:
        return build(config.trainer, allowed(config), **settings)
    except Refusal:
        raise
    except (MisconfigurationException, ValueError) as error:  # no such device or strategy, settings that do not go together
        if "invalid strategy name" in str(error):
            from pytorch_lightning.strategies import StrategyRegistry

            known = ", ".join(["auto", *StrategyRegistry.available_strategies()])
            raise Refusal(
                f"trainer.strategy={config.trainer.strategy}: wanted trainer=ddp, trainer=fsdp, or one of {known}."
            ) from error
        raise Refusal(f"trainer=... (trainer.accelerator={config.trainer.accelerator}): {error}") from error


def _plain(config: DictConfig) -> tuple[Any, Any]:
    """As it is written, and with its interpolations resolved, by present names."""
    return moved(OmegaConf.to_container(config)), moved(OmegaConf.to_container(config, resolve=True))


main = command("train")(run)
