"""
The numbers of the paper, to stand beside the user's.

Source: "GIFT: Guided Fine-Tuning and Transfer for Enhancing Instruction-Tuned Language Models", ACL 2026, arXiv 2605.01256.
A method that the paper has no number of for a pair of models is left out. Of its summaries (Super-NaturalInstructions) it is
not recorded here which pair they are of; they are put beside any.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gift_trl.evaluation.comparison import Comparison, mean_interval
from gift_trl.evaluation.statistics import Interval


SOURCE = "GIFT, ACL 2026, arXiv 2605.01256"
# Shares of the weighted loss, in percent, that come from tokens with a low and with a high confidence
LEARNING_SIGNAL = {"plain cross-entropy": (79.7, 6.9), "GIFT": (29.6, 31.5)}


@dataclass(frozen=True)
class Benchmark:
    """
    What the paper measured.

    Args:
        name (`str`):
            Name, with the figure.
        tasks (`dict[str, str]`):
            The tasks whose mean the figure is: names, with a regular expression for the names they go by in lower case
            without punctuation.
        sampling (`dict[str, float]`):
            How answers were drawn.
        samples (`int`, *optional*):
            Number of samples of each problem.
    """

    name: str
    tasks: dict[str, str]
    sampling: dict[str, float] = field(default_factory=dict)
    samples: int | None = None


@dataclass(frozen=True)
class PaperResult:
    """
    A line of the paper.

    Args:
        pair (`str` or `None`):
            The base and the instruct model, as the paper calls them; `None` where they are not known here.
        benchmark ([`Benchmark`]):
            What was measured.
        values (`dict[str, float]`):
            Figures in percent by method.
    """

    pair: str | None
    benchmark: Benchmark
    values: dict[str, float]


@dataclass(frozen=True)
class Beside:
    """
    A line of the paper, and the user's models of the same pair.

    Args:
        paper ([`PaperResult`]):
            The paper's.
        figures (`dict[str, Interval | None]`):
            The user's figures from 0 to 1 by model, `None` where a task is missing.
        missing (`tuple[str, ...]`):
            Tasks of the benchmark that the user has not evaluated.
        deviations (`tuple[str, ...]`):
            Where the user's settings are not the paper's.
    """

    paper: PaperResult
    figures: dict[str, Interval | None]
    missing: tuple[str, ...]
    deviations: tuple[str, ...]


_MATH = Benchmark(
    "mean Average@16 of five math sets",
    {
        "MATH-500": "math500",
        "Minerva Math": "minerva(math)?",
        "OlympiadBench": "olympiad(bench)?.*",
        "AIME 2024": "aime(20)?24",
        "AMC 2023": "amc(20)?23",
    },
    {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4096},
    16,
)
_MEDICAL = Benchmark(
    "mean accuracy of three medical sets",
    {"MedQA": "medqa(usmle)?", "MMLU-medical": "mmlumed(ical)?|medicalmmlu", "MedMCQA": "medmcqa"},
)
_SUMMARIES = "(super)?(ni|naturalinstructions)(summaries)?"
RESULTS = (
    PaperResult("Llama-3.1-8B", _MATH, {"instruct": 16.8, "Instruct-SFT": 8.9, "Shadow-FT": 18.0, "GIFT": 22.0}),
    PaperResult("Llama-3.2-3B", _MATH, {"instruct": 16.5, "Shadow-FT": 16.7, "GIFT": 19.5}),
    PaperResult(
        "Qwen2.5-7B",
        _MATH,
        {"instruct": 41.3, "Instruct-SFT": 21.2, "Shadow-FT": 38.0, "GIFT-BaseT": 41.0, "GIFT": 42.9},
    ),
    PaperResult("DeepSeek-Math-7B", _MATH, {"instruct": 16.8, "Shadow-FT": 17.4, "GIFT": 19.7}),
    PaperResult("Llama-3.1-8B", _MEDICAL, {"instruct": 62.6, "Shadow-FT": 65.1, "GIFT": 68.8}),
    PaperResult("Qwen2.5-7B", Benchmark("MMLU", {"MMLU": "mmlu"}), {"instruct": 68.7, "GIFT": 68.8}),
    PaperResult("Qwen2.5-7B", Benchmark("IFEval", {"IFEval": "ifeval"}), {"instruct": 71.2, "GIFT": 72.1}),
    PaperResult(
        None,
        Benchmark("exact match of Super-NI summaries", {"Super-NI summaries": f"{_SUMMARIES}(em|exactmatch)"}),
        {"instruct": 10.75, "GIFT": 12.0},
    ),
    PaperResult(
        None,
        Benchmark("ROUGE-L of Super-NI summaries", {"Super-NI summaries": f"{_SUMMARIES}(rougel?)?"}),
        {"instruct": 37.38, "GIFT": 40.28},
    ),
)
# Hub ids, without the organisation, of the instruct models
_INSTRUCT_MODELS = {
    "Llama-3.1-8B": r"(Meta-)?Llama-3\.1-8B-Instruct",
    "Llama-3.2-3B": r"Llama-3\.2-3B-Instruct",
    "Qwen2.5-7B": r"Qwen2\.5-7B-Instruct",
    "DeepSeek-Math-7B": r"deepseek-math-7b-instruct",
}


def place_beside_paper(comparison: Comparison) -> list[Beside]:
    """
    Finds the lines of the paper whose models and tasks are among the user's.

    Args:
        comparison ([`Comparison`]):
            The user's results.

    Returns:
        `list[Beside]`: A line for each that has at least one model and one task in common with them.
    """
    found = []
    for paper in RESULTS:
        models = [model for model in comparison.models if _is_of(comparison.model_config(model), paper.pair)]
        tasks = {
            name: next((task for task in comparison.tasks if re.fullmatch(pattern, _plain(task))), None)
            for name, pattern in paper.benchmark.tasks.items()
        }
        known = [task for task in tasks.values() if task is not None]
        if not models or not known:
            continue
        summaries = {model: [comparison.summary(model, task) for task in known] for model in models}
        figures = {
            model: mean_interval([None if s is None else s.average for s in summaries[model]])
            if len(known) == len(tasks)
            else None
            for model in models
        }
        missing = tuple(name for name, task in tasks.items() if task is None)
        deviations = dict.fromkeys(
            deviation for task in known for deviation in _deviations(comparison, paper.benchmark, task)
        )
        found.append(Beside(paper, figures, missing, tuple(deviations)))
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_of(config: Any, pair: str | None) -> bool:
    """Whether a model is the instruct model of a pair, or what its configuration says it was merged into is."""
    if pair is None:
        return True
    if isinstance(config, Mapping):
        return any(_is_of(value, pair) for value in config.values())
    pattern = rf"([\w.-]+/)?{_INSTRUCT_MODELS[pair]}"
    return isinstance(config, str) and re.fullmatch(pattern, config, re.IGNORECASE) is not None


def _deviations(comparison: Comparison, benchmark: Benchmark, task: str) -> list[str]:
    config = comparison.task_config(task)
    sampling = config.get("sampling") or {}
    deviations = [
        f"{task}: {name} {sampling.get(name, 'unknown')}, not {value:g}"
        for name, value in benchmark.sampling.items()
        if sampling.get(name) != value
    ]
    if config.get("limit") is not None:
        deviations.append(f"{task}: only the first {config['limit']} problems")
    samples = {run.summary.num_samples for (_, name), run in comparison.runs.items() if name == task}
    if benchmark.samples is not None and samples - {benchmark.samples}:
        deviations.append(f"{task}: {', '.join(map(str, sorted(samples)))} samples, not {benchmark.samples}")
    return deviations
