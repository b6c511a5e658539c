"""Settings that a command says and that nothing reads: refused by name, since they would change nothing. Light to import."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ldm.check import is_offered, locate, parameters_of
from ldm.errors import Refusal
from ldm.files.process import first
from ldm.run_id import FILES

LISTS = ("condition", "adapter", "metric", "callback", "logger")  # groups of which several members are chosen
# What ldm/command/train.py reads itself; all else is read where one of these names it, as ${...}.
READ = "training data callback always logger trainer name run_id runs folder resume plan".split()
READ += "coordinates profile optimize seed allow debug".split()
PREVIEWED = ("sampler", "guidance")  # how a model that is trained anew is usually drawn from
ADAPTED = "ldm.build.adapted"
# What only training on pictures does, in its own order. Here they are taken once, in order and as they are: settings that would
# change these are refused but for the value that says so, those of the way of reading are said.
ALTERED = {"data.crop": "center", "data.flip": 0, "data.weights": None}
READING = tuple(f"data.{name}" for name in "batch workers window lanes on_mismatch shuffle".split())
SEEDED = ("ldm.data.dataset.", "ldm.data.hub.")  # datasets whose own transforms may be random
# Weights of what not every training of an autoencoder has: its term, and the value that leaves it out.
TERMS = {"training.kl_weight": ("kl", 0), "training.codebook_weight": ("codebook", 0)}
TERMS |= {"training.perceptual_weight": ("perceptual", 0), "training.perceptual_share": ("perceptual", 1)}
WORD = re.compile(r"\$\{([\w./]+)\}")


@runtime_checkable
class Penalised(Protocol):
    """A class of autoencoders that says which terms its loss has, of those that have a weight."""

    terms: tuple[str, ...]


def check_used(config: DictConfig, config_name: str, overrides: Sequence[Override], configs: Path) -> None:
    """Looks at what a command's words set.

    Args:
        config: composed of `overrides`. configs: the folder of the framework's configs.

    Raises:
        Refusal: one of them is read by nobody.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    said = [(o, _place(o)) for o in overrides if not o.key_or_group.startswith("hydra") and o.key_or_group not in FILES]
    for override, place in said:
        if override.is_delete():
            continue
        group, _, rest = place.partition(".")
        if group in LISTS and rest and "_target_" not in ((plain.get(group) or {}).get(rest.partition(".")[0]) or {}):
            name = rest.partition(".")[0]
            members = ",".join([*(n for n, node in (plain.get(group) or {}).items() if "_target_" in (node or {})), name])
            raise Refusal(f"{_word(override)}: {name} is not chosen, so that this changes nothing; say {group}=[{members}] too.")
        _check_offered(plain, place, override)
    if config_name == "train":
        _check_read(config, said, configs)
    if config_name in ("precompute", "evaluate"):
        _check_in_order(plain, said, config_name)


def _check_read(config: DictConfig, said: Sequence[tuple[Override, str]], configs: Path) -> None:
    """Raises Refusal where a training reads nothing of what is said."""
    plain = OmegaConf.to_container(config, resolve=False)
    model = plain["training"].get("model") or {}
    anew = bool(model) and model.get("_target_") != ADAPTED
    read = set(_read(plain, [*READ, "model.init", *(PREVIEWED if anew else ())]))
    for override, place in said:
        inside = any(place == one or place.startswith(f"{one}.") for one in read)
        around = not _is_group(override, configs) and any(one.startswith(f"{place}.") for one in read)
        if not inside and not around and not override.is_delete():
            raise Refusal(f"{_word(override)} changes nothing here: {_why(config, place, configs)}")
        if place in TERMS and override.value() != TERMS[place][1]:
            _check_term(config, TERMS[place][0], override)


def _check_term(config: DictConfig, term: str, override: Override) -> None:
    """Raises Refusal where an autoencoder's training has no such term of its loss."""
    if term == "perceptual":
        if OmegaConf.select(config, "training.perceptual") is None:
            raise Refusal(f"{_word(override)} changes nothing here: training.perceptual=null compares no features. Leave it out.")
        return
    target = OmegaConf.select(config, "autoencoder._target_")
    autoencoder = locate(target, "autoencoder")
    if isinstance(autoencoder, Penalised) and term not in autoencoder.terms:
        raise Refusal(
            f"{_word(override)} changes nothing here: {target} has no such term, but {', '.join(autoencoder.terms)}. "
            "Leave it out."
        )


def _check_in_order(plain: Mapping[str, Any], said: Sequence[tuple[Override, str]], command: str) -> None:
    """Refuses, or says, what changes nothing where every sample is taken once, in order."""
    fixed, idle = dict(ALTERED), list(READING)
    if command == "evaluate":
        fixed["data.buckets"] = None
    if not str((plain.get("data") or {}).get("_target_")).startswith(SEEDED):
        idle += ["data.seed", *(["seed"] if command == "precompute" else [])]
    for override, place in said:
        if place in fixed and override.value() != fixed[place]:
            raise Refusal(
                f"{_word(override)}: ldm {command} takes pictures as they are, each once, its middle cut out. Leave it out"
                f"{'; train on the pictures themselves for that.' if command == 'precompute' else '.'}"
            )
        if command == "evaluate" and place.split(".")[0] == "logger" and plain.get("sweep") is None:
            raise Refusal(
                f"{_word(override)}: only the numbers of a sweep=... are logged; OUT/metrics.json has those of one setting."
            )
        if command == "precompute" and re.fullmatch(r"condition\.\w+\.rate", place):
            idle.append(place)
    unread = [_word(override) for override, place in said if place in idle]
    if unread and first():
        print(f"Not used, since {command} takes samples once, in order: {', '.join(unread)}", flush=True)


def _why(config: DictConfig, place: str, configs: Path) -> str:
    """Why a setting is not read, and which training would read it."""
    group = place.partition(".")[0]
    named = {path.stem: path.read_text(encoding="utf-8") for path in sorted((configs / "training").glob("*.yaml"))}
    name = place if any(f"${{{place}}}" in text for text in named.values()) else group
    readers = [training for training, text in named.items() if f"${{{name}}}" in text]
    if OmegaConf.select(config, "training.model._target_") == ADAPTED and (group in PREVIEWED or "diffusion" in readers):
        return (
            f"training=finetune takes the {name} of the model that it begins from (model.init={config.model.init}). Leave it "
            "out; training=diffusion trains with another, from the same weights where they fit."
        )
    advice = f" It goes with training={' or training='.join(readers)}." if readers else ""
    return f"nothing in this training reads `{name}`.{advice}"


def _read(plain: Mapping[str, Any], roots: Sequence[str]) -> Iterator[str]:
    """The places of a plain config that are read, where those are that `roots` name."""
    waiting, met = list(roots), set()
    while waiting:
        place = waiting.pop()
        if place in met:
            continue
        met.add(place)
        yield place
        node: Any = plain
        for key in place.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        members = node.values() if place in LISTS and isinstance(node, Mapping) else [node]
        chosen = [m for m in members if place not in LISTS or "_target_" in (m or {})]
        waiting += [word for text in _texts(chosen) for word in WORD.findall(text)]


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for value in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from _texts(value)


def _check_offered(plain: Mapping[str, Any], place: str, override: Override) -> None:
    """Raises Refusal where a part is set of what takes no such part, as objective.time of an objective without times."""
    node: Any = plain
    for key in place.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return
        owner, node = node, node[key]
        if isinstance(owner.get("_target_"), str) and is_offered(key, node):
            names, open_ended = parameters_of(owner["_target_"], place)
            if key not in names and not open_ended:
                raise Refusal(f"{_word(override)} changes nothing here: {owner['_target_']} has no {key}. Leave it out.")


def _is_group(override: Override, configs: Path) -> bool:
    return (configs / override.key_or_group).is_dir()


def _place(override: Override) -> str:
    """Where in the config an override sets something."""
    return override.package or override.key_or_group.replace("/", ".")


def _word(override: Override) -> str:
    return override.input_line.lstrip("+")
