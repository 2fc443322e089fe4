"""What would keep a run from merging and pushing at its end, found out before it begins."""

import json
import math
import os
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy, get_last_checkpoint
from transformers.utils import CONFIG_NAME

from gift_trl.cards import public_name
from gift_trl.checkpoints import REPORT_FILE, check_output_folder, checkpoint_folder, weights_fingerprint
from gift_trl.hub.target import check_push_target
from gift_trl.hub.uploads import PushLedger
from gift_trl.merging.planned import preflight_training
from gift_trl.merging.report import REPLACED_MARKS
from gift_trl.repositories import HUB_ERRORS, call_hub, check_repository, explain
from gift_trl.training import GIFTConfig, GIFTSFTTrainer


STEP_BRANCH = "step-{:06d}"
_STEP_BRANCH = re.compile(r"step-\d{6,}")


class Findings:
    """What speaks against a run: all of it is said at once."""

    def __init__(self):
        self.errors: list[Exception] = []

    def check(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, and notes what it raises."""
        try:
            return function(*args, **kwargs)
        except (OSError, ValueError) as error:
            self.add(error)
            return None

    def add(self, error: Exception) -> None:
        """Notes an error, once."""
        if str(error) not in map(str, self.errors):
            self.errors.append(error)

    def raise_any(self) -> None:
        """Raises the error if there is one, or all of them as one."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            listed = "".join(f"\n- {error}" for error in self.errors)
            raise ValueError(f"{len(self.errors)} things have to be mended before the training:{listed}")


def check_merge(
    settings: Any, args: GIFTConfig, peft_config: PeftConfig | None, resume: str | None, findings: Findings
) -> None:
    """
    Checks that the adapter can be merged when it is trained.

    Args:
        settings ([`MergeAndPushCallback`]):
            What is to be done.
        args ([`GIFTConfig`]):
            Arguments of the trainer.
        peft_config ([`~peft.PeftConfig`] or `None`):
            Configuration of the adapter.
        resume (`str` or `None`):
            Checkpoint that the training goes on from.
        findings ([`Findings`]):
            Receives what speaks against it.
    """
    if settings.merge_output_dir is None:
        for name in ("merge_at_every_checkpoint", "hub_merged_model_id"):
            if getattr(settings, name):
                findings.add(
                    ValueError(f"`{name}` is set, but nothing is merged: set `merge_output_dir` to a folder.")
                )
        return
    if peft_config is None:
        findings.add(
            ValueError(
                "`merge_output_dir` is set, but no adapter is trained: set `use_peft: true`, or pass a `peft_config`."
            )
        )
    instruct, revision = instruct_model(settings, args)
    if instruct is None:
        findings.add(
            ValueError(
                "`merge_output_dir` is set, but nothing says what to merge into: set `instruct_model_name_or_path`."
            )
        )
    elif peft_config is not None:
        for problem in preflight_training(
            peft_config,
            instruct,
            settings.merge_output_dir,
            instruct_model_revision=revision,
            scale=settings.merge_scale,
            saved_modules=settings.merge_saved_modules,
        ):
            findings.add(ValueError(problem))
    if settings.merge_at_every_checkpoint and args.save_strategy == SaveStrategy.NO:
        findings.add(
            ValueError(
                "`merge_at_every_checkpoint` is set, but no checkpoint is saved: set `save_strategy` to 'steps'."
            )
        )
    findings.check(_check_merge_folders, settings, args, resume)


def check_pushes(
    settings: Any, args: GIFTConfig, resume: str | None, findings: Findings
) -> tuple[str | None, str | None]:
    """
    Checks that adapter and merged model can be pushed when they are there.

    Args:
        settings, args, resume, findings:
            As in [`check_merge`].

    Returns:
        `tuple[str | None, str | None]`: Ids of the repositories of the adapter and of the merged model, with their
        namespaces; `None` for what is not pushed.
    """
    merged_id = settings.hub_merged_model_id
    for name in ("hub_merged_private_repo", "hub_merged_revision", "hub_merged_tag"):
        if getattr(settings, name) is not None and merged_id is None:
            findings.add(ValueError(f"`{name}` is set, but no merged model is pushed: set `hub_merged_model_id`."))
    if merged_id is None and not args.push_to_hub:
        return None, None
    if args.hub_token is not None:
        findings.add(
            ValueError(
                "`hub_token` is set, and tokens are read only from the login: run `hf auth login`, or set `HF_TOKEN`."
            )
        )
    # A run that begins, or goes on from another one's checkpoint, has pushed nothing
    ledger = PushLedger(args.output_dir) if is_own_checkpoint(args, resume) else ()
    adapter_id = None
    if args.push_to_hub:
        if args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            findings.add(
                ValueError(
                    f"`hub_strategy` is '{args.hub_strategy.value}', with which the state of the optimizer would be pushed, as "
                    "pickles: set it to 'every_save' or 'end'."
                )
            )
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        where = {"private": args.hub_private_repo, "revision": args.hub_revision}
        adapter_id = findings.check(_check_target, ledger, name, overwrite=settings.hub_overwrite, **where) or name
    if merged_id is not None:
        where = {"private": merged_is_private(settings, args), "revision": settings.hub_merged_revision}
        checked = findings.check(
            _check_target,
            ledger,
            merged_id,
            tag=settings.hub_merged_tag,
            overwrite=settings.hub_overwrite,
            **where,
        )
        if checked is not None and settings.merge_at_every_checkpoint and not settings.hub_overwrite:
            findings.check(_check_step_branches, ledger, checked)
        merged_id = checked or merged_id
        if adapter_id is not None and adapter_id.lower() == merged_id.lower():
            findings.add(
                ValueError(
                    f"Adapter (`hub_model_id`) and merged model (`hub_merged_model_id`) would both go to '{merged_id}', and "
                    "replace one another's card: give each a repository of its own."
                )
            )
    return adapter_id, merged_id


def check_saved_whole(trainer: GIFTSFTTrainer) -> None:
    """Refuses a trainer that saves the adapter in shards, from which nothing can be merged or pushed."""
    if trainer.is_fsdp_enabled and "FULL_STATE_DICT" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        raise ValueError(
            "FSDP would save the adapter in shards, which cannot be merged or pushed: set `fsdp_state_dict_type: "
            "FULL_STATE_DICT` in the accelerate configuration."
        )


def merged_is_private(settings: Any, args: GIFTConfig) -> bool | None:
    """Whether the merged model goes to a private repository: as the adapter does, unless told otherwise."""
    if settings.hub_merged_private_repo is not None:
        return settings.hub_merged_private_repo
    return args.hub_private_repo


def is_merge_of(settings: Any, args: GIFTConfig, folder: Path, adapter: Path) -> bool:
    """Whether a folder holds the merge of an adapter, as it would be made now."""
    instruct, revision = instruct_model(settings, args)
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        return (
            (folder / CONFIG_NAME).is_file()
            and report["scale"] == settings.merge_scale
            and report["recipe"].get("saved_modules") == settings.merge_saved_modules
            and report["instruct_model"] == public_name(instruct)
            and report["adapter_fingerprint"] == weights_fingerprint(adapter)
            and report["instruct_model_fingerprint"] == weights_fingerprint(checkpoint_folder(instruct, revision))
        )
    except (OSError, ValueError, KeyError):
        return False


def instruct_model(settings: Any, args: GIFTConfig) -> tuple[str | None, str | None]:
    """Name and revision of the model that is merged into."""
    if settings.instruct_model is not None:
        return settings.instruct_model, None
    return args.instruct_model_name_or_path, args.instruct_model_revision


def is_own_checkpoint(args: GIFTConfig, checkpoint: str | None) -> bool:
    """Whether a run goes on from a checkpoint of its own folder, so that what lies there and was pushed from there is its."""
    return checkpoint is not None and Path(checkpoint).absolute().parent.resolve() == Path(args.output_dir).resolve()


def step_folders(merge_output_dir: str | os.PathLike) -> dict[int, Path]:
    """The folders of the models that were merged at checkpoints, by step."""
    folder = Path(merge_output_dir).expanduser().resolve()
    prefix = f"{folder.name}-"
    found = (path for path in folder.parent.glob(f"{prefix}step-*") if path.is_dir())
    return {
        int(path.name.rpartition("-")[2]): path
        for path in found
        if _STEP_BRANCH.fullmatch(path.name.removeprefix(prefix))
    }


def _check_target(
    ledger: Container[tuple[str, str | None]],
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    tag: str | None = None,
    overwrite: bool,
) -> str:
    if "/" not in repo_id:  # the ledger knows it with its namespace
        repo_id, _ = check_repository(repo_id, private=private)
    if (repo_id, revision) in ledger:
        overwrite, tag = True, None  # it is this run that has pushed there
    try:
        return check_push_target(repo_id, private=private, revision=revision, tag=tag, overwrite=overwrite)
    except FileExistsError as error:
        if "--overwrite" not in str(error):
            raise
        raise FileExistsError(f"{error} Here, that is `hub_overwrite: true`.") from error


def _check_step_branches(ledger: Container[tuple[str, str | None]], repo_id: str) -> None:
    _, remote = check_repository(repo_id)
    if remote is None:
        return
    try:
        refs = call_hub(HfApi(token=True).list_repo_refs, repo_id)
    except HUB_ERRORS as error:
        raise explain(error, repo_id) from error
    names = [ref.name for ref in refs.branches]
    others = [name for name in names if _STEP_BRANCH.fullmatch(name) and (repo_id, name) not in ledger]
    if others:
        raise FileExistsError(
            f"'{repo_id}' has branches of another run's checkpoints ({others[0]}{' and others' if others[1:] else ''}): push to "
            "another repository, delete them, or replace what they hold (`hub_overwrite: true`)."
        )


def _check_merge_folders(settings: Any, args: GIFTConfig, resume: str | None) -> None:
    folder = Path(settings.merge_output_dir).expanduser().resolve()
    adapter = Path(args.output_dir).resolve()
    if folder.is_relative_to(adapter) or adapter.is_relative_to(folder):
        raise ValueError(
            f"`merge_output_dir` ({folder}) and `output_dir` ({adapter}) lie in one another. The adapter's folder is "
            "an input of the merge and is not written to: put them side by side."
        )
    overwrite = settings.merge_overwrite or folder in settings.merged_folders
    if not overwrite and resume is not None and _is_finished(Path(resume), args):
        # The run was killed after its merge, perhaps before its push, and only goes on from there
        overwrite = any(is_merge_of(settings, args, folder, merged) for merged in (Path(resume), adapter))
    option = "`merge_overwrite`"
    check_output_folder(folder, overwrite=overwrite, marks=REPLACED_MARKS, option=option)
    if settings.merge_at_every_checkpoint and not is_own_checkpoint(args, resume) and not settings.merge_overwrite:
        for path in step_folders(folder).values():
            if path not in settings.merged_folders:
                check_output_folder(path, option=option)


def _is_finished(checkpoint: Path, args: GIFTConfig) -> bool:
    """Whether a checkpoint is that of the last step."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["global_step"] >= state["max_steps"] and state["num_train_epochs"] == math.ceil(args.num_train_epochs)


def last_checkpoint(args: GIFTConfig) -> str | None:
    """The last checkpoint of a run, from which it may go on."""
    return get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
