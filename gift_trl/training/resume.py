"""The checkpoint that a killed run goes on from."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftType
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from gift_trl.annotation.checks import ORIGINAL_INDEX
from gift_trl.cards import Source, TrainingFacts
from gift_trl.checkpoints import TRAINING_FILE


logger = get_logger(__name__)

# What makes another objective, and what may change on the way as in any run
_OBJECTIVE = ("annotator", "confidence_exponent", "confidence_floor", "eos_confidence", "weight_normalization")
_BORROWED = "instruct model's embedding rows"
_CHANGEABLE = (
    *("confidence_source", "confidences", "optimizer", "rows per step", "max_length", "packing", "seed"),
    "lora_dropout",
)
# Of an adapter's configuration: what makes no other adapter, and what PEFT does not change when it sees the model
_NO_PART_OF_ADAPTER = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version"}
_NO_PART_OF_ADAPTER |= {"revision", "task_type"}
_KNOWN_BEFORE_LOADING = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias"}
# Columns that the annotation adds, and rows that the digest of the data reads
_ADDED_COLUMNS = {"labels", "confidences", "completion_mask", "assistant_masks", "attention_mask", ORIGINAL_INDEX}
_ROWS_READ = 256

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Bytes: of a failed write torch says nothing but that
_LITTLE_ROOM = 2**20


def last_complete_checkpoint(args: TrainingArguments) -> str:
    """
    Finds the last checkpoint that was written to its end.

    The trainer writes a checkpoint file by file, so that a run killed meanwhile leaves a part of one, which transformers
    would take for the last. `trainer_state.json` is written last by the main process, and the state of the random numbers
    last by the others.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the trainer, whose `output_dir` holds the checkpoints.

    Returns:
        `str`: Folder of the checkpoint.

    Raises:
        `ValueError`: If there is none that the run can go on from.
    """
    found = [(_step(path), path) for path in Path(str(args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    folders = [path for step, path in sorted(found, reverse=True) if step >= 0]
    if not folders:
        raise ValueError(
            f"`resume_from_checkpoint` is set, but `{args.output_dir}` holds no checkpoint. Unset it, or set `output_dir` to "
            "the folder of the interrupted run."
        )
    for path in folders:
        if _has_state(path) and (args.save_only_model or _is_complete(path, folders, args.world_size)):
            if path != folders[0]:
                logger.warning(
                    f"`{folders[0].name}` is not complete: the run was killed while it was written. Going on from "
                    f"`{path.name}`."
                )
            if args.save_only_model:
                logger.warning(
                    f"`{path.name}` was saved without the state of the optimizer (`save_only_model`), which starts anew: "
                    "the run will differ from an uninterrupted one."
                )
            return str(path)
    raise ValueError(
        f"None of the {len(folders)} checkpoints in `{args.output_dir}` can be gone on from: they were not written to their "
        "end, or without the state of the optimizer (`save_only_model`). Start again with another `output_dir`, or set "
        "`save_only_model` as it was set then."
    )


def find_checkpoint(args: TrainingArguments, wanted: str | bool | None) -> str | None:
    """
    Finds what `resume_from_checkpoint` asks for; to be called by every process.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the trainer.
        wanted (`str` or `bool`, *optional*):
            Folder of a checkpoint; `True` for the last one that is complete, which there has to be; `"auto"` for that if there
            is one, so that the same command starts a run and goes on with it. The command line gives booleans as text.

    Returns:
        `str` or `None`: Folder of the checkpoint, `None` to begin.

    Raises:
        `ValueError`: As [`last_complete_checkpoint`], for `True`.
    """
    text = str(wanted).lower()
    if text not in ("true", "auto"):
        return None if text in ("false", "none", "") else str(wanted)
    found: list[str | None] = [None]
    try:
        found = [Path(last_complete_checkpoint(args)).name]
    except ValueError:
        if text == "true":
            raise
        if any(Path(str(args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            logger.warning(f"No checkpoint in `{args.output_dir}` can be gone on from: starting from the beginning.")
    # Each process would decide for itself, and one that sees another disk otherwise
    if args.world_size > 1:
        broadcast_object_list(found)
    return None if found[0] is None else str(Path(str(args.output_dir)) / found[0])


def data_digest(dataset: Dataset | IterableDataset, text_field: str) -> str | None:
    """
    Identifies training data by the number of its rows and the content of some of them.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data as it was given. Annotated data count as the data that were annotated.
        text_field (`str`):
            Name of the column with plain text.

    Returns:
        `str` or `None`: Number of rows and digest; `None` for a stream, which is not read ahead of the training.
    """
    if not isinstance(dataset, Dataset):
        return None
    known = {"prompt", "completion", "messages", "conversations", text_field}
    columns = [name for name in dataset.column_names if name in known]
    # A formatting function reads whatever it wants
    columns = columns or [name for name in dataset.column_names if name not in {*_ADDED_COLUMNS, "input_ids"}]
    columns = columns or [name for name in dataset.column_names if name == "input_ids"]
    read = min(_ROWS_READ, len(dataset))
    # In Arrow: a transform may be drawn at random
    rows = dataset.with_format("arrow").select_columns(columns).select([i * len(dataset) // read for i in range(read)])
    text = json.dumps(rows[:].to_pylist() if read else [], sort_keys=True, default=str)
    return f"{len(dataset)} rows, digest {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_checkpoint(
    checkpoint: str, args: TrainingArguments, run: TrainingFacts, peft_config: PeftConfig | None, *, loaded: bool
) -> None:
    """
    Refuses a checkpoint of another run, whose adapter would be taken for this one's; to be called by every process.

    What defines the objective and the adapter must be the same. What may change on the way, such as the learning rate, is
    warned of: whatever is said of the adapter names the settings of its last steps.

    Args:
        checkpoint (`str`):
            Folder of the checkpoint.
        args ([`~transformers.TrainingArguments`]):
            Arguments of the trainer.
        run ([`~gift_trl.cards.TrainingFacts`]):
            What this run says of itself.
        peft_config ([`~peft.PeftConfig`] or `None`):
            Configuration of the adapter.
        loaded (`bool`):
            Whether the model is loaded. Before, only what is known by then is compared, and nothing is warned of.

    Raises:
        `ValueError`: If the checkpoint was made by another run; the message names every field that differs.
    """
    found: list[Any] = [None, []]
    if args.process_index == 0:
        found = list(_compare(Path(checkpoint), args, run, peft_config, loaded))
    # As with the choice of the checkpoint, each process would decide for itself
    if args.world_size > 1:
        broadcast_object_list(found)
    problem, cautions = found
    if problem is not None:
        raise ValueError(problem)
    for caution in cautions if loaded else ():
        logger.warning(caution)


def _compare(
    checkpoint: Path, args: TrainingArguments, run: TrainingFacts, peft_config: PeftConfig | None, loaded: bool
) -> tuple[str | None, list[str]]:
    """What speaks against going on from a checkpoint, and what is to be warned of."""
    try:
        known = TrainingFacts.from_dict(json.loads((checkpoint / TRAINING_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None, [
            f"`{checkpoint.name}` holds no `{TRAINING_FILE}`, which `GIFTSFTTrainer` writes, so it is not checked that it "
            "belongs to this run's models, data and settings."
        ]
    differing = _differences(
        {name: known.settings[name] for name in _OBJECTIVE if name in known.settings}, run.settings
    )
    for name in ("base_model", "instruct_model"):
        old, new = getattr(known, name), getattr(run, name)
        if not _may_be_same(old, new):
            differing.append(_difference(name, old.name, new.name))
    other_data = []
    if None not in (known.data, run.data) and known.data != run.data:
        other_data.append(_difference("training data", known.data, run.data))
        end = _end_of(checkpoint, args)
        if end is not None and end.is_over:  # else the rest of the run sees the new data
            differing += other_data
    if loaded and known.settings.get(_BORROWED) != run.settings.get(_BORROWED):
        differing.append(_difference(_BORROWED, known.settings.get(_BORROWED), run.settings.get(_BORROWED)))
    differing += _adapter_differences(checkpoint, known.peft_type, peft_config, loaded)
    if differing:
        return (
            f"`{checkpoint}` was made by another run: {'; '.join(differing)}. To train this one, choose another "
            "`output_dir`, or unset `resume_from_checkpoint`; to go on with that one, give it its own settings."
        ), []
    changed = other_data + _differences(
        {name: known.settings[name] for name in _CHANGEABLE if name in known.settings}, run.settings
    )
    for name in ("base_model", "instruct_model"):
        commits = [source.commit for source in (getattr(known, name), getattr(run, name)) if source is not None]
        if None not in commits and len(set(commits)) > 1:
            changed.append(_difference(f"commit of the {name}", *commits))
    cautions = []
    if changed:
        cautions.append(
            f"Going on from `{checkpoint.name}` with other settings: {'; '.join(changed)}. The card will name this run's."
        )
    if caution := _nothing_left(checkpoint, args):
        cautions.append(caution)
    return None, cautions


def _difference(name: str, old: Any, new: Any) -> str:
    if all(isinstance(value, list) and len(value) > 0 for value in (old, new)):
        # "all-linear" stands for every module of every layer
        short = [", ".join(sorted({str(item).rpartition(".")[2] for item in value})) for value in (old, new)]
        old, new = short if short[0] != short[1] else (f"{len(old)} of {short[0]}", f"{len(new)}")
    return f"{name} ({old}, this run has {new})"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    def comparable(value: Any) -> Any:
        # The same rows per step, cut into other batches
        return value.partition(" = ")[0] if isinstance(value, str) else value

    return [
        _difference(name, comparable(value), comparable(new[name]))
        for name, value in old.items()
        if name in new and comparable(value) != comparable(new[name])
    ]


def _may_be_same(old: Source | None, new: Source | None) -> bool:
    """Whether two names may be those of one model: of a copy of a repository, only the last part is known."""
    if old is None or new is None:
        return True
    names = [old.name, new.name]
    if old.on_hub != new.on_hub:
        names = [name.rpartition("/")[2] for name in names]
    return names[0] == names[1]


def _adapter_differences(
    checkpoint: Path, peft_type: str | None, peft_config: PeftConfig | None, loaded: bool
) -> list[str]:
    now = None if peft_config is None else PeftType(peft_config.peft_type).value
    if peft_type != now:
        return [_difference("adapter", peft_type or "none", now or "none")]
    try:
        if peft_config is None:
            return []
        saved = PeftConfig.from_pretrained(str(checkpoint))
    except (OSError, ValueError):  # in shards, or damaged: loading it says more
        return []
    old, new = _adapter_fields(saved), _adapter_fields(peft_config)
    names = [name for name in old if name in new and (loaded or name in _KNOWN_BEFORE_LOADING)]
    return [_difference(name, old[name], new[name]) for name in names if old[name] != new[name]]


def _adapter_fields(peft_config: PeftConfig) -> dict[str, Any]:
    """As JSON reads them, lists of names in one order."""
    dropped = _NO_PART_OF_ADAPTER
    if peft_config.peft_type == PeftType.ADALORA:  # which finds it during the training
        dropped = dropped | {"rank_pattern"}
    fields = {name: value for name, value in peft_config.to_dict().items() if name not in dropped}
    # The checkpoint is loaded over them, but for those that have changed the base model
    if not str(fields.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")):
        fields["init_lora_weights"] = None
    fields = json.loads(
        json.dumps(fields, default=lambda value: list(value) if isinstance(value, set) else str(value))
    )
    return {
        name: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for name, value in fields.items()
    }


class _End(NamedTuple):
    """
    Where a run ends that goes on from a checkpoint.

    Args:
        step (`int`):
            Step of the checkpoint.
        end (`str`):
            The end in words.
        is_over (`bool`):
            Whether the checkpoint is at that end, or behind it.
        is_same (`bool`):
            Whether the run of the checkpoint had the same one.
    """

    step: int
    end: str
    is_over: bool
    is_same: bool


def _end_of(checkpoint: Path, args: TrainingArguments) -> _End | None:
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        step: int = state["global_step"]
        if args.max_steps > 0:
            end = f"step {args.max_steps} (`max_steps`)"
            return _End(step, end, step >= args.max_steps, state["max_steps"] == args.max_steps)
        end, epochs = f"epoch {args.num_train_epochs:g} (`num_train_epochs`)", args.num_train_epochs
        return _End(step, end, state["epoch"] >= epochs, state["num_train_epochs"] == math.ceil(epochs))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _nothing_left(checkpoint: Path, args: TrainingArguments) -> str | None:
    """Says so if a run ends before its checkpoint; not if it is the complete run itself, started once more."""
    found = _end_of(checkpoint, args)
    if found is None or not found.is_over or found.is_same:
        return None
    return (
        f"Nothing is trained: `{checkpoint.name}` is at step {found.step}, and this run ends with {found.end}. What is saved is "
        "the checkpoint."
    )


def finish_rotation(args: TrainingArguments, checkpoint: str) -> None:
    """
    Deletes what a killed run was about to delete, to keep no more than `save_total_limit` checkpoints.

    By the time of its change transformers would take the rest of one for the newest, and delete others in its place; and
    after the last step no further checkpoint is written whose saving would delete the oldest one.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the trainer.
        checkpoint (`str`):
            The checkpoint that the run goes on from.
    """
    newest, output_dir = Path(checkpoint), Path(str(args.output_dir))
    if not args.save_total_limit or newest.parent.resolve() != output_dir.resolve():
        return
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) >= 0]
    if len(folders) <= args.save_total_limit:
        return
    state = json.loads((newest / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    best, names = Path(state.get("best_model_checkpoint") or "").name, _names(newest)
    for path in folders:
        if _step(path) < _step(newest) and path.name != best and not names <= _names(path):
            shutil.rmtree(path, ignore_errors=True)
    if max(map(_step, folders)) == _step(newest):
        rotate_checkpoints(str(output_dir), args.save_total_limit, str(output_dir / best) if best else None)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """
    Says what to do when a checkpoint or an adapter finds no room.

    Args:
        folder (`Path`):
            Folder that is written to.

    Raises:
        `OSError`: In place of what the libraries raise.
    """
    try:
        yield
    except Exception as error:
        # safetensors and torch have errors of their own, with the system's words or without
        number = error.errno if isinstance(error, OSError) else None
        if number not in _NO_ROOM and not any(os.strerror(known) in str(error) for known in _NO_ROOM):
            if not isinstance(error, RuntimeError) or shutil.disk_usage(_existing(folder)).free > _LITTLE_ROOM:
                raise
        raise OSError(
            number or errno.ENOSPC,
            "The disk is full. The checkpoints before are whole: free some space, or keep fewer (`save_total_limit`), and go on "
            "with `resume_from_checkpoint: true`",
            str(folder),
        ) from error


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def clear_checkpoint(output_dir: Path, step: int) -> None:
    """
    Removes what a killed run has left of a checkpoint that is about to be written.

    Its files would make the new one look complete before it is, and older than others: transformers removes the oldest.

    Args:
        output_dir (`Path`):
            Folder of the checkpoints.
        step (`int`):
            Step of the checkpoint.
    """
    folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if folder.is_dir():
        # First what makes it complete: this process may be killed too
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        for path in folder.iterdir():  # the folder itself may be a link to another disk
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def logged_tokens(log_history: Sequence[Mapping[str, float]]) -> int:
    """
    Number of tokens that were trained on, as of the last log before a checkpoint.

    Args:
        log_history (`Sequence[Mapping[str, float]]`):
            What the trainer has logged.

    Returns:
        `int`: The number, 0 if none was logged.
    """
    return int(next((log["num_tokens"] for log in reversed(log_history) if "num_tokens" in log), 0))


def _is_complete(path: Path, folders: list[Path], num_processes: int) -> bool:
    states = list(path.glob("rng_state*.pth"))
    if not states or not all(map(zipfile.is_zipfile, states)):
        return False
    if [state.name for state in states] == ["rng_state.pth"]:  # of a single process
        return True
    # Fewer than there are processes now: by a run of fewer, unless other checkpoints show that it had more
    others = [len(list(folder.glob("rng_state_*.pth"))) for folder in folders]
    return len(states) > 1 and (len(states) >= num_processes or len(states) == max(others))


def _step(path: Path) -> int:
    """Number of the step, -1 for what is no checkpoint."""
    step = path.name.rpartition("-")[2]
    return int(step) if step.isdigit() and path.is_dir() else -1


def _names(checkpoint: Path) -> set[str]:
    """What is in a checkpoint, without the numbers of steps and processes."""
    return {re.sub(r"\d+", "#", str(path.relative_to(checkpoint))) for path in checkpoint.rglob("*")}


def _has_state(path: Path) -> bool:
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
