"""Who may import whom, and how long things may be."""

import ast
import importlib
import inspect
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from ldm.check import SLOW

ROOT = Path(__file__).parent.parent
LDM = ROOT / "ldm"
GROUND = {"errors", "files"}  # everybody may import these two; errors imports nothing, files itself and errors
MEMBERS = ["adapter", "autoencoder", "backbone", "condition", "guidance", "loss", "objective", "sampler"]
ALLOWED = {
    "types": set(),
    "schedule": set(),
    "prediction": set(),
    "denoiser": {"types", "nn"},
    "embedder": {"types"},
    "conditioner": {"types", "embedder"},
    "model": {"types", "conditioner", "denoiser"},
    "measure": {"types"},
    "edges": set(),
    "check": set(),
    "run_id": set(),
    "swap": {"run_id"},
    "unused": {"check", "run_id"},
    "compose": {"check", "run_id", "swap", "unused"},
    "adapt": {"types", "check", "model"},
    "rest": {"check", "interop", "training"},
    "build": {"adapt", "check", "compose", "conditioner", "denoiser", "interop", "model", "nn", "rest", "training", "types"},
    "nn": set(),
    "tower": {"nn"},
    **{room: {"types", "nn", "tower"} for room in MEMBERS},
    "condition": {"types", "embedder", "nn", "tower"},
    "metric": {"types", "edges", "measure", "tower"},
    "extractor": {"measure", "tower"},
    "data": {"types"},
    "drawing": {"types", "embedder", "model", "sampler"},
    "evaluation": {"types", "measure", "model", "drawing", "data"},
    "report": {"evaluation"},
    "page": {"adapt", "build", "check", "compose", "drawing", "embedder", "model"},
    "training": {"types", "embedder", "measure", "model", "tower", "drawing", "evaluation"},
    "interop": {"types", "adapt", "adapter", "autoencoder", "backbone", "condition", "nn", "tower"},
    "__main__": {"check"},
    "api": {"build", "command", "compose", "drawing", "model", "rest", "types"},
}
INSIDE = {  # rooms within a room, each with those beside it that it may know
    "data.shard": set(),
    "data.order": {"data.shard"},
    "data.batch": {"data.shard", "data.order"},
    "data.packing": set(),
}
ALIASES = ["average.py", "data/doctor.py", "data/pack.py"]  # names of before: three lines each
CONFINED = {
    "hydra": {"build", "command", "compose", "run_id", "swap", "unused"},
    "omegaconf": {"api", "build", "command", "compose", "page", "run_id", "swap", "unused"},
    "pytorch_lightning": {"command", "training"},
    "webdataset": {"data"},
    "peft": {"adapter"},
    "aiohttp": {"data", "page"},
    "open_clip": {"condition", "extractor", "loss", "metric", "tower", "training"},
}
# getattr(x, "name", default) and hasattr(x, "name"), where x is none of ours, or may be anybody's; `None`: any name
ASKED_BY_NAME = {
    ("check.py", None): "what a config names is anything that Python can import",
    ("command/pack.py", "n_frames"): "Pillow's pictures of one frame have none",
    ("condition/text.py", "encode"): "open_clip's tokenizers: Hugging Face's have none",
    ("data/shard/fetch.py", None): "errors of each remote file system's own library",
    ("extractor/timm.py", "checkpoint_filter_fn"): "timm's modules have one where weights need it",
    ("files/lightning.py", "scaler"): "Lightning's precision plugins, of which fp16's has one",
    ("loss/features.py", "transformer"): "open_clip's image towers are of several kinds",
    ("tower/clip.py", "encode"): "open_clip's tokenizers: Hugging Face's have none",
    ("tower/clip.py", "token_embedding"): "open_clip's models are of several kinds",
    ("training/base.py", "_step_supports_amp_scaling"): "torch's fused optimizers alone have it",
    ("training/callback/bfloat16.py", "bias"): "torch's RMSNorm has none",
    ("training/callback/compile.py", "blocks"): "any network that callback.compile.parts names; backbones have it",
    ("files/process.py", "sched_getaffinity"): "Linux alone has it",
}
FILES = sorted(f for f in LDM.rglob("*.py") if f.stem != "__init__")


@cache
def parsed(path):
    return ast.parse(path.read_text())


@cache
def room(path):
    return path.relative_to(LDM).with_suffix("").parts[0]


@cache
def imports(path):
    nodes = list(ast.walk(parsed(path)))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    origins = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    assert not any(n.level for n in origins), f"{path}: imports say their full name"
    modules = [f"{n.module}.{a.name}" for n in origins if n.module.split(".")[0] == "ldm" for a in n.names]
    return names + modules + [n.module for n in origins]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LDM)))
def test_rooms_import_only_what_they_may(path):
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "ldm" and rest and str(path.relative_to(LDM)) not in ALIASES and room(path) != "command":
            assert rest[0] in {room(path), *GROUND, *ALLOWED.get(room(path), ())}, f"{room(path)} may not know {rest[0]}"
            inner, other = ".".join(path.relative_to(LDM).parts[:2]), ".".join(rest[:2])
            if inner in INSIDE and rest[0] == room(path):
                assert other in {inner, *INSIDE[inner]}, f"{inner} may not know {other}"
        assert room(path) in CONFINED.get(top, {room(path)}), f"{top} does not belong in {room(path)}"


def room_names(path):
    return {name.split(".")[1] for name in imports(path) if name.startswith("ldm.")}


def test_the_vocabulary_knows_torch_alone():
    outside = {name.split(".")[0] for name in imports(LDM / "types.py")} - set(sys.stdlib_module_names)
    assert outside == {"torch", "ldm"} and room_names(LDM / "types.py") == {"errors"}


def test_no_mutual_imports():
    known = {room(p): set() for p in FILES}
    for path in FILES:
        if str(path.relative_to(LDM)) not in ALIASES:
            known[room(path)] |= room_names(path) - {room(path)}
    assert not [(a, b) for a in known for b in known[a] if a in known.get(b, ())]


def test_no_files_import_in_a_circle():
    """Imports at the top, under TYPE_CHECKING and within functions alike; an alias of before counts as any other file."""
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}
    left = {name: {n for n in imports(f) if n in names and n != name} for name, f in names.items()}
    while free := [name for name, known in left.items() if not known & left.keys()]:
        left = {name: known for name, known in left.items() if name not in free}
    assert not left, f"in a circle, or on the way to one: {sorted(left)}"


def test_nothing_asks_ours_by_name_whether_it_has_a_member():
    """A Protocol says what is there, embedder.py what is there by default: ask the object."""
    found = set()
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
                if name is not None and (node.func.id == "hasattr" or len(node.args) == 3):
                    found.add((str(path.relative_to(LDM)), name))
    excused = {(file, name) for file, name in found if {(file, name), (file, None)} & ASKED_BY_NAME.keys()}
    assert found == excused
    assert {file for file, _ in found} == {file for file, _ in ASKED_BY_NAME}, "an exception that nothing needs any more"


def test_lightnings_privates_are_reached_for_in_one_file():
    """Attributes that begin with an underscore, of anything but self, in the rooms that know Lightning, by word."""
    words = ("trainer", "strategy", "connector", "plugin", "loop", "progress")
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                assert not owner.endswith(words), f"{path}: {ast.unparse(node)} belongs into ldm/files/lightning.py"


@pytest.mark.parametrize("path", [*FILES, *ROOT.glob("*.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(path):
    text, tree = path.read_text(), parsed(path)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert text.count("\n") <= 420
    long = [f.name for f in functions if f.end_lineno - f.body[0].end_lineno > 40]
    assert not long, f"functions over 40 lines: {long}"
    assert ast.get_docstring(tree), "a file opens by saying what it is for"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LDM)))
def test_public_things_have_docstrings(path):
    tree = parsed(path)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    public = [*(c for c in classes if not _protocol(c)), *(n for n in tree.body if isinstance(n, ast.FunctionDef))]
    methods = [m for c in classes for m in c.body if isinstance(m, ast.FunctionDef) and not _protocol(c)]
    bare = [n.name for n in [*public, *methods] if not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not [n for n in bare if n not in ("main",)], f"without a docstring: {bare}"


def _protocol(node):
    return any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases)


def test_test_modules_import_no_test_modules():
    """What tests share is in tests/helpers/, so that each file can be run, moved and split over processes alone."""
    for path in (ROOT / "tests").rglob("*.py"):
        names = [part for name in imports(path) for part in name.split(".") if part.startswith("test_")]
        assert not [name for name in names if list((ROOT / "tests").rglob(f"{name}.py"))], f"{path} imports {names}"


# Words that name nothing: what was told, found, asked, kept, and whose? These rooms have not been rid of them yet.
VAGUE = {"told", "found", "asked", "own", "theirs", "kept"}
ROUGH = {"adapt", "data", "interop"}


@pytest.mark.parametrize("path", [f for f in FILES if room(f) not in ROUGH], ids=lambda p: str(p.relative_to(LDM)))
def test_names_say_what_a_thing_is(path):
    """Variables and parameters; docs/concepts.md has the words."""
    nodes = list(ast.walk(parsed(path)))
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not (names | {n.arg for n in nodes if isinstance(n, ast.arg)}) & VAGUE


LONG = 4  # parameters that a sentence can name


def _signatures(path):
    """The public functions, classes and methods that a file defines: (name, parameters, docstring) of each."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__ or name.startswith("_") or not callable(thing):
            continue
        members = vars(thing) if inspect.isclass(thing) else {}
        if inspect.isfunction(thing) or ("__init__" in members and not _is_protocol(thing)):
            yield name, [*inspect.signature(thing).parameters], thing.__doc__
        for member, value in members.items():
            method = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if inspect.isfunction(method) and (member == "__call__" or not member.startswith("_")):
                parameters = [p for p in inspect.signature(method).parameters if p not in ("self", "cls")]
                if _is_protocol(thing) or (member, parameters) not in _promised():
                    yield f"{name}.{member}", parameters, method.__doc__


def _is_protocol(thing):
    return getattr(thing, "_is_protocol", False)


def _promised():
    """What the Protocols describe once for all that keep to them; torch's modules are called by `forward`."""
    modules = [importlib.import_module(f"ldm.{name}") for name in ("types", "measure")]
    protocols = [thing for module in modules for thing in vars(module).values() if _is_protocol(thing)]
    methods = [(n, m) for p in protocols for n, m in vars(p).items() if inspect.isfunction(m) and not n.startswith("_")]
    methods += [(n, vars(p)["__call__"]) for p in protocols if "__call__" in vars(p) for n in ("__call__", "forward")]
    return [(name, [*inspect.signature(method).parameters][1:]) for name, method in methods]


def _listed(docstring):
    """The parameters that a docstring's `Args:` list names, one or several (`a, b:`) at the head of each of its lines."""
    section = re.search(r"^( *)Args:\n((?:\1 +.*\n?)+)", docstring or "", re.MULTILINE)
    heads = re.findall(r"^ *((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*): ", section[2], re.MULTILINE) if section else []
    return [name.lstrip("*") for head in heads for name in head.split(", ")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LDM)))
def test_long_signatures_describe_each_parameter(path):
    """An `Args:` list names them all; a method that keeps to a Protocol of types.py or measure.py is described there."""
    wrong = []
    for name, parameters, docstring in _signatures(path):
        listed = _listed(docstring)
        wrong += [f"{name} takes no {arg}" for arg in listed if arg not in parameters]
        wrong += [f"{name} says nothing of {arg}" for arg in parameters if arg not in listed and len(parameters) > LONG]
    assert not wrong


def test_packages_are_empty():
    """But for what `import ldm` offers, which is looked for in api.py when it is asked for."""
    assert all(not f.read_text().strip() for f in LDM.rglob("__init__.py") if f != LDM / "__init__.py")


MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}


@cache
def at_import(name):
    """What importing one of our modules imports: its imports outside functions and TYPE_CHECKING, and theirs."""
    nodes = [n for n in parsed(MODULES[name]).body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{a.name}" for a in node.names}
            names |= (whole & MODULES.keys()) | {node.module}
    return names.union(*(at_import(other) for other in names & MODULES.keys()))


def slow(name):
    return bool({"pytorch_lightning", "open_clip"} & {other.split(".")[0] for other in at_import(name)})


def test_what_is_checked_late_is_what_is_slow_to_import():
    """`train` names mistakes in all other targets before it imports Lightning and open_clip."""
    text = "".join(path.read_text() for path in (ROOT / "configs").rglob("*.yaml"))
    targets = {name.rpartition(".")[0] for name in re.findall(r"_target_: (ldm\.[\w.]+)", text)}
    late = {name for name in targets if any(f"{name}.".startswith(f"{part}.") for part in SLOW)}
    assert len(late) > 10 and late == {name for name in targets if slow(name)}


def test_drawing_and_measuring_need_no_lightning():
    assert not [name for name in ("build", "command.subject", "data.shards", "evaluation.run", "api") if slow(f"ldm.{name}")]
