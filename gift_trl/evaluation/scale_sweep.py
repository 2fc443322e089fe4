"""Which λ is best on a task: the instruct model with the adapter at run time answers it at one factor after the other."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gift_trl.evaluation.config import EvaluationConfig, ModelSpec
from gift_trl.evaluation.results import Results, write_json
from gift_trl.evaluation.run import evaluate
from gift_trl.evaluation.statistics import paired_difference
from gift_trl.evaluation.tasks import Task
from gift_trl.merging.sweep import SWEEP_FILE, SWEEP_PLOT_FILE, ScaleScore, Sweep, ordered_scales


def sweep_task(
    adapter: str | os.PathLike,
    instruct_model: str | os.PathLike,
    scales: Sequence[float],
    task: Task,
    output_dir: str | os.PathLike,
    *,
    adapter_revision: str | None = None,
    instruct_model_revision: str | None = None,
    saved_modules: str | None = None,
    seeds: Sequence[int] = (0,),
    dtype: str = "auto",
    tokens_per_batch: int = EvaluationConfig.tokens_per_batch,
    use_cpu: bool = False,
    overwrite: bool = False,
) -> Sweep | None:
    """
    Lets the instruct model with the adapter answer a task at several factors; no checkpoint is written.

    `output_dir` is a folder of results like any other evaluation's, with `sweep.json` and `sweep.png` beside: every answer is
    in it, a sweep that was stopped goes on, further factors are added to what is there, and `gift-trl report` makes a page of
    it. Its models are called `scale_0.5` and so on, and the factor 0 `instruct`.

    Args:
        adapter (`str` or `os.PathLike`):
            Folder or Hub id of the adapter.
        instruct_model (`str` or `os.PathLike`):
            Folder or Hub id of the instruct model.
        scales (`Sequence[float]`):
            The factors. 0 is the instruct model.
        task ([`~gift_trl.evaluation.tasks.Task`]):
            The task.
        output_dir (`str` or `os.PathLike`):
            Folder for the results.
        adapter_revision, instruct_model_revision (`str`, *optional*):
            Revisions on the Hub.
        saved_modules (`str`, *optional*):
            What to do with tensors that the adapter holds whole, as in [`~gift_trl.merging.sweep_scales`].
        seeds, dtype, tokens_per_batch, use_cpu, overwrite (*optional*):
            As in [`~gift_trl.evaluation.EvaluationConfig`].

    Returns:
        [`~gift_trl.merging.Sweep`] or `None`: The average scores in percent, with their differences from the best on the same
        problems; `None` in processes other than the main one.

    Raises:
        `ValueError`, `OSError`: If there is no factor, the adapter cannot be merged, or as from
            [`~gift_trl.evaluation.evaluate`].
    """
    scales = ordered_scales(scales)
    update = {"adapter": os.fspath(adapter), "adapter_revision": adapter_revision, "saved_modules": saved_modules}
    models = {}
    for scale in scales:
        # What takes the place of the instruct model's layers does so at every factor
        is_instruct = scale == 0 and saved_modules != "replace"
        # With all its digits: two factors that are close to each other are two models
        name = "instruct" if is_instruct else f"scale_{scale!r}".removesuffix(".0")
        added = {} if is_instruct else {**update, "adapter_scale": scale}
        models[name] = ModelSpec(os.fspath(instruct_model), instruct_model_revision, **added)
    config = EvaluationConfig(
        os.fspath(output_dir),
        models,
        (task,),
        seeds=list(seeds),
        dtype=dtype,
        tokens_per_batch=tokens_per_batch,
        use_cpu=use_cpu,
        overwrite=overwrite,
    )
    results = evaluate(config)
    if results is None:
        return None
    sweep = _read_sweep(results, dict(zip(models, scales, strict=True)), task)
    folder = Path(output_dir)
    write_json(folder / SWEEP_FILE, sweep.to_dict())
    sweep.plot(folder / SWEEP_PLOT_FILE)
    return sweep


def _read_sweep(results: Results, scales: dict[str, float], task: Task) -> Sweep:
    runs = {scale: results.runs[name, task.name] for name, scale in scales.items()}
    averages = {scale: run.summary.average for scale, run in runs.items()}
    plain = [ScaleScore(s, 100 * a.mean, (100 * a.low, 100 * a.high)) for s, a in averages.items()]
    metric = f"{task.name}, {task.metric['name']}, percent"
    best = Sweep(tuple(plain), metric, higher_is_better=True).best
    means = {scale: _mean_scores(run.scores) for scale, run in runs.items()}
    entries = []
    for entry in plain:
        difference = None
        if entry.scale != best.scale:
            both = sorted(means[entry.scale].keys() & means[best.scale].keys())
            ours, theirs = ([means[s][problem] for problem in both] for s in (entry.scale, best.scale))
            found = paired_difference(ours, theirs)
            difference = (100 * found.mean, 100 * found.low, 100 * found.high)
        entries.append(ScaleScore(entry.scale, entry.score, entry.interval, difference))
    return Sweep(tuple(entries), metric, higher_is_better=True)


def _mean_scores(scores: dict[int, list[float]]) -> dict[int, float]:
    return {problem: float(np.mean(samples)) for problem, samples in scores.items()}
