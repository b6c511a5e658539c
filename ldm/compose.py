"""From words to a config: free text is quoted, names and types are checked, then Hydra composes. Light to import."""

import os
import pickle
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ldm.check import nearest
from ldm.errors import Refusal
from ldm.files.called import command_line
from ldm.run_id import FILES, check_sweep, name_run, searched
from ldm.swap import swapped
from ldm.unused import LISTS, check_used

HERE = Path(__file__).resolve().parent
CONFIGS = next(path for path in (HERE / "configs", HERE.parent / "configs") if path.is_dir())  # installed, or in a clone
# Settings that are free text: what is said in words, and the last part of the name of each that takes a path or a place.
SPOKEN = ("prompt", "negative", "source", "ask", "callback.drawings.captions")
PATHS = (
    *("model", "init", "path", "weights", "pretrained", "vocabulary"),  # of what was trained
    *("train", "val", "split", "val_split", "data_dir", "root", "images", "reference", "mask", "prompts"),  # of what is read
    *("out", "runs", "run_id", "folder", "cache", "checkpoints", "save_dir", "default_root_dir"),  # of what is written
    *("resume", "sweep", "compare", "adapters", "base"),
    *("pictures", "prior", "prompt", "word", "begin"),  # of fine-tuning, words among them
)
FREE_TEXT = re.compile(
    rf"^(?P<key>\+{{0,2}}(?:(?:prompt|negative|source|callback\.drawings\.captions|ask\.[\w.]+)|(?:[\w.]+\.)?(?:{'|'.join(PATHS)})))"
    r"=(?P<value>.*)$",
    re.S,
)
DOLLAR = re.compile(r"(\\*)\$\{")  # where an interpolation begins
NAMED = ("run_id",)  # which settings may be part of
QUOTED = re.compile(r"""\s*(['"])(?:(?!\1).|\\\1)*\1\s*(?=[],])""", re.S)  # an element of a list
UNCHOSEN = re.compile(r"^(sampler|sampler/grid|guidance|adversary|set)=null$")  # which Hydra writes as ~sampler
OPEN = re.compile(r"^((?:groups|rates)(?:\.|=))")  # settings by names of the user's, which no config has yet
SIZED = "+size@_global_="
ADDED = re.compile(r"^\+(trainer\.(?:strategy|enable_progress_bar|enable_model_summary)=)")  # which were no settings
GRID = re.compile(r"^(sampler\.grid\.\w+=)")  # of the grid that a model is usually drawn on, which no config knows yet


def quote(arguments: Sequence[str], config_name: str = "train") -> list[str]:
    """Quotes the raw values of free text, which is not Hydra's grammar; `ask.*`, `groups` and `rates` may add what they name.

    `sampler=null` chooses none. A value that is one whole list, or one whole quoted string, stays what it is, and so does `null`
    in the place of a file or folder, and a truth value in that of pretrained weights. `[cat|dog] on a mat` and `"Hello" on a
    wall` are none of these, but text. Of a list of prompts each element is text. A path's `~` is the person's home, which shells
    leave as it is behind a `=`; `${...}` is text, but for a run's own name.
    """
    quoted = []
    usual = config_name in ("sample", "evaluate") and not any(a.startswith("sampler/grid=") for a in arguments)
    for argument in arguments:
        argument = ADDED.sub(r"\1", OPEN.sub(r"++\1", UNCHOSEN.sub(r"~\1", argument)))
        argument = GRID.sub(r"++\1", argument) if usual else argument
        match = FREE_TEXT.match(argument)
        if match is None:
            quoted.append(argument)
            continue
        key, value = match["key"], match["value"]
        if key.startswith("ask."):
            key = f"++{key}"
        name = key.lstrip("+")
        spoken = name in SPOKEN or name.split(".")[0] in SPOKEN
        plain = ("null", "true", "false") if name.endswith(".pretrained") else () if spoken else ("null",)
        if value and value not in plain and not (name in NAMED and "${" in value):
            write = partial(_element, words=name in SPOKEN, path=not spoken or name.startswith("ask."))
            value = _listed(value, write) if value[0] == "[" else write(value, alone=True)
        quoted.append(f"{key}={value}")
    return quoted


def _element(value: str, words: bool, path: bool, alone: bool = False) -> str:
    """A value, `alone` or of a list, in Hydra's grammar: quoted, but for a string or list that is quoted; numbers of a list of
    `words` too.
    """
    if (value[:1] in ("'", '"') or (value[:1] == "[" and not words)) and _is_whole(value):
        return DOLLAR.sub(_escaped, value)
    if path and value.startswith("~/"):
        value = os.path.expanduser(value)
    return _text(value) if alone or words or not _is_plain(value) else value


def _text(value: str) -> str:
    """A quoted string of Hydra's grammar that means `value`."""
    return DOLLAR.sub(_escaped, _in_quotes(value))


def spoken(value: str) -> str:
    """A text as it is written for `quote`, which then means that text and no list, whatever it begins with."""
    return _in_quotes(value) if value[:1] in ("[", "'", '"', "~") or value == "null" else value


def _in_quotes(value: str) -> str:
    return "'" + re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", re.sub(r"\\+\Z", lambda m: m[0] * 2, value)) + "'"


def _escaped(match: re.Match[str]) -> str:
    return match[1] * 2 + r"\${"


def _is_whole(value: str) -> bool:
    """Whether a value is one list, or one quoted string, of Hydra's grammar."""
    try:
        override = OverridesParser.create().parse_overrides([f"x={value}"])[0]
        return not override.is_sweep_override() and (isinstance(override.value(), list) or value[:1] in ("'", '"'))
    except (HydraException, ValueError):
        return False


def _is_plain(value: str) -> bool:
    """Whether Hydra reads a number, a truth value or null."""
    try:
        override = OverridesParser.create().parse_overrides([f"x={value}"])[0]
        return not override.is_sweep_override() and (override.value() is None or isinstance(override.value(), int | float))
    except (HydraException, ValueError):
        return False


def _listed(value: str, write: Callable[[str], str] | None = None) -> str:
    """A value that begins with `[`: a list if its bracket closes at the end, each element as it is written; else a text."""
    parts = _elements(value)
    if parts is None:
        return value if _is_whole(value) else _text(value)
    write = write or partial(_element, words=False, path=False)
    return f"[{','.join(write(part) for part in parts if part or len(parts) > 1)}]"


def _elements(value: str) -> list[str] | None:
    """What stands between commas (a comma itself is `\\,`) in a pair of brackets around the whole value; None: there is none."""
    parts, brackets, parentheses, i = [""], 1, 0, 1
    while i < len(value):
        quoted = QUOTED.match(value, i) if not parts[-1].strip() else None
        if quoted:
            parts[-1], i = quoted[0], quoted.end()
            continue
        if value.startswith("\\,", i):
            parts[-1], i = parts[-1] + ",", i + 2
            continue
        sign, i = value[i], i + 1
        brackets += (sign == "[") - (sign == "]")
        parentheses = max(0, parentheses + (sign == "(") - (sign == ")"))
        if brackets == 0:
            return [part.strip() for part in parts] if i == len(value) else None
        if sign == "," and brackets == 1 and not parentheses:
            parts.append("")
        else:
            parts[-1] += sign
    return None


def with_local(arguments: Sequence[str]) -> list[str]:
    """Quoted words, and the search path on which a folder `configs` lies where the command is called, if there is one."""
    local, option = Path("configs"), "hydra.searchpath="
    if not local.is_dir() or local.resolve() == CONFIGS or any("file://configs" in a for a in arguments if a.startswith(option)):
        return list(arguments)
    listed = next((a.removeprefix(option).strip("[] ") for a in arguments if a.startswith(option)), "")
    others = [a for a in arguments if not a.startswith(option)]
    return _beside(others, f"{option}[{', '.join(filter(None, (listed, 'file://configs')))}]")


def prepared(arguments: Sequence[str], config_name: str) -> list[str]:
    """Words of a command line as Hydra reads them: free text is quoted, and what they mean besides is said.

    Raises:
        Refusal: `size` with several experiments, or several sizes.
    """
    return sized(with_local(quote(arguments, config_name)))


def sized(words: Sequence[str]) -> list[str]:
    """`experiment=NAME size=SIZE` also chooses size/SIZE/NAME.yaml, if there is one, which may choose anew what the experiment
    chooses: Hydra lets no file do so whose name is put together in train.yaml.
    """
    chosen = {key: value for key, _, value in (word.partition("=") for word in words) if key in FILES}
    if len(chosen) < len(FILES) or "null" in chosen.values() or any(word.startswith(SIZED) for word in words):
        return list(words)
    if several := [f"{key}={value}" for key, value in chosen.items() if "," in value]:
        raise Refusal(f"{several[0]}: size= shrinks one experiment at a time; call the command once for each.")
    name = "{size}/{experiment}".format(**chosen)
    parsed = OverridesParser.create().parse_overrides([word for word in words if word.startswith("hydra.searchpath=")])
    there = any((folder / "size" / f"{name}.yaml").is_file() for folder in (CONFIGS, *searched(parsed)))
    return _beside(words, f"{SIZED}{name}") if there else list(words)


def _beside(words: Sequence[str], word: str) -> list[str]:
    """Words and one more, ahead of the first that is no option: argparse takes them in one piece."""
    place = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    return [*words[:place], word, *words[place:]]


def check_overrides(config_name: str, overrides: Sequence[str], multirun: bool = False) -> list[str]:
    """Composes once and names what is mistyped, with the nearest valid name; -> the settings that are given several values.

    Raises:
        Refusal: an unknown choice or setting, a value of another type, a list where one choice is meant.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if multirun:
        check_sweep(parsed)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        chosen, groups = _choices(parsed)
        for override in chosen:
            if override.input_line.startswith(SIZED):
                continue
            _check_choice(override, groups[override.key_or_group], multirun)
        words = [o.input_line for o in parsed if (o in chosen and not o.is_sweep_override()) or _is_search(o)]
        config = _composed(config_name, words)
        heads = tuple(f"{o.key_or_group.replace('/', '.')}." for o in chosen)
        if any(o.key_or_group.startswith(heads) for o in parsed):  # settings of a choice that may take the place of a recipe's
            config = swapped(config, config_name, [o for o in parsed if o.input_line in words], CONFIGS)
    left_out = {o.key_or_group for o in parsed if o.is_delete()}
    for override in parsed:
        if override not in chosen and not override.key_or_group.startswith("hydra."):
            _check_value(override, config, replaces=override.key_or_group in left_out and not override.is_delete())
    return [o.key_or_group for o in parsed if o.is_sweep_override()]


def compose_config(config_name: str, overrides: Sequence[str] = (), used: bool = False) -> DictConfig:
    """The composed config, as a script gets it: what tests and the quickstart call the scripts' work with.

    used: whether settings are refused that the command does not read.
    """
    overrides = prepared(overrides, config_name)
    check_overrides(config_name, overrides)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        if any(o.is_sweep_override() or o.is_hydra_override() for o in parsed):
            return settled(compose(config_name, overrides=list(overrides)), config_name, overrides, used=used)
        chosen, _ = _choices(parsed)
        config = _composed(config_name, [o.input_line for o in chosen])
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in chosen], config)
        return settled(config, config_name, overrides, used=used)


def _choices(overrides: Sequence[Override]) -> tuple[list[Override], dict[str, list[str]]]:
    """Those that choose a file of a group, and what each could choose. Hydra must be initialized."""
    more, loader = list(searched(overrides)), GlobalHydra.instance().config_loader()
    ours = not any(_is_search(o) for o in overrides)
    groups = {g: _own_options(g) if ours else _options(loader, g, more) for g in (o.key_or_group for o in overrides)}
    return [o for o in overrides if groups[o.key_or_group]], groups


def _is_search(override: Override) -> bool:
    return override.key_or_group == "hydra.searchpath"


def _composed(config_name: str, words: Sequence[str]) -> DictConfig:
    """What Hydra composes of choices, once for the same ones: it takes a fifth of a second. Hydra must be initialized."""
    if any(word.startswith("hydra") for word in words):
        return compose(config_name, overrides=list(words))
    return pickle.loads(_pickled(config_name, tuple(words)))


@lru_cache(maxsize=256)
def _pickled(config_name: str, words: tuple[str, ...]) -> bytes:
    return pickle.dumps(compose(config_name, overrides=list(words)))


def settled(
    config: DictConfig, config_name: str, overrides: Sequence[str], swept: Sequence[str] = (), used: bool = True
) -> DictConfig:
    """A composed config as a command works with it: choices in place of a recipe's own stand alone, and a run has its name.

    Args:
        config, config_name: as it was composed, and from which file, such as `train`.
        overrides: the words of the command line.
        swept: the settings that a multirun gives several values.
        used: as in `compose_config`.

    Raises:
        Refusal: a setting that the command does not read.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    config = swapped(config, config_name, parsed, CONFIGS, say=True)
    if used:
        check_used(config, config_name, parsed, CONFIGS)
    return name_run(config, CONFIGS, overrides, swept)


@lru_cache(maxsize=1024)
def _own_options(group: str) -> list[str]:
    """The choices of a group in the framework's configs."""
    return _options(GlobalHydra.instance().config_loader(), group)


def _options(loader: Any, group: str, more: Sequence[Path] = ()) -> list[str]:
    """The choices of a group, here and in `more` folders, or, where it holds only folders, those as `folder/name`; empty where
    it is no group.
    """
    below = [f"{folder}/{name}" for folder in loader.list_groups(group) for name in _options(loader, f"{group}/{folder}")]
    place = group.split("@")[0]
    others = [
        path.relative_to(root / place).with_suffix("").as_posix() for root in more for path in (root / place).rglob("*.yaml")
    ]
    return [*(loader.get_group_options(group) or below), *others]


def _check_choice(override: Override, options: Sequence[str], multirun: bool) -> None:
    group = override.key_or_group
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    if override.is_sweep_override() and not multirun:
        raise Refusal(f"{override.input_line}: several choices need a multirun: {command_line('train')} -m {override.input_line}")
    if values == [None] and not override.is_delete():
        one = "leave it out for none" if group in FILES else f"wanted one of {', '.join(sorted(options))}"
        raise Refusal(f"{group}=null: {f'{group}=[] chooses none' if group.split('@')[0] in LISTS else one}.")
    for value in values:
        names = value if isinstance(value, list) else [value]
        if isinstance(value, list) and group.split("@")[0] not in LISTS:
            raise Refusal(f"{override.input_line}: {group} is one choice, not a list, such as {group}={options[0]}.")
        if len(set(map(str, names))) < len(names):
            raise Refusal(f"{override.input_line}: a name stands twice in the list; name each once.")
        for name in names:
            if name is not None and str(name) not in options and not override.is_delete():
                raise Refusal(f"{group}={name}: there is no such choice.{nearest(str(name), options)}")


def _check_value(override: Override, config: DictConfig, replaces: bool = False) -> None:
    node, path = config, override.key_or_group.split(".")
    for i, key in enumerate(path):
        if (
            node is None
            and override.key_or_group.startswith(("sampler.", "guidance."))
            and not (override.is_add() or override.is_force_add())
        ):
            group = "/".join(path[:i])
            raise Refusal(f"{override.input_line}: choose a {group} to set it, such as {group}=NAME (ldm list {group}).")
        if not isinstance(node, DictConfig):
            return
        if key not in list(node):
            if override.is_add() or override.is_force_add() or (i == len(path) - 1 and override.is_delete()):
                return
            place = ".".join(path[:i]) or "the config"
            more = f" What {node['_target_']} takes besides: +{override.key_or_group}=..." if "_target_" in node else ""
            raise Refusal(f"{override.key_or_group}: {place} has no `{key}`.{nearest(key, [str(k) for k in node])}{more}")
        if replaces and i == len(path) - 1:
            return
        if override.is_add() and i == len(path) - 1:
            raise Refusal(
                f"+{override.key_or_group}: there is such a setting already; say {override.key_or_group}=... without the +."
            )
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            return
        node = node[key]
    values = [override.value()] if not override.is_sweep_override() else []
    for value in values:
        wanted = {bool: (bool,), int: (int,), float: (int, float)}.get(type(node))
        wrong_switch = isinstance(value, bool) and wanted is not None and bool not in wanted
        if wanted and value is not None and (wrong_switch or not isinstance(value, wanted)) and not _interpolated(value):
            raise Refusal(
                f"{override.key_or_group}={value}: a {type(value).__name__.replace('QuotedString', 'str')} was given where "
                f"{type(node).__name__} is wanted, such as {override.key_or_group}={node}."
            )


def _interpolated(value: Any) -> bool:
    return isinstance(value, str) and "${" in value
