"""What is evaluated: models × tasks × seeds, and how the answers are made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gift_trl.evaluation.results import check_name
from gift_trl.evaluation.tasks import Task, from_mapping, load_task


@dataclass(frozen=True)
class ModelSpec:
    """
    A model to evaluate.

    Args:
        model (`str`):
            Hub id, or folder of a checkpoint. With the `vllm` engine its tokenizer and chat template make the prompts.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*):
            Dtype of the weights, in place of the configuration's.
        init_kwargs (`dict[str, Any]`):
            Further keyword arguments of `from_pretrained`, such as `attn_implementation` or `trust_remote_code`.
        chat_template_kwargs (`dict[str, Any]`):
            Variables of the chat template, such as `enable_thinking`.
        max_length (`int`, *optional*):
            Tokens of prompt and answer together. Defaults to the positions of the model.
        base_url (`str`, *optional*):
            URL of the server that holds this model, in place of the configuration's.
        served_model_name (`str`, *optional*):
            Its name on a server that serves several.
        adapter (`str`, *optional*):
            Folder or Hub id of an adapter that is put on the model at run time. Not with the `vllm` engine.
        adapter_revision (`str`, *optional*):
            Branch, tag or commit of the adapter on the Hub.
        adapter_scale (`float`, *optional*, defaults to `1.0`):
            Factor of the adapter's update.
        saved_modules (`str`, *optional*):
            What to do with tensors that the adapter holds whole, `"replace"` or `"ignore"`, as in
            [`~gift_trl.merging.merge_adapter`].
    """

    model: str
    revision: str | None = None
    dtype: str | None = None
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    base_url: str | None = None
    served_model_name: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    adapter_scale: int | float = 1.0
    saved_modules: str | None = None

    @property
    def tokenizer_kwargs(self) -> dict[str, Any]:
        """Keyword arguments with which its configuration and tokenizer are read."""
        trust = {k: v for k, v in self.init_kwargs.items() if k == "trust_remote_code"}
        return {"revision": self.revision, **trust}


@dataclass(frozen=True)
class HarnessTask:
    """
    A task of lm-eval.

    Args:
        name (`str`):
            Name of its folder of results.
        task (`str`, *optional*):
            Task, group (such as `mmlu`) or tag of lm-eval, or the path of a YAML file in its format. Defaults to `name`.
        metric (`str`, *optional*):
            Metric of the harness, from 0 to 1 for each problem. Defaults to the task's first.
        filter (`str`, *optional*):
            Filter of the harness that the metric is taken after. Defaults to the task's first.
        num_fewshot (`int`, *optional*):
            Number of examples in the prompt. Defaults to the task's own.
        limit (`int`, *optional*):
            Number of problems of each task of a group, from the start.
        system (`str`, *optional*):
            System message.
        chat (`bool`, *optional*, defaults to `True`):
            Whether prompts go through the model's chat template.
        batch_size (`int`, *optional*):
            Number of prompts in a batch. Defaults to what fits on a GPU, and to 8 on a CPU.
        role (`str`, *optional*, defaults to `"retention"`):
            As in [`~gift_trl.evaluation.tasks.Task`].
        description (`str`, *optional*):
            What it is, in a sentence.
    """

    name: str
    task: str | None = None
    metric: str | None = None
    filter: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    system: str | None = None
    chat: bool = True
    batch_size: int | None = None
    role: Literal["target", "retention"] = "retention"
    description: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, "task")
        for name, lowest in (("limit", 1), ("batch_size", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"Task `{self.name}`: `{name}` is {value}: it has to be at least {lowest}.")


@dataclass(frozen=True)
class EvaluationConfig:
    """
    An evaluation.

    Args:
        output_dir (`str`):
            Folder for the results. What it holds of the same models and tasks is kept, and what is missing is added.
        models (`dict[str, ModelSpec]`):
            Models by the names they have in the results.
        tasks (`tuple[Task, ...]`):
            Tasks.
        lm_eval (`tuple[HarnessTask, ...]`, *optional*):
            Tasks of lm-eval, such as `mmlu` and `ifeval`. With the `transformers` engine, in one process.
        baseline (`str`, *optional*):
            Name of the model that the others are compared with. Defaults to the first.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Seeds. Each gives `n` answers to every problem; the same seed gives the same answers.
        engine (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`: `generate` in this process or these; `"vllm"`: an OpenAI-compatible server.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the models; `"auto"` is the checkpoint's own.
        tokens_per_batch (`int`, *optional*, defaults to `65536`):
            Upper bound of answers × tokens of prompt and longest answer in a batch. A batch that does not fit into memory is
            halved.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave GPUs alone.
        base_url (`str`, *optional*):
            URL of the server, such as `http://localhost:8000/v1`.
        concurrency (`int`, *optional*, defaults to `64`):
            Number of answers a server is asked for at the same time.
        timeout (`float`, *optional*, defaults to `3600.0`):
            Seconds to wait for an answer before it is asked for again.
        max_retries (`int`, *optional*, defaults to `8`):
            Number of times an answer is asked for again.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to throw away what `output_dir` holds of these models and tasks under another configuration.
    """

    output_dir: str
    models: dict[str, ModelSpec]
    tasks: tuple[Task, ...]
    lm_eval: tuple[HarnessTask, ...] = ()
    baseline: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: str = "auto"
    tokens_per_batch: int = 65536
    use_cpu: bool = False
    base_url: str | None = None
    concurrency: int = 64
    timeout: int | float = 3600.0
    max_retries: int = 8
    overwrite: bool = False

    def __post_init__(self) -> None:
        _check_names(list(self.models), "model")
        _check_names([task.name for task in self.tasks] + [task.name for task in self.lm_eval], "task")
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(
                f"`baseline` is '{self.baseline}', and the models are {', '.join(self.models)}: name one of them."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` is {self.seeds}: give at least one, and none twice.")
        for name in ("tokens_per_batch", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it has to be at least 1.")
        if self.engine == "vllm":
            self._check_servers()
            if self.lm_eval:
                raise ValueError(
                    "The tasks of `lm_eval` need the weights here, for the probabilities of choices: evaluate them with the engine "
                    "`transformers`, into another `output_dir`, and give both to `gift-trl report`."
                )

    def _check_servers(self) -> None:
        places: dict[tuple[str, str | None], str] = {}
        for name, spec in self.models.items():
            if spec.adapter is not None:
                raise ValueError(
                    f"`{name}` has an adapter, which the engine `vllm` does not apply: merge it and serve the result, or use "
                    "the engine `transformers`."
                )
            place = (spec.base_url or self.base_url or "").rstrip("/"), spec.served_model_name
            if not place[0]:
                raise ValueError(f"The engine `vllm` needs the URL of the server that holds `{name}`: set `base_url`.")
            if place in places:
                raise ValueError(
                    f"`{name}` and `{places[place]}` would be answered by the same model, that of {place[0]}: give each its "
                    "own `base_url` (or `served_model_name`, on a server of several)."
                )
            places[place] = name


def _check_names(names: list[str], kind: str) -> None:
    if not names:
        raise ValueError(f"There is no {kind} to evaluate: set `{kind}s`.")
    seen = set()
    for name in names:
        if check_name(name, kind).casefold() in seen:
            raise ValueError(
                f"Two {kind}s are named '{name}': their results go to folders of that name, so give each its own."
            )
        seen.add(name.casefold())


def make_config(
    values: dict[str, Any],
    tasks_folder: Path | None = None,
    *,
    limit: int | None = None,
    sampling: dict[str, Any] | None = None,
) -> EvaluationConfig:
    """
    Makes the configuration of what YAML holds.

    Args:
        values (`dict[str, Any]`):
            Fields of [`EvaluationConfig`]. `models` maps names to Hub ids, folders or fields of [`ModelSpec`]; `tasks` lists
            what [`load_task`] takes; `lm_eval` lists names of lm-eval or fields of [`HarnessTask`].
        tasks_folder (`Path`, *optional*):
            Where the shipped tasks are.
        limit (`int`, *optional*):
            Number of rows of every task.
        sampling (`dict[str, Any]`, *optional*):
            Fields of [`Sampling`] for every task; those that are `None` are left as they are.

    Returns:
        [`EvaluationConfig`]: The configuration.

    Raises:
        `ValueError`, `FileNotFoundError`: If it makes no sense; the message names the field.
    """
    values = dict(values)
    models, tasks, harness = values.get("models"), values.get("tasks"), values.pop("lm_eval", None) or []
    if tasks is None and harness:
        tasks = []
    if not isinstance(models, dict):
        raise ValueError(
            f"`models` is {models!r}: map names to Hub ids or folders, as in `instruct: Qwen/Qwen2.5-7B-Instruct`."
        )
    if not isinstance(tasks, list):
        raise ValueError(
            f"`tasks` is {tasks!r}: list names of shipped tasks, paths of YAML files, or tasks themselves."
        )
    if not isinstance(harness, list) or not all(isinstance(task, str | dict) for task in harness):
        raise ValueError(f"`lm_eval` is {harness!r}: list names of tasks of lm-eval, or mappings of their fields.")
    sampling = {name: value for name, value in (sampling or {}).items() if value is not None}
    values["models"] = {
        name: from_mapping(ModelSpec, {"model": spec} if isinstance(spec, str) else spec, f"Model `{name}`")
        for name, spec in models.items()
    }
    values["tasks"] = tuple(load_task(task, tasks_folder, limit=limit, sampling=sampling) for task in tasks)
    values["lm_eval"] = tuple(
        from_mapping(
            HarnessTask,
            {**_harness_fields(task), **({} if limit is None else {"limit": limit})},
            f"Task {task!r} of `lm_eval`",
        )
        for task in harness
    )
    return from_mapping(EvaluationConfig, values, "The evaluation")


def _harness_fields(source: str | dict[str, Any]) -> dict[str, Any]:
    """The fields of a task, with a name, of what a list in YAML or on the command line holds."""
    values = {"task": source} if isinstance(source, str) else dict(source)
    if "name" not in values and isinstance(values.get("task"), str):
        values["name"] = Path(values["task"]).stem if is_yaml(values["task"]) else values["task"]
    return values


def is_yaml(source: str) -> bool:
    """
    Whether a task of lm-eval is given as a file.

    Args:
        source (`str`):
            Name or path.

    Returns:
        `bool`: Whether it is the path of a YAML file.
    """
    return Path(source).suffix in (".yaml", ".yml")
