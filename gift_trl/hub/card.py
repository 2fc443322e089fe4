"""The card of a merged model, made of what the training and the merge have written beside the weights."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gift_trl.cards import (
    PAPER,
    Source,
    TrainingFacts,
    list_versions,
    make_card,
    markdown_table,
    may_be_replaced,
    write_card,
)
from gift_trl.checkpoints import (
    CARD_FILE,
    EVALUATION_FILE,
    KINSHIP_PLOT_FILE,
    REPORT_FILE,
    SIGNAL_PLOT_FILE,
    VERIFICATION_FILE,
)
from gift_trl.plots import new_figure, plot_bands


_USE = """\
## Use

```python
from transformers import pipeline

{load}
{call}
```"""
_LOAD = 'generator = pipeline("text-generation", model="{model}"{revision}, dtype="auto")'
_CHAT_CALL = """\
messages = [{"role": "user", "content": "What is the capital of France?"}]
print(generator(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])"""
_PLAIN_CALL = 'print(generator("The capital of France is", max_new_tokens=64)[0]["generated_text"])'
# Files that the metadata of a card may name; others need an address
_LICENCE_FILES = ("LICENSE", "LICENSE.md")
# Of a merge recipe: what is set only where the method reads it
_MERGE_SETTINGS = (
    "instruct_weight",
    "density",
    "majority_sign",
    "seed",
    "rank",
    "explained_variance",
    "saved_modules",
)


@dataclass(frozen=True)
class EvaluationResult:
    """
    A figure of the merged model on a task. Figures are shares or scores from 0 to 1.

    Args:
        task (`str`):
            Name of the task.
        metric (`str`):
            Name of the metric.
        value (`float`):
            The figure.
        low, high (`float`, *optional*):
            Ends of its 95 % interval.
        instruct_value (`float`, *optional*):
            The instruct model's figure.
        num_problems (`int`, *optional*):
            Number of problems.
        dataset (`str`, *optional*):
            Hub id of the data. Only with one does the figure appear in the metadata of the card.
        dataset_config, dataset_split, dataset_revision (`str`, *optional*):
            Which part of the data.
    """

    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    instruct_value: float | None = None
    num_problems: int | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    dataset_revision: str | None = None


def write_merged_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    adapter_id: str | None = None,
    evaluation: Sequence[EvaluationResult] | None = None,
) -> bool:
    """
    Writes the card of a merged model into its folder, with a picture of the learning signal of its training.

    A card that a person wrote or changed is left alone, and a card that cannot be made is a warning.

    Args:
        folder (`str` or `os.PathLike`):
            Folder that a merge wrote.
        repo_id (`str`, *optional*):
            Id of the repository that the model goes to. Defaults to the name of the folder.
        revision (`str`, *optional*):
            Branch that it goes to, if not the main one.
        adapter_id (`str`, *optional*):
            Id of the repository that the adapter goes to, if it came from a folder.
        evaluation (`Sequence[EvaluationResult]`, *optional*):
            Figures of the model, which are kept in `evaluation.json` beside the weights for the next card. Defaults to what
            stands there.

    Returns:
        `bool`: Whether a card was written.

    Raises:
        `FileNotFoundError`: If the folder holds no `merge_report.json`.
    """
    folder = Path(folder)
    if not (folder / REPORT_FILE).is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no {REPORT_FILE}, so it was not merged here, and its card is yours to write ({CARD_FILE})."
        )

    def make() -> ModelCard:
        if evaluation is not None:
            text = json.dumps([asdict(result) for result in evaluation], indent=2) + "\n"
            (folder / EVALUATION_FILE).write_text(text, encoding="utf-8")
        return _Card(folder, repo_id, revision, adapter_id).make()

    return write_card(folder / CARD_FILE, make)


def complete_merged_card(
    folder: str | os.PathLike, repo_id: str, revision: str | None = None, adapter_id: str | None = None
) -> bool:
    """
    Writes the card of a merged model before a push, if it has none, or one of ours for another repository.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of a model or an adapter; nothing is done if no merge wrote it.
        repo_id, revision, adapter_id:
            As in [`write_merged_card`].

    Returns:
        `bool`: Whether a card was written.
    """
    folder = Path(folder).expanduser()
    card = folder / CARD_FILE
    if not (folder / REPORT_FILE).is_file() or not may_be_replaced(card):
        return False
    # The card of this push is not made again: it may say what is no longer known here
    if card.is_file() and _load_line(repo_id, revision) in card.read_text(encoding="utf-8"):
        return False
    return write_merged_card(folder, repo_id=repo_id, revision=revision, adapter_id=adapter_id)


class _Card:
    """What the files of a merged folder say."""

    def __init__(self, folder: Path, repo_id: str | None, revision: str | None, adapter_id: str | None):
        self.folder, self.repo_id, self.revision = folder, repo_id, revision
        self.name = (repo_id or folder.resolve().name).split("/")[-1]
        self.model = repo_id or self.name
        self.report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        self.verification = _read(folder / VERIFICATION_FILE)
        self.evaluation = [EvaluationResult(**result) for result in _read(folder / EVALUATION_FILE) or ()]
        self.recipe = self.report["recipe"]
        self.trainings = [
            (update["name"], TrainingFacts.from_dict(update["training"]))
            for update in self.report["updates"]
            if "training" in update
        ]
        commit = self.report["instruct_model_commit"]
        self.instruct = Source(self.report["instruct_model"], commit, on_hub=commit is not None)
        self.base, self.tuned = self._base(), self._companion("tuned_model")
        self.adapters = [
            Source(update["name"], update["commit"], on_hub=update["commit"] is not None)
            for update in self.report["updates"]
            if "settings" in update
        ]
        if adapter_id is not None and len(self.adapters) == 1 and not self.adapters[0].on_hub:
            self.adapters = [Source(adapter_id, on_hub=True)]
        datasets = [dataset for _, facts in self.trainings for dataset in facts.datasets]
        self.datasets = list(dict.fromkeys(datasets))

    def _companion(self, role: str) -> Source | None:
        """A further checkpoint that was given to the merge."""
        commits = {update["name"]: update["commit"] for update in self.report["updates"]}
        if role not in self.recipe or role not in commits:
            return None
        return Source(self.recipe[role], commits[role], on_hub=commits[role] is not None)

    def _base(self) -> Source | None:
        given = self._companion("base_model")
        if given is not None and given.on_hub:
            return given
        for _, facts in self.trainings:
            return facts.base_model
        # The adapter names it, and no commit: an id of the Hub has a namespace
        name = self.report["adapter_base_model"]
        return Source(name, on_hub="/" in name) if name else given

    def make(self) -> ModelCard:
        signals = self._draw_signals()
        sections = [
            f"# {self.name}",
            self._introduction(),
            self._sources(),
            self._use(),
            *self._evaluation(),
            *self._training(signals),
            *self._merge(),
            list_versions(self._versions()),
            *self._licence(),
        ]
        return make_card(self._metadata(), sections)

    def _metadata(self) -> ModelCardData:
        named = [source.name for source in (self.instruct, self.base) if source is not None and source.on_hub]
        lora = any(update.get("settings", {}).get("peft_type") == "LORA" for update in self.report["updates"])
        results = [
            EvalResult(
                task_type="text-generation",
                task_name=result.task,
                dataset_type=result.dataset,
                dataset_name=result.task,
                dataset_config=result.dataset_config,
                dataset_split=result.dataset_split,
                dataset_revision=result.dataset_revision,
                metric_type=result.metric,
                metric_value=round(100 * result.value, 2),
            )
            for result in self.evaluation
            if result.dataset is not None
        ]
        return ModelCardData(
            model_name=self.name,
            base_model=list(dict.fromkeys(named)) or None,
            base_model_relation="merge" if named else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=[*(["trl"] if self.trainings else []), "gift", *(["lora"] if lora else []), "merge"],
            datasets=[dataset.name for dataset in self.datasets if dataset.on_hub] or None,
            eval_results=results or None,
            **self._licence_data(),
        )

    def _licence_data(self) -> dict[str, Any]:
        licence = dict(self.report["licence"])
        link = licence.get("license_link", "")
        if link and "://" not in link:
            file = link.removeprefix("./")
            holder, revision = self.repo_id, self.revision
            if not (self.folder / file).is_file():
                holder, revision = self.instruct.name if self.instruct.on_hub else None, self.instruct.commit
            if holder == self.repo_id and file in _LICENCE_FILES:
                licence["license_link"] = file
            elif holder is not None:
                licence["license_link"] = f"https://huggingface.co/{holder}/blob/{revision or 'main'}/{file}"
            else:
                del licence["license_link"]
        return licence

    def _licence(self) -> Iterator[str]:
        licence = self._licence_data()
        if licence:
            name = licence.get("license_name") or licence["license"]
            link = licence.get("license_link")
            named = "its own" if name == "other" else str(name)
            yield (
                f"## Licence\n\nThe licence of the instruct model {self.instruct.link()} applies: "
                f"{f'[{named}]({link})' if link else named}."
            )

    def _introduction(self) -> str:
        method, adapters = self.recipe["method"], ", ".join(adapter.link() for adapter in self.adapters)
        what = f"{self.name} is {self.instruct.link()}"
        files = "tokenizer, chat template and configuration"
        like_instruct = f"Its {files} are those of the instruct model."
        base = self.base.link() if self.base is not None else "its base model"
        if method == "full_delta" and self.tuned is not None:
            return f"{what} plus the difference between {self.tuned.link()} and the base model {base}. {like_instruct}"
        if not self.trainings or method != "linear" or len(self.adapters) > 1:
            kind = "the update of the adapter" if len(self.adapters) == 1 else "the updates of the adapters"
            trained = f", trained on the base model {base}" if self.base is not None else ""
            return f"{what}, merged with {kind} {adapters}{trained}. {like_instruct}"
        _, facts = self.trainings[0]
        settings = facts.settings
        data = [dataset.link("datasets/") for dataset in facts.datasets]
        if settings.get("confidence_exponent") == 0:
            loss = "with plain cross-entropy"
        elif settings.get("annotator") == "base":
            loss = "with the cross-entropy of every token weighted by the probability that the base model gave to it"
        else:
            loss = (
                "with the cross-entropy of every token weighted by the probability that the instruct model gives to it"
            )
        kind = "A LoRA adapter" if facts.peft_type == "LORA" else "An adapter"
        return (
            f"{what}, adapted{f' to {_listed(data)}' if data else ''} with GIFT "
            f"([Guided Fine-Tuning and Transfer]({PAPER})). {kind} was trained on the base model {base}, {loss}, and was "
            f"then added to the instruct model, whose {files} it keeps."
        )

    def _sources(self) -> str:
        rows = [("instruct model", self.instruct, "", self.report["instruct_model_fingerprint"])]
        if self.base is not None:
            rows.append(("base model", self.base, "", None))
        fingerprints = {update["name"]: update["fingerprint"] for update in self.report["updates"]}
        updates = [update for update in self.report["updates"] if "settings" in update]
        rows += [
            ("adapter", adapter, "", update["fingerprint"])
            for adapter, update in zip(self.adapters, updates, strict=True)
        ]
        if self.tuned is not None:
            rows.append(("fine-tuned base model", self.tuned, "", fingerprints["tuned_model"]))
        rows += [("dataset", dataset, "datasets/", None) for dataset in self.datasets]
        cells = [
            (part, source.link(kind), source.commit_link(kind) or (f"weights `{weights[:12]}`" if weights else ""))
            for part, source, kind, weights in rows
        ]
        return markdown_table(("made of", "", "revision"), cells)

    def _use(self) -> str:
        templates = [self.folder / "chat_template.jinja", self.folder / "additional_chat_templates"]
        settings = _read(self.folder / "tokenizer_config.json") or {}
        chats = "chat_template" in settings or any(path.exists() for path in templates)
        return _USE.format(load=_load_line(self.model, self.revision), call=_CHAT_CALL if chats else _PLAIN_CALL)

    def _evaluation(self) -> Iterator[str]:
        if not self.evaluation:
            return
        rows = []
        for result in self.evaluation:
            value = f"{100 * result.value:.1f}"
            if result.low is not None and result.high is not None:
                value += f" ({100 * result.low:.1f}–{100 * result.high:.1f})"
            instruct = "" if result.instruct_value is None else f"{100 * result.instruct_value:.1f}"
            rows.append((result.task, result.metric, value, instruct, result.num_problems or ""))
        head = ("task", "metric", "this model", "instruct model", "problems")
        note = "In percent, with 95 % intervals over the problems where there are any."
        yield f"## Evaluation\n\n{markdown_table(head, rows)}\n\n{note}"

    def _training(self, signals: Mapping[str, str]) -> Iterator[str]:
        for name, facts in self.trainings:
            title = "## Training" if len(self.trainings) == 1 else f"## Training of {name}"
            yield f"{title}\n\n" + markdown_table(("setting", "value"), list(facts.settings.items()))
            if facts.links:
                yield "Run: " + ", ".join(f"[{service}]({url})" for service, url in facts.links.items())
            if name in signals:
                yield (
                    f"![Shares of the training loss by the confidence of the tokens]({signals[name]})\n\n"
                    "The shares of the weighted loss Σ w·ℓ that came from tokens to which the "
                    f"{'base' if facts.settings.get('annotator') == 'base' else 'instruct'} model gave a probability q below "
                    "0.2, between 0.2 and 0.8, and above 0.8."
                )

    def _merge(self) -> Iterator[str]:
        report, recipe = self.report, self.recipe
        rows = [("method", _formula(recipe)), ("scale λ", f"{report['scale']:g}")]
        weights = recipe.get("adapter_weight", [])
        if len(weights) > 1:
            rows += [(f"weight of {a.link()}", f"{w:g}") for a, w in zip(self.adapters, weights, strict=True)]
        rows += [(name, recipe[name]) for name in _MERGE_SETTINGS if name in recipe and recipe[name] != 1.0]
        dtypes = ", ".join(sorted(set(report["merged_tensors"].values())))
        rows.append(
            (
                "tensors",
                f"{len(report['merged_tensors'])} of {report['num_tensors']} updated ({dtypes}), "
                f"{report['num_changed']} changed in value",
            )
        )
        table = markdown_table(("setting", "value"), rows)
        yield f"## Merge\n\n{table}\n\nMore stands in `{REPORT_FILE}` and `merge_recipe.yaml` beside the weights."
        if self.report["kinship"]:
            names = {
                "relative_change": "‖θ_I − θ_B‖ / ‖θ_B‖",
                "update_ratio": "‖M‖ / ‖θ_I − θ_B‖",
                "cosine": "cos(M, θ_I − θ_B)",
            }
            rows = [(title, _number(self.report["kinship"]["all"][name])) for name, title in names.items()]
            picture = f"\n\n![Kinship by kind of module]({KINSHIP_PLOT_FILE})"
            yield (
                "### Kinship\n\nHow far the instruct model θ_I is from the base model θ_B, and how the update M lies to that:"
                f"\n\n{markdown_table(('over all weights', ''), rows)}"
                + (picture if (self.folder / KINSHIP_PLOT_FILE).is_file() else "")
            )
        if self.verification is not None:
            yield "### Verification\n\n" + _verified(self.verification)

    def _versions(self) -> dict[str, str]:
        versions = dict(self.report["versions"])
        for _, facts in self.trainings:
            for library, version in facts.versions.items():
                known = versions.setdefault(library, version)
                if version not in known.split(" "):
                    versions[library] = f"{known} (merge), {version} (training)"
        return dict(sorted(versions.items()))

    def _draw_signals(self) -> dict[str, str]:
        """Pictures of the learning signals, by the name of what was trained."""
        pictures: dict[str, str] = {}
        for name, facts in self.trainings:
            if facts.signal:
                stem, suffix = os.path.splitext(SIGNAL_PLOT_FILE)
                pictures[name] = SIGNAL_PLOT_FILE if not pictures else f"{stem}_{len(pictures) + 1}{suffix}"
                shares = [facts.signal[band] for band in ("low", "mid", "high")]
                with new_figure(self.folder / pictures[name], (7, 3)) as figure:
                    axes = figure.subplots()
                    plot_bands(axes, facts.signal["step"], [[100 * share for share in band] for band in shares])
                    axes.set_xlabel("optimizer step")
                    axes.set_ylabel("share of the loss (%)")
                    handles, labels = axes.get_legend_handles_labels()
                    figure.legend(handles, labels, loc="outside upper center", ncols=3)
        return pictures


def _load_line(model: str, revision: str | None) -> str:
    return _LOAD.format(model=model, revision=f', revision="{revision}"' if revision else "")


def _formula(recipe: Mapping[str, Any]) -> str:
    method, several = recipe["method"], len(recipe.get("adapter", [])) > 1
    formulas = {
        "linear": "θ_I + λ·ΣᵢwᵢMᵢ" if several else "θ_I + λ·M",
        "task_arithmetic": "θ_B + β·(θ_I − θ_B) + λ·M",
        "re_adapt": "θ_B + β·(θ_I − θ_B) + λ·M",
        "lore_adapt": "θ_B + β·(θ_I − θ_B, truncated) + λ·M",
        "full_delta": "θ_I + λ·(θ_B' − θ_B)",
    }
    return f"{method}: {formulas.get(method, f'θ_I + λ·M, M from the updates by {method}')}"


def _verified(verification: Mapping[str, Any]) -> str:
    rows = [
        ("tensors computed once more", f"{len(verification['wrong_tensors'])} wrong of {verification['num_targets']}"),
        ("files beside the weights that differ from the instruct model's", len(verification["different_files"])),
    ]
    if verification["mean_kl"] is not None:
        rows += [
            ("positions compared with the adapter at run time", verification["num_positions"]),
            ("largest difference of a logit", f"{verification['max_logit_difference']:.1e}"),
            ("mean KL divergence", f"{verification['mean_kl']:.1e}"),
            ("the same of the instruct model, without the adapter", f"{verification['mean_kl_instruct']:.1e}"),
            ("same likeliest token", f"{100 * verification['top1_agreement']:.1f} %"),
        ]
    problems = len(verification["problems"])
    verdict = "within its bounds" if not problems else f"{problems} of the checks failed"
    return f"`gift-trl merge --verify`: {verdict}.\n\n{markdown_table(('check', 'result'), rows)}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
