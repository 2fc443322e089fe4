"""An evaluation from its configuration to the folder of results."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, release_memory
from datasets.utils import tqdm
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from gift_trl.annotation.engine import balance, together
from gift_trl.annotation.loading import check_scoring_model, load_scoring_model
from gift_trl.annotation.server_client import ServerClient
from gift_trl.evaluation.config import EvaluationConfig, ModelSpec
from gift_trl.evaluation.generation import Completion, Request, TransformersEngine, plan_batches
from gift_trl.evaluation.grading import check_metric, grade
from gift_trl.evaluation.harness import (
    HarnessData,
    HarnessRun,
    describe_harness_task,
    grade_harness,
    load_harness_data,
    remove_cache,
    run_harness,
)
from gift_trl.evaluation.manifest import describe_model, describe_task, prepare_folder
from gift_trl.evaluation.parts import PartWriter, join_parts, read_done, remove_parts
from gift_trl.evaluation.prompts import Renderer, make_renderer
from gift_trl.evaluation.results import (
    GENERATIONS_FILE,
    SKIPPED_FILE,
    SUMMARY_FILE,
    TIMING_FILE,
    Generation,
    Results,
    Skip,
    TaskResults,
    load_results,
    write_json,
    write_lines,
)
from gift_trl.evaluation.server_engine import ServerEngine
from gift_trl.evaluation.tasks import TaskData, load_task_data
from gift_trl.merging.preflight import AdapterPlan, preflight
from gift_trl.merging.runtime import apply_plan


logger = get_logger(__name__)

_LOCK_FILE = ".lock"


@dataclass(frozen=True)
class _Model:
    """A model and how it is reached."""

    spec: ModelSpec
    renderer: Renderer
    server: ServerClient | None
    adapter: AdapterPlan | None = None

    @property
    def name(self) -> str:
        return self.renderer.name


@dataclass(frozen=True)
class _Run:
    """A model on a task: what is asked, and what cannot be."""

    data: TaskData
    renderer: Renderer
    folder: Path
    requests: list[Request]
    skipped: list[Skip]

    @property
    def generated(self) -> bool:
        return (self.folder / GENERATIONS_FILE).is_file()


def evaluate(config: EvaluationConfig, data: Sequence[TaskData] | None = None) -> Results | None:
    """
    Generates, grades and summarises.

    Whatever can be known to be wrong is refused before any weights are read. What `output_dir` holds already is kept; a run
    that was killed goes on where it was. Under `accelerate launch` the processes share the problems, in batches that do not
    depend on their number.

    Args:
        config ([`EvaluationConfig`]):
            What to evaluate.
        data (`Sequence[TaskData]`, *optional*):
            The data of its tasks, in their order. Loaded if not given.

    Returns:
        [`Results`] or `None`: The results; `None` in processes other than the main one.

    Raises:
        `ValueError`, `OSError`: If something cannot be used; what was generated until then is kept.
    """
    state = PartialState(cpu=config.use_cpu)
    if config.lm_eval and state.num_processes > 1:
        raise ValueError(
            f"The tasks of `lm_eval` run in one process, and there are {state.num_processes}: launch `gift-trl evaluate` without "
            "accelerate (it spreads a model over the GPUs it sees), or evaluate them by themselves."
        )
    for task in config.tasks:
        check_metric(task.metric, task.name)
    if data is None:
        with state.main_process_first():
            data = [load_task_data(task) for task in config.tasks]
    harness = [load_harness_data(task) for task in config.lm_eval]
    models = [_reach(name, spec, config) for name, spec in config.models.items()]
    runs = {model.name: [_plan(model.renderer, one, config) for one in data] for model in models}
    harness_runs = {
        model.name: [
            HarnessRun(one, model.renderer, Path(config.output_dir, model.name, one.task.name)) for one in harness
        ]
        for model in models
    }
    with _locked(Path(config.output_dir)):
        together(lambda: _prepare(config, data, models, runs, harness) if state.is_main_process else None)
        for model in models:
            if not all(run.generated for run in (*runs[model.name], *harness_runs[model.name])):
                _generate_model(model, config, runs[model.name], harness_runs[model.name])
        if not state.is_main_process:
            return None
        for model in models:
            for run in runs[model.name]:
                _grade(model.name, run)
            for run in harness_runs[model.name]:
                _grade_harness(model.name, run)
        # Of models that are not named here: a task has one metric
        results = load_results(config.output_dir)
        for pair in results.missing:
            _grade_again(results, *pair)
    return load_results(config.output_dir)


def regrade(output_dir: str) -> Results:
    """
    Grades again what a folder of results holds, with the metrics that its `evaluation.yaml` names; generates nothing.

    Args:
        output_dir (`str`):
            The folder.

    Returns:
        [`Results`]: The results.

    Raises:
        `FileNotFoundError`, `ValueError`: If it is no such folder, or a file in it cannot be read.
    """
    results = load_results(output_dir)
    with _locked(results.folder):
        for model in results.models:
            for name in results.tasks:
                _grade_again(results, model, name)
    return load_results(output_dir)


def _grade_again(results: Results, model: str, name: str) -> None:
    """Grades a model's answers to a task, if it has answered it, as `evaluation.yaml` says."""
    task, folder = results.config["tasks"][name], results.folder / model / name
    if not (folder / GENERATIONS_FILE).is_file():
        return
    if "harness" in task:
        grade_harness(folder, task["metric"])
        return
    check_metric(task["metric"], name)
    grade(folder, task["metric"], task["answer_pattern"], f"Grading {model}, {name}")


def _reach(name: str, spec: ModelSpec, config: EvaluationConfig) -> _Model:
    """Finds what makes a model's prompts, and the server that holds it."""
    server, max_length = None, spec.max_length
    if config.engine == "vllm":
        server = ServerClient(
            spec.base_url or config.base_url,
            model=spec.served_model_name,
            concurrency=config.concurrency,
            timeout=config.timeout,
            max_retries=config.max_retries,
        )
        served = server.identity
        max_length = max_length or server.max_model_len
        if Path(spec.model).name not in {Path(value).name for value in served.values()}:
            logger.warning(
                f"The server serves `{served['model']}` (from `{served['root']}`), and its answers are taken for those of "
                f"`{name}`, which is `{spec.model}`. Make sure that it has loaded these weights."
            )
    else:
        check_scoring_model(spec.model, **spec.tokenizer_kwargs)
    renderer = make_renderer(
        name, spec.model, template_kwargs=spec.chat_template_kwargs, max_length=max_length, **spec.tokenizer_kwargs
    )
    return _Model(spec, renderer, server, _reach_adapter(spec))


def _reach_adapter(spec: ModelSpec) -> AdapterPlan | None:
    if spec.adapter is None:
        return None
    # What could not be merged is not applied either: it would not be what the merge makes
    plan = preflight(
        [(spec.adapter, spec.adapter_revision)],
        spec.model,
        None,
        instruct_model_revision=spec.revision,
        scale=float(spec.adapter_scale),
        saved_modules=spec.saved_modules,
    )
    for caution in plan.cautions:
        logger.warning(caution)
    return plan.adapters[0]


def _plan(renderer: Renderer, data: TaskData, config: EvaluationConfig) -> _Run:
    task, requests, skipped, shortened = data.task, [], list(data.skipped), 0
    longest, n = task.sampling.max_new_tokens, task.sampling.n
    for problem, ids in zip(data.problems, renderer.render(data), strict=True):
        room = longest if renderer.max_length is None else renderer.max_length - len(ids)
        if room < 1:
            skipped.append(
                Skip(
                    problem.index, f"the prompt of {len(ids)} tokens fills the model's {renderer.max_length} positions"
                )
            )
            continue
        shortened += room < longest
        requests += [
            Request(task.name, problem.index, n * place + sample, seed, ids, min(room, longest))
            for place, seed in enumerate(config.seeds)
            for sample in range(n)
        ]
    if not requests:
        raise ValueError(
            f"No prompt of task `{task.name}` leaves `{renderer.name}` room for an answer within its {renderer.max_length} "
            "positions."
        )
    if shortened:
        logger.warning(
            f"{shortened} of {len(data.problems)} prompts of task `{task.name}` leave `{renderer.name}` less than "
            f"{longest} (`max_new_tokens`) of its {renderer.max_length} positions: their answers are cut off earlier."
        )
    folder = Path(config.output_dir) / renderer.name / task.name
    return _Run(data, renderer, folder, requests, sorted(skipped, key=lambda skip: skip.problem))


def _prepare(
    config: EvaluationConfig,
    data: Sequence[TaskData],
    models: list[_Model],
    runs: dict[str, list[_Run]],
    harness: list[HarnessData],
) -> None:
    entries = {
        model.name: describe_model(model.spec, model.renderer, config, model.server and model.server.identity)
        for model in models
    }
    tasks = {one.task.name: describe_task(one) for one in data}
    tasks |= {one.task.name: describe_harness_task(one) for one in harness}
    prepare_folder(Path(config.output_dir), config, entries, tasks)
    for run in (run for several in runs.values() for run in several):
        write_lines(run.folder / SKIPPED_FILE, run.skipped)


def _generate_model(model: _Model, config: EvaluationConfig, runs: list[_Run], harness_runs: list[HarnessRun]) -> None:
    stop_ids = model.renderer.stop_ids
    if model.server is not None:
        engine, tokens_per_batch = ServerEngine(model.server, stop_ids), 1  # it makes its own batches
    else:
        engine, tokens_per_batch = TransformersEngine(_load(model, config), stop_ids), config.tokens_per_batch
    for run in runs:
        if not run.generated:
            _generate(model.name, engine, run, tokens_per_batch)
    for harness_run in harness_runs:
        if not harness_run.generated:
            run_harness(engine.model, harness_run, config.seeds[0])
    del engine
    release_memory()


def _load(reached: _Model, config: EvaluationConfig) -> PreTrainedModel:
    spec = reached.spec
    load_kwargs = {"revision": spec.revision, "dtype": spec.dtype or config.dtype, **spec.init_kwargs}
    if config.use_cpu:
        load_kwargs["device_map"] = None
    model, sharded = load_scoring_model(spec.model, load_kwargs)
    if sharded is not None:
        raise ValueError(
            "Under DeepSpeed ZeRO-3 each process holds a part of the weights, and none can generate by itself: launch with DDP, "
            "or one process, which spreads the model over its GPUs."
        )
    if reached.adapter is not None:
        model = apply_plan(model, reached.adapter, spec.saved_modules, float(spec.adapter_scale))
    return model


def _generate(name: str, engine: TransformersEngine | ServerEngine, run: _Run, tokens_per_batch: int) -> None:
    state = PartialState()
    before = TaskResults(name, run.data.task.name, run.folder).timing.get("seconds", 0.0)
    done = [read_done(run.folder) if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(done)
    # A batch is made anew whole if one of its answers is missing: so every number comes out the same to the last bit
    batches = [
        batch
        for batch in plan_batches(run.requests, tokens_per_batch)
        if any(request.key not in done[0] for request in batch)
    ]
    costs = [len(batch) * (len(batch[0].prompt_ids) + batch[0].max_new_tokens) for batch in batches]
    mine = [batches[i] for i in balance(costs, state.num_processes)[state.process_index]]
    problems = {problem.index: problem for problem in run.data.problems}
    prompts: dict[int, str] = {}

    def generation(request: Request, completion: Completion) -> Generation:
        problem = problems[request.problem]
        if request.problem not in prompts:
            prompts[request.problem] = run.renderer.describe(request.prompt_ids)
        return Generation(
            problem=request.problem,
            sample=request.sample,
            seed=request.seed,
            prompt=prompts[request.problem],
            prompt_ids=request.prompt_ids,
            reference=problem.reference,
            text=run.renderer.answer(completion.ids) if completion.text is None else completion.text,
            ids=completion.ids,
            finish_reason=completion.finish_reason,
            fields=problem.fields,
        )

    def write() -> None:
        started = time.monotonic()
        writer = PartWriter(run.folder, state.process_index)
        progress = tqdm(
            total=sum(map(len, mine)),
            desc=f"{name}, {run.data.task.name}",
            unit="answer",
            disable=not state.is_main_process,
        )
        try:
            with progress:
                for answers in engine.generate(mine, run.data.task.sampling):
                    writer.write([generation(*answer) for answer in answers if answer[0].key not in done[0]])
                    progress.update(len(answers))
                    if state.is_main_process:
                        write_json(
                            run.folder / TIMING_FILE, {"seconds": round(before + time.monotonic() - started, 1)}
                        )
        finally:
            writer.close()

    together(write)
    if state.is_main_process:
        join_parts(run.folder, {request.key for request in run.requests})


def _grade(model: str, run: _Run) -> None:
    remove_parts(run.folder)
    task, results = run.data.task, TaskResults(model, run.data.task.name, run.folder)
    if (run.folder / SUMMARY_FILE).is_file() and results.summary.metric == task.metric:
        return
    grade(run.folder, task.metric, task.answer_pattern, f"Grading {model}, {task.name}")


def _grade_harness(model: str, run: HarnessRun) -> None:
    remove_cache(run.folder)
    results = TaskResults(model, run.data.task.name, run.folder)
    if not (run.folder / SUMMARY_FILE).is_file() or results.summary.metric != run.data.metric:
        grade_harness(run.folder, run.data.metric)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second evaluation from writing into the same folder."""
    if not PartialState().is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FileExistsError(
            f"Another evaluation is writing to '{folder}': wait for it, or choose another `output_dir`."
        ) from error
    try:
        yield
    finally:
        lock.release()
