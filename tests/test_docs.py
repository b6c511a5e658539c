"""The documentation holds together, as README and as the site of `make docs`: links, pictures, the menu, pages of the API.

What mkdocs itself says of it, `make docs` shows (CONTRIBUTING.md); this needs no mkdocs.
"""

import ast
import importlib.util
import json
import re
import sys
from types import ModuleType

import pytest
import yaml

from ldm.compose import CONFIGS

ROOT = CONFIGS.parent
DOCS = ROOT / "docs"
FENCED, INLINE = re.compile(r"^```.*?^```", re.M | re.S), re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")])


def text_of(path):
    """Markdown without its blocks of code, of a notebook its cells of words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return FENCED.sub("", text)


def anchors(text):
    """The fragments that headings answer to."""
    headings = re.findall(r"^#+ +(.+)$", text, re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def broken(text, links_to):
    """Links that lead nowhere; `links_to` gives the text of a place, None where there is nothing."""
    for link in LINK.findall(INLINE.sub("", text)):
        place, _, fragment = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        there = text if not place else links_to(place)
        if there is None or (fragment and fragment not in anchors(there)):
            yield link


def test_what_leads_nowhere_is_found():
    text = "# A heading, `code` and more\n[a](none.md) [b](#nope) [c](#a-heading-code-and-more) [d](there.md#e) [f](http://x)"
    assert list(broken(text, {"there.md": "## E\n"}.get)) == ["none.md", "#nope"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    def links_to(place):
        there = path.parent / place
        return None if not there.exists() else text_of(there) if there.suffix in (".md", ".ipynb") else ""

    assert not list(broken(text_of(path), links_to))


@pytest.fixture(scope="module")
def site():
    """tools/site.py, beside names in the place of mkdocs'."""
    names = {"mkdocs.config.defaults": "MkDocsConfig", "mkdocs.plugins": "event_priority", "mkdocs.structure.files": "File Files"}
    for module, offers in names.items():
        stub = ModuleType(module)
        for name in offers.split():
            setattr(stub, name, lambda *_: lambda function: function)
        sys.modules[module] = stub
    spec = importlib.util.spec_from_file_location("site_of_docs", ROOT / "tools" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def pages(site):
    """The site's pages by name, as mkdocs reads them."""
    found = {path.relative_to(DOCS).as_posix(): text_of(path) for path in DOCS.rglob("*.md")}
    found |= {name: FENCED.sub("", text) for name, text in site.generated().items()}
    return found | {f"notebooks/{path.name}": text_of(path) for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_sites_links_lead_somewhere(pages):
    """README's and others' too, which lie elsewhere in the repository."""

    def links_to(place):
        there = DOCS / place
        return pages.get(place, "" if there.is_file() and there.suffix != ".md" else None)

    wrong = {name: list(broken(text, links_to)) for name, text in pages.items() if "/" not in name}
    assert not {name: links for name, links in wrong.items() if links}


def test_the_menu_names_every_page_once(pages):
    def named(node):
        below = node.values() if isinstance(node, dict) else node
        return [node] if isinstance(node, str) else [name for each in below for name in named(each)]

    menu = named(yaml.safe_load((ROOT / "tools" / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(pages)


def test_the_api_has_its_modules(site):
    """All there, each with a docstring, which is what is shown."""
    modules = re.findall(r"^::: (\S+)$", site.api(), re.M)
    assert len(modules) > 80 and len(set(modules)) == len(modules)
    for name in modules:
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        assert ast.get_docstring(ast.parse(path.read_text())), name


def test_every_recipe_has_its_command_and_pictures_are_shown(site):
    text = site.recipes()
    sections = {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}
    assert len(sections) == len(list((CONFIGS / "experiment").rglob("*.yaml")))
    assert not [name for name, part in sections.items() if f"experiment={name}" not in part]
    shown = re.findall(r"^!\[what (\S+) draws\]", text, re.M)
    assert site.PICTURES.keys() <= set(shown) and {path.stem for path in (DOCS / "recipes").glob("*")} <= {
        name.replace("/", "_") for name in shown
    }
