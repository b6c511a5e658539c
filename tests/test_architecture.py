"""Who may import whom, and how long things may be."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LDM = ROOT / "ldm"
ROOMS = ["autoencoder", "backbone", "condition", "guidance", "loss", "metric", "objective", "sampler"]
ALLOWED = {
    "types": set(),
    "files": set(),
    "measure": {"types"},
    "schedule": set(),
    "prediction": set(),
    "check": set(),
    "moved": set(),
    "folder": {"moved"},
    "report": set(),
    "quickstart_report": {"folder", "report"},
    "clip": {"folder", "nn"},
    **{room: {"types", "nn", "clip", "folder", room} for room in ROOMS},
    "metric": {"types", "measure", "clip", "folder", "metric"},
    "extractor": {"types", "measure", "clip", "folder", "extractor"},
    "evaluation": {"types", "measure", "folder", "model", "generate", "data", "report", "evaluation"},
    "data": {"types", "data"},
    "denoiser": {"types"},
    "likelihood": {"types"},
    "edit": {"types", "sampler"},
    "average": {"folder"},
    "model": {"types", "denoiser", "condition"},
    "generate": {"types", "model"},
    "request": {"types", "folder", "model", "edit"},
    "subject": {"build", "data", "evaluation", "folder", "measure", "request"},
    "interop": {"types", "clip", "folder", "backbone", "autoencoder", "condition", "nn", "interop"},
    "training": {"types", "average", "measure", "evaluation", "clip", "folder", "model", "generate", "training"},
    "build": {"interop", "nn", "check", "command_line", "condition", "denoiser", "folder", "model", "moved", "training"},
    "run_id": {"moved"},
    "command_line": {"check", "run_id"},
}
CONFINED = {
    "hydra": {"build", "command_line", "run_id"},
    "omegaconf": {"build", "command_line", "run_id"},
    "pytorch_lightning": {"training", "data"},
    "webdataset": {"data"},
    "open_clip": {"clip", "condition", "extractor", "loss", "metric", "training"},
}
FILES = sorted(f for f in LDM.rglob("*.py") if f.stem != "__init__")


def room(path):
    return path.relative_to(LDM).with_suffix("").parts[0]


def imports(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    origins = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    assert not any(n.level for n in origins), f"{path}: imports say their full name"
    return names + [f"ldm.{a.name}" for n in origins if n.module == "ldm" for a in n.names] + [n.module for n in origins]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LDM)))
def test_rooms_import_only_what_they_may(path):
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "ldm" and rest:
            assert rest[0] in {"files", *ALLOWED[room(path)]}, f"{room(path)} may not know {rest[0]}"
        assert room(path) in CONFINED.get(top, {room(path)}), f"{top} does not belong in {room(path)}"


def test_the_vocabulary_knows_torch_alone():
    outside = {name.split(".")[0] for name in imports(LDM / "types.py")} - set(sys.stdlib_module_names)
    assert outside == {"torch"}


def test_no_mutual_imports():
    known = {room(p): set() for p in FILES}
    for path in FILES:
        known[room(path)] |= {n.split(".")[1] for n in imports(path) if n.startswith("ldm.")} - {room(path)}
    assert not [(a, b) for a in known for b in known[a] if a in known.get(b, ())]


@pytest.mark.parametrize("path", [*FILES, *ROOT.glob("*.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert text.count("\n") <= 300
    long = [f.name for f in functions if f.end_lineno - f.body[0].end_lineno > 40]
    assert not long, f"functions over 40 lines: {long}"
    assert ast.get_docstring(tree), "a file opens by saying what it is for"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LDM)))
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    public = [*(c for c in classes if not _protocol(c)), *(n for n in tree.body if isinstance(n, ast.FunctionDef))]
    methods = [m for c in classes for m in c.body if isinstance(m, ast.FunctionDef) and not _protocol(c)]
    bare = [n.name for n in [*public, *methods] if not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not [n for n in bare if n not in ("main",)], f"without a docstring: {bare}"


def _protocol(node):
    return any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases)


def test_packages_are_empty():
    assert all(not f.read_text().strip() for f in LDM.rglob("__init__.py"))
