"""
The lab's experiment: every method over seeds, mixes, learning rates and numbers of examples, each run kept in a file, so
that a grid that was stopped goes on where it was.
"""

import copy
import dataclasses
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback

from gift_trl.annotation import annotate_dataset
from gift_trl.lab.comparison import METHODS, Method, make_target_dataset
from gift_trl.lab.corpora import corpus_rng, make_target_problem
from gift_trl.lab.evaluation import EvaluationSet, Scores, evaluate_model, make_evaluation_set
from gift_trl.lab.learning_signal import signal_shares, token_shares
from gift_trl.lab.pair import PairSettings, make_pair
from gift_trl.lab.problems import Problem
from gift_trl.lab.progress import progress_display
from gift_trl.lab.quiet import silence_libraries
from gift_trl.lab.weightings import WEIGHTINGS, replace_confidences, reweigh, write_tempered_model
from gift_trl.merging import MergeRecipe, merge_recipe
from gift_trl.training import GIFTConfig, GIFTSFTTrainer


_VALIDATION_SEED = 787
_RUNS = "runs"


@dataclass(frozen=True)
class Treatment:
    """
    A way to train, and the merges to make of what it trained.

    Args:
        name (`str`):
            Name in tables.
        trained_model (`str`):
            `"base"` or `"instruct"`.
        changes (`dict[str, Any]`):
            Fields of the [`GIFTConfig`] that differ from the recipe.
        weighting (`str`, *optional*):
            One of [`~gift_trl.lab.weightings.WEIGHTINGS`], or `"temperature T"`. Plain q by default.
        merges (`dict[str, dict[str, Any]]`):
            By name, the fields of the [`MergeRecipe`] beside models and adapter.
    """

    name: str
    trained_model: str
    changes: dict[str, Any]
    merges: dict[str, dict[str, Any]]
    weighting: str | None = None


def _scales(*scales: float) -> dict[str, dict[str, Any]]:
    return {f"{scale:g}": {"scale": scale} for scale in scales}


_MERGES = _scales(0.25, 0.5, 1.0)
# Of what Shadow-FT trains: the difference of the two models halved, or cut to half of its squared norm
_BASE_MERGES = {
    f"{method} {scale:g}": {"method": method, "scale": scale, **fields}
    for method, fields in (("re_adapt", {"instruct_weight": 0.5}), ("lore_adapt", {"explained_variance": 0.5}))
    for scale in (0.5, 1.0)
}


def _treatment(method: Method) -> Treatment:
    merges = {**_MERGES, **(_BASE_MERGES if method.name == "Shadow-FT" else {})}
    return Treatment(method.name, method.trained_model, method.changes, merges)


TREATMENTS: tuple[Treatment, ...] = tuple(_treatment(method) for method in METHODS)
EXPONENTS: tuple[Treatment, ...] = tuple(
    Treatment(f"GIFT, exponent {exponent:g}", "base", {"confidence_exponent": exponent}, _scales(0.5, 1.0))
    for exponent in (0.5, 2.0)
)
VARIANTS: tuple[Treatment, ...] = (
    *(
        Treatment(f"floor {floor:g}", "base", {"confidence_floor": floor}, _scales(0.5, 1.0))
        for floor in (0.03, 0.1, 0.3)
    ),
    *(Treatment(name, "base", {}, _scales(0.5, 1.0), name) for name in WEIGHTINGS),
    *(Treatment(f"temperature {t:g}", "base", {}, _scales(0.5, 1.0), f"temperature {t:g}") for t in (2.0, 4.0)),
)


@dataclass(frozen=True)
class Questions:
    """
    What every model of an experiment is asked.

    Args:
        evaluation ([`EvaluationSet`]):
            Questions that are reported.
        validation (`tuple[Problem, ...]`):
            Other problems of the target task, to choose learning rates and merges by.
    """

    evaluation: EvaluationSet
    validation: tuple[Problem, ...]

    @classmethod
    def draw(cls, num_validation: int = 300, **sizes: int) -> "Questions":
        """
        Draws the questions, which are the same for every seed of the pair.

        Args:
            num_validation (`int`, *optional*, defaults to `300`):
                Number of validation problems.
            sizes (`int`):
                Arguments of [`make_evaluation_set`].

        Returns:
            [`Questions`]: The questions.
        """
        rng = corpus_rng("held-out", _VALIDATION_SEED)
        validation = tuple(make_target_problem(rng) for _ in range(num_validation))
        return cls(make_evaluation_set(**sizes), validation)

    @property
    def joined(self) -> EvaluationSet:
        """All of them, the validation problems after the other target problems."""
        return dataclasses.replace(self.evaluation, target=self.evaluation.target + self.validation)


@dataclass(frozen=True)
class Cell:
    """
    What the methods are compared on.

    Args:
        seed (`int`):
            Seed of pair, data and training.
        mix (`str`):
            How the reference answers are written.
        learning_rate (`float`):
            Learning rate.
        num_examples (`int`, *optional*, defaults to `512`):
            Training examples.
    """

    seed: int
    mix: str
    learning_rate: float
    num_examples: int = 512

    @property
    def folder(self) -> str:
        """Where its runs are kept, under the folder of the experiment."""
        return f"{_RUNS}/seed{self.seed}/{self.mix}-{self.learning_rate:g}-{self.num_examples}"


@dataclass(frozen=True)
class Run:
    """
    A method in a cell.

    Args:
        cell ([`Cell`]):
            The cell.
        treatment (`str`):
            Name of the method.
        validation (`dict[str, tuple[bool, ...]]`):
            By merge, the validation problems that the merged model solved.
        scores (`dict[str, Scores]`):
            By merge, what the merged model got right of the evaluation.
        signal (`tuple[float, ...]`):
            Share, in percent, of the weighted loss before training by confidence band.
        tokens (`tuple[float, ...]`):
            Share, in percent, of the target tokens by confidence band.
        training_loss (`float`):
            Mean training loss.
        seconds (`float`):
            Time of training, merges and evaluation.
    """

    cell: Cell
    treatment: str
    validation: dict[str, tuple[bool, ...]]
    scores: dict[str, Scores]
    signal: tuple[float, ...]
    tokens: tuple[float, ...]
    training_loss: float
    seconds: float


@dataclass(frozen=True)
class Experiment:
    """
    All runs of an experiment, and the models they started from.

    Args:
        models (`dict[int, dict[str, tuple[Scores, tuple[bool, ...]]]]`):
            By seed and name (`"base"`, `"instruct"`), what the model got right of evaluation and validation.
        runs (`tuple[Run, ...]`):
            The runs.
    """

    models: dict[int, dict[str, tuple[Scores, tuple[bool, ...]]]]
    runs: tuple[Run, ...] = field(repr=False)


def run_experiment(
    cells: Sequence[Cell],
    treatments: Sequence[Treatment],
    args: GIFTConfig,
    peft_config: LoraConfig,
    output_dir: Path,
    *,
    num_workers: int = 1,
    settings: PairSettings | None = None,
    questions: Questions | None = None,
    progress: Progress | None = None,
) -> None:
    """
    Trains, merges and evaluates every method in every cell, but for what an earlier call has finished.

    Args:
        cells (`Sequence[Cell]`):
            The cells.
        treatments (`Sequence[Treatment]`):
            The methods.
        args ([`GIFTConfig`]):
            The recipe, as of [`~gift_trl.lab.comparison.run_comparison`].
        peft_config ([`~peft.LoraConfig`]):
            The adapter.
        output_dir (`Path`):
            Folder of the experiment. Every finished run is a file in it.
        num_workers (`int`, *optional*, defaults to `1`):
            Processes that work side by side, each on one thread.
        settings ([`PairSettings`], *optional*):
            Size and training of the pairs.
        questions ([`Questions`], *optional*):
            What the models are asked. Defaults to [`Questions.draw`]'s.
        progress ([`~rich.progress.Progress`], *optional*):
            Display to report to. Defaults to one of its own.
    """
    questions = questions or Questions.draw()
    missing = {
        cell: [treatment for treatment in treatments if not _run_file(output_dir, cell, treatment).is_file()]
        for cell in cells
    }
    missing = {cell: wanted for cell, wanted in missing.items() if wanted}
    with progress_display(progress) as display:
        total = len(cells) * len(treatments)
        task = display.add_task("Running the grid", total=total, completed=total - sum(map(len, missing.values())))
        # Pairs first: the cells of a seed would all make the same one
        with ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker) as pool:
            seeds = sorted({cell.seed for cell in missing})
            for done in as_completed(
                [pool.submit(_prepare_seed, seed, settings, questions, output_dir) for seed in seeds]
            ):
                done.result()
            jobs = {
                pool.submit(_run_cell, cell, wanted, args, peft_config, settings, questions, output_dir): wanted
                for cell, wanted in missing.items()
            }
            try:
                for job in as_completed(jobs):
                    job.result()
                    display.advance(task, len(jobs[job]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def load_experiment(output_dir: Path) -> Experiment:
    """
    Reads every finished run.

    Args:
        output_dir (`Path`):
            Folder of the experiment.

    Returns:
        [`Experiment`]: The runs.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    models, runs = {}, []
    for file in sorted((output_dir / _RUNS).glob("seed*/models.json")):
        seed = int(re.fullmatch(r"seed(\d+)", file.parent.name)[1])
        models[seed] = {name: _read_scores(facts) for name, facts in json.loads(file.read_text()).items()}
    for file in sorted((output_dir / _RUNS).glob("seed*/*/*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        merges = {name: _read_scores(merge) for name, merge in facts["merges"].items()}
        runs.append(
            Run(
                Cell(**facts["cell"]),
                facts["treatment"],
                {name: validation for name, (_, validation) in merges.items()},
                {name: scores for name, (scores, _) in merges.items()},
                tuple(facts["signal"]),
                tuple(facts["tokens"]),
                facts["training_loss"],
                facts["seconds"],
            )
        )
    if not runs:
        raise FileNotFoundError(f"'{output_dir}' holds no finished run of the lab: start it with `gift-trl lab`.")
    return Experiment(models, tuple(runs))


@contextmanager
def _pool(num_workers: int) -> Iterator[Callable[..., Future]]:
    """What submits a job to processes of their own; an error or Ctrl-C leaves those that have not begun."""
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker) as pool:
        try:
            yield pool.submit
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    silence_libraries()
    torch.set_num_threads(1)


def _run_file(output_dir: Path, cell: Cell, treatment: Treatment) -> Path:
    return output_dir / cell.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', treatment.name)}.json"


def _prepare_seed(seed: int, settings: PairSettings | None, questions: Questions, output_dir: Path) -> None:
    file = output_dir / _RUNS / f"seed{seed}" / "models.json"
    if file.is_file():
        return
    pair = make_pair(seed, settings=settings, progress=Progress(disable=True))
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    folders = zip(("base", "instruct"), pair, strict=True)
    facts = {name: _evaluate(folder, tokenizer, questions) for name, folder in folders}
    _write(file, facts)


def _run_cell(
    cell: Cell,
    treatments: Sequence[Treatment],
    args: GIFTConfig,
    peft_config: LoraConfig,
    settings: PairSettings | None,
    questions: Questions,
    output_dir: Path,
) -> None:
    models = dict(zip(("base", "instruct"), map(str, make_pair(cell.seed, settings=settings)), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(models["instruct"])
    rows = Dataset.from_list(make_target_dataset(cell.mix, cell.seed, cell.num_examples, questions.joined))
    annotated = {name: annotate_dataset(rows, folder, tokenizer, args=args) for name, folder in models.items()}
    for treatment in treatments:
        start = time.perf_counter()
        run_args = dataclasses.replace(
            args,
            instruct_model_name_or_path=models["instruct"],
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            **treatment.changes,
        )
        weighted_by = _weighted(treatment, annotated, rows, models, tokenizer, run_args)
        with tempfile.TemporaryDirectory(prefix="gift_trl_") as work_dir:
            adapter = os.path.join(work_dir, "adapter")
            loss = _train(models[treatment.trained_model], run_args, weighted_by, peft_config, adapter)
            merges = {
                name: _evaluate(
                    _merge(fields, adapter, models, os.path.join(work_dir, "merged")), tokenizer, questions
                )
                for name, fields in treatment.merges.items()
            }
        signal = signal_shares(
            annotated["instruct"],
            weighted_by=weighted_by,
            trained=annotated[treatment.trained_model],
            args=run_args,
            end_of_turn_token_ids=[tokenizer.eos_token_id],
        )
        facts = {
            "cell": dataclasses.asdict(cell),
            "treatment": treatment.name,
            "merges": merges,
            "signal": signal,
            "tokens": token_shares(annotated["instruct"]),
            "training_loss": loss,
            "seconds": round(time.perf_counter() - start, 2),
        }
        _write(_run_file(output_dir, cell, treatment), facts)


def _weighted(
    treatment: Treatment,
    annotated: dict[str, Dataset],
    rows: Dataset,
    models: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    args: GIFTConfig,
) -> Dataset:
    """The dataset whose confidences a method weighs by."""
    if treatment.weighting is None:
        return annotated[args.annotator]
    if treatment.weighting.startswith("temperature "):
        with tempfile.TemporaryDirectory(prefix="gift_trl_") as work_dir:
            tempered = Path(work_dir) / "tempered"
            write_tempered_model(models["instruct"], float(treatment.weighting.split()[1]), tempered)
            scored = annotate_dataset(rows, str(tempered), tokenizer, args=args)
        return replace_confidences(annotated["instruct"], scored["confidences"])
    return reweigh(annotated["instruct"], annotated["base"], tokenizer, WEIGHTINGS[treatment.weighting])


def _train(model: str, args: GIFTConfig, dataset: Dataset, peft_config: LoraConfig, adapter: str) -> float:
    trainer = GIFTSFTTrainer(
        model=model,
        args=dataclasses.replace(args, output_dir=adapter),
        train_dataset=dataset,
        # A trainer may complete the configuration it is given, and the next one starts from the recipe again
        peft_config=copy.deepcopy(peft_config),
    )
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    trainer.save_model(adapter)
    return loss


def _merge(fields: dict[str, Any], adapter: str, models: dict[str, str], merged: str) -> str:
    base_model = {"base_model": models["base"]} if "method" in fields else {}
    recipe = MergeRecipe(instruct_model=models["instruct"], adapter=[adapter], **base_model, **fields)
    merge_recipe(recipe, merged, overwrite=True)
    return merged


def _evaluate(folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, questions: Questions) -> dict[str, str]:
    scores = evaluate_model(AutoModelForCausalLM.from_pretrained(folder), tokenizer, questions.joined)
    num_target = len(questions.evaluation.target)
    return {
        "target": _digits(scores.target[:num_target]),
        "validation": _digits(scores.target[num_target:]),
        "short": _digits(scores.short),
        "retention": _digits(scores.retention),
    }


def _digits(correct: Sequence[bool]) -> str:
    return "".join(str(int(right)) for right in correct)


def _read_scores(facts: dict[str, str]) -> tuple[Scores, tuple[bool, ...]]:
    correct = {name: tuple(digit == "1" for digit in digits) for name, digits in facts.items()}
    validation = correct.pop("validation")
    return Scores(**correct), validation


def _write(file: Path, facts: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    temporary.replace(file)


def make_grid(
    seeds: Sequence[int],
    mixes: Sequence[str],
    learning_rates: Sequence[float],
    sizes: Sequence[int],
    *,
    size_learning_rate: float = 1e-3,
) -> Iterator[Cell]:
    """
    The cells of an experiment: every learning rate at the middle number of examples, and the other numbers at one rate.

    Args:
        seeds (`Sequence[int]`):
            Seeds.
        mixes (`Sequence[str]`):
            Mixes.
        learning_rates (`Sequence[float]`):
            Learning rates.
        sizes (`Sequence[int]`):
            Numbers of examples.
        size_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the other numbers of examples.

    Yields:
        [`Cell`]: The cells.
    """
    middle = sorted(sizes)[len(sizes) // 2]
    for seed in seeds:
        for mix in mixes:
            for rate in learning_rates:
                yield Cell(seed, mix, rate, middle)
            for size in sizes:
                if size != middle:
                    yield Cell(seed, mix, size_learning_rate, size)
