"""What `pip install` leaves: the wheel holds every package and config, and `ldm` works from any folder."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel; setuptools works in a copy, so that no build folder is left in the tree."""
    place = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if name.split("/")[0] in ("ldm", "configs", "pyproject.toml", "README.md", "LICENSE") and (ROOT / name).is_file():
            (place / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, place / "tree" / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(place),
        str(place / "tree"),
    ]
    subprocess.run(build, check=True, capture_output=True)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs words in an environment that holds the wheel, and this one's other packages; -> what it printed."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words, cwd):
        answer = subprocess.run(
            [str(home / "bin" / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True, env=environment
        )
        assert answer.returncode == 0, answer.stderr[-2000:]
        return answer.stdout

    return run


def test_every_package_and_config_is_in_the_wheel(wheel):
    listed = PROJECT["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "ldm").rglob("__init__.py")}
    assert listed == sorted(there | {"ldm.configs"})
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"ldm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= names and {"ldm/data/assets/emoji.webp", "ldm/interop/published.yaml", "ldm/py.typed"} <= names


def test_an_installed_ldm_works_from_any_folder(installed, tmp_path):
    """It imports itself and not this tree, finds its configs, and searches a folder `configs` beside the command."""
    place = installed("python", "-c", "import ldm.compose as c; print(c.CONFIGS, c.CONFIGS.is_dir())", cwd=tmp_path)
    assert str(ROOT) not in place and place.split()[1] == "True"
    assert "doctor" in installed("ldm", cwd=tmp_path)
    (tmp_path / "configs" / "sampler").mkdir(parents=True)
    (tmp_path / "configs" / "sampler" / "mine.yaml").write_text(
        "# Ten steps of Euler's.\n_target_: ldm.sampler.euler.Euler\nsteps: 10\n"
    )
    rows = installed("ldm", "list", "sampler", cwd=tmp_path)
    assert "heun" in rows and "Ten steps of Euler's." in rows
    help_page = installed("ldm", "sample", "sampler=mine", "--help", cwd=tmp_path)
    assert "steps: 10" in help_page
