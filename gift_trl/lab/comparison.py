"""
Instruct-SFT, Shadow-FT, GIFT-BaseT and GIFT as settings of one recipe, run with the library's own stages, from annotation
to evaluation.
"""

import copy
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback

from gift_trl.annotation import annotate_dataset
from gift_trl.evaluation.config import EvaluationConfig, ModelSpec
from gift_trl.evaluation.run import evaluate
from gift_trl.evaluation.tasks import TaskData, load_task_data
from gift_trl.lab.corpora import make_target_examples
from gift_trl.lab.evaluation import EvaluationSet, Scores, make_evaluation_set, read_scores
from gift_trl.lab.learning_signal import pick_example, signal_shares, token_shares
from gift_trl.lab.progress import progress_display
from gift_trl.lab.results import Comparison, MethodResult, Setting, SettingResult
from gift_trl.merging import merge_adapter
from gift_trl.training import GIFTConfig, GIFTSFTTrainer


@dataclass(frozen=True)
class Method:
    """
    A way to fine-tune, as a setting of the GIFT recipe.

    Parameters:
        name (`str`):
            Name in tables.
        trained_model (`str`):
            The model the adapter is trained on, `"base"` or `"instruct"`. It is merged into the instruct model.
        changes (`dict[str, Any]`):
            Fields of the [`GIFTConfig`] that differ from the recipe.
        description (`str`):
            What it does, in a sentence.
    """

    name: str
    trained_model: str
    changes: dict[str, Any]
    description: str


METHODS: tuple[Method, ...] = (
    Method(
        "Instruct-SFT",
        "instruct",
        {"confidence_exponent": 0.0},
        "the adapter is trained on the instruct model itself, every token weighing 1.",
    ),
    Method(
        "Shadow-FT",
        "base",
        {"confidence_exponent": 0.0},
        "the adapter is trained on the base model, every token weighing 1, and merged into the instruct model.",
    ),
    Method(
        "GIFT-BaseT",
        "base",
        {"annotator": "base"},
        "as Shadow-FT, but every token weighs as much as the base model's confidence in it.",
    ),
    Method(
        "GIFT",
        "base",
        {},
        "as Shadow-FT, but every token weighs as much as the instruct model's confidence in it.",
    ),
)


def run_comparison(
    pair: tuple[str | os.PathLike, str | os.PathLike],
    settings: Sequence[Setting],
    args: GIFTConfig,
    peft_config: LoraConfig,
    evaluation: EvaluationConfig,
    *,
    seed: int,
    num_examples: int = 512,
    evaluation_set: EvaluationSet | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """
    Annotates, trains, merges and evaluates every method in every setting. Every answer is kept in the folder of the
    evaluation.

    Args:
        pair (`tuple[str, str]`):
            Folders of the base and of the instruct model, see [`~gift_trl.lab.pair.make_pair`].
        settings (`Sequence[Setting]`):
            The settings.
        args ([`GIFTConfig`]):
            The recipe. Models, learning rate, seed, output folder and what a method changes are filled in.
        peft_config ([`~peft.LoraConfig`]):
            The adapter.
        evaluation ([`~gift_trl.evaluation.EvaluationConfig`]):
            Its tasks, [`~gift_trl.lab.evaluation.TASKS`], on the questions as
            [`~gift_trl.lab.evaluation.write_questions`] writes them, and its folder. The models are filled in: `instruct`,
            `base`, and the others by [`Setting.model_name`].
        seed (`int`):
            Seed of the data and of the training.
        num_examples (`int`, *optional*, defaults to `512`):
            Number of training examples.
        evaluation_set ([`EvaluationSet`], *optional*):
            Those questions, which are left out of the training data. Defaults to [`make_evaluation_set`]'s.
        progress ([`~rich.progress.Progress`], *optional*):
            Display to report to. Defaults to one of its own.

    Returns:
        [`Comparison`]: The results.
    """
    if not settings:
        raise ValueError("There is no setting to compare the methods in: pass at least one `Setting`.")
    evaluation_set = evaluation_set or make_evaluation_set()
    models = {"base": str(pair[0]), "instruct": str(pair[1])}
    tokenizer = AutoTokenizer.from_pretrained(models["instruct"])
    asked = _Asked(evaluation, tuple(load_task_data(task) for task in evaluation.tasks))
    mixes = list(dict.fromkeys(setting.mix for setting in settings))
    with progress_display(progress) as display:
        task = display.add_task("Comparing", total=2 + 2 * len(mixes) + len(METHODS) * len(settings))
        scores = {}
        # The instruct model first: with it the others are compared
        for name in ("instruct", "base"):
            display.update(task, description=f"Evaluating the {name} model")
            scores[name] = asked.evaluate(name, models[name])
            display.advance(task)
        # The two annotations of a mix serve all methods and learning rates: weights are made from them in the trainer.
        annotated: dict[str, dict[str, Dataset]] = {mix: {} for mix in mixes}
        for mix in mixes:
            rows = Dataset.from_list(make_target_dataset(mix, seed, num_examples, evaluation_set))
            for annotator, folder in models.items():
                display.update(task, description=f"Annotating mix {mix} with the {annotator} model")
                annotated[mix][annotator] = annotate_dataset(rows, folder, tokenizer, args=args)
                display.advance(task)
        results = []
        for setting in settings:
            outcomes = []
            for method in METHODS:
                display.update(task, description=f"{method.name}, {setting}")
                run_args = dataclasses.replace(
                    args,
                    instruct_model_name_or_path=models["instruct"],
                    learning_rate=setting.learning_rate,
                    seed=seed,
                    **method.changes,
                )
                answer = partial(asked.evaluate, setting.model_name(method.name))
                outcomes.append(
                    _run_method(method, run_args, peft_config, models, annotated[setting.mix], tokenizer, answer)
                )
                display.advance(task)
            results.append(SettingResult(setting, token_shares(annotated[setting.mix]["instruct"]), tuple(outcomes)))
    example = pick_example(annotated[mixes[0]]["instruct"], mixes[0], tokenizer)
    return Comparison(seed, scores["base"], scores["instruct"], tuple(results), example)


def make_target_dataset(
    mix: str, seed: int, num_examples: int = 512, evaluation_set: EvaluationSet | None = None
) -> list[dict[str, Any]]:
    """
    Draws the training rows of a comparison; no question of the evaluation is among them.

    Args:
        mix (`str`):
            How the reference answers are written.
        seed (`int`):
            Seed.
        num_examples (`int`, *optional*, defaults to `512`):
            Number of rows.
        evaluation_set ([`EvaluationSet`], *optional*):
            Questions to leave out. Defaults to [`make_evaluation_set`]'s.

    Returns:
        `list[dict]`: Rows with the columns `prompt` and `completion`.
    """
    evaluation_set = evaluation_set or make_evaluation_set()
    held_out = [problem.question for problem in evaluation_set.target]
    return make_target_examples(mix, seed, num_examples, held_out)


@dataclass(frozen=True)
class _Asked:
    """The evaluation, and the data of its tasks, read once."""

    config: EvaluationConfig
    data: tuple[TaskData, ...]

    def evaluate(self, name: str, folder: str) -> Scores:
        """Adds a model to the results."""
        config = dataclasses.replace(self.config, models={name: ModelSpec(folder)})
        return read_scores(evaluate(config, self.data), name)


def _run_method(
    method: Method,
    args: GIFTConfig,
    peft_config: LoraConfig,
    models: dict[str, str],
    annotated: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    evaluate_folder: Callable[[str], Scores],
) -> MethodResult:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gift_trl_") as work_dir:
        adapter, merged = os.path.join(work_dir, "adapter"), os.path.join(work_dir, "merged")
        trainer = GIFTSFTTrainer(
            model=models[method.trained_model],
            args=dataclasses.replace(args, output_dir=adapter),
            train_dataset=annotated[args.annotator],
            # A trainer may complete the configuration it is given, and the next one starts from the recipe again.
            peft_config=copy.deepcopy(peft_config),
        )
        # It prints every log to the terminal, across the progress display.
        trainer.remove_callback(PrinterCallback)
        training_loss = trainer.train().training_loss
        trainer.save_model(adapter)
        merge_adapter(adapter, models["instruct"], merged)
        scores = evaluate_folder(merged)
    signal = signal_shares(
        annotated["instruct"],
        weighted_by=annotated[args.annotator],
        trained=annotated[method.trained_model],
        args=args,
        end_of_turn_token_ids=[tokenizer.eos_token_id],
    )
    return MethodResult(method.name, scores, signal, training_loss, time.perf_counter() - start)
