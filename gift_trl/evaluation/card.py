"""The figures of an evaluation on the card of the merged model that they are of."""

import json
import os
from pathlib import Path

from gift_trl.cards import is_hub_id
from gift_trl.checkpoints import REPORT_FILE, weights_fingerprint
from gift_trl.evaluation.comparison import Comparison
from gift_trl.hub import EvaluationResult, write_merged_card


def evaluation_rows(comparison: Comparison, model: str, instruct_model: str | None = None) -> list[EvaluationResult]:
    """
    The figures of a model as a card takes them.

    Args:
        comparison ([`Comparison`]):
            Results.
        model (`str`):
            Name of the model in them.
        instruct_model (`str`, *optional*):
            Name of the instruct model in them, whose figures stand beside.

    Returns:
        `list[EvaluationResult]`: Average@n on every task the model has results of. Data that is not on the Hub has no name
        there.
    """
    rows = []
    for task in comparison.tasks:
        summary = comparison.summary(model, task)
        if summary is None:
            continue
        config = comparison.task_config(task)
        instruct = comparison.summary(instruct_model, task) if instruct_model is not None else None
        averaged = f" (average@{summary.num_samples})" if summary.num_samples > 1 else ""
        # A local file is known by its name alone; an id without an organisation would look like one
        on_hub = "/" in config["dataset"] and is_hub_id(config["dataset"])
        part = config.get("dataset_config")
        rows.append(
            EvaluationResult(
                task=task,
                metric=f"{summary.metric['name']}{averaged}",
                value=summary.average.mean,
                low=summary.average.low,
                high=summary.average.high,
                instruct_value=None if instruct is None else instruct.average.mean,
                num_problems=summary.num_problems,
                dataset=config["dataset"] if on_hub else None,
                dataset_config=part if isinstance(part, str) else None,
                dataset_split=config.get("split"),
                dataset_revision=config.get("revision"),
            )
        )
    return rows


def add_to_card(comparison: Comparison, model: str, folder: str | os.PathLike) -> bool:
    """
    Puts the figures of a model on the card in its folder, and into `evaluation.json` beside the weights.

    Args:
        comparison ([`Comparison`]):
            Results.
        model (`str`):
            Name of the model in them.
        folder (`str` or `os.PathLike`):
            Folder that a merge wrote, with the very weights that were evaluated.

    Returns:
        `bool`: Whether the card was written: one that a person wrote is left alone.

    Raises:
        `FileNotFoundError`: If the folder holds no merged model.
        `ValueError`: If there is no such model, or its weights are not those in the folder, or not known.
    """
    if model not in comparison.models:
        raise ValueError(
            f"There is no model `{model}` to make a card of: the models are {', '.join(comparison.models)}."
        )
    if not (Path(folder) / REPORT_FILE).is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no {REPORT_FILE}: name the folder that the merge of `{model}` wrote."
        )
    weights = comparison.model_config(model).get("weights")
    if weights is None:
        raise ValueError(
            f"The results do not tell which weights `{model}` had (a server answered), so its figures go on no card by "
            "themselves: write them into the card by hand."
        )
    if weights != weights_fingerprint(folder):
        raise ValueError(
            f"The weights in '{folder}' are not those that were evaluated as `{model}`: name its folder, or evaluate again."
        )
    instruct = json.loads((Path(folder) / REPORT_FILE).read_text(encoding="utf-8"))["instruct_model_fingerprint"]
    names = [name for name in comparison.models if comparison.model_config(name).get("weights") == instruct]
    return write_merged_card(folder, evaluation=evaluation_rows(comparison, model, names[0] if names else None))
