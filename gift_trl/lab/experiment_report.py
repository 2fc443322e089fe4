"""The page of an experiment: what it shows in words made from its numbers, tables, pictures, and all runs as one JSON file."""

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from gift_trl.annotation.provenance import library_versions
from gift_trl.lab.corpora import MIXES
from gift_trl.lab.experiment import EXPONENTS, VARIANTS, Experiment
from gift_trl.lab.experiment_figures import COLORS, plot_curves, plot_rows, plot_signal
from gift_trl.lab.summary import Row, best_rows, shared_rows
from gift_trl.page import embed_picture, render_document
from gift_trl.plots import BAND_NAMES


PAGE_FILE, TEXT_FILE, RESULTS_FILE = "lab.html", "lab.md", "lab.json"
_REFERENCES = ("Instruct-SFT", "Shadow-FT", "GIFT-BaseT", "RE-Adapt", "LoRE-Adapt")


@dataclass(frozen=True)
class Section:
    """
    A part of the page.

    Args:
        title (`str`):
            Heading.
        note (`str`):
            What the table and the picture are.
        headings (`Sequence[str]`):
            Of the table's columns.
        rows (`Sequence[Sequence[str]]`):
            The table.
        picture (`str`, *optional*):
            Name of a PNG file.
        draw (`Callable`, *optional*):
            Draws the picture into a file, for a dark page or not.
    """

    title: str
    note: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    picture: str | None = None
    draw: Callable[[str | Path | BinaryIO, bool], None] | None = None


def write_experiment_report(experiment: Experiment, folder: Path, *, command: str) -> list[str]:
    """
    Writes `lab.html`, `lab.md`, `lab.json` and the pictures.

    Args:
        experiment ([`Experiment`]):
            The runs.
        folder (`Path`):
            Existing folder.
        command (`str`):
            The command that made the runs.

    Returns:
        `list[str]`: The conclusions, a sentence each.
    """
    cells = [run.cell for run in experiment.runs]
    mixes = [mix for mix in MIXES if any(cell.mix == mix for cell in cells)]
    sizes = sorted({cell.num_examples for cell in cells})
    size = max(sizes, key=lambda value: sum(cell.num_examples == value for cell in cells))
    rates = sorted({cell.learning_rate for cell in cells if cell.num_examples == size})
    conclusions = _conclusions(experiment, mixes, rates, size)
    sections = [
        _shared_section(experiment, mixes, rates, size),
        _best_section(experiment, mixes, size),
        _scale_section(experiment, mixes, rates, size),
        *([_size_section(experiment, mixes, sizes)] if len(sizes) > 1 else []),
        *_other_sections(experiment, mixes, rates, size),
        _signal_section(experiment, mixes, rates[-1], size),
    ]
    seeds = sorted(experiment.models)
    first = experiment.models[seeds[0]]["instruct"]
    counts = (len(first[0].target), len(first[0].retention), len(first[1]))
    about = (
        f"Tiny model pairs, one for each of the seeds {', '.join(map(str, seeds))}; {counts[0]} held-out target problems, "
        f"{counts[1]} retention questions, {counts[2]} other problems to choose settings by. ±: half the 95 % interval of "
        "the mean over the seeds (Student's t), of differences to the instruct model of the same seed. "
        + " ".join(f"Mix {mix}: {MIXES[mix].description}." for mix in mixes)
    )
    made_by = f"{command} ({sum(run.seconds for run in experiment.runs) / 60:.0f} minutes of runs)"
    text = [f"# The lab's experiment\n\n{about}\n\n## What it shows\n"]
    text.append("\n".join(f"- {sentence}" for sentence in conclusions))
    text += [_markdown(section) for section in sections]
    text.append(f"\nMade by `{command}`. {_versions()}.")
    (folder / TEXT_FILE).write_text("\n".join(text) + "\n", encoding="utf-8")
    body = f'<p class="note">{html.escape(about)}</p><h2>What it shows</h2><ul>'
    body += "".join(f"<li>{html.escape(sentence)}</li>" for sentence in conclusions) + "</ul>"
    body += "".join(_html(section) for section in sections)
    body += f'<p class="note">Made by {html.escape(made_by)}. {html.escape(_versions())}.</p>'
    page = render_document(title="Ways to fine-tune an instruct model", kicker="The lab's experiment", body=body)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    for section in sections:
        if section.draw is not None:
            section.draw(folder / section.picture, False)
    (folder / RESULTS_FILE).write_text(_json(experiment), encoding="utf-8")
    return conclusions


def _conclusions(experiment: Experiment, mixes: list[str], rates: list[float], size: int) -> list[str]:
    sentences = []
    for mix in mixes:
        rows = {row.method: row for row in best_rows(experiment, mix, size)}
        if "GIFT" not in rows:
            continue
        gift, others = rows["GIFT"], [rows[name] for name in _REFERENCES if name in rows]
        against = ", ".join(
            f"{gift.against(row)} against {row.method} ({gift.against(row).verdict})" for row in others
        )
        sentences.append(
            f"Mix {mix}, each method at its own best learning rate and scale: GIFT is {gift.against_instruct} points from "
            f"the instruct model ({gift.against_instruct.verdict}){'; ' if against else ''}{against}."
        )
        best = max(rows.values(), key=lambda row: row.against_instruct.mean)
        if best.against_instruct.verdict != "above":
            sentences.append(
                f"On mix {mix} no method is above the instruct model beyond error; the highest mean is {best.method}'s, "
                f"{best.against_instruct}."
            )
        else:
            above = [row.method for row in rows.values() if row.against_instruct.verdict == "above"]
            sentences.append(f"On mix {mix}, above the instruct model beyond error: {', '.join(above)}.")
    # What strains the methods most: the most noise in the references, and the largest learning rate
    noisiest = min(mixes, key=lambda mix: MIXES[mix].canonical_share, default="")
    stress = {row.method: row for row in shared_rows(experiment, noisiest, rates[-1], size)}
    if {"GIFT", "Shadow-FT", "Instruct-SFT"} <= stress.keys():
        sentences.append(
            f"At the largest learning rate ({rates[-1]:g}) on mix {noisiest}, all at scale 1: "
            + ", ".join(f"{name} {stress[name].against_instruct}" for name in COLORS if name in stress)
            + " points from the instruct model."
        )
    return sentences + _weighting_conclusions(experiment, mixes, rates, size)


def _weighting_conclusions(experiment: Experiment, mixes: list[str], rates: list[float], size: int) -> list[str]:
    """A sentence per weighting: where it is above plain q, above the instruct model, above both, and below plain q."""
    found: dict[str, dict[str, list[str]]] = {}
    names = {treatment.name for treatment in VARIANTS}
    for setting, rows in _settings(experiment, mixes, rates, size):
        for name in (rows.keys() & names) if "GIFT" in rows else ():
            by_gift, by_instruct = rows[name].against(rows["GIFT"]).verdict, rows[name].against_instruct.verdict
            places = found.setdefault(
                name, {"all": [], "above q": [], "above instruct": [], "both": [], "below q": []}
            )
            places["all"].append(setting)
            if by_gift == "above":
                places["above q"].append(setting)
            if by_instruct == "above":
                places["above instruct"].append(setting)
            if by_gift == by_instruct == "above":
                places["both"].append(setting)
            if by_gift == "below":
                places["below q"].append(setting)
    sentences = [
        f"Weights {name!r} in {len(places['all'])} settings, beyond error: above GIFT in "
        f"{_listed(places['above q'])}; above the instruct model in {_listed(places['above instruct'])}; above both in "
        f"{_listed(places['both'])}; below GIFT in {_listed(places['below q'])}."
        for treatment in VARIANTS
        if (places := found.get(name := treatment.name))
    ]
    if found:
        winners = [name for name, places in found.items() if places["both"] and not places["below q"]]
        sentences.append(
            f"Weights that beat both plain q and the instruct model somewhere and lose to q nowhere: {_listed(winners)}."
        )
    return sentences


def _settings(
    experiment: Experiment, mixes: list[str], rates: list[float], size: int
) -> Iterable[tuple[str, dict[str, Row]]]:
    """The rows of every learning rate at scale 1 by method, and those of each method's own best setting."""
    for mix in mixes:
        for rate in rates:
            yield f"{mix}, {rate:g}", {row.method: row for row in shared_rows(experiment, mix, rate, size)}
        yield f"{mix}, own best", {row.method: row for row in best_rows(experiment, mix, size)}


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names) or "none"


def _shared_section(experiment: Experiment, mixes: list[str], rates: list[float], size: int) -> Section:
    def rows_at(mix: str, rate: float) -> list[Row]:
        return _main(shared_rows(experiment, mix, rate, size))

    return Section(
        "All methods at the same setting",
        f"{size} examples, scale 1. RE-Adapt: θ_B + 0.5·Δ_I + M, LoRE-Adapt: half of the squared norm of Δ_I kept, both "
        "with the update of Shadow-FT.",
        ("mix, learning rate", "method", "target %", "against instruct", "retention against instruct"),
        [
            (f"{mix}, {rate:g}", row.method, f"{row.target:.1f}", str(row.against_instruct), str(row.retention))
            for mix in mixes
            for rate in rates
            for row in rows_at(mix, rate)
        ],
        "learning_rate.png",
        partial(plot_curves, mixes, rates, rows_at, "learning rate"),
    )


def _best_section(experiment: Experiment, mixes: list[str], size: int) -> Section:
    groups = [(f"mix {mix}", _main(best_rows(experiment, mix, size))) for mix in mixes]
    return Section(
        "Each method at its own best setting",
        f"{size} examples. Learning rate and scale are chosen on each seed by the validation problems, which are not "
        "those reported.",
        ("mix", "method", "target %", "against instruct", "retention against instruct", "chosen (rate, scale)"),
        [
            (title, row.method, f"{row.target:.1f}", str(row.against_instruct), str(row.retention), _choices(row))
            for title, rows in groups
            for row in rows
        ],
        "own_best.png",
        partial(plot_rows, groups),
    )


def _scale_section(experiment: Experiment, mixes: list[str], rates: list[float], size: int) -> Section:
    scales = sorted({float(merge) for run in experiment.runs for merge in run.scores if " " not in merge})
    rate = rates[-1]

    def rows_at(mix: str, scale: float) -> list[Row]:
        return _main(shared_rows(experiment, mix, rate, size, f"{scale:g}"))

    return Section(
        "The scale of the update",
        f"{size} examples, learning rate {rate:g}: target accuracy against the instruct model, by λ of θ_I + λ·M.",
        ("mix", "method", *(f"λ = {scale:g}" for scale in scales)),
        _across(mixes, scales, rows_at),
        "merge_scale.png",
        partial(plot_curves, mixes, scales, rows_at, "scale of the update", log=False),
    )


def _size_section(experiment: Experiment, mixes: list[str], sizes: list[int]) -> Section:
    smallest = [cell for cell in (run.cell for run in experiment.runs) if cell.num_examples == sizes[0]]
    rate = smallest[0].learning_rate

    def rows_at(mix: str, size: float) -> list[Row]:
        return _main(shared_rows(experiment, mix, rate, int(size)))

    return Section(
        "The number of examples",
        f"Learning rate {rate:g}, one epoch, scale 1: target accuracy against the instruct model.",
        ("mix", "method", *(f"{size} examples" for size in sizes)),
        _across(mixes, sizes, rows_at),
        "data_size.png",
        partial(plot_curves, mixes, sizes, rows_at, "training examples"),
    )


def _other_sections(experiment: Experiment, mixes: list[str], rates: list[float], size: int) -> Iterable[Section]:
    for title, note, treatments in (
        ("The exponent", "w = q ** exponent; 1 is GIFT, 0 is Shadow-FT.", EXPONENTS),
        ("Other weights than q", "See `gift_trl/lab/weightings.py`.", VARIANTS),
    ):
        names = {treatment.name for treatment in treatments}
        rows = [
            (
                setting,
                row.method,
                f"{row.target:.1f}",
                str(row.against_instruct),
                str(row.against(found["GIFT"])) if "GIFT" in found else "",
            )
            for setting, found in _settings(experiment, mixes, rates, size)
            for row in found.values()
            if row.method in names
        ]
        if rows:
            headings = ("mix, learning rate", "weights", "target %", "against instruct", "against GIFT")
            yield Section(title, f"{note} {size} examples, scale 1 but where each is at its own best.", headings, rows)


def _signal_section(experiment: Experiment, mixes: list[str], rate: float, size: int) -> Section:
    groups = []
    for mix in mixes:
        runs = [
            r for r in experiment.runs if (r.cell.mix, r.cell.learning_rate, r.cell.num_examples) == (mix, rate, size)
        ]
        bars = [("share of tokens", _mean([run.tokens for run in runs]))] if runs else []
        for method in COLORS:
            if shares := [run.signal for run in runs if run.treatment == method]:
                bars.append((method, _mean(shares)))
        groups.append((f"mix {mix}", bars))
    return Section(
        "Where the learning signal comes from",
        "Shares of the weighted loss before training by the instruct model's confidence in the token, mean over the seeds.",
        ("mix", "method", *BAND_NAMES),
        [(title, name, *(f"{share:.0f} %" for share in shares)) for title, bars in groups for name, shares in bars],
        "signal.png",
        partial(plot_signal, groups),
    )


def _main(rows: Sequence[Row]) -> list[Row]:
    """The methods of the paper, in their order, without exponents and other weights."""
    found = {row.method: row for row in rows}
    return [found[method] for method in COLORS if method in found]


def _across(mixes: list[str], places: Sequence[float], rows_at) -> list[tuple[str, ...]]:
    table = []
    for mix in mixes:
        found = {place: {row.method: row for row in rows_at(mix, place)} for place in places}
        for method in COLORS:
            if any(method in rows for rows in found.values()):
                cells = [str(rows[method].against_instruct) if method in rows else "" for rows in found.values()]
                table.append((mix, method, *cells))
    return table


def _choices(row: Row) -> str:
    counts = {choice: row.choices.count(choice) for choice in dict.fromkeys(row.choices)}
    return "; ".join(f"{choice} ×{count}" if count > 1 else choice for choice, count in counts.items())


def _mean(shares: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(band) / len(shares) for band in zip(*shares, strict=True))


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in library_versions().items())


def _markdown(section: Section) -> str:
    lines = [f"\n## {section.title}\n\n{section.note}\n", f"| {' | '.join(section.headings)} |"]
    lines += ["|" + "---|" * len(section.headings), *(f"| {' | '.join(row)} |" for row in section.rows)]
    if section.picture:
        lines.append(f"\n![{section.title}]({section.picture})")
    return "\n".join(lines)


def _html(section: Section) -> str:
    headings = "".join(f"<th>{html.escape(heading)}</th>" for heading in section.headings)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in section.rows)
    picture = embed_picture(section.draw, section.title) if section.draw is not None else ""
    return (
        f'<h2>{html.escape(section.title)}</h2><p class="note">{html.escape(section.note)}</p>{picture}'
        f'<details class="example"><summary>Table</summary><div class="text"><table class="figures"><thead><tr>{headings}'
        f"</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _json(experiment: Experiment) -> str:
    runs = [
        {
            "seed": run.cell.seed,
            "mix": run.cell.mix,
            "learning_rate": run.cell.learning_rate,
            "num_examples": run.cell.num_examples,
            "method": run.treatment,
            "merge": merge,
            **{name: round(accuracy, 3) for name, accuracy in scores.accuracies.items()},
            "validation": round(100 * sum(run.validation[merge]) / len(run.validation[merge]), 3),
            "signal": [round(share, 3) for share in run.signal],
            "training_loss": round(run.training_loss, 6),
        }
        for run in experiment.runs
        for merge, scores in run.scores.items()
    ]
    models = {
        seed: {name: scores.accuracies for name, (scores, _) in found.items()}
        for seed, found in experiment.models.items()
    }
    facts = json.dumps({"versions": library_versions(), "models": models})
    lines = ",\n".join(json.dumps(run) for run in runs)  # a line for each, to be looked at and compared
    return f'{facts[:-1]}, "runs": [\n{lines}\n]}}\n'
