"""What the wheel and the sdist hold, and that they name what the package imports."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import gift_trl


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """Folder with the wheel and the sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    return folder


def files(folder: str) -> set[str]:
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_wheel_holds_the_package_and_the_recipes_and_nothing_else(distributions):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        message = Parser().parsestr(archive.read(metadata).decode())
    assert names == files("gift_trl") | {f"gift_trl/{name}" for name in files("recipes")}
    assert {"gift_trl/py.typed", "gift_trl/recipes/quickstart/gift.yaml"} <= names
    assert message["Version"] == gift_trl.__version__
    assert {"deepspeed", "quantization", "docs", "dev"} <= set(message.get_all("Provides-Extra"))


def test_sdist_holds_what_its_tests_need(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    for folder in ("gift_trl", "recipes", "tests", "benchmarks"):
        assert files(folder) <= names
    assert {"README.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv", "outputs"))]


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: extra for name, extra in project["optional-dependencies"].items() if name not in ("dev", "docs")}
    requirements = [*project["dependencies"], *(requirement for extra in extras.values() for requirement in extra)]
    # Named in a model card by those who use it
    declared = {"wandb"} | {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
    installed = packages_distributions()
    undeclared = {}
    for path in (ROOT / "gift_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"gift_trl"}:
                if not declared & {normalised(name) for name in installed.get(module, [module])}:
                    undeclared[module] = path.name
    assert undeclared == {}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
