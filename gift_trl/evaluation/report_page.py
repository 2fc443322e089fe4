"""The parts of a report, and how each reads in Markdown and in HTML."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gift_trl.cards import markdown_table
from gift_trl.evaluation.report_examples import Answer, Example
from gift_trl.evaluation.report_figures import Draw
from gift_trl.page import embed_picture, render_document, visible_text


# Beginning and end that are kept of a long text; the answer is mostly at the end
_PROMPT_ENDS, _ANSWER_ENDS = (900, 500), (500, 900)


@dataclass(frozen=True)
class Heading:
    """A section begins."""

    text: str

    def to_markdown(self) -> str:
        return f"## {_escape(self.text)}"

    def to_html(self) -> str:
        return f"<h2>{html.escape(self.text)}</h2>"


@dataclass(frozen=True)
class Text:
    """Prose of ours; `kind` is `"note"` for small print and `"warning"` for what should not be missed."""

    text: str
    kind: str = ""

    def to_markdown(self) -> str:
        return f"> **Mind:** {self.text}" if self.kind == "warning" else self.text

    def to_html(self) -> str:
        return f'<p class="{self.kind}">{_prose(self.text)}</p>'


@dataclass(frozen=True)
class Bullets:
    """A list of sentences of ours."""

    items: Sequence[str]

    def to_markdown(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)

    def to_html(self) -> str:
        return f"<ul>{''.join(f'<li>{_prose(item)}</li>' for item in self.items)}</ul>"


@dataclass(frozen=True)
class Table:
    """
    A table: a row is a list of cells, or a text that heads the rows below it. A line break divides a cell. Columns from
    `num_text` on hold numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str] | str]
    num_text: int = 1

    def to_markdown(self) -> str:
        lines = []
        for row in self.rows:
            if isinstance(row, str):
                lines.append([f"**{_escape(row)}**", *[""] * (len(self.head) - 1)])
            else:
                lines.append([_escape(cell).replace("\n", "<br>") for cell in row])
        return markdown_table([cell.replace("\n", "<br>") for cell in self.head], lines)

    def to_html(self) -> str:
        head = "".join(f"<th{self._kind(i)}>{_cell(cell)}</th>" for i, cell in enumerate(self.head))
        body = "".join(map(self._row_to_html, self.rows))
        return f'<div class="scroll" tabindex="0"><table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def _row_to_html(self, row: Sequence[str] | str) -> str:
        if isinstance(row, str):
            return f'<tr class="group"><th colspan="{len(self.head)}">{html.escape(row)}</th></tr>'
        first, *others = map(_cell, row)
        cells = "".join(f"<td{self._kind(i)}>{cell}</td>" for i, cell in enumerate(others, start=1))
        return f"<tr><th>{first}</th>{cells}</tr>"

    def _kind(self, column: int) -> str:
        return ' class="words"' if 0 < column < self.num_text else ""


@dataclass(frozen=True)
class Picture:
    """A picture, which is also a file. One without a caption has its title within."""

    file_name: str
    title: str
    caption: str
    draw: Draw

    def to_markdown(self) -> str:
        return "\n\n".join(filter(None, [f"![{_escape(self.title)}]({self.file_name})", _escape(self.caption)]))

    def to_html(self) -> str:
        caption = f"<figcaption><b>{html.escape(self.title)}</b>{html.escape(self.caption)}</figcaption>"
        return f"<figure>{caption if self.caption else ''}{embed_picture(self.draw, self.title)}</figure>"

    def write(self, folder: Path) -> None:
        with open(folder / self.file_name, "wb") as file:
            self.draw(file, False)


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side."""

    pictures: Sequence[Picture]

    def to_markdown(self) -> str:
        return "\n\n".join(picture.to_markdown() for picture in self.pictures)

    def to_html(self) -> str:
        return f'<div class="plots">{"".join(picture.to_html() for picture in self.pictures)}</div>'


@dataclass(frozen=True)
class Listing:
    """A file as it is."""

    title: str
    text: str

    def to_markdown(self) -> str:
        return f"{_escape(self.title)}\n\n{_fence(self.text)}"

    def to_html(self) -> str:
        return (
            f'<details class="example"><summary><b>{html.escape(self.title)}</b></summary>'
            f'<div class="text" tabindex="0">{html.escape(self.text)}</div></details>'
        )


@dataclass(frozen=True)
class ExampleBlock:
    """A problem and two answers."""

    example: Example
    is_open: bool = False

    def _parts(self) -> list[tuple[str, str]]:
        """Titles and texts, with nothing in them that hides or turns other text."""
        example = self.example
        parts = [
            ("Prompt", _shorten(example.prompt, *_PROMPT_ENDS)),
            ("Reference", _shorten(example.reference, *_PROMPT_ENDS)),
        ]
        return parts + [(_describe(answer), _shorten(answer.text, *_ANSWER_ENDS)) for answer in example.answers]

    def _title(self) -> str:
        ours, theirs = self.example.answers
        return f"{self.example.task}, problem {self.example.problem}: {ours.model} {ours.mean:.2f}, {theirs.model} {theirs.mean:.2f}"

    def to_markdown(self) -> str:
        parts = "\n\n".join(f"{_escape(title)}\n\n{_fence(text)}" for title, text in self._parts())
        return f"### {_escape(self._title())}\n\n{parts}"

    def to_html(self) -> str:
        parts = "".join(
            f'<div><p class="note">{html.escape(title)}</p><div class="text" dir="auto" tabindex="0">{html.escape(text)}</div></div>'
            for title, text in self._parts()
        )
        return (
            f'<details class="example"{" open" if self.is_open else ""}><summary><b>{html.escape(self._title())}</b></summary>'
            f'<div class="answers">{parts}</div></details>'
        )


def _cell(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def _describe(answer: Answer) -> str:
    found = (
        f"taken for its answer: {_shorten(answer.extracted, 60, 30)}"
        if answer.extracted is not None
        else "no answer found"
    )
    ended = {"length": ", cut off", "stop": ""}.get(answer.finish_reason or "", "")
    return f"{answer.model}: score {answer.score:g}, {found}{ended}"


def _shorten(text: str, head: int, tail: int) -> str:
    """The ends of a text, with characters that have no shape made visible."""
    left_out = len(text) - head - tail
    # A mark in place of a few characters would be longer than they are
    if left_out > 40:
        text = f"{text[:head]}\n… {left_out:,} characters …\n{text[-tail:]}"
    return visible_text(text.replace("\r\n", "\n"))


def _fence(text: str) -> str:
    """A code block that its text cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _prose(text: str) -> str:
    """HTML of a sentence of ours, in which code stands between backquotes."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _escape(text: str) -> str:
    """Text of others in which Markdown finds no markup."""
    return re.sub(r"[\\`*<>]|\](?=[(\[:])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def render_markdown(title: str, parts: Sequence) -> str:
    """
    Renders a report as Markdown.

    Args:
        title (`str`):
            Its title.
        parts (`Sequence`):
            Its parts.

    Returns:
        `str`: The text.
    """
    return "\n\n".join([f"# {_escape(title)}", *(part.to_markdown() for part in parts)]) + "\n"


def render_html(title: str, parts: Sequence) -> str:
    """
    Renders a report as one HTML document.

    Args:
        title (`str`):
            Its title.
        parts (`Sequence`):
            Its parts.

    Returns:
        `str`: HTML that refers to no other file.
    """
    body = "\n".join(part.to_html() for part in parts)
    return render_document(
        title=f"{title}: evaluation report", heading=title, kicker="Evaluation report", body=body, style=_STYLE
    )


_STYLE = """\
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
.figures { width: auto; min-width: 50%; }
.figures .words { text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 7rem; max-width: 30rem; }
.figures thead th:not(:first-child) { white-space: nowrap; }
.figures .group th { padding-top: .9rem; font-weight: 600; border-bottom-color: var(--muted); }
.warning { border-left: 4px solid var(--low); padding: .4rem .8rem; background: var(--card); }
.plots { align-items: start; margin: .8rem 0 1.2rem; }
.answers { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.answers > div { border-top: 1px solid var(--faint); min-width: 0; }
.answers .note { margin: .5rem .8rem 0; }
.answers .text { border: 0; padding-top: .2rem; }
li { margin: .35rem 0; max-width: 62rem; }
@media (max-width: 48rem) {
  .answers { grid-template-columns: minmax(0, 1fr); }
  .example summary b { display: inline; }
  .figures th:first-child { position: sticky; left: 0; background: var(--page); padding-right: .6rem; }
}"""
