"""What `make docs` adds to docs/: README, the change log, the notebooks, the recipes' opening lines and the API's pages."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
COMMAND = re.compile(r"(.*?)(?:((?:python|torchrun) .*?)(?:\s{3,}(.*))?)?")  # words, a command, its figures
API = {
    "Python": ["ldm.api"],
    "The theory": ["ldm.types", "ldm.schedule", "ldm.prediction", "ldm.denoiser", "ldm.conditioner", "ldm.model", "ldm.measure"],
    "Members": ["autoencoder", "backbone", "condition", "adapter", "objective", "sampler", "guidance", "loss", "metric"],
}


@event_priority(50)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie elsewhere."""
    pages = {target: (ROOT / source).read_text().replace("](docs/", "](") for target, source in PAGES.items()}
    pages |= {"recipes.md": recipes(), "api.md": api()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def recipes() -> str:
    """Every experiment with its purpose and its command, as its config opens."""
    parts = ["# Recipes\n\nEach is a config in `configs/experiment/`; any of its settings is a word on the command line.\n"]
    for path in sorted((ROOT / "configs" / "experiment").rglob("*.yaml")):
        name = path.relative_to(ROOT / "configs" / "experiment").with_suffix("")
        lines = path.read_text().splitlines()[1:]
        opening = [line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
        parts.append(f"## {name}\n")
        for line in opening:
            text, command, figures = COMMAND.fullmatch(line).groups()
            parts += [text.strip()] if text else []
            parts += [f"\n```bash\n{command}\n```\n"] if command else []
            parts += [f"{figures}\n"] if figures else []
        parts.append("")
    return "\n".join(parts)


def api() -> str:
    """The modules' docstrings."""
    parts = ["# API\n"]
    for title, modules in API.items():
        parts.append(f"# {title}\n")
        for module in modules:
            rooms = [module] if module.startswith("ldm.") else members(module)
            parts += [f"::: {name}\n" for name in rooms]
    return "\n".join(parts)


def members(room: str) -> list[str]:
    """The modules of a room of members, helpers apart."""
    paths = sorted((ROOT / "ldm" / room).glob("[!_]*.py"))
    return [f"ldm.{room}.{path.stem}" for path in paths]
