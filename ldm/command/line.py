"""How a command that reads a config is called: its words are checked, Hydra composes, and refusals are one line."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.compose import CONFIGS, check_overrides, prepared, settled
from ldm.errors import Refusal
from ldm.files.process import end_soon
from ldm.files.table import once_a_minute


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Makes a function of a composed config the main function of a script."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def main() -> None:
            if sys.platform == "win32":
                sys.exit(
                    "error: this is Windows, which has no signals to save a run by, and other rules for files: run it in WSL2"
                )
            once_a_minute()
            end_soon()
            if os.getcwd() not in sys.path:  # the user's own packages lie where the command is called, as with `python -m ldm`
                sys.path.append(os.getcwd())
            try:
                sys.argv[1:] = arguments = prepared(sys.argv[1:], config_name)
            except Refusal as error:
                sys.exit(f"error: {error}")
            flags = [a for a in arguments if a.startswith("-")]
            multirun, swept = bool({"-m", "--multirun"} & set(flags)), []
            if not flags or multirun:
                try:
                    swept = check_overrides(config_name, [a for a in arguments if not a.startswith("-")], multirun)
                except (Refusal, HydraException, OmegaConfBaseException) as error:
                    sys.exit(f"error: {error}")
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # tracebacks of the user's own code are shown whole
            started: list[DictConfig] = []
            guarded = _guarded(task, config_name, multirun, swept, started)
            try:
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(guarded)()
            except (HydraException, OmegaConfBaseException) as error:
                if started:
                    raise
                sys.exit(f"error: {error}")  # Hydra's own settings are composed, and refused, here alone

        return main

    return decorate


def _guarded(
    task: Callable[[DictConfig], Any], config_name: str, multirun: bool, swept: Sequence[str], started: list[DictConfig]
) -> Callable[[DictConfig], Any]:
    def run(config: DictConfig) -> Any:
        started.append(config)
        launched = "SUBMITIT_EXECUTOR" in os.environ
        if multirun and not launched and OmegaConf.select(config, "trainer.devices") not in (None, 1):
            sys.exit(
                f"error: trainer.devices={config.trainer.devices} in a multirun: Lightning's launcher would start the whole "
                "sweep again in every process. Sweep with trainer.devices=1, or start each job with srun, torchrun, or "
                "hydra/launcher=slurm."
            )
        unsaid = _unsaid(OmegaConf.to_container(config, resolve=False))
        if unsaid:
            sys.exit(f"error: {', '.join(f'{key}=...' for key in unsaid)} must be said: there is no default.")
        try:
            job = HydraConfig.get()
            several = [*swept, *(job.sweeper.get("params") or ())] if multirun else []
            search = [word for word in job.overrides.hydra if word.startswith("hydra.searchpath=")]
            return task(settled(config, config_name, [*search, *job.overrides.task], several))
        except Refusal as error:
            if multirun or config.get("debug"):
                raise
            sys.exit(f"error: {error}")

    return run


def _unsaid(node: Any, place: str = "") -> list[str]:
    """The settings below a plain node that have no default and were not given."""
    if isinstance(node, dict):
        return [name for key, value in node.items() for name in _unsaid(value, f"{place}.{key}".strip("."))]
    return [place] if node == "???" else []
