"""What `make docs` adds to docs/: README, the change log, the notebooks, the recipes' opening lines and the API's pages."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
COMMAND = re.compile(r"(.*?)(?:((?:python|torchrun) .*?)(?:\s{3,}(.*))?)?")  # words, a command, its figures
PICTURES = {  # of recipes in docs/: other pages show them too; the others lie in docs/recipes/, by the recipe's name
    "emoji/autoencoder": "autoencoder.jpg",
    "emoji/controlnet": "controlnet.png",
    "emoji/dreambooth": "finetuning.jpg",
    "emoji/lora": "blueprint.png",
    "emoji/semantic": "convolutional.png",
    "emoji/text": "quickstart.png",
    "emoji/textual_inversion": "finetuning.jpg",
}
API = {
    "Python": ["ldm.api"],
    "The theory": ["ldm.types", "ldm.schedule", "ldm.prediction", "ldm.denoiser", "ldm.conditioner", "ldm.model", "ldm.measure"],
    "Members": ["autoencoder", "backbone", "condition", "adapter", "objective", "sampler", "guidance", "loss", "metric"],
}


@event_priority(50)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie elsewhere."""
    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def generated() -> dict[str, str]:
    """The pages that are not in docs/, by name."""
    pages = {target: (ROOT / source).read_text().replace("](docs/", "](") for target, source in PAGES.items()}
    return pages | {"recipes.md": recipes(), "api.md": api()}


def recipes() -> str:
    """Every experiment with its purpose and its command, as its config opens, and what it draws where that was kept."""
    parts = [
        "# Recipes\n\nEach is a config in `configs/experiment/`; any of its settings is a word on the command line. "
        "The emoji's run on a CPU in minutes.\n"
    ]
    for path in sorted((ROOT / "configs" / "experiment").rglob("*.yaml"), key=lambda path: (path.parent.name != "emoji", path)):
        name = path.relative_to(ROOT / "configs" / "experiment").with_suffix("").as_posix()
        lines = path.read_text().splitlines()[1:]
        opening = [line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
        parts.append(f"## {name}\n")
        for line in opening:
            text, command, figures = COMMAND.fullmatch(line).groups()
            parts += [text.strip()] if text else []
            parts += [f"\n```bash\n{command}\n```\n"] if command else []
            parts += [f"{figures}\n"] if figures else []
        picture = PICTURES.get(name, f"recipes/{name.replace('/', '_')}.png")
        parts.append(f"\n![what {name} draws]({picture})\n" if (ROOT / "docs" / picture).is_file() else "")
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
