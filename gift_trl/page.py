"""What the pages share: one self-contained HTML document in a light and a dark look, for wide and narrow windows."""

import base64
import html
import unicodedata
from collections.abc import Callable, Mapping
from io import BytesIO
from string import Template
from typing import BinaryIO


# Characters that join others into one sign, and have to stay where they are
_JOINERS = "\u200c\u200d"


def render_document(*, title: str, kicker: str, body: str, style: str = "", heading: str | None = None) -> str:
    """
    Renders a document.

    Args:
        title (`str`):
            Title of the document, as plain text.
        kicker (`str`):
            What kind of page it is, written above the heading; plain text.
        body (`str`):
            HTML below the heading.
        style (`str`, *optional*, defaults to `""`):
            CSS rules of this page.
        heading (`str`, *optional*):
            Heading as plain text. Defaults to `title`.

    Returns:
        `str`: HTML that refers to no other file and runs no script.
    """
    return Template(_DOCUMENT).substitute(
        title=html.escape(title),
        kicker=html.escape(kicker),
        heading=html.escape(title if heading is None else heading),
        base=_STYLE,
        style=style,
        body=body,
    )


def embed_picture(draw: Callable[[BinaryIO, bool], None], alt: str) -> str:
    """
    Draws a picture into a document, once for each look.

    Args:
        draw (`Callable`):
            Writes the picture as PNG to the binary file it is given; the second argument is whether it is for a dark page.
        alt (`str`):
            What it shows, in words.

    Returns:
        `str`: HTML.
    """
    light, dark = (_data_url(draw, dark=dark) for dark in (False, True))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{html.escape(alt)}" src="{light}"></picture>'
    )


def visible_text(text: str, marks: Mapping[str, str] = {"\n": "\n", "\t": "\t"}) -> str:
    """
    Makes characters without a shape of their own visible, which else hide, or turn the direction of what follows.

    Args:
        text (`str`):
            The text.
        marks (`Mapping[str, str]`, *optional*):
            What stands for a character in place of its number. By default line breaks and tabs stay as they are.

    Returns:
        `str`: The text, still to be escaped.
    """
    return "".join(marks.get(c) or (f"⟨U+{ord(c):04X}⟩" if _has_no_shape(c) else c) for c in text)


def _has_no_shape(character: str) -> bool:
    return unicodedata.category(character)[0] == "C" and character not in _JOINERS


def _data_url(draw: Callable[[BinaryIO, bool], None], *, dark: bool) -> str:
    file = BytesIO()
    draw(file, dark)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


_STYLE = """\
:root { color-scheme: light dark; --text: #1d1f22; --muted: #666b72; --faint: #e3e5e8; --page: #fff; --card: #fafafa;
  --low: #e08a4b; --middle: #cdcdc8; --high: #5b9bd1; --bar: #8b93a0; }
@media (prefers-color-scheme: dark) {
:root { --text: #e4e6e9; --muted: #9aa0a8; --faint: #34373c; --page: #16181b; --card: #1c1e22;
  --low: #cf7434; --middle: #6b6e73; --high: #4f94d4; --bar: #7d8694; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", sans-serif;
  color: var(--text); background: var(--page); max-width: 72rem; margin: 0 auto; padding: 1.6rem 1.2rem 3rem;
  -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .2rem; padding-top: .9rem; border-top: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .2rem 0 .8rem; max-width: 62rem; }
.kicker { color: var(--muted); font-size: .85rem; margin: 0; }
.note { color: var(--muted); font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.figures { width: 100%; }
.figures th, .figures td { padding: .28rem 0 .28rem 1rem; text-align: right; border-bottom: 1px solid var(--faint);
  font-weight: normal; vertical-align: top; }
.figures th:first-child { text-align: left; padding-left: 0; }
.figures thead th { color: var(--muted); font-size: .85rem; }
.figures td { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); margin: 0 0 1.2rem; }
dt, dd { margin: 0; padding: .28rem 0; border-bottom: 1px solid var(--faint); }
dt { color: var(--muted); padding-right: 1.2rem; }
dd { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1rem 2.5rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; color: var(--muted); }
figcaption b { display: block; font-weight: 600; font-size: .93rem; color: var(--text); }
img { width: 100%; height: auto; }
.example { margin: 0 0 .8rem; border: 1px solid var(--faint); border-radius: 6px; background: var(--card); }
.example summary { padding: .45rem .8rem; cursor: pointer; font-variant-numeric: tabular-nums; }
.example summary span { display: inline-block; color: var(--muted); margin-left: 1rem; }
.text { padding: .6rem .8rem; max-height: 19rem; overflow: auto; border-top: 1px solid var(--faint); }
.text, .context { font: 13px/1.65 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 48rem) {
  .plots { grid-template-columns: minmax(0, 1fr); }
  .example summary span { margin-left: 0; margin-right: .7rem; }
  .example summary b { display: inline-block; margin-right: .7rem; }
}"""

_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
$base
$style
</style>
</head>
<body>
<p class="kicker">$kicker</p>
<h1>$heading</h1>
$body
</body>
</html>
"""
