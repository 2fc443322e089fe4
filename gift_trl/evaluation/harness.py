"""
Tasks of EleutherAI's lm-evaluation-harness (`lm-eval`), with their answers and scores in the same folder as ours.

The harness makes the prompts, asks the model and scores each answer, by its own definitions, so that the figures are those that others
report. What it logs of every problem becomes a generation and a grade, and from there on a task is like any other: paired
differences, intervals and examples are made of the scores of the single problems.
"""

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from transformers import GenerationConfig, PreTrainedModel

from gift_trl.evaluation.config import HarnessTask, is_yaml
from gift_trl.evaluation.grading import summarize
from gift_trl.evaluation.prompts import Renderer
from gift_trl.evaluation.results import (
    GENERATIONS_FILE,
    GRADES_FILE,
    SKIPPED_FILE,
    SUMMARY_FILE,
    TIMING_FILE,
    Generation,
    Grade,
    Summary,
    read_lines,
    write_json,
    write_lines,
)


logger = get_logger(__name__)

# Where the harness keeps the answers of a task under way. It adds the number of the process.
_CACHE = "lm_eval.cache"
_METRICS = "metrics"
_CPU_BATCH_SIZE = 8


@dataclass(frozen=True)
class HarnessData:
    """
    A task of lm-eval with its data.

    Args:
        task ([`HarnessTask`]):
            The task.
        subtasks (`dict[str, Any]`):
            The tasks of the harness that it is made of, by name, as lm-eval loads them.
        metric (`dict[str, str]`):
            `name` of the metric, and `filter`.
        sizes (`dict[str, int]`):
            Number of problems of each of them.
        digest (`str`):
            SHA-256 of the problems and of how they are asked.
    """

    task: HarnessTask
    subtasks: dict[str, Any]
    metric: dict[str, str]
    sizes: dict[str, int]
    digest: str


@dataclass(frozen=True)
class HarnessRun:
    """
    A model on a task of lm-eval.

    Args:
        data ([`HarnessData`]):
            The task.
        renderer ([`~gift_trl.evaluation.prompts.Renderer`]):
            Tokenizer and template of the model.
        folder (`Path`):
            Folder of the results.
    """

    data: HarnessData
    renderer: Renderer
    folder: Path

    def __post_init__(self) -> None:
        if self.data.task.chat and self.renderer.tokenizer.chat_template is None:
            raise ValueError(
                f"The model `{self.renderer.name}` has no chat template, and task `{self.data.task.name}` asks in the chat "
                "format. Copy the instruct model's `chat_template.jinja` beside its tokenizer, or set `chat: false`."
            )

    @property
    def generated(self) -> bool:
        """Whether every answer is there."""
        return (self.folder / GENERATIONS_FILE).is_file()


def load_harness_data(task: HarnessTask) -> HarnessData:
    """
    Loads a task and its data.

    Args:
        task ([`HarnessTask`]):
            The task.

    Returns:
        [`HarnessData`]: The task with its problems.

    Raises:
        `ImportError`: If lm-eval is not installed.
        `ValueError`: If there is no such task or metric, or its data cannot be loaded.
    """
    subtasks = _load(task)
    sizes = {
        name: min(len(subtask.eval_docs), task.limit or len(subtask.eval_docs)) for name, subtask in subtasks.items()
    }
    if not any(sizes.values()):
        raise ValueError(f"Task `{task.name}`: lm-eval has no problem in it: check its data.")
    digest = hashlib.sha256()
    for name, subtask in subtasks.items():
        config = {
            key: value for key, value in subtask.dump_config().items() if not key.startswith(("dataset_", "meta"))
        }
        for part in (name, config, *islice(subtask.eval_docs, sizes[name])):
            digest.update(json.dumps(part, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return HarnessData(task, subtasks, _metric(task, subtasks), sizes, digest.hexdigest())


def describe_harness_task(data: HarnessData) -> dict[str, Any]:
    """
    A task as it was used, without a path.

    Args:
        data ([`HarnessData`]):
            The task.

    Returns:
        `dict[str, Any]`: Its fields, the version of lm-eval, the number of problems and a digest of them.
    """
    entry = dataclasses.asdict(data.task) | {"metric": data.metric, "answer_pattern": None}
    for name in ("name", "batch_size"):
        del entry[name]
    entry["filter"] = data.metric.get("filter")  # only what it gave is kept, unlike the other metrics
    entry["task"] = Path(data.task.task or data.task.name).stem
    return {
        "harness": f"lm-eval {_lm_eval().__version__}",
        **entry,
        "num_problems": sum(data.sizes.values()),
        "data": data.digest,
    }


def run_harness(model: PreTrainedModel, run: HarnessRun, seed: int) -> None:
    """
    Asks a model, and writes its answers.

    What a killed run has asked already is not asked again.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        run ([`HarnessRun`]):
            What it is asked.
        seed (`int`):
            Seed that is noted beside the answers. The harness takes the likeliest token, unless a task says otherwise.

    Raises:
        `ValueError`: If the metric is no score from 0 to 1 for each problem.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task, started = run.data.task, time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    own = model.generation_config
    # As with our own engine, nothing but the tokens that end an answer comes from the checkpoint's configuration
    model.generation_config = GenerationConfig(eos_token_id=list(run.renderer.stop_ids))
    try:
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(run.renderer.tokenizer),
            batch_size=task.batch_size or ("auto" if model.device.type != "cpu" else _CPU_BATCH_SIZE),
            max_length=run.renderer.max_length,
            # A chat template writes what a text begins with itself
            add_bos_token=False if task.chat else None,
            chat_template_args=run.renderer.template_kwargs,
        )
        with torch.random.fork_rng():
            results = _lm_eval().simple_evaluate(
                lm,
                tasks=list(_load(task).values()),
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                task_manager=TaskManager(
                    include_defaults=False
                ),  # the tasks are loaded, and there are thousands of others
                use_cache=str(run.folder / _CACHE),
                bootstrap_iters=0,
                system_instruction=task.system,
                apply_chat_template=task.chat,
            )
    finally:
        model.generation_config = own
    generations = list(_generations(run, results["samples"], seed))
    _warn_of_long_prompts(run, generations)
    write_lines(run.folder / SKIPPED_FILE, [])
    write_json(run.folder / TIMING_FILE, {"seconds": round(time.monotonic() - started, 1)})
    write_lines(run.folder / GENERATIONS_FILE, generations)
    remove_cache(run.folder)


def grade_harness(folder: Path, metric: dict[str, str]) -> Summary:
    """
    Writes grades and summary of answers that the harness has scored.

    Args:
        folder (`Path`):
            Folder of a model and task.
        metric (`dict[str, str]`):
            `name` of the metric, and `filter`.

    Returns:
        [`Summary`]: The figures.

    Raises:
        `ValueError`: If the answers have no such metric.
    """
    grades: list[Grade] = []
    lengths: dict[int, list[tuple[int | None, str | None]]] = {}
    for generation in read_lines(folder / GENERATIONS_FILE, Generation):
        scores = generation.fields[_METRICS]
        if metric["name"] not in scores:
            raise ValueError(
                f"The answers in '{folder}' have no metric `{metric['name']}`: lm-eval gave {', '.join(scores)}."
            )
        lengths[generation.problem] = [(None, None)]
        grades.append(Grade(generation.problem, generation.sample, scores[metric["name"]], generation.text))
    summary = summarize(grades, lengths, metric, [])
    write_lines(folder / GRADES_FILE, grades)
    write_json(folder / SUMMARY_FILE, summary.to_dict())
    return summary


def has_cache(folder: Path) -> bool:
    """
    Whether a task of the harness was begun and not finished.

    Args:
        folder (`Path`):
            Folder of a model and task.

    Returns:
        `bool`: Whether it was.
    """
    return any(folder.glob(f"{_CACHE}*"))


def remove_cache(folder: Path) -> None:
    """
    Removes the answers of a task under way.

    Args:
        folder (`Path`):
            Folder of a model and task.
    """
    for path in folder.glob(f"{_CACHE}*"):
        path.unlink()


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The tasks in `lm_eval` need {error.name}, which is not installed: pip install 'gift_trl[lm-eval]'."
        ) from error
    return lm_eval


def _load(task: HarnessTask) -> dict[str, Any]:
    """The tasks of the harness by name, new ones at each call."""
    _lm_eval()
    from lm_eval.tasks import TaskManager

    source = task.task or task.name
    if is_yaml(source) and not Path(source).expanduser().is_file():
        raise FileNotFoundError(f"Task `{task.name}`: there is no file '{source}'.")
    manager = TaskManager(include_defaults=not is_yaml(source))
    try:
        loaded = manager.load([str(Path(source).expanduser()) if is_yaml(source) else source])["tasks"]
    except KeyError as error:
        raise ValueError(
            f"Task `{task.name}`: lm-eval has no task, group or tag '{source}' ({error.args[0]}). `lm-eval ls tasks` lists them."
        ) from error
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"Task `{task.name}`: lm-eval cannot load '{source}' ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Install what it needs, or go online once: the data stays in the cache of datasets."
        ) from error
    if not loaded:
        raise ValueError(f"Task `{task.name}`: '{source}' of lm-eval is empty.")
    return loaded


def _metric(task: HarnessTask, subtasks: dict[str, Any]) -> dict[str, str]:
    """The metric that is wanted, or the first, after the filter that is wanted, or the first."""
    first = next(iter(subtasks.values()))
    name = task.metric or next(iter(first.aggregation()))
    filters = [entry["name"] for entry in first.get_config("filter_list") or [{"name": "none"}]]
    chosen = task.filter or filters[0]
    for label, subtask in subtasks.items():
        if name not in subtask.aggregation():
            raise ValueError(
                f"Task `{task.name}`: `{label}` of lm-eval has no metric `{name}`: set `metric` to one of "
                f"{', '.join(subtask.aggregation())}."
            )
    if chosen not in filters:
        raise ValueError(
            f"Task `{task.name}`: there is no filter `{chosen}`: set `filter` to one of {', '.join(filters)}."
        )
    return {"name": name} if chosen == "none" else {"name": name, "filter": chosen}


def _generations(run: HarnessRun, samples: dict[str, list[dict[str, Any]]], seed: int) -> Iterator[Generation]:
    """What the harness logged, as generations in the order of its tasks and problems."""
    first, metric = 0, run.data.metric
    for name, size in run.data.sizes.items():
        chosen = [sample for sample in samples[name] if sample["filter"] == metric.get("filter", "none")]
        if len(chosen) != size:
            raise ValueError(
                f"Task `{run.data.task.name}`: lm-eval scored {len(chosen)} of {size} problems of `{name}`."
            )
        for sample in sorted(chosen, key=lambda sample: sample["doc_id"]):
            prompt, text, reference = _conversation(sample)
            scores = {key: _score(sample[key]) for key in sample["metrics"]}
            if scores[metric["name"]] is None:
                raise ValueError(
                    f"Task `{run.data.task.name}`: `{metric['name']}` of `{name}` is {sample[metric['name']]!r:.60} for a "
                    "problem, and no score from 0 to 1: set another `metric`."
                )
            fields = {
                "task": name,
                "doc": sample["doc_id"],
                _METRICS: {k: v for k, v in scores.items() if v is not None},
            }
            yield Generation(
                problem=first + sample["doc_id"],
                sample=0,
                seed=seed,
                prompt=prompt,
                prompt_ids=None,
                reference=reference,
                text=text,
                ids=None,
                finish_reason=None,
                fields=fields,
            )
        first += size


def _conversation(sample: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, answer and reference of a problem; of choices the likeliest one."""
    arguments, responses, target = sample["arguments"], sample["resps"], sample["target"]
    prompt = str(arguments[0][0])
    first = responses[0][0]
    if isinstance(first, str):
        return prompt, first, str(target)
    likelihoods = [response[0][0] for response in responses] if isinstance(first, tuple | list) else []
    choices = [str(argument[1]).strip() for argument in arguments if len(argument) > 1]
    if not likelihoods or len(choices) != len(likelihoods):
        return prompt, "", str(target)
    in_range = isinstance(target, int) and 0 <= target < len(choices)
    return prompt, choices[int(np.argmax(likelihoods))], choices[target] if in_range else str(target)


def _score(value: Any) -> float | None:
    """A score from 0 to 1, of several their mean; `None` if it is none."""
    values = value if isinstance(value, list | tuple) and value else [value]
    if not all(isinstance(one, bool | int | float | np.number | np.bool_) for one in values):
        return None
    mean = float(np.mean([float(one) for one in values]))
    return mean if 0 <= mean <= 1 else None


def _warn_of_long_prompts(run: HarnessRun, generations: Iterable[Generation]) -> None:
    """Says how many prompts were cut to fit the model, which the harness does from their start."""
    longest = run.renderer.max_length
    if longest is None:
        return
    lengths = map(
        len, run.renderer.tokenizer([one.prompt for one in generations], add_special_tokens=False)["input_ids"]
    )
    long = sum(length >= longest for length in lengths)
    if long:
        logger.warning(
            f"{long} prompts of task `{run.data.task.name}` do not fit into the {longest} positions of `{run.renderer.name}`: "
            "lm-eval cut off their beginnings. Set `num_fewshot` lower."
        )
