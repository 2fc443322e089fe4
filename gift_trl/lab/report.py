"""The results of a comparison as a terminal table, a page and a JSON file."""

import html
import json
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from rich.table import Table

from gift_trl.annotation.provenance import library_versions
from gift_trl.lab.comparison import METHODS
from gift_trl.lab.corpora import MIXES
from gift_trl.lab.evaluation import Scores
from gift_trl.lab.figures import plot_comparison
from gift_trl.lab.findings import Findings, describe_findings, paired_difference
from gift_trl.lab.results import Comparison, ScoredExample
from gift_trl.page import embed_picture, render_document
from gift_trl.plots import BAND_NAMES


PAGE_FILE, FIGURE_FILE, RESULTS_FILE = "report.html", "comparison.png", "results.json"

_COLUMNS = ("target", "short", "retention")
# Shades of the example: from a token the instruct model would not have written to one it was sure of.
_LOW, _MIDDLE, _HIGH = (240, 150, 90), (245, 245, 240), (120, 180, 230)


def make_table(comparison: Comparison) -> Table:
    """
    Makes the terminal table.

    Args:
        comparison ([`Comparison`]):
            The results.

    Returns:
        [`~rich.table.Table`]: The table.
    """
    table = Table(title=f"Accuracy (%) and learning signal, seed {comparison.seed}", title_justify="left")
    table.add_column("model")
    for name in (*_COLUMNS, "vs instruct"):
        table.add_column(name, justify="right")
    table.add_column(f"signal by q\n{' / '.join(BAND_NAMES)}", justify="right")
    for section in _sections(comparison):
        if section["heading"]:
            table.add_section()
            table.add_row(f"[bold]{section['heading']}[/bold]", "", "", "", "", f"tokens: {section['tokens']}")
        for row in section["rows"]:
            table.add_row(*row)
    return table


def describe_mixes(comparison: Comparison) -> list[str]:
    """
    Says what the mixes of a comparison are.

    Args:
        comparison ([`Comparison`]):
            The results.

    Returns:
        `list[str]`: A line for each mix.
    """
    mixes = dict.fromkeys(result.setting.mix for result in comparison.settings)
    return [f"mix {mix}: {MIXES[mix].description}" for mix in mixes]


def write_report(comparison: Comparison, output_dir: Path, *, seconds: float) -> None:
    """
    Writes the page, the picture and the results into a folder.

    Args:
        comparison ([`Comparison`]):
            The results.
        output_dir (`Path`):
            Existing folder.
        seconds (`float`):
            Time of the whole run.
    """
    findings = describe_findings(comparison)
    plot_comparison(comparison, output_dir / FIGURE_FILE)
    body = Template(_BODY).substitute(
        seed=comparison.seed,
        table=_html_table(comparison),
        shows=_html_list(findings.shows),
        does_not_show=_html_list(findings.does_not_show),
        picture=embed_picture(partial(plot_comparison, comparison), _PICTURE_ALT),
        methods="".join(
            f"<li><b>{html.escape(method.name)}</b>: {html.escape(method.description)}</li>" for method in METHODS
        ),
        example=_html_example(comparison.example),
        mix=html.escape(comparison.example.mix),
        legend=_html_legend(),
        mixes=html.escape("; ".join(describe_mixes(comparison))),
        num_target=len(comparison.instruct.target),
        num_short=len(comparison.instruct.short),
        num_retention=len(comparison.instruct.retention),
        seconds=f"{seconds:.0f}",
        versions=html.escape(", ".join(f"{name} {version}" for name, version in library_versions().items())),
    )
    page = render_document(
        title=f"GIFT quick start, seed {comparison.seed}",
        heading="Four ways to fine-tune an instruct model, on a tiny pair",
        kicker="Quick start",
        body=body,
        style=_STYLE,
    )
    (output_dir / PAGE_FILE).write_text(page, encoding="utf-8")
    results = json.dumps(_to_dict(comparison, findings, seconds), indent=2, ensure_ascii=False)
    (output_dir / RESULTS_FILE).write_text(f"{results}\n", encoding="utf-8")


def _sections(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows of the table, which terminal and page share."""
    models = [
        ("base model", *_percentages(comparison.base), _versus(comparison.base, comparison), ""),
        ("instruct model", *_percentages(comparison.instruct), "", ""),
    ]
    sections: list[dict[str, Any]] = [{"heading": "", "tokens": "", "rows": models}]
    for result in comparison.settings:
        rows = [
            (
                outcome.method,
                *_percentages(outcome.scores),
                _versus(outcome.scores, comparison),
                _shares(outcome.signal),
            )
            for outcome in result.results
        ]
        sections.append({"heading": str(result.setting), "tokens": _shares(result.tokens), "rows": rows})
    return sections


def _percentages(scores: Scores) -> list[str]:
    return [f"{scores.accuracies[column]:.1f}" for column in _COLUMNS]


def _versus(scores: Scores, comparison: Comparison) -> str:
    return str(paired_difference(scores.target, comparison.instruct.target))


def _shares(shares: tuple[float, ...]) -> str:
    return " / ".join(f"{share:.0f}" for share in shares)


def _html_table(comparison: Comparison) -> str:
    headings = ["model", *_COLUMNS, "target vs instruct model", f"signal by q: {' / '.join(BAND_NAMES)}"]
    lines = ["<thead><tr>", *(f"<th>{html.escape(heading)}</th>" for heading in headings), "</tr></thead><tbody>"]
    for section in _sections(comparison):
        if section["heading"]:
            heading, tokens = html.escape(section["heading"]), html.escape(section["tokens"])
            lines.append(f'<tr class="setting"><th colspan="5">{heading}</th><td>tokens: {tokens}</td></tr>')
        for name, *values in section["rows"]:
            cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
            lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return "".join([*lines, "</tbody>"])


def _html_list(sentences: tuple[str, ...]) -> str:
    return "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)


def _html_example(example: ScoredExample) -> str:
    tokens = "".join(
        f'<span class="token" style="background:{_shade(confidence)}" title="q = {confidence:.4f}">'
        f"{html.escape(token)}<small>{confidence:.2f}</small></span>"
        for token, confidence in example.tokens
    )
    return f'<p class="question">{html.escape(example.question)}</p><p class="answer">{tokens}</p>'


def _html_legend() -> str:
    marks = "".join(
        f'<span class="token" style="background:{_shade(mark / 4)}">q = {mark / 4:g}</span>' for mark in range(5)
    )
    return f'<p class="legend">{marks}</p>'


def _shade(confidence: float) -> str:
    start, end = (_LOW, _MIDDLE) if confidence < 0.5 else (_MIDDLE, _HIGH)
    share = 2 * confidence if confidence < 0.5 else 2 * confidence - 1
    return f"rgb({','.join(str(round(a + share * (b - a))) for a, b in zip(start, end, strict=True))})"


def _to_dict(comparison: Comparison, findings: Findings, seconds: float) -> dict[str, Any]:
    return {
        "seed": comparison.seed,
        "seconds": round(seconds, 1),
        "versions": library_versions(),
        "models": {name: _scores_to_dict(getattr(comparison, name)) for name in ("base", "instruct")},
        "settings": [
            {
                "mix": result.setting.mix,
                "learning_rate": result.setting.learning_rate,
                "tokens": dict(zip(BAND_NAMES, result.tokens, strict=True)),
                "methods": {
                    outcome.method: {
                        **_scores_to_dict(outcome.scores),
                        "signal": dict(zip(BAND_NAMES, outcome.signal, strict=True)),
                        "training_loss": outcome.training_loss,
                        "seconds": round(outcome.seconds, 2),
                    }
                    for outcome in result.results
                },
            }
            for result in comparison.settings
        ],
        "example": {
            "mix": comparison.example.mix,
            "question": comparison.example.question,
            "tokens": comparison.example.tokens,
        },
        "shows": findings.shows,
        "does_not_show": findings.does_not_show,
    }


def _scores_to_dict(scores: Scores) -> dict[str, Any]:
    return {
        "accuracies": scores.accuracies,
        # One digit a question, so that runs can be compared in pairs.
        "correct": {column: "".join(str(int(right)) for right in getattr(scores, column)) for column in _COLUMNS},
    }


_PICTURE_ALT = "Bars of the target accuracy of each method by setting, and stacked bars of the learning-signal shares"

_STYLE = """\
.scroll { overflow-x: auto; }
.setting th, .setting td { padding-top: 1rem; font-weight: 600; border-bottom-color: var(--muted); }
tbody th { white-space: nowrap; }
li { margin: .35rem 0; }
.question { font-style: italic; }
.answer { line-height: 2.9; }
.token { display: inline-block; line-height: 1.15; padding: .15rem .4rem; margin: .1rem; border-radius: .25rem;
  text-align: center; color: #1d1f22; }
.token small { display: block; font-size: .68rem; }
@media (max-width: 48rem) { .scroll img { min-width: 44rem; } }"""

_BODY = """\
<p class="note">gift-trl quickstart, seed $seed. Base and instruct model, data, training, merging and evaluation were
made on this machine.</p>
<ul>$methods</ul>

<h2>Accuracy in percent, and where the learning signal comes from</h2>
<div class="scroll"><table class="figures">$table</table></div>
<p class="note">target: $num_target held-out problems of three to five operations with distracting sentences. short:
$num_short problems of one to three operations. retention: $num_retention list tasks. ±: twice the standard error over
the questions, which are the same for every model. signal: shares of the weighted loss before training that come from
tokens with a low, middling or high confidence q of the instruct model. $mixes.</p>
<div class="scroll" tabindex="0">$picture</div>

<h2>What this run shows</h2>
<ul>$shows</ul>
<h2>What it does not show</h2>
<ul>$does_not_show</ul>

<h2>An example of mix $mix, shaded by the instruct model's confidence</h2>
<p class="note">q is the probability the instruct model gives to the token, written below it. GIFT weighs the token by
it; the token that ends the turn weighs 1 whatever its q.</p>
$legend
$example
<p class="note">$seconds seconds. $versions.</p>
"""
