"""
Writes the recipes of every model from models.yaml and tasks.yaml: `python recipes/generate.py`.

The files are complete, so that one is enough to read, and equal, so that they do not drift apart: a test compares them with
what this script writes.
"""

import functools
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from gift_trl.planning.memory import MemoryEstimate, TrainingSetup, training_memory
from gift_trl.planning.placement import Placement
from gift_trl.planning.stages import Batch, build_skeleton
from gift_trl.scripts.recipe_writer import (
    LORA_RANK,
    MAX_LENGTH,
    RecipeChoices,
    Setting,
    accumulation_steps,
    gibibytes,
    smallest_card,
    write_recipe,
)


FOLDER = Path(__file__).parent
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Where they are offered, a model takes more than 16 GiB without QLoRA, and fits into 24 GiB with it
QLORA_ABOVE, QLORA_CARD = 16 * 2**30, 24
# Name in results, folder, and what turns the recipe into it
TRAINED = {
    "GIFT": ("gift", ""),
    "GIFT-BaseT": ("gift_baset", "--annotator base"),
    "Shadow-FT": ("shadow_ft", "--confidence_exponent 0"),
    "Instruct-SFT": ("instruct_sft", "--confidence_exponent 0 --model_name_or_path {instruct}{model_revision}"),
}
MERGED = {
    "Task-Arithmetic": ("task_arithmetic", "--method task_arithmetic --instruct_weight 0.5 --scale 0.5"),
    "RE-Adapt": ("re_adapt", "--method re_adapt --instruct_weight 1.0 --scale 0.5"),
    "LoRE-Adapt": ("lore_adapt", "--method lore_adapt --explained_variance 0.5"),
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def load_models() -> dict[str, dict[str, Any]]:
    """What models.yaml says of every model, with what it says of its family."""
    content = read("models.yaml")
    models = content["models"]
    for name, model in models.items():
        family = content["families"][model["family"]]
        model["name"] = name
        model["facts"] = [*family["facts"], *model.get("facts", [])]
        model["comments"] = {**family.get("comments", {}), **model.get("comments", {})}
    return models


def make_skeleton(model: dict[str, Any]) -> PreTrainedModel:
    """The model of the published figures, on the meta device."""
    return build_skeleton(config_of(model))


def config_of(model: dict[str, Any]) -> PreTrainedConfig:
    figures = dict(model["config"])
    return AutoConfig.for_model(figures.pop("model_type"), **figures)


@functools.cache
def setup_of(name: str, qlora: bool) -> TrainingSetup:
    """What a recipe of a model trains."""
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.05, target_modules=TARGET_MODULES)
    return TrainingSetup(config_of(load_models()[name]), lora, load_in_4bit=qlora)


def estimate(name: str, rows: int, qlora: bool = False, processes: int = 1, zero_stage: int = 0) -> MemoryEstimate:
    """Memory of training on rows of the largest length."""
    batch = Batch(rows, MAX_LENGTH, rows * (MAX_LENGTH - 1), masked=rows > 1)
    return training_memory(setup_of(name, qlora), batch, Placement("", processes, zero_stage))


def annotation_bytes(skeleton: PreTrainedModel) -> int:
    """The instruct model in bf16."""
    return 2 * skeleton.num_parameters()


def recipe_of(model: dict[str, Any], task: str, skeleton: PreTrainedModel, *, qlora: bool = False) -> str:
    """A recipe of a model and a task."""
    name, facts = model["name"], read("tasks.yaml")[task]
    path = f"recipes/{name}/{task}{'_qlora' if qlora else ''}.yaml"
    rows = 1 if qlora else model["rows"]
    quantised = qlora and smallest_card(annotation_bytes(skeleton)) > QLORA_CARD
    size = estimate(name, rows, qlora).total
    needed = size if quantised else max(size, annotation_bytes(skeleton))
    steps = [accumulation_steps(processes, rows) for processes in (1, 8, 16)]
    header = [
        f"GIFT{' with QLoRA' if qlora else ''} for {facts['title']} on {model['title']}: {facts['source']}, the paper's settings.",
        "",
        f"  gift-trl train --config {path}",
    ]
    if not qlora:
        header += [f"  gift-trl train --accelerate_config zero2 --num_processes 8 --config {path}"]
    header += [
        "",
        f"Hardware: one GPU of {smallest_card(needed)} GB or more ({gibibytes(needed)} by estimate, *not measured*), or several.",
        f"Global batch: 256 rows = 1 GPU × {rows} row{'s' * (rows > 1)} × {steps[0]} accumulation steps",
    ]
    header[-1] += "." if qlora else f" = 8 GPUs × {rows} × {steps[1]} = 16 GPUs × {rows} × {steps[2]}."
    header += [
        f"README.md beside this file says what the chat format does, and what has not been tried. Written by {FOLDER.name}/generate.py."
    ]
    comments = {**facts.get("comments", {}), **model["comments"]}
    return write_recipe(
        header,
        RecipeChoices(
            base=model["base"],
            instruct=model["instruct"],
            base_revision=model.get("base_revision"),
            instruct_revision=model.get("instruct_revision"),
            data=[Setting(key, value) for key, value in facts["data"].items()],
            target_modules=TARGET_MODULES,
            rows=rows,
            output_dir=f"outputs/{name}/{task}{'_qlora' if qlora else ''}",
            chat_template_kwargs=model.get("chat_template_kwargs", {}),
            load_in_4bit=qlora,
            quantise_instruct=quantised,
            comments=comments,
        ),
    )


def offers_qlora(model: dict[str, Any]) -> bool:
    """Whether a model is too large for a small GPU without QLoRA, and not with it."""
    for rows in (model["rows"], 1):  # the first has been estimated already
        if estimate(model["name"], rows).total <= QLORA_ABOVE:
            return False
    small = smallest_card(estimate(model["name"], 1, qlora=True).total)
    return small is not None and small <= QLORA_CARD


def evaluation_of(model: dict[str, Any], task: str) -> str:
    """What `gift-trl evaluate` compares: the instruct model, and every method's."""
    output = f"outputs/{model['name']}/{task}"
    models: dict[str, Any] = {"instruct": {"model": model["instruct"], "revision": model.get("instruct_revision")}}
    models |= {name: {"model": f"{output}/{folder}/merged"} for name, (folder, _) in {**TRAINED, **MERGED}.items()}
    for spec in models.values():
        spec["chat_template_kwargs"] = model.get("chat_template_kwargs")
    lines = [
        f"# The models of {model['title']} for {read('tasks.yaml')[task]['title']}, against the instruct model. Leave out what you have not made.",
        "#",
        f"#   gift-trl evaluate --config recipes/{model['name']}/{task}_evaluation.yaml",
        f"#   gift-trl report {output}/results --output {output}/report",
        "",
        f"output_dir: {output}/results",
        "baseline: instruct",
        "models:",
    ]
    for name, spec in models.items():
        spec = {key: value for key, value in spec.items() if value is not None}
        text = yaml.safe_dump(spec, default_flow_style=True, sort_keys=False, width=1000).strip()
        lines += [f"  {name}: {spec['model'] if len(spec) == 1 else text}"]
    return "\n".join([*lines, f"tasks: [{', '.join(read('tasks.yaml')[task]['evaluation'])}]"]) + "\n"


def commands_of(model: dict[str, Any], task: str) -> str:
    """The commands of a table of the paper, one after the other."""
    config, output = f"recipes/{model['name']}/{task}.yaml", f"outputs/{model['name']}/{task}"
    revision = model.get("instruct_revision")
    lines = []
    for folder, options in TRAINED.values():
        options = options.format(
            instruct=model["instruct"], model_revision=f" --model_revision {revision}" if revision else ""
        )
        lines += [f"gift-trl train --config {config}"]
        if folder != "gift":
            lines[-1] += f" {options} \\"
            lines += [f"  --output_dir {output}/{folder}/adapter --merge_output_dir {output}/{folder}/merged"]
    for folder, options in MERGED.values():
        lines += [f"gift-trl merge --adapter {output}/shadow_ft/adapter --output_dir {output}/{folder}/merged \\"]
        names = [f"--{kind}_model {model[kind]}" for kind in ("instruct", "base")]
        names += [f"--{kind}_model_revision {model[f'{kind}_revision']}" for kind in ("instruct", "base") if revision]
        lines += [f"  {' '.join(names)} \\", f"  {options}"]
    lines += [
        f"gift-trl evaluate --config recipes/{model['name']}/{task}_evaluation.yaml",
        f"gift-trl report {output}/results --output {output}/report",
    ]
    return "\n".join(lines)


README = """\
# {title}

`{base}` is trained; `{instruct}` scores the data and is what the adapter is merged into. {parameters} parameters.

*Not tried with these weights*: the tests build the model from its published figures, run the recipe's lines with a small pair
in its place, and apply its chat template where TRL ships a copy. Written by `python recipes/generate.py`.

| recipe | data |
|---|---|
{recipes}

## The chat format

{facts}

## Run

```bash
gift-trl train --config recipes/{name}/math.yaml
```

annotates the data, trains the adapter and merges it: `outputs/{name}/math/gift/merged`. On 8 GPUs, with ZeRO-2 or ZeRO-3 (or
`ddp`, where nothing is sharded):

```bash
gift-trl train --accelerate_config zero2 --num_processes 8 --config recipes/{name}/math.yaml
gift-trl train --accelerate_config zero3 --num_processes 8 --config recipes/{name}/math.yaml
```

On two machines of 8 GPUs each, the first line on the first, whose address it is, and the second on the second:

```bash
gift-trl train --accelerate_config two_nodes --machine_rank 0 --main_process_ip 10.0.0.1 --main_process_port 29500 \\
  --config recipes/{name}/math.yaml
gift-trl train --accelerate_config two_nodes --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500 \\
  --config recipes/{name}/math.yaml
```

`global_batch_size: 256` sets the accumulation steps, so that every line makes the same optimizer steps:

| GPUs | sharding | GPUs × rows × accumulation | memory of each GPU |
|---|---|---|---|
{hardware}

The memory is an estimate from the shapes, as of `gift-trl estimate`, with rows of 2,048 tokens, *not measured on a GPU*; CUDA
and the allocator take more. `--per_device_train_batch_size` changes the rows, not the batch. While the data is scored, before
the training, the instruct model takes {annotation} on one GPU, and some for its batches.
{qlora}
## The paper's tables

Each method is the same recipe with another setting, and has a folder of its own. No token is scored twice. Of Task Arithmetic,
RE-Adapt and LoRE-Adapt the factors are ours; on validation data, `gift-trl sweep` finds better ones.

### Mathematics

```bash
{math}
```

### Medical questions

```bash
{medical}
```

### Summaries

```bash
{summaries}
```

The report puts the paper's numbers beside these where it has any of this pair, and those of its summaries, whose pair is not
known here, beside any. `--lm_eval mmlu ifeval` after the evaluation's line adds general ability, measured by lm-eval
([how](../../docs/guides/evaluation.md#general-ability-mmlu-ifeval-and-what-else-lm-eval-has)).
"""

QLORA = """
## QLoRA on one card of 24 GB

```bash
gift-trl train --config recipes/{name}/math_qlora.yaml
```

The base model is loaded in NF4 with nested quantisation, the adapter trained in bf16: {memory} by estimate, against {plain}
for the plain recipe with one row.{instruct} The adapter is merged into the bf16 weights of the instruct model, not into
quantised ones: what is lost to quantisation is lost in training alone.
"""


def readme_of(model: dict[str, Any], skeleton: PreTrainedModel) -> str:
    """The page of a model."""
    rows = model["rows"]
    placements = [(1, "none", 0), (8, "ZeRO-2", 2), (8, "ZeRO-3", 3), (16, "ZeRO-3, two machines", 3)]
    hardware = [
        f"| {n} | {kind} | {n} × {rows} × {accumulation_steps(n, rows)} | "
        f"{gibibytes(estimate(model['name'], rows, processes=n, zero_stage=stage).total)} |"
        for n, kind, stage in placements
    ]
    tasks = read("tasks.yaml")
    recipes = [f"| [{task}.yaml]({task}.yaml) | {facts['source']} |" for task, facts in tasks.items()]
    qlora = ""
    if offers_qlora(model):
        recipes += [f"| [math_qlora.yaml](math_qlora.yaml) | the same as math.yaml, on one card of {QLORA_CARD} GB |"]
        large = smallest_card(annotation_bytes(skeleton)) > QLORA_CARD
        qlora = QLORA.format(
            name=model["name"],
            memory=gibibytes(estimate(model["name"], 1, qlora=True).total),
            plain=gibibytes(estimate(model["name"], 1).total),
            instruct=" Its instruct model does not fit on that card in bf16, so the data is scored in NF4 too; to score with the exact"
            " model, annotate elsewhere and train with `--dataset annotated`." if large else "",
        )  # fmt: skip
    return README.format(
        **model | {"facts": "\n".join(f"- {fact}" for fact in model["facts"])},
        recipes="\n".join(recipes),
        hardware="\n".join(hardware),
        annotation=gibibytes(annotation_bytes(skeleton)),
        qlora=qlora,
        math=commands_of(model, "math"),
        medical=commands_of(model, "medical"),
        summaries=commands_of(model, "summaries"),
    )


def generate() -> dict[str, str]:
    """Contents of every file by its path in this folder."""
    files = {}
    for name, model in load_models().items():
        skeleton = make_skeleton(model)
        for task in read("tasks.yaml"):
            files[f"{name}/{task}.yaml"] = recipe_of(model, task, skeleton)
            files[f"{name}/{task}_evaluation.yaml"] = evaluation_of(model, task)
        if offers_qlora(model):
            files[f"{name}/math_qlora.yaml"] = recipe_of(model, "math", skeleton, qlora=True)
        files[f"{name}/README.md"] = readme_of(model, skeleton)
    return files


if __name__ == "__main__":
    for path, text in generate().items():
        (FOLDER / path).parent.mkdir(exist_ok=True)
        (FOLDER / path).write_text(text, encoding="utf-8")
