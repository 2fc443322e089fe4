"""What the pages name is there, and what is public is on a page. `make docs` checks the links."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import gift_trl
from gift_trl.scripts.cli import COMMANDS


ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("recipes/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_commands_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"(?<![\w/.-])((?:tests|benchmarks|recipes/quickstart|\.ci)/[\w./-]*\w)", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    commands = re.findall(r"gift-trl (?!COMMAND)(\w[\w-]*)", text)
    assert [name for name in commands if name not in COMMANDS] == []
    targets = re.findall(r"make ([\w-]+)(?:`|\s+#)", text)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [name for name in targets if f"\n{name}:" not in makefile] == []


@pytest.mark.parametrize("stage", ["annotation", "training", "merging", "evaluation", "hub"])
def test_public_names_are_in_the_api_reference(stage):
    page = (ROOT / "docs" / "api" / f"{stage}.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)
    for name in documented:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__
    public = getattr(importlib.import_module(f"gift_trl.{stage}"), "__all__", [])
    assert [name for name in public if f"gift_trl.{stage}.{name}" not in documented] == []


def test_the_names_of_the_package_are_on_the_first_page():
    page = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert [name for name in gift_trl.__all__ if f"[`{name}`]" not in page] == []


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == gift_trl.__version__
    assert citation["preferred-citation"]["title"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_docstrings_in_the_form_of_trl_become_lists_and_links():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    docstring = (
        "Adds [`merge_adapter`] to [`~peft.PeftModel`].\n\nArgs:\n    > Parameters of the merge\n\n"
        '    scale (`float`, *optional*, defaults to `1.0`):\n        A factor:\n\n        - `"a"`: one\n\n'
        "    a, b:\n        Others.\n\nRaises:\n    `ValueError`: If it fails.\n    OSError: If not.\n"
    )
    lines = module.to_markdown(docstring, {"merge_adapter": "gift_trl.merge_adapter"}).splitlines()
    assert lines[0] == "Adds [`merge_adapter`][gift_trl.merge_adapter] to `peft.PeftModel`."
    assert [line for line in lines[1:] if line] == [
        "**Parameters**",
        "*Parameters of the merge*",
        "-   **`scale`** (`float`, *optional*, defaults to `1.0`)",
        "    A factor:",
        '    - `"a"`: one',
        "-   **`a`**, **`b`**",
        "    Others.",
        "**Raises**",
        "-   **`ValueError`**",
        "    If it fails.",
        "-   **`OSError`**",
        "    If not.",
    ]
