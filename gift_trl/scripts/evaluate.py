"""`gift-trl evaluate`: models × tasks × seeds, with every answer kept."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from gift_trl.evaluation.config import EvaluationConfig
    from gift_trl.evaluation.results import Results
    from gift_trl.scripts.arguments import RecipeParser

_DESCRIPTION = """\
Lets models answer the questions of tasks, grades the answers, and writes every answer, grade and figure to OUTPUT_DIR. Run
again, it goes on where it was stopped, and adds models and tasks to what is there. `gift-trl report OUTPUT_DIR` makes a page
of it. A task is the name of a shipped one (recipes/evaluation), a YAML file, or, in a recipe, its fields.
"""
_EPILOG = """\
example: %(prog)s --models instruct=Qwen/Qwen2.5-7B-Instruct gift=outputs/merged --tasks math500 --output_dir outputs/results
"""
_SECTIONS = {
    "what": "output_dir models tasks lm_eval baseline seeds",
    "every task": "limit n max_new_tokens temperature",
    "how": "engine dtype tokens_per_batch use_cpu overwrite grade_only",
    "server": "base_url concurrency timeout max_retries",
}
# Of the command itself, or of every task, and no fields of the configuration
_SAMPLING = ("n", "max_new_tokens", "temperature")
_OWN = ("limit", "grade_only", *_SAMPLING)


@dataclass
class EvaluateArguments:
    """
    Arguments of `gift-trl evaluate`: the fields of an [`~gift_trl.evaluation.EvaluationConfig`], and what wins over every task.

    Args:
        output_dir (`str`):
            Folder for the results.
        models (`list[str]`):
            Models, as `NAME=MODEL`; in YAML a mapping of names to Hub ids, folders or the fields of a model.
        tasks (`list[str]`):
            Names of shipped tasks or paths of YAML files; in YAML also the fields of a task.
        lm_eval (`list[str]`, *optional*):
            Tasks of lm-eval, such as `mmlu`, or YAML files in its format; in YAML also the fields of a
            [`~gift_trl.evaluation.harness.HarnessTask`].
        limit (`int`, *optional*):
            Number of rows of every task.
        n, max_new_tokens, temperature (*optional*):
            As in [`~gift_trl.evaluation.tasks.Sampling`], for every task.
        grade_only (`bool`, *optional*, defaults to `False`):
            Whether to grade the answers in `output_dir` again and generate none.
        baseline, seeds, engine, dtype, tokens_per_batch, use_cpu, base_url, concurrency, timeout, max_retries, overwrite
        (*optional*):
            As in [`~gift_trl.evaluation.EvaluationConfig`].
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the results."})
    models: list[str] | None = field(
        default=None, metadata={"help": "Models as NAME=MODEL, MODEL being a Hub id or folder; a mapping in YAML."}
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Names of shipped tasks or YAML files; in YAML also the fields of a task."}
    )
    lm_eval: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks of lm-eval, such as mmlu and ifeval; in YAML also mappings of their fields."},
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Model that the others are compared with; the first by default."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds, each with n answers a problem."})
    limit: int | None = field(default=None, metadata={"help": "Number of rows, from the start."})
    n: int | None = field(default=None, metadata={"help": "Number of answers to each problem."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature; 0 takes the likeliest token."})
    engine: str = field(
        default="transformers",
        metadata={
            "help": "transformers: `generate` in this process; vllm: an OpenAI-compatible server.",
            "choices": ["transformers", "vllm"],
        },
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype of the models; auto is the checkpoint's own."})
    tokens_per_batch: int = field(
        default=65536, metadata={"help": "Upper bound of answers × tokens of prompt and longest answer in a batch."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave GPUs alone."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Throw away answers of the same models and tasks under another configuration."},
    )
    grade_only: bool = field(
        default=False, metadata={"help": "Grade the answers in output_dir again and generate none."}
    )
    base_url: str | None = field(default=None, metadata={"help": "URL of the server: http://localhost:8000/v1."})
    concurrency: int = field(default=64, metadata={"help": "Answers asked for at the same time."})
    timeout: float = field(default=3600.0, metadata={"help": "Seconds to wait for an answer before asking again."})
    max_retries: int = field(default=8, metadata={"help": "Number of times an answer is asked for again."})


def make_parser(prog: str | None = None) -> "RecipeParser":
    """
    Parser of the command line and of the YAML file.

    Args:
        prog (`str`, *optional*):
            Name of the command in the help text.

    Returns:
        [`~gift_trl.scripts.arguments.RecipeParser`]: Parser for [`EvaluateArguments`].
    """
    from gift_trl.scripts.arguments import RecipeParser

    return RecipeParser(
        [EvaluateArguments], _SECTIONS, prog=prog or "gift-trl evaluate", description=_DESCRIPTION, epilog=_EPILOG
    )


def main(argv: list[str] | None = None) -> None:
    """
    Runs `gift-trl evaluate`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments; those of the process if not given.

    Raises:
        `ValueError`, `OSError`: If a field, a task, a model or the folder cannot be used.
    """
    (arguments,) = make_parser().parse_args_and_config(argv)
    if arguments.output_dir is None:
        raise ValueError("Nothing says where the results go: set `output_dir`.")

    from gift_trl.evaluation.run import evaluate, regrade

    if arguments.grade_only:
        results = regrade(arguments.output_dir)
    else:
        results = evaluate(config_of(arguments))
    if results is not None:
        print(describe_results(results))


def config_of(arguments: EvaluateArguments) -> "EvaluationConfig":
    """
    The evaluation that the arguments describe.

    Args:
        arguments ([`EvaluateArguments`]):
            The arguments.

    Returns:
        [`~gift_trl.evaluation.EvaluationConfig`]: The configuration.

    Raises:
        `ValueError`, `FileNotFoundError`: If it makes no sense.
    """
    from gift_trl.evaluation.config import make_config
    from gift_trl.scripts.recipes import recipes_folder

    values: dict[str, Any] = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name not in _OWN}
    for name in ("seeds", "tasks", "lm_eval"):
        if values[name] is not None and not isinstance(values[name], list):
            values[name] = [values[name]]
    if isinstance(values["models"], list):
        values["models"] = _named_models(values["models"])
    sampling = {name: getattr(arguments, name) for name in _SAMPLING}
    return make_config(values, recipes_folder() / "evaluation", limit=arguments.limit, sampling=sampling)


def _named_models(models: list[Any]) -> dict[str, str]:
    named: dict[str, str] = {}
    for entry in models:
        name, equals, model = str(entry).partition("=")
        if not equals or not name or not model:
            raise ValueError(
                f"'{entry}' does not say what the model is called in the results: write NAME=MODEL, as in "
                "instruct=Qwen/Qwen2.5-7B-Instruct."
            )
        if name in named:
            raise ValueError(f"Two models are named '{name}': give each a name of its own.")
        named[name] = model
    return named


def describe_results(results: "Results") -> str:
    """
    The figures as a table, and what a reader of it has to know.

    Args:
        results ([`~gift_trl.evaluation.results.Results`]):
            The results.

    Returns:
        `str`: Text of several lines.
    """
    rows = [["average score, %", *results.tasks]]
    notes = []
    for model in results.models:
        rows.append([model])
        for task in results.tasks:
            run = results.runs.get((model, task))
            if run is None:
                rows[-1].append("–")
                continue
            mean, low, high = (100 * value for value in run.summary.average)
            rows[-1].append(f"{mean:.1f} ± {(high - low) / 2:.1f}")
            notes += _notes(model, task, run)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines += ["(±: half of the 95 % interval over problems)", *notes, f"Written to {results.folder}"]
    return "\n".join(line.rstrip() for line in lines)


def _notes(model: str, task: str, run: Any) -> list[str]:
    summary, notes = run.summary, []
    if summary.truncated:
        notes.append(
            f"{model}, {task}: {summary.truncated:.1%} of the answers were cut off; {summary.never_stopped:.1%} of the problems "
            "have none that ended by itself"
        )
    if summary.unchecked:
        notes.append(f"{model}, {task}: {summary.unchecked} answers took too long to check and count as wrong")
    if summary.skipped:
        first = summary.skipped[0]
        notes.append(
            f"{model}, {task}: {len(summary.skipped)} problems skipped, the first being {first.problem} ({first.reason})"
        )
    return notes


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
