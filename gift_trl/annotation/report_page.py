"""The page of the annotation report: numbers, excerpts and provenance in, one self-contained HTML document out."""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from string import Template
from typing import Any

import numpy as np

from gift_trl.annotation.excerpts import RowExample, ShownToken, TokenInContext
from gift_trl.annotation.provenance import Provenance
from gift_trl.annotation.report_template import BODY, STYLE
from gift_trl.annotation.summary import BANDS, SUSPICIOUS_MEAN, ConfidenceSummary
from gift_trl.page import render_document, visible_text


_BAND_NAMES = (f"q < {BANDS[0]}", f"q {BANDS[0]} to {BANDS[1]}", f"q > {BANDS[1]}")
# Shades of the text from q = 0 over 0.5 to 1: orange, the page, blue, which colour-blind readers tell apart
_SHADES = 20
_LIGHT = ((246, 163, 104), (246, 246, 243), (124, 183, 236))
_DARK = ((160, 78, 20), (40, 41, 44), (28, 92, 158))
# Shades cannot tell 0.01 from 0.000001, so the latter have a shade of their own
_VERY_LOW = 0.001
_PLOT_HEIGHT = 170


def render_page(
    *,
    title: str,
    summaries: Mapping[str, ConfidenceSummary],
    provenances: Mapping[str, Sequence[Provenance]],
    examples: Sequence[RowExample],
    lowest: Sequence[TokenInContext],
) -> str:
    """
    Renders the page.

    Args:
        title (`str`):
            Name of the dataset.
        summaries (`Mapping[str, ConfidenceSummary]`):
            Summaries by split.
        provenances (`Mapping[str, Sequence[Provenance]]`):
            Provenances by split, none where a dataset says nothing of itself.
        examples (`Sequence[RowExample]`):
            Rows to show.
        lowest (`Sequence[TokenInContext]`):
            Tokens to show.

    Returns:
        `str`: HTML that refers to no other file.
    """
    body = Template(BODY).substitute(
        data=_render_data(summaries, provenances),
        provenance=_render_provenances(provenances),
        distributions="".join(_render_distribution(split, summary) for split, summary in summaries.items()),
        legend=_render_legend(),
        examples="".join(_render_example(example) for example in examples),
        num_lowest=len(lowest),
        lowest="".join(_render_lowest(token) for token in lowest),
    )
    style = Template(STYLE).substitute(light_shades=_shade_rules(_LIGHT), dark_shades=_shade_rules(_DARK))
    return render_document(
        title=f"{title}: annotation report", heading=title, kicker="Annotation report", body=body, style=style
    )


def _render_data(summaries: Mapping[str, ConfidenceSummary], provenances: Mapping[str, Sequence[Provenance]]) -> str:
    """A column for each split, which is few and narrow enough for a phone."""
    every = summaries.values()
    rows: list[tuple[str, list[str]]] = [
        ("Rows", [f"{summary.rows:,}" for summary in every]),
        ("Target tokens", [f"{summary.targets:,}" for summary in every]),
        ("Target tokens per row", [f"{summary.targets / summary.rows:,.1f}" for summary in every]),
        ("Mean q", [f"{summary.mean:.3f}" for summary in every]),
        (
            f"Rows with a mean q below {SUSPICIOUS_MEAN}",
            [f"{summary.suspicious_rows:,} ({_percent(summary.suspicious_rows / summary.rows)})" for summary in every],
        ),
    ]
    # A dataset may have several provenances after a concatenation, or none, which is not the same as no such row
    known = [provenances[split] for split in summaries]
    counts = {"Rows truncated": [sum(p.truncated for p in ps) for ps in known]}
    for reason in sorted({reason for ps in known for p in ps for reason in p.dropped}):
        counts[f"Rows left out: {reason}"] = [sum(len(p.dropped.get(reason, [])) for p in ps) for ps in known]
    for name, values in counts.items():
        cells = [f"{value:,}" if ps else "unknown" for value, ps in zip(values, known, strict=True)]
        rows.append((name, cells))
    head = "".join(f"<th>{html.escape(split)}</th>" for split in summaries)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    return f'<table class="figures"><thead><tr><th>Split</th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _render_provenances(provenances: Mapping[str, Sequence[Provenance]]) -> str:
    """Splits that were scored alike share a list."""
    alike: dict[str, tuple[Provenance, list[str]]] = {}
    for split, several in provenances.items():
        for provenance in several:
            fields = asdict(provenance)
            key = json.dumps({k: v for k, v in fields.items() if k not in ("rows", "truncated", "dropped")})
            names = alike.setdefault(key, (provenance, []))[1]
            if split not in names:
                names.append(split)
    unknown = [split for split, several in provenances.items() if not several]
    parts = [_render_provenance(provenance, names) for provenance, names in alike.values()]
    if unknown:
        them = html.escape(", ".join(unknown))
        parts.append(f'<p class="note">{them}: no provenance, so nothing says what scored these tokens.</p>')
    return "".join(parts)


def _render_provenance(provenance: Provenance, splits: Sequence[str]) -> str:
    targets = "all tokens, or the completion where there is one"
    if provenance.completion_only_loss is not None:
        targets = "completion" if provenance.completion_only_loss else "prompt and completion"
    if provenance.assistant_only_loss:
        targets = "assistant turns"
    cut = "none" if provenance.max_length is None else f"{provenance.max_length:,} tokens"
    entries = {
        "Splits": ", ".join(splits),
        "Scoring model": provenance.model,
        "Commit": provenance.commit,
        "Weights": provenance.weights and f"{provenance.weights[:16]}…",
        "Data type": provenance.dtype,
        "Quantisation": provenance.quantization,
        "Engine": provenance.engine,
        "Maximum length": cut,
        "Targets": targets,
        "End-of-turn ids": ", ".join(map(str, provenance.end_of_turn_token_ids)) or "unknown",
        "Vocabulary": provenance.vocabulary,
        "Chat template": provenance.chat_template,
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(provenance.versions.items())),
    }
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in entries.items() if value)
    return f"<dl>{items}</dl>"


def _render_distribution(split: str, summary: ConfidenceSummary) -> str:
    bins, width = len(summary.histogram), 1 / len(summary.histogram)
    middles = [(i + 0.5) * width for i in range(bins)]
    tokens = _render_histogram(
        summary.histogram.tolist(),
        [f"band{(q > BANDS[0]) + (q > BANDS[1])}" for q in middles],
        summary.mean,
        "tokens",
    )
    means = _render_histogram(
        summary.row_histogram.tolist(),
        ["band0" if q < SUSPICIOUS_MEAN else "row-bar" for q in middles],
        float(np.nanmean(summary.row_means)),
        "rows",
    )
    bars = "".join(
        f'<div class="stack-name">{name}</div><div class="stack">'
        + "".join(f'<span class="band{i}" style="width:{share:.3%}"></span>' for i, share in enumerate(shares))
        + "</div>"
        for name, shares in (("target tokens", summary.token_shares), ("weight Σq", summary.weight_shares))
    )
    table = "".join(
        f'<tr><th><i class="swatch band{i}"></i>{html.escape(name)}</th><td>{round(token * summary.targets):,}</td>'
        f"<td>{_percent(token)}</td><td>{_percent(weight)}</td></tr>"
        for i, (name, token, weight) in enumerate(
            zip(_BAND_NAMES, summary.token_shares, summary.weight_shares, strict=True)
        )
    )
    return (
        f"<h3>{html.escape(split)}</h3>"
        '<div class="plots">'
        f"<figure><figcaption><b>Target tokens by confidence q</b> tokens per {width:g}, logarithmic</figcaption>"
        f"{tokens}</figure>"
        f"<figure><figcaption><b>Rows by mean confidence</b> rows per {width:g}, logarithmic; orange: below "
        f"{SUSPICIOUS_MEAN}</figcaption>{means}</figure></div>"
        f'<div class="bands"><div class="stacks">{bars}</div><table class="figures"><thead><tr><th>Band</th>'
        f"<th>tokens</th><th>of tokens</th><th>of weight Σq</th></tr></thead><tbody>{table}</tbody></table></div>"
    )


def _render_histogram(counts: Sequence[int], classes: Sequence[str], mean: float, unit: str) -> str:
    """Bars over 0 to 1 of logarithmic height. Places along x are percentages, so that text keeps its size."""
    # From the power of ten below the smallest bar, so that it has a height and the others their differences
    highest = max(counts)
    base = 10 ** math.floor(math.log10(min(count for count in counts if count))) / 2
    span = math.log10(max(highest, 4 * base) / base)

    def place(count: float) -> float:
        return _PLOT_HEIGHT * (1 - math.log10(max(count, base) / base) / span)

    parts = []
    # Powers of ten, and steps between where there are few of them
    steps = (1,) if span > 2.4 else (1, 2, 5)
    for tick in (step * 10**power for power in range(19) for step in steps):
        if base <= tick <= highest:
            y = place(tick)
            parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="end" x="-8" y="{y + 4:.1f}">{_short_number(tick)}</text>')
    size, total = 100 / len(counts), sum(counts)
    for i, (count, name) in enumerate(zip(counts, classes, strict=True)):
        x, y = i * size, place(count)
        says = f"{i * size / 100:.2f} to {(i + 1) * size / 100:.2f}: {count:,} {unit} ({_percent(count / total)})"
        # The whole column answers to the pointer, also where the bar is a pixel high
        parts.append(
            f'<g><title>{says}</title><rect class="column" x="{x:g}%" width="{size:g}%" height="{_PLOT_HEIGHT}"/>'
            f'<rect class="{name}" x="{x + 0.1 * size:g}%" width="{0.8 * size:g}%" y="{y:.1f}" '
            f'height="{_PLOT_HEIGHT - y:.1f}"/></g>'
        )
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{_PLOT_HEIGHT}" y2="{_PLOT_HEIGHT}"/>')
    for tick in range(6):
        parts.append(f'<text class="middle" x="{20 * tick}%" y="{_PLOT_HEIGHT + 18}">{tick / 5:g}</text>')
    parts.append(
        f'<text class="middle" x="50%" y="{_PLOT_HEIGHT + 36}">{"mean q of the row" if unit == "rows" else "q"}</text>'
    )
    side = "end" if mean > 0.5 else ""
    parts.append(f'<line class="mean" x1="{mean:.2%}" x2="{mean:.2%}" y1="-14" y2="{_PLOT_HEIGHT}"/>')
    parts.append(f'<text class="{side}" x="{mean:.2%}" dx="{-5 if side else 5}" y="-6">mean {mean:.3f}</text>')
    label = f"Histogram of {total:,} {unit} by confidence from 0 to 1, mean {mean:.3f}"
    return f'<svg class="plot" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _render_example(example: RowExample) -> str:
    quantile = round(100 * example.quantile)
    name = {0: "Lowest", 50: "Median", 100: "Highest"}.get(
        quantile, f"{quantile}{'st' if quantile == 1 else 'th'} percentile"
    )
    return (
        f'<details class="example" open><summary><b>{name}</b> <span>mean q {_number(example.mean)}</span> '
        f"<span>{html.escape(example.split)}, row {example.row:,}</span> "
        f"<span>{example.targets:,} target tokens</span></summary>"
        f'<div class="text" dir="auto" tabindex="0">{_render_parts(example.parts, breaks=True)}</div></details>'
    )


def _render_lowest(shown: TokenInContext) -> str:
    context = (
        _render_parts(shown.before, breaks=False)
        + _render_token(shown.token, shown.after, breaks=False, focus=" focus")
        + _render_parts(shown.after, breaks=False)
    )
    cells = {
        "q": f"{shown.token.confidence:.2e}",
        "split": html.escape(shown.split),
        "row": f"{shown.row:,}",
        "position": f"{shown.position:,}",
        "id": str(shown.token.token_id),
    }
    tds = "".join(f'<td class="{name}" data-label="{name}">{value}</td>' for name, value in cells.items())
    return f'<tr>{tds}<td class="context" dir="auto">{context}</td></tr>'


def _render_parts(parts: Sequence[ShownToken | int], *, breaks: bool) -> str:
    """Target tokens one by one; the others, and what is left out, in one piece each."""
    rendered = []
    entries: Iterable[tuple[int, Any]] = enumerate(parts)
    for kind, group in groupby(entries, key=lambda entry: _kind(entry[1])):
        if kind == "target":
            rendered += [_render_token(token, parts[i + 1 :], breaks=breaks) for i, token in group]
        elif kind == "prompt":
            text = "".join(token.text for _, token in group)
            rendered.append(f'<span class="prompt">{html.escape(_visible(text, breaks=breaks))}</span>')
        else:
            rendered += [f'<span class="gap"> … {count:,} tokens … </span>' for _, count in group]
    return "".join(rendered)


def _kind(part: ShownToken | int) -> str:
    if isinstance(part, int):
        return "gap"
    return "prompt" if part.confidence is None else "target"


def _render_token(token: ShownToken, following: Iterable[ShownToken | int], *, breaks: bool, focus: str = "") -> str:
    text, says = _visible(token.text, breaks=breaks), f"“{_visible(token.text, breaks=False)}”"
    if not token.text:
        whole = next((part.text for part in following if not isinstance(part, int) and part.text), "")
        says = f"part of “{_visible(whole, breaks=False)}”"
    assert token.confidence is not None  # only targets are shaded
    low = " very-low" if token.confidence < _VERY_LOW else ""
    part = "" if token.text else " part"
    shade = min(_SHADES - 1, int(token.confidence * _SHADES))
    title = html.escape(f"{says} · id {token.token_id} · q = {_number(token.confidence)}")
    return f'<span class="t q{shade}{low}{part}{focus}" title="{title}">{html.escape(text)}</span>'


def _visible(text: str, *, breaks: bool) -> str:
    """Text in which line breaks, tabs and characters without a shape of their own can be seen."""
    return visible_text(text, {"\n": "⏎\n", "\t": "⇥\t"} if breaks else {"\n": "⏎", "\t": "⇥"})


def _render_legend() -> str:
    boxes = "".join(f'<span class="q{i}"></span>' for i in range(_SHADES))
    return (
        f'<div class="legend"><div class="scale"><span>q = 0</span><div class="ramp">{boxes}</div><span>1</span></div>'
        f'<span><i class="swatch very-low"></i>q below {_VERY_LOW:g}</span>'
        '<span><span class="t q14 part"></span>&ensp;bytes of the character that follows</span>'
        '<span><span class="prompt">grey</span> no target: prompt, template</span></div>'
    )


def _shade_rules(colors: tuple[tuple[int, int, int], ...]) -> str:
    rules = []
    for i in range(_SHADES):
        place = 2 * i / (_SHADES - 1)
        low = min(int(place), 1)
        mixed = (round(a + (place - low) * (b - a)) for a, b in zip(colors[low], colors[low + 1], strict=True))
        rules.append(f".q{i}{{background:rgb({','.join(map(str, mixed))})}}")
    return "\n".join(rules)


def _number(q: float) -> str:
    return f"{q:.3f}" if q >= _VERY_LOW else f"{q:.1e}"


def _percent(share: float) -> str:
    """One decimal, which neither hides what exists nor completes what is not complete."""
    if 0 < share < 0.0005:
        return "&lt;0.1%"
    return "&gt;99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def _short_number(value: int) -> str:
    for size, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value // size}{name}"
    return str(value)
