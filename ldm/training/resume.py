"""What has changed in a run's config since its checkpoint: each change holds from there on and is said, or is refused by name."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.errors import Refusal
from ldm.files.content import file_content
from ldm.files.folder import LOCAL, is_part, write_text

# What becomes of a setting that is another one now: the first line with a pattern of its name counts. A reason refuses it.
HOLDS, FREE, UNUSED = "holds", "free", "unused"
STATE = "the optimizer's state in the checkpoint is of no use to it"
MODEL = "the weights in the checkpoint learned with it"
FATES = (
    (
        "run_id identity name runs folder resume plan coordinates profile debug optimize allow model sampler* guidance* logger*",
        FREE,
    ),
    ("callback.bar* callback.drawings* trainer.enable_progress_bar trainer.enable_model_summary", FREE),
    ("callback.reconstructions* callback.latents* callback.levels* callback.throughput* *.folder data.cache data.cache_gb", FREE),
    ("model.init", UNUSED),
    ("optimizer._target_ optimizer.amsgrad optimizer.centered optimizer.least optimizer.initial_accumulator_value", STATE),
    ("groups parametrization*", STATE),
    ("adversary.optimizer._target_ adversary.optimizer.amsgrad", STATE),
    ("adversary adversary._target_ adversary.network*", "the discriminator learned with it"),
    ("callback.power_ema.stds", "the averages so far are of these lengths"),
    ("training._target_", "the checkpoint is of that stage"),
    ("schedule* prediction* level*", "the network learned to read and to answer in it"),
    ("condition.*.rate autoencoder.decay autoencoder.dead autoencoder.commitment *.checkpointing *.dropout", HOLDS),
    ("backbone* condition* autoencoder* clip* adapter*", MODEL),
    ("*", HOLDS),
)
FILES = ("path", "model", "weights", "pretrained", "vocabulary")
Config = tuple[Mapping[str, Any], Mapping[str, Any]]  # as it is written, and with its interpolations resolved
Change = tuple[str, Any, Any]  # a setting's name, its value before and now


class Changes(pl.Callback):
    """Compares a run's config with the one that its checkpoint was trained with, says what differs, and keeps config.yaml.

    The file is written once a step was trained, so that it never says what was not done; its first lines name each change
    and the step from which it holds. It stands before what saves checkpoints in the trainer's list.

    Args:
        text: the config, as YAML. config: the same as plain containers. read: a config.yaml -> such containers.
    """

    def __init__(self, text: str, config: Config, read: Callable[[Path], Config], folder: Path) -> None:
        self.text, self.config, self.read, self.folder = text, config, read, folder
        self.checkpoint: Path | None = None
        self.changes: list[Change] = []
        self.due = ""  # config.yaml, once a step was trained

    def compare(self, checkpoint: Path | None, first: bool) -> None:
        """Looks at the config.yaml of the checkpoint's run; on the `first` rank, a run without a checkpoint gets its own now.

        Raises:
            Refusal: a setting that cannot change; names all of them.
        """
        self.checkpoint = checkpoint
        before = None if checkpoint is None else config_of(checkpoint)
        if checkpoint is None:
            if first:
                write_text(self.text, self.folder / "config.yaml")
        elif before is not None:
            self.changes = list(differences(self.read(before), self.config))
            refuse(self.changes, checkpoint)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Says what has changed, on rank 0."""
        if self.checkpoint is None or not trainer.is_global_zero:
            return
        before = config_of(self.checkpoint)
        words = {UNUSED: "is not used: the weights are the checkpoint's", HOLDS: f"holds from step {trainer.global_step} on"}
        lines = [
            f"{line(change)}, {words.get(fate(change[0])) or same_files(*change)}"
            for change in self.changes
            if fate(change[0]) != FREE
        ]
        if before is None:
            lines = ["what it was trained with is not known: there is no config.yaml in its run"]
        if lines:
            print("\n  ".join(["Changed since the checkpoint:", *lines]), flush=True)
        if self.folder.absolute() not in self.checkpoint.absolute().parents:
            lines.append(f"goes on from {self.checkpoint}")
        rows = [] if before is None else [row for row in before.read_text().splitlines() if row.startswith("# step ")]
        head = [f"# step {trainer.global_step}: {' '.join(one.splitlines())}" for one in lines]
        self.due = "\n".join([*rows, *head, self.text])

    def on_train_batch_end(self, *_: Any) -> None:
        """Writes config.yaml."""
        if self.due:
            write_text(self.due, self.folder / "config.yaml")
        self.due, self.changes = "", []

    def told(self) -> str:
        """What has changed, for a refusal before the first step; empty where nothing has."""
        lines = [line(change) for change in self.changes if fate(change[0]) not in (FREE, UNUSED)]
        return f" Changed since the checkpoint: {'; '.join(lines)}." if lines else ""

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Says what was given to a run that had nothing left to train."""
        usual = ("sampler", "guidance")  # of which the model says how it is drawn from
        lines = [
            line(change)
            for change in self.changes
            if fate(change[0]) not in (FREE, UNUSED) or change[0].partition(".")[0] in usual
        ]
        if lines and trainer.is_global_zero:
            print(
                f"Nothing is left to train up to trainer.max_steps={trainer.max_steps}; not used: {'; '.join(lines)}", flush=True
            )


def fate(name: str) -> str:
    """HOLDS, FREE or UNUSED, or why the setting cannot change."""
    return next(verdict for patterns, verdict in FATES if any(fnmatchcase(name, pattern) for pattern in patterns.split()))


def refuse(changes: list[Change], checkpoint: Path) -> None:
    """Raises ValueError where some of the changes cannot be, with the reason of each."""
    refused = [change for change in changes if fate(change[0]) not in (HOLDS, FREE, UNUSED) and not same_files(*change)]
    if refused:
        reasons = "; ".join(f"{line(change)}, but {fate(change[0])}" for change in refused)
        raise Refusal(
            f"A run that goes on cannot change {reasons}. Go on with the value before, or begin another run: run_id=NAME (or "
            f"resume=never), from these weights with model.init={checkpoint}."
        )


def differences(before: Config, now: Config) -> Iterator[Change]:
    """The settings whose values differ, by their dotted names; a default of the class counts as if it were written."""
    patterns = [list(config[1].get("groups") or {}) for config in (before, now)]
    if patterns[0] != patterns[1]:
        yield "groups", *patterns
    yield from _differences("", chosen(before[0]), chosen(now[0]), chosen(before[1]), chosen(now[1]))


def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the settings of members that were not chosen."""
    lists = {group: config.get(group) or {} for group in ("callback", "always", "condition", "adapter", "logger")}
    members = {group: {n: v for n, v in lists[group].items() if isinstance(v, str) or "_target_" in (v or {})} for group in lists}
    return {**{name: value for name, value in config.items() if name != "identity"}, **members}


def _differences(place: str, raw: Any, raw_now: Any, old: Any, new: Any) -> Iterator[Change]:
    """An interpolation that both have says nothing of its own, but for the rate's length."""
    if old == new or (isinstance(raw, str) and "${" in raw and raw == raw_now and not place.startswith("rate.")):
        return
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        yield place, old, new
    elif old.get("_target_") != new.get("_target_"):
        yield f"{place}._target_", old.get("_target_"), new.get("_target_")
    else:
        for name in [*old, *(name for name in new if name not in old)]:
            values = [default(side, name) if name not in side else side[name] for side in (old, new)]
            rows = [side.get(name) if isinstance(side, Mapping) else None for side in (raw, raw_now)]
            yield from _differences(f"{place}.{name}".strip("."), *rows, *values)


def default(node: Mapping[str, Any], name: str) -> Any:
    """What a node that does not say it gets of its class for a setting; None where there is no default."""
    module, _, called = str(node.get("_target_", "")).rpartition(".")
    try:
        usual = inspect.signature(getattr(importlib.import_module(module), called)).parameters[name].default
    except (ValueError, TypeError, KeyError, ImportError, AttributeError):
        return None
    return None if usual is inspect.Parameter.empty else list(usual) if isinstance(usual, tuple) else usual


def line(change: Change) -> str:
    """`optimizer.lr: 0.001 (before: 0.0001)`"""
    name, *values = change
    before, now = (value.get("_target_", dict(value)) if isinstance(value, Mapping) else value for value in values)
    return f"{name}: {now} (before: {before})"


def same_files(name: str, before: Any, now: Any) -> str:
    """Where a setting names a model's place, and the model was moved: in which way it is the same. Empty where it is not."""
    if name.rpartition(".")[2] not in FILES or not isinstance(before, str) or not isinstance(now, str):
        return ""
    old, new = (Path(place.removeprefix(LOCAL)) for place in (before, now))
    if not old.exists() and new.exists():
        return "not compared with what is not there any more"
    files = [[place] if place.is_file() else sorted(filter(is_part, place.glob("*"))) for place in (old, new)]
    same = files[0] and [file_content(f) for f in files[0]] == [file_content(f) for f in files[1]]
    return "of the same files" if same else ""


def config_of(checkpoint: Path) -> Path | None:
    """The config.yaml of the run that a checkpoint lies in."""
    return next((p / "config.yaml" for p in list(checkpoint.absolute().parents)[:3] if (p / "config.yaml").is_file()), None)


def keep_settings(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A hook of `load_state_dict`: moments are the checkpoint's; rates, decays and all else that is set, the present ones.

    Raises:
        Refusal: the checkpoint is of another optimizer, or of other groups of weights.
    """
    present, saved = optimizer.param_groups, state["param_groups"]
    sizes, wanted = ([len(group["params"]) for group in groups] for groups in (saved, present))
    names, known = ({name for group in groups for name in group} for groups in (saved, present))
    if sizes != wanted or (names - known and known - names):
        raise Refusal(
            f"The checkpoint's optimizer is another than this run's {type(optimizer).__name__}: its groups have {sizes} "
            f"weights with {', '.join(sorted(names - {'params'}))}; here they have {wanted} with "
            f"{', '.join(sorted(known - {'params'}))}. "
            "Go on with the optimizer and groups it was trained with (config.yaml in its run), or begin another run: run_id=NAME."
        )
    settings = ({k: v for k, v in group.items() if k != "params"} for group in present)
    merged = [{**mine, "params": group["params"]} for mine, group in zip(settings, saved)]
    return {**state, "param_groups": merged}


class Rates(LambdaLR):
    """A schedule of the present rates: of a checkpoint it takes the step alone."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the checkpoint's step."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = [base * rate(self.last_epoch) for base, rate in zip(self.base_lrs, self.lr_lambdas)]
        for group, value in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = value
