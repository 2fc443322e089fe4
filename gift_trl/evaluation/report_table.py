"""The figures of a report as a table for other programs."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gift_trl.evaluation.comparison import Comparison
from gift_trl.evaluation.results import Summary


def write_table(comparison: Comparison, path: Path) -> None:
    """
    Writes a line for each model and task, with figures from 0 to 1; empty where there is none.

    Args:
        comparison ([`Comparison`]):
            The results.
        path (`Path`):
            CSV file to write.
    """
    ks = sorted({k for run in comparison.runs.values() for k in run.summary.pass_at_k})
    lines = [
        {
            "model": model,
            "task": task,
            "role": comparison.roles[task],
            **_figures(run.summary, ks),
            **_difference(comparison, model, task),
            "seconds": run.timing.get("seconds"),
        }
        for (model, task), run in comparison.runs.items()
    ]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _figures(summary: Summary, ks: Sequence[int]) -> dict[str, Any]:
    named = {"average": summary.average, **{f"pass@{k}": summary.pass_at_k.get(k) for k in ks}}
    named["majority"] = summary.majority
    line: dict[str, Any] = {
        "metric": summary.metric["name"],
        "problems": summary.num_problems,
        "samples": summary.num_samples,
    }
    for name, interval in named.items():
        line |= dict(zip((name, f"{name}_low", f"{name}_high"), interval or (None, None, None), strict=True))
    return line | {
        "truncated": summary.truncated,
        "never_stopped": summary.never_stopped,
        "mean_tokens": summary.mean_tokens,
        "skipped": len(summary.skipped),
    }


def _difference(comparison: Comparison, model: str, task: str) -> dict[str, Any]:
    names = ("reference", "difference", "difference_low", "difference_high", "excludes_zero", "paired_problems")
    difference = comparison.differences.get((model, task))
    if difference is None:
        return dict.fromkeys(names)
    interval = difference.interval
    excludes_zero = interval.low > 0 or interval.high < 0
    return dict(zip(names, (comparison.reference, *interval, excludes_zero, len(difference.points)), strict=True))
