"""MkDocs hooks: the repository's own pages at the paths they have there, and equations as MathML."""

import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


DOCS = Path(__file__).parent
ROOT = DOCS.parent
# [text](path#anchor) and <img src="path">, where the path is relative
_LINK = re.compile(
    r"(?P<before>\[(?P<text>[^][]+)\]\(|<img src=\")(?P<path>(?![a-z]+:)[^)#\s\"]+)(?P<after>(?:#[^)]*)?\)|\")"
)
# Also those that are linked to and are no pages
_SHOWN = (
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "SECURITY.md",
    "constraints.txt",
    "benchmarks/**/*",
    "recipes/**/*",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the recipes' pages, and has fences of `math` converted."""
    for entry in config.nav:
        if "Recipes" in entry:
            entry["Recipes"] = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/**/README.md"))
    config.nav[:] = [entry for entry in config.nav if entry.get("Recipes", True)]
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _format_equation})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside of docs/."""
    paths = (path for pattern in _SHOWN for path in sorted(ROOT.glob(pattern)))
    for path in paths:
        if path.is_file() and "__pycache__" not in path.parts:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at where the site has the files: those of docs/ beside the repository's own."""
    source = Path(str(page.file.abs_src_path))

    def point(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link["path"]))
        if target.is_dir():
            target /= "README.md"
            if not target.exists():
                return link["text"]  # a folder without a page
        name = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT)
        return f"{link['before']}{os.path.relpath(name, Path(page.file.src_uri).parent)}{link['after']}"

    return _LINK.sub(point, markdown)


def _format_equation(source: str, *args: Any, **kwargs: Any) -> str:
    return convert(source.strip(), display="block")
