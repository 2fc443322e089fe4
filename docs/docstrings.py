"""Griffe extension: docstrings in TRL's form become the Markdown that the API reference shows."""

import re
from typing import Any

from griffe import Extension, Module, Object


_SECTION = re.compile(r"(Args|Parameters|Attributes|Returns|Yields|Raises|Examples?|Notes?):$")
# `name (`type`, *optional*):`, several names with one description, or the exceptions of `Raises:`
_ITEM = re.compile(r"(?P<names>[\w`, ]+?)(?: \((?P<type>.+)\))?:(?: (?P<rest>.*))?$")
_REFERENCE = re.compile(r"\[`(~?[\w.]+)`\](?![\[(])")


class TrlDocstrings(Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        documented = {}
        for module in (pkg, *(member for member in pkg.members.values() if not member.is_alias and member.is_module)):
            documented.update({str(name): f"{module.path}.{name}" for name in module.exports or ()})
        _rewrite(pkg, documented)


def _rewrite(obj: Object, documented: dict[str, str]) -> None:
    if obj.docstring is not None:
        obj.docstring.value = to_markdown(obj.docstring.value, documented)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member, documented)


def to_markdown(docstring: str, documented: dict[str, str]) -> str:
    """
    Markdown of a docstring in TRL's form.

    Args:
        docstring (`str`):
            Docstring without its indentation.
        documented (`dict[str, str]`):
            Where the names are documented that a reference may name.

    Returns:
        `str`: Sections as bold headings, their items as a list, references to documented names as links.
    """
    lines, section = [], None
    for line in docstring.splitlines():
        heading = _SECTION.match(line)
        if heading:
            section = "Parameters" if heading[1] == "Args" else heading[1]
            lines += [f"**{section}**", ""]
        elif section is None or (line and not line.startswith(" ")):
            section = None
            lines.append(line)
        else:
            lines += _section_lines(section, line[4:])
    return _REFERENCE.sub(lambda match: _link(match[1], documented), "\n".join(lines))


def _section_lines(section: str, line: str) -> list[str]:
    if section in ("Returns", "Yields", "Example", "Examples", "Note", "Notes"):
        return [line]
    if line.startswith("> "):  # a group of parameters
        return [f"*{line[2:]}*"]
    item = None if line.startswith(" ") else _ITEM.match(line)
    if item is None:
        return [line]  # the description, which its indentation makes a part of the item
    names = ", ".join(f"**`{name.strip(' `')}`**" for name in item["names"].split(","))
    kind = f" ({item['type']})" if item["type"] else ""
    return ["", f"-   {names}{kind}", "", *([f"    {item['rest']}"] if item["rest"] else [])]


def _link(name: str, documented: dict[str, str]) -> str:
    short = name.removeprefix("~").removeprefix("gift_trl.")
    target = documented.get(short.split(".")[0] if "." not in short else short.rpartition(".")[2])
    return f"[`{short}`][{target}]" if target and "transformers." not in name else f"`{short}`"
