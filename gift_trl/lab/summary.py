"""An experiment summed up over its seeds: differences to the instruct model with intervals, in shared and in own best settings."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gift_trl.lab.experiment import Cell, Experiment, Run


# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond, the normal distribution's is within 2 %
_T_QUANTILES = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
_T_QUANTILES += (
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)
SHARED_MERGE = "1"
# Merges of what Shadow-FT trained, shown as the methods they are
MERGE_METHODS = {"re_adapt": "RE-Adapt", "lore_adapt": "LoRE-Adapt"}
INSTRUCT = "instruct model"


@dataclass(frozen=True)
class Estimate:
    """
    A mean over seeds.

    Args:
        mean (`float`):
            The mean, in percentage points.
        margin (`float`):
            Half the width of its 95 % interval by Student's t over the seeds; infinite for one seed.
        num_seeds (`int`):
            Number of seeds.
    """

    mean: float
    margin: float
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """
        The estimate of values, one per seed.

        Args:
            values (`Sequence[float]`):
                The values.

        Returns:
            [`Estimate`]: Mean and margin.
        """
        count, mean = len(values), sum(values) / len(values)
        if count == 1:
            return cls(mean, math.inf, 1)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
        quantile = _T_QUANTILES[count - 2] if count - 2 < len(_T_QUANTILES) else 2.0
        return cls(mean, quantile * deviation / math.sqrt(count), count)

    @property
    def verdict(self) -> str:
        """`"above"`, `"below"` or `"within error"`: whether the interval excludes 0."""
        if abs(self.mean) <= self.margin:
            return "within error"
        return "above" if self.mean > 0 else "below"

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + (f" ± {self.margin:.1f}" if math.isfinite(self.margin) else "")


@dataclass(frozen=True)
class Outcome:
    """
    One method in one setting on one seed.

    Args:
        seed (`int`):
            Seed.
        target, retention (`float`):
            Accuracies in percent.
        validation (`float`):
            Accuracy on the validation problems, in percent.
        choice (`str`):
            Learning rate and merge that were taken.
    """

    seed: int
    target: float
    retention: float
    validation: float
    choice: str


@dataclass(frozen=True)
class Row:
    """
    One method over the seeds, against the instruct model of each.

    Args:
        method (`str`):
            Name.
        target (`float`):
            Mean target accuracy in percent.
        against_instruct ([`Estimate`]):
            Difference in target accuracy to the instruct model.
        retention ([`Estimate`]):
            Difference in retention accuracy to the instruct model.
        choices (`tuple[str, ...]`):
            What was chosen on each seed.
        outcomes (`dict[int, Outcome]`):
            By seed.
    """

    method: str
    target: float
    against_instruct: Estimate
    retention: Estimate
    choices: tuple[str, ...]
    outcomes: dict[int, Outcome]

    def against(self, other: "Row") -> Estimate:
        """
        Difference in target accuracy to another method, seed by seed.

        Args:
            other ([`Row`]):
                The other method.

        Returns:
            [`Estimate`]: This minus the other, over the seeds of both.
        """
        seeds = sorted(self.outcomes.keys() & other.outcomes.keys())
        return Estimate.of([self.outcomes[seed].target - other.outcomes[seed].target for seed in seeds])


def shared_rows(
    experiment: Experiment, mix: str, learning_rate: float, num_examples: int, merge: str = SHARED_MERGE
) -> list[Row]:
    """
    Every method at the same learning rate, number of examples and merge.

    Args:
        experiment ([`Experiment`]):
            The runs.
        mix (`str`), learning_rate (`float`), num_examples (`int`):
            The setting.
        merge (`str`, *optional*, defaults to `"1"`):
            The merge. RE-Adapt and LoRE-Adapt are taken with the same factor.

    Returns:
        `list[Row]`: A row per method.
    """

    runs = (run for run in experiment.runs if _setting(run.cell) == (mix, learning_rate, num_examples))
    return _rows(experiment, runs, lambda name: name.split()[-1] == merge)


def best_rows(experiment: Experiment, mix: str, num_examples: int) -> list[Row]:
    """
    Every method at the learning rate and merge that solved most validation problems, chosen on each seed by itself.

    Args:
        experiment ([`Experiment`]):
            The runs.
        mix (`str`), num_examples (`int`):
            The setting.

    Returns:
        `list[Row]`: A row per method.
    """
    runs = (run for run in experiment.runs if (run.cell.mix, run.cell.num_examples) == (mix, num_examples))
    return _rows(experiment, runs, lambda name: True)


def _setting(cell: Cell) -> tuple[str, float, int]:
    return cell.mix, cell.learning_rate, cell.num_examples


def _rows(experiment: Experiment, runs: Iterable[Run], chosen: Callable[[str], bool]) -> list[Row]:
    best: dict[str, dict[int, Outcome]] = defaultdict(dict)
    for run in runs:
        for merge in filter(chosen, run.scores):
            method = MERGE_METHODS.get(merge.split()[0], run.treatment)
            validation, scores = run.validation[merge], run.scores[merge].accuracies
            outcome = Outcome(
                run.cell.seed,
                scores["target"],
                scores["retention"],
                100 * sum(validation) / len(validation),
                f"{run.cell.learning_rate:g}, {merge}",
            )
            known = best[method].get(outcome.seed)
            if known is None or outcome.validation > known.validation:
                best[method][outcome.seed] = outcome
    return [_row(experiment, method, outcomes) for method, outcomes in best.items()]


def _row(experiment: Experiment, method: str, outcomes: dict[int, Outcome]) -> Row:
    instruct = {seed: experiment.models[seed]["instruct"][0].accuracies for seed in outcomes}
    return Row(
        method,
        sum(outcome.target for outcome in outcomes.values()) / len(outcomes),
        Estimate.of([outcome.target - instruct[seed]["target"] for seed, outcome in outcomes.items()]),
        Estimate.of([outcome.retention - instruct[seed]["retention"] for seed, outcome in outcomes.items()]),
        tuple(outcome.choice for outcome in outcomes.values()),
        outcomes,
    )
