"""Which run a training command belongs to: the same command finds its run again, whatever defaults the framework has by then.

A run's id, unless the command says one, is the experiment's name and 8 hex digits of what the command and the experiment's
files say. `config.identity`, and so config.yaml in the run's folder, keeps the digits.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import Refusal
from ldm.files.moved import moved
from ldm.files.process import first

# What says where, how long and how visibly a run trains, and not what.
VOLATILE = tuple(
    "run_id identity resume trainer logger callback always plan coordinates profile debug optimize runs folder hydra".split()
)
FILES = ("experiment", "size")  # the groups whose files are a command's words, said ahead

Difference = tuple[tuple[str, ...], Any, Any]  # a setting's path, its value in the run, its value now
ABSENT = object()


def name_run(config: DictConfig, configs: Path, overrides: Sequence[str] = (), swept: Sequence[str] = ()) -> DictConfig:
    """Gives a training config its run_id where it has none, and the defaults of when that run began.

    Args:
        config: the composed config; what is no training, and so has no `resume`, stays as it is.
        configs: the folder of the framework's configs.
        overrides: what the command says.
        swept: the settings that a multirun gives several values: they count whatever they say, so that its jobs never meet.
    """
    if "resume" not in config:
        return config
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    try:
        _ = [Path(config[key]) for key in ("runs", "folder")]
    except (OmegaConfBaseException, TypeError) as error:
        raise Refusal(f"runs={config.runs} run_id={config._get_node('run_id')} name no folder: {error}") from error
    before = None
    with open_dict(config):
        config.identity = identity(parsed, configs, swept)
        if config.run_id is None:
            config.run_id = f"{config.name}-{config.identity}"
            if config.resume != "never" and not Path(config.folder).is_dir() and not any(_root(k) in VOLATILE for k in swept):
                before = _begun_before(config, parsed)
                config.run_id = before or config.run_id
        path = Path(config.folder) / "config.yaml"
        if config.resume != "never" and path.is_file():
            if before or OmegaConf.load(path).get("identity") == config.identity:
                _keep_defaults(config, path)
    return config


def identity(overrides: Sequence[Override], configs: Path, swept: Sequence[str] = ()) -> str:
    """8 hex digits of the overrides, in any order, and of the files that they choose of experiments and sizes."""
    said = {}
    overrides = [o for o in overrides if not (o.key_or_group in FILES and o.package)]  # which follows from the others
    for o in overrides:
        if o.key_or_group in swept or _root(o.key_or_group) not in VOLATILE:
            said[f"{o.key_or_group}@{o.package or ''}"] = "~" if o.is_delete() else o.value()
    chosen = {o.key_or_group: str(o.value()) for o in overrides if o.key_or_group in FILES}
    names = [f"{group}/{name}" for group, name in chosen.items()]
    names += ["size/{size}/{experiment}".format(**chosen)] if len(chosen) == len(FILES) else []
    folders = [configs, *searched(overrides)]
    files = dict(file for name in names for file in _files(name, folders))
    words = json.dumps({"overrides": said, "files": files}, sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:8]


def check_sweep(overrides: Sequence[Override]) -> None:
    """Raises ValueError where two jobs of a multirun would be one run."""
    sweeps = [o for o in overrides if o.is_sweep_override()]
    for o in sweeps:
        values = list(o.sweep_string_iterator()) if o.is_discrete_sweep() else []
        if len(set(values)) < len(values):
            raise Refusal(f"{o.input_line}: a value stands twice in the sweep, and two jobs would be one run; name each once.")
    fixed = [o for o in overrides if o.key_or_group in ("run_id", "folder") and o not in sweeps and "${" not in o.input_line]
    if sweeps and fixed:
        key = sweeps[0].key_or_group
        raise Refusal(
            f"{fixed[0].input_line} in a multirun: all of its jobs would be one run. Leave it out, or say what tells them apart, "
            f"such as run_id='NAME-${{{key.replace('/', '.')}}}'."
        )


def differences(saved: Any, present: Any, path: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Where two plain configs differ, setting by setting; where two nodes build other things, it is the nodes."""
    nodes = isinstance(saved, Mapping) and isinstance(present, Mapping)
    if not nodes or saved.get("_target_") != present.get("_target_"):
        if saved != present:
            yield path, saved, present
        return
    for key in dict.fromkeys([*saved, *present]):
        yield from differences(saved.get(key, ABSENT), present.get(key, ABSENT), (*path, str(key)))


def _keep_defaults(config: DictConfig, path: Path) -> None:
    """Takes the settings of a run that goes on by the same command, where defaults have changed since; and says so."""
    lines = []
    for place, saved, present in _differing(path, config):
        name = ".".join(place)
        if saved is ABSENT:
            lines.append(f"  {name}={_short(present)} is new since")
        elif present is ABSENT:
            lines.append(f"  {name}={_short(saved)} is a setting no longer")
        else:
            OmegaConf.update(config, name, saved, merge=False)
            lines.append(f"  {name}={_short(saved)} is kept; the default is {_short(present)} now")
    if lines:
        _say("\n".join([f"{path.parent} was begun with other defaults:", *lines]))


def _begun_before(config: DictConfig, overrides: Sequence[Override]) -> str | None:
    """The id of a run that this command began when ids were made otherwise; a run that may be it is named."""
    near = []
    for path in sorted(Path(config.runs).glob(f"{config.name}-*/config.yaml")):
        if not re.fullmatch(r".*-[0-9a-f]{8}", path.parent.name):
            continue
        run_id = f"{config.name.rpartition('/')[0]}/{path.parent.name}".lstrip("/")
        saved = OmegaConf.load(path)
        if saved.get("identity") is not None:
            if saved.identity == config.identity:
                return run_id
            continue
        # A setting that is new since then counts only where the command says it.
        differences = [d for d in _differing(path, config) if d[1] is not ABSENT or _says(overrides, d[0])]
        if not differences:
            return run_id
        near.append((len(differences), run_id, differences))
    if near:
        _, run_id, differences = min(near, key=lambda run: run[0])
        few = ", ".join(f"{'.'.join(place)} ({_short(a)} there, {_short(b)} here)" for place, a, b in differences[:3])
        _say(
            f"{config.runs}/{run_id} was begun by an earlier version of the framework, and differs from this command in "
            f"{few}{' ...' if len(differences) > 3 else ''}. run_id={run_id} goes on with it; this is another run, "
            f"{config.run_id}."
        )
    return None


def _says(overrides: Sequence[Override], place: tuple[str, ...]) -> bool:
    """Whether a command sets a setting, one below it, or all around it."""
    keys = [tuple(re.split("[./]", o.key_or_group)) for o in overrides]
    return any(place[: len(key)] == key[: len(place)] for key in keys)


def _differing(path: Path, config: DictConfig) -> Iterator[Difference]:
    saved, present = (moved(OmegaConf.to_container(c, resolve=False)) for c in (OmegaConf.load(path), config))
    stable = ({k: v for k, v in c.items() if k not in VOLATILE} for c in (saved, present))
    return differences(*stable)


def _files(name: str, folders: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """A config file as it is written, and the files that it begins with; classes by their own names, which no move changes."""
    path = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
    if path is None:
        return
    node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    yield name, _by_class(node)
    for line in node.get("defaults", []):
        if isinstance(line, str) and line != "_self_":
            yield from _files(line[1:] if line.startswith("/") else f"{name.rpartition('/')[0]}/{line}", folders)


def _by_class(node: Any) -> Any:
    if isinstance(node, list):
        return [_by_class(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    return {k: str(v).rpartition(".")[2] if k == "_target_" else _by_class(v) for k, v in node.items()}


def searched(overrides: Sequence[Override]) -> Iterator[Path]:
    """The folders that `hydra.searchpath` adds.

    Raises:
        Refusal: a package that is not there.
    """
    for place in next((o.value() for o in overrides if o.key_or_group == "hydra.searchpath"), None) or ():
        kind, _, rest = str(place).rpartition("://")
        if kind != "pkg":
            yield Path(rest)
            continue
        try:
            spec = find_spec(rest.replace("/", "."))
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            raise Refusal(f"hydra.searchpath={place}: there is no such package here, nor on Python's path (PYTHONPATH).")
        # Hydra warns of a package without an __init__.py, in which it finds the configs all the same
        warnings.filterwarnings("ignore", message=rf".*path={re.escape(rest)} is not available")
        yield from map(Path, spec.submodule_search_locations or ())


def _root(key: str) -> str:
    return re.split("[./@]", key)[0]


def _say(text: str) -> None:
    """Prints on the first process."""
    if first():
        print(text, flush=True)


def _short(value: Any) -> str:
    if value is ABSENT:
        return "none"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
