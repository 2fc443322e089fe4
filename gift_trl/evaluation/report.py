"""One or several evaluations as a report: Markdown, a table for other programs, one HTML page, and pictures."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from gift_trl import __version__
from gift_trl.checkpoints import check_output_folder, write_folder
from gift_trl.evaluation import report_figures as figures
from gift_trl.evaluation.comparison import Comparison, Difference, compare_results, mean_interval
from gift_trl.evaluation.paper import LEARNING_SIGNAL, SOURCE, Beside, place_beside_paper
from gift_trl.evaluation.report_examples import RULE, choose_examples
from gift_trl.evaluation.report_page import (
    Bullets,
    ExampleBlock,
    Heading,
    Listing,
    Picture,
    Pictures,
    Table,
    Text,
    render_html,
    render_markdown,
)
from gift_trl.evaluation.report_table import write_table
from gift_trl.evaluation.report_text import (
    count_skips,
    describe_findings,
    describe_warnings,
    difference_with_interval,
    percent,
    with_interval,
)
from gift_trl.evaluation.results import Summary
from gift_trl.evaluation.training_logs import TrainingSignal, read_training_signals
from gift_trl.page import visible_text
from gift_trl.plots import BAND_NAMES


MARKDOWN_FILE, PAGE_FILE, TABLE_FILE = "report.md", "report.html", "results.csv"
_MARKS = {"above": "▲ ", "below": "▼ ", "undecided": ""}
Part = Heading | Text | Bullets | Table | Pictures | Listing | ExampleBlock


def write_evaluation_report(
    results: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    training: Sequence[str | os.PathLike] = (),
    reference: str | None = None,
    retention: Collection[str] = (),
    overwrite: bool = False,
) -> Comparison:
    """
    Writes `report.md`, `report.html`, `results.csv` and the pictures about evaluations into a folder, which appears whole
    or not at all.

    Args:
        results (`Sequence[str | os.PathLike]`):
            Folders that `gift-trl evaluate` wrote. What they hold is put side by side.
        output_dir (`str` or `os.PathLike`):
            Folder to write.
        training (`Sequence[str | os.PathLike]`, *optional*):
            Output folders of trainings, for their learning signal.
        reference (`str`, *optional*):
            As in [`compare_results`].
        retention (`Collection[str]`, *optional*):
            As in [`compare_results`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an earlier report.

    Returns:
        [`Comparison`]: What the report is about.

    Raises:
        `FileExistsError`: If `output_dir` holds something, and `overwrite` is not set or it is no report.
        `ValueError`: If it and an input lie in one another, or as in [`compare_results`] and [`read_training_signals`].
    """
    output_dir = check_output_folder(output_dir, overwrite=overwrite, marks=(TABLE_FILE,))
    for folder in (*results, *training):
        path = Path(folder).expanduser().resolve()
        if output_dir.is_relative_to(path) or path.is_relative_to(output_dir):
            raise ValueError(
                f"'{output_dir}' and '{folder}', which is left as it is, lie in one another: choose another output folder."
            )
    signals = read_training_signals(training)
    comparison = compare_results(results, reference=reference, retention=retention)
    parts = make_report(comparison, signals)
    with write_folder(output_dir, overwrite=overwrite, marks=(TABLE_FILE,)) as folder:
        for picture in (picture for part in parts if isinstance(part, Pictures) for picture in part.pictures):
            picture.write(folder)
        (folder / MARKDOWN_FILE).write_text(render_markdown(_title(comparison), parts), encoding="utf-8")
        (folder / PAGE_FILE).write_text(render_html(_title(comparison), parts), encoding="utf-8")
        write_table(comparison, folder / TABLE_FILE)
    return comparison


def make_report(comparison: Comparison, signals: Sequence[TrainingSignal] = ()) -> list[Part]:
    """
    Puts the report together.

    Args:
        comparison ([`Comparison`]):
            What it is about.
        signals (`Sequence[TrainingSignal]`, *optional*):
            Learning signal of trainings.

    Returns:
        `list`: Its parts in order.
    """
    return [
        *_findings(comparison),
        *_scores(comparison),
        *_samples(comparison),
        *_truncation(comparison),
        *_signals(signals),
        *_paper(comparison, signals),
        *_skips(comparison),
        *_examples(comparison),
        *_settings(comparison),
    ]


def _title(comparison: Comparison) -> str:
    others = comparison.others
    if not others:
        return comparison.reference
    names = ", ".join(others) if len(others) <= 3 else f"{len(others)} models"
    return f"{names} beside {comparison.reference}"


def _findings(comparison: Comparison) -> list[Part]:
    findings, warnings = describe_findings(comparison), describe_warnings(comparison)
    parts: list[Part] = [Heading("What the results show")] if findings or warnings else []
    parts += [Text(warning, "warning") for warning in warnings]
    return [*parts, Bullets(findings)] if findings else parts


def _scores(comparison: Comparison) -> list[Part]:
    # A column is a task, or several whose mean it is
    columns: list[tuple[str, ...]] = []
    for role in ("target", "retention"):
        tasks = comparison.with_role(role)
        columns += [(task,) for task in tasks] + ([tasks] if len(tasks) > 1 else [])
    head = ["model", *(_describe_column(comparison, tasks) for tasks in columns)]
    rows = [[model, *(_score_cell(comparison, model, tasks) for tasks in columns)] for model in comparison.models]
    note = "Mean score in percent over the problems (Average@n) with its 95 % interval, a bootstrap over problems."
    if comparison.others:
        note += (
            f" Below it: points above {comparison.reference} on the same problems, with the interval of the paired "
            "difference; ▲ and ▼ where that excludes zero (with at least 30 problems). The interval of a mean of tasks takes them as "
            "independent."
        )
    shown = [
        Picture("scores.png", "Scores", "Mean scores with 95 % intervals.", figures.score_figure(comparison)),
    ]
    if trade_off := figures.trade_off_figure(comparison):
        caption = (
            f"Mean paired difference from {comparison.reference} over the tasks of each role, with 95 % intervals: up is "
            "better at what was trained for, left is lost."
        )
        shown.append(Picture("target_retention.png", "Target against retention", caption, trade_off))
    parts: list[Part] = [Heading("Scores"), Text(note, "note"), Table(head, rows), Pictures(shown)]
    if comparison.others and not comparison.with_role("retention"):
        parts.append(
            Text(
                "No task tells what was kept: give one the role `retention` in its configuration, or name it with "
                "`--retention`.",
                "note",
            )
        )
    return parts


def _describe_column(comparison: Comparison, tasks: Sequence[str]) -> str:
    role = comparison.roles[tasks[0]]
    if len(tasks) > 1:
        return f"mean of the {len(tasks)}\n{role} tasks"
    found = [comparison.summary(model, tasks[0]) for model in comparison.models]
    counts = sorted({summary.num_problems for summary in found if summary is not None})
    problems = f"{' or '.join(f'{count:,}' for count in counts)} problems"
    return f"{tasks[0]}\n{'retention, ' if role == 'retention' else ''}{problems}"


def _score_cell(comparison: Comparison, model: str, tasks: Sequence[str]) -> str:
    summaries = [comparison.summary(model, task) for task in tasks]
    cell = with_interval(mean_interval([None if summary is None else summary.average for summary in summaries]))
    if difference := comparison.mean_difference(model, tasks):
        interval, verdict = difference
        cell += f"\n{_MARKS[verdict]}{difference_with_interval(interval)}"
    return cell


def _samples(comparison: Comparison) -> list[Part]:
    """Where there are several samples of a problem."""
    summaries = {pair: run.summary for pair, run in comparison.runs.items() if run.summary.num_samples > 1}
    if not summaries:
        return []
    ks = sorted({k for summary in summaries.values() for k in summary.pass_at_k if k > 1})
    rows: list[Sequence[str] | str] = []
    for task in comparison.tasks:
        here = {model: summaries[model, task] for model in comparison.models if (model, task) in summaries}
        if here:
            rows.append(task)
        for model, summary in here.items():
            passes = [with_interval(summary.pass_at_k.get(k)) for k in ks]
            cells = [
                str(summary.num_samples),
                with_interval(summary.average),
                *passes,
                with_interval(summary.majority),
            ]
            rows.append([model, *cells])
    note = (
        "Of n samples: their mean score (Average@n), the chance that at least one of k is right (pass@k, unbiased), and the "
        "score of the most frequent answer (majority@n). Brackets and bands are 95 % intervals over problems."
    )
    pictures = [
        Picture(f"pass_at_k_{task}.png", f"pass@k on {task}", "", draw)
        for task in comparison.tasks
        if (draw := figures.pass_at_k_figure(comparison, task))
    ]
    head = ["model", "n", "Average@n", *(f"pass@{k}" for k in ks), "majority@n"]
    parts: list[Part] = [Heading("Several samples"), Text(note, "note"), Table(head, rows)]
    return [*parts, Pictures(pictures)] if pictures else parts


def _truncation(comparison: Comparison) -> list[Part]:
    if all(run.summary.truncated is None for run in comparison.runs.values()):
        return []
    rows = [
        [model, *(_describe_ends(comparison.summary(model, task)) for task in comparison.tasks)]
        for model in comparison.models
    ]
    note = (
        "Answers that were cut off at the allowed length / problems of which no answer ended by itself, in percent; below, the "
        "mean number of tokens. A merged model that has lost its end-of-turn token shows here."
    )
    parts: list[Part] = [Heading("Do the answers end?"), Text(note, "note"), Table(["model", *comparison.tasks], rows)]
    if draw := figures.truncation_figure(comparison):
        parts.append(Pictures([Picture("truncation.png", "Answers that did not end", "Mean over the tasks.", draw)]))
    return parts


def _describe_ends(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    tokens = "" if summary.mean_tokens is None else f"\n{summary.mean_tokens:,.0f} tokens"
    return f"{percent(summary.truncated)} / {percent(summary.never_stopped)}{tokens}"


def _signals(signals: Sequence[TrainingSignal]) -> list[Part]:
    draw = figures.signal_figure(signals)
    if draw is None:
        return []
    caption = "Shares of the loss Σ w·ℓ by the confidence of the token, mean over the steps of the training."
    rows = [[s.name, f"{s.steps:,}", *(f"{share:.1f}" for share in s.shares)] for s in signals]
    return [
        Heading("Learning signal"),
        Table(["training", "steps", *BAND_NAMES], rows),
        Pictures([Picture("learning_signal.png", "Where the loss came from", caption, draw)]),
    ]


def _paper(comparison: Comparison, signals: Sequence[TrainingSignal]) -> list[Part]:
    beside = place_beside_paper(comparison)
    if not beside:
        return []
    parts: list[Part] = [
        Heading("The paper's numbers"),
        Text(f"As printed in the paper ({SOURCE}); they enter no figure, interval or sentence above.", "note"),
    ]
    for entry in beside:
        parts += _paper_table(entry)
    if signals:
        rows = [[f"paper: {name}", f"{low:.1f}", "–", f"{high:.1f}"] for name, (low, high) in LEARNING_SIGNAL.items()]
        rows += [[f"yours: {s.name}", *(f"{share:.1f}" for share in s.shares)] for s in signals]
        parts.append(Table(["share of the weighted loss (%)", *BAND_NAMES], rows))
    return parts


def _paper_table(entry: Beside) -> list[Part]:
    # With the digits that are printed there
    digits = 1 if all(round(value, 1) == value for value in entry.paper.values.values()) else 2
    rows = [[f"paper: {method}", f"{value:.{digits}f}"] for method, value in entry.paper.values.items()]
    rows += [[f"yours: {model}", with_interval(figure)] for model, figure in entry.figures.items()]
    pair = entry.paper.pair or "A pair of models that is not recorded here"
    parts: list[Part] = [Table([f"{pair}, {entry.paper.benchmark.name}", "%"], rows)]
    if entry.missing:
        parts.append(Text(f"For the mean you have yet to evaluate {', '.join(entry.missing)}.", "note"))
    if entry.deviations:
        parts.append(Text(f"Your settings are not the paper's: {'; '.join(entry.deviations)}.", "note"))
    return parts


def _skips(comparison: Comparison) -> list[Part]:
    rows = []
    for task, model, reason, count, problems in count_skips(comparison):
        first = ", ".join(map(str, problems)) + (", …" if count > len(problems) else "")
        rows.append([task, model, visible_text(reason), f"{count:,}", first])
    if not rows:
        return []
    note = "Rows of the data that could not be asked, and are in no figure."
    return [
        Heading("Left out"),
        Text(note, "note"),
        Table(["task", "model", "reason", "rows", "the first"], rows, num_text=3),
    ]


def _examples(comparison: Comparison) -> list[Part]:
    examples = choose_examples(comparison)
    if not examples:
        return []
    rows = [
        [model, *(_count_problems(comparison.differences.get((model, task))) for task in comparison.tasks)]
        for model in comparison.others
    ]
    counts = f"Numbers of problems with a better / a worse / the same mean score as that of {comparison.reference}:"
    return [
        Heading(f"Problems on which they differ: {len(examples)} examples"),
        Text(counts, "note"),
        Table(["model", *comparison.tasks], rows),
        Text(RULE, "note"),
        *(ExampleBlock(example, is_open=example is examples[0]) for example in examples),
    ]


def _count_problems(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    better, worse = int((difference.points > 0).sum()), int((difference.points < 0).sum())
    return f"{better:,} / {worse:,} / {len(difference.points) - better - worse:,}"


def _settings(comparison: Comparison) -> list[Part]:
    listings = [
        Listing(
            part.folder.resolve().name, yaml.safe_dump(part.config, sort_keys=False, allow_unicode=True, width=100)
        )
        for part in comparison.results
    ]
    return [Heading("Settings and versions"), Text(f"Report by gift_trl {__version__}.", "note"), *listings]
