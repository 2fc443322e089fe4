"""`MergeAndPushCallback`: from the last training step, or from every checkpoint, to a model that others can use."""

import copy
import dataclasses
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, sort_checkpoints

from gift_trl.checkpoints import CARD_FILE, TRAINING_FILE, weights_fingerprint
from gift_trl.hub.card import complete_merged_card
from gift_trl.hub.files import warn_of_local_base
from gift_trl.hub.main_process import run_on_main_process
from gift_trl.hub.preflight import (
    STEP_BRANCH,
    Findings,
    check_merge,
    check_pushes,
    check_saved_whole,
    instruct_model,
    is_merge_of,
    is_own_checkpoint,
    last_checkpoint,
    merged_is_private,
    step_folders,
)
from gift_trl.hub.uploads import PushLedger, Upload, UploadQueue, remove_snapshots, take_snapshot
from gift_trl.merging import merge_adapter
from gift_trl.training import GIFTConfig, GIFTSFTTrainer
from gift_trl.training.callback import StageCallback, adapter_config


logger = logging.getLogger(__name__)


class MergeAndPushCallback(StageCallback):
    """
    A callback of [`GIFTSFTTrainer`] that merges the trained adapter into the instruct model, and pushes.

    When the training ends, the adapter is saved to `args.output_dir`, and the main process merges it from there into
    `merge_output_dir` with [`merge_adapter`]. With `merge_at_every_checkpoint`, each checkpoint is merged too, into a
    folder beside `merge_output_dir` with `-step-000100` after its name, which is deleted with the checkpoint
    (`save_total_limit`).

    With `hub_merged_model_id`, the merged model is pushed with its card, and the models of the checkpoints to branches
    `step-000100`. With `args.push_to_hub`, the adapter is pushed to `args.hub_model_id` by this callback in place of the
    trainer: `hub_private_repo`, `hub_revision`, `hub_always_push` and, of `hub_strategy`, `"every_save"` and `"end"` mean
    what they mean there. Pushes run in the background and are [`push_folder`]'s: one commit, checked afterwards.

    What speaks against any of it, from the login to the output folders, is raised before the data is scored. A merge or
    a push that fails stops no training: the reason, and the command that finishes the job, are in an error at its end.
    A resumed run does what its checkpoints lack.

    Args:
        merge_output_dir (`str` or `os.PathLike`, *optional*):
            Folder for the merged model. Without it, nothing is merged, and `args.push_to_hub` has to be set.
        merge_scale (`float`, *optional*, defaults to `1.0`):
            Factor λ of the adapter in the merge θ_I + λ·M(φ).
        merge_saved_modules (`str`, *optional*):
            What to do with modules that are trained whole: `"replace"` or `"ignore"`, as in [`merge_adapter`].
        merge_overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a merged model that is there, once the new one is complete.
        merge_at_every_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether to merge every checkpoint.
        hub_merged_model_id (`str`, *optional*):
            Repository to push the merged model to, another one than the adapter's.
        hub_merged_private_repo (`bool`, *optional*):
            Whether it is private. Defaults to `args.hub_private_repo`.
        hub_merged_revision (`str`, *optional*):
            Branch for the final model. Defaults to the main one.
        hub_merged_tag (`str`, *optional*):
            Tag for the final model.
        hub_overwrite (`bool`, *optional*, defaults to `False`):
            Whether pushes may replace what the repositories hold of another run.
        instruct_model (`str`, *optional*):
            Instruct model to merge into. Defaults to `args.instruct_model_name_or_path`, with its revision.

    Raises:
        `ValueError`, `OSError`: In the trainer's constructor, with all that speaks against the merge and the pushes. At the
            end of `train`, an `OSError` if any of them failed.

    Example:

    ```python
    >>> from gift_trl import GIFTConfig, GIFTSFTTrainer, MergeAndPushCallback

    >>> trainer = GIFTSFTTrainer(
    ...     model="Qwen/Qwen2.5-7B",
    ...     args=GIFTConfig("adapter", instruct_model_name_or_path="Qwen/Qwen2.5-7B-Instruct"),
    ...     train_dataset=dataset,
    ...     peft_config=peft_config,
    ...     callbacks=[MergeAndPushCallback("merged", hub_merged_model_id="user/Qwen2.5-7B-mine")],
    ... )
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        merge_output_dir: str | os.PathLike | None = None,
        *,
        merge_scale: float = 1.0,
        merge_saved_modules: str | None = None,
        merge_overwrite: bool = False,
        merge_at_every_checkpoint: bool = False,
        hub_merged_model_id: str | None = None,
        hub_merged_private_repo: bool | None = None,
        hub_merged_revision: str | None = None,
        hub_merged_tag: str | None = None,
        hub_overwrite: bool = False,
        instruct_model: str | None = None,
    ):
        self.merge_output_dir = merge_output_dir
        self.merge_scale = merge_scale
        self.merge_saved_modules = merge_saved_modules
        self.merge_overwrite = merge_overwrite
        self.merge_at_every_checkpoint = merge_at_every_checkpoint
        self.hub_merged_model_id = hub_merged_model_id
        self.hub_merged_private_repo = hub_merged_private_repo
        self.hub_merged_revision = hub_merged_revision
        self.hub_merged_tag = hub_merged_tag
        self.hub_overwrite = hub_overwrite
        self.instruct_model = instruct_model
        # Those that were written here may be written again
        self.merged_folders: set[Path] = set()
        self._args: GIFTConfig | None = None
        self._trainer: GIFTSFTTrainer | None = None
        self._adapter_id: str | None = None
        self._merged_id: str | None = None
        self._resumed_from: str | None = None
        self._problems: list[str] = []

    def before_annotation(
        self, args: GIFTConfig, peft_config: PeftConfig | None, resume_from_checkpoint: str | bool | None = None
    ) -> GIFTConfig:
        """
        Checks all that can be known before the run; called by [`GIFTSFTTrainer`].

        Args:
            args ([`GIFTConfig`]):
                Arguments of the trainer.
            peft_config ([`~peft.PeftConfig`] or `None`):
                Configuration of the adapter.
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint that the training goes on from, `False` for none. Defaults to the last one, if there is any:
                whether the run goes on from it is known when it begins.

        Returns:
            [`GIFTConfig`]: The arguments, with which the trainer itself pushes nothing.

        Raises:
            `ValueError`, `OSError`: If something speaks against it.
        """
        if args is self._args:
            return args
        if self.merge_output_dir is None and not args.push_to_hub and self.hub_merged_model_id is None:
            raise ValueError(
                "There is nothing to do: set `merge_output_dir`, or `push_to_hub` in the trainer's `args`."
            )
        _ = args.world_size  # connects the processes
        self._given_args = args
        if resume_from_checkpoint is None:  # the others may see another disk, and have to check as often
            resume_from_checkpoint = run_on_main_process(lambda: last_checkpoint(args))
        self._check(peft_config, resume_from_checkpoint)
        self._pushes_saves = args.hub_strategy == HubStrategy.EVERY_SAVE
        self._ledger = PushLedger(args.output_dir)
        self._uploads = UploadQueue(self._ledger)
        self._args = copy.copy(args)
        if self._adapter_id is not None:
            self._args.push_to_hub, self._args.hub_model_id = False, self._adapter_id
        return self._args

    def before_training(self, trainer: GIFTSFTTrainer, resume_from_checkpoint: str | None) -> None:
        """Takes the trainer; called by it."""
        check_saved_whole(trainer)
        is_first = self._trainer is None
        self._trainer, self._resumed_from = trainer, resume_from_checkpoint
        peft_config = adapter_config(trainer.model)
        if self._args is None:  # it was added later
            trainer.args = self.before_annotation(trainer.args, peft_config, resume_from_checkpoint or False)
        elif is_first and resume_from_checkpoint != self._checked_for:
            self._check(peft_config, resume_from_checkpoint)
        if is_first and trainer.is_world_process_zero():
            if self._adapter_id is not None:
                warn_of_local_base(getattr(peft_config, "base_model_name_or_path", None))
            remove_snapshots(self._args.output_dir)
            if not self._goes_on():
                self._ledger.clear()

    def _check(self, peft_config: PeftConfig | None, resume_from_checkpoint: str | bool | None) -> None:
        resume = resume_from_checkpoint or None

        def check() -> tuple[str | None, str | None]:
            findings = Findings()
            check_merge(self, self._given_args, peft_config, resume, findings)
            targets = check_pushes(self, self._given_args, resume, findings)
            findings.raise_any()
            return targets

        self._adapter_id, self._merged_id = run_on_main_process(check)
        self._checked_for = resume

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._trainer is None:
            raise ValueError(
                "`MergeAndPushCallback` needs the trainer that saves the adapter: use a `GIFTSFTTrainer`."
            )
        self._started_at = state.global_step
        if self._resumed_from is not None:
            run_on_main_process(lambda: self._catch_up(state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.merge_at_every_checkpoint or (self._adapter_id is not None and self._pushes_saves):
            run_on_main_process(lambda: self._finish_checkpoints([state.global_step], state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not run_on_main_process(self._adapter_is_saved):
            self._trainer.save_model(self._args.output_dir)
        if self._adapter_id is not None and not (Path(self._args.output_dir) / CARD_FILE).exists():
            self._trainer.create_model_card()  # only that of an adapter is written with it
        run_on_main_process(lambda: self._finish(state))

    def _finish_checkpoints(self, steps: Sequence[int], state: TrainerState) -> None:
        """Merges and pushes checkpoints. Nothing that fails stops the training."""
        for step in steps:
            checkpoint = Path(self._args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            message = _commit_message(step, state)
            # Merged first: a push may have to wait for those before it. Without the checkpoint, what was merged of it may
            # still have to be pushed.
            has_merged = self.merge_at_every_checkpoint and (
                not checkpoint.is_dir() or self._try_merge(checkpoint, step)
            )
            if self._adapter_id is not None and self._pushes_saves and step == state.global_step:
                self._try(f"The adapter of step {step} is not pushed", self._push_saved_adapter, checkpoint, message)
            if has_merged:
                self._push_merged(message, step)
        self._try("Old merged models are not deleted", self._delete_old)

    def _catch_up(self, state: TrainerState) -> None:
        """Does what a run that was killed has not done for its checkpoints."""
        if not self._goes_on():
            return
        names = [path.rpartition("-")[2] for path in sort_checkpoints(self._args.output_dir)]
        steps = {int(name) for name in names if name.isdigit()}  # not `checkpoint-100-copy`
        if self.merge_at_every_checkpoint and self._merged_id is not None:
            steps |= {
                step
                for step in step_folders(self.merge_output_dir)
                if (self._merged_id, STEP_BRANCH.format(step)) in self._ledger
            }
        self._finish_checkpoints(sorted(step for step in steps if step <= state.global_step), state)

    def _finish(self, state: TrainerState) -> None:
        """Merges and pushes the trained adapter, waits for all pushes, and says how it went."""
        adapter, message = Path(self._args.output_dir), _commit_message(state.global_step, state)
        print(f"The {'adapter' if adapter_config(self._trainer.model) is not None else 'model'} is in {adapter}")
        is_merged = self.merge_output_dir is not None and self._try_merge(adapter)
        if self._adapter_id is not None:
            self._uploads.add(self._adapter_upload(adapter, message))
        if is_merged:
            self._push_merged(message)
        self._wait_for_uploads()
        self._try("Old merged models are not deleted", self._delete_old)
        problems, self._problems = self._problems, []
        if problems:
            safe = f"its adapter is safe in '{adapter}'" + (
                f", the merged model in '{self._merged()[0]}'" if is_merged else ""
            )
            listed = "".join(f"\n- {problem}" for problem in problems)
            raise OSError(f"The training is complete, {safe}, but not all is done:{listed}")

    def _wait_for_uploads(self) -> None:
        if pending := self._uploads.pending():
            print(f"Waiting for {len(pending)} push{'es' if pending[1:] else ''} to the Hub", flush=True)
        try:
            ended = self._uploads.wait()
        except KeyboardInterrupt:
            for upload in self._uploads.pending():
                print(f"\nInterrupted. To finish, run `{upload.command()}`.", file=sys.stderr)
            raise
        for upload in ended:
            if upload.report is not None:
                print(upload.report.summary(), flush=True)
            else:
                self._problems.append(upload.problem)

    def _merged(self, step: int | None = None) -> tuple[Path, str | None, str | None]:
        """Folder, branch and tag of the merged model, or of that of a checkpoint."""
        folder = Path(self.merge_output_dir).expanduser().resolve()
        if step is None:
            return folder, self.hub_merged_revision, self.hub_merged_tag
        branch = STEP_BRANCH.format(step)
        return folder.with_name(f"{folder.name}-{branch}"), branch, None

    def _try_merge(self, adapter: Path, step: int | None = None) -> bool:
        """Merges; if that fails, it is a problem to be told at the end."""
        instruct, revision = instruct_model(self, self._args)
        merged = self._merged(step)[0]
        overwrite = self.merge_overwrite or merged in self.merged_folders
        # What a resumed run comes by once more, it replaces, as the trainer does with the checkpoint
        overwrite = overwrite or (self._goes_on() and step is not None)
        try:
            if is_merge_of(self, self._args, merged, adapter):
                print(f"The merged model is in {merged}")
            else:
                options = {"scale": self.merge_scale, "saved_modules": self.merge_saved_modules}
                options |= {"instruct_model_revision": revision, "overwrite": overwrite}
                print(merge_adapter(adapter, instruct, merged, **options).summary(), flush=True)
        except Exception as error:
            reason, command = str(error).rstrip("."), self._merge_command(adapter, step)
            self._problems.append(f"The merge of '{adapter}' failed: {reason}. To finish, run `{command}`.")
            logger.warning(self._problems[-1])
            return False
        self.merged_folders.add(merged)
        return True

    def _merge_command(self, adapter: Path, step: int | None) -> str:
        instruct, revision = instruct_model(self, self._args)
        merged = self._merged(step)[0]
        command = ["gift-trl", "merge", "--adapter", str(adapter), "--instruct_model", instruct]
        command += ["--output_dir", str(merged)]
        command += ["--instruct_model_revision", revision] if revision else []
        command += ["--scale", f"{self.merge_scale:g}"] if self.merge_scale != 1.0 else []
        command += ["--saved_modules", self.merge_saved_modules] if self.merge_saved_modules else []
        command += ["--overwrite"] if self.merge_overwrite else []
        then = "" if self._merged_id is None else f" && {self._merged_upload(None, step).command()}"
        return shlex.join(command) + then

    def _push_merged(self, message: str, step: int | None = None) -> None:
        folder, branch, _ = self._merged(step)
        if self._merged_id is not None and folder.is_dir():
            card = (folder, self._merged_id, branch, self._adapter_id)
            self._try(f"The card of '{folder}' is not written", complete_merged_card, *card)
            upload = self._merged_upload(message, step)
            if (folder / CARD_FILE).is_file():
                self._uploads.add(upload)
                return
            # A full disk may be the cause; the card would be a second commit
            self._problems.append(
                f"{CARD_FILE} was not written into '{folder}', which is not pushed without it. See the warning above, make room "
                f"if the disk is full, and run `{upload.command()}`."
            )
            logger.warning(self._problems[-1])

    def _merged_upload(self, message: str | None, step: int | None) -> Upload:
        folder, branch, tag = self._merged(step)
        options = {"private": merged_is_private(self, self._args), "revision": branch, "tag": tag}
        options |= {"commit_message": message, "overwrite": self.hub_overwrite}
        return Upload(folder, self._merged_id, options)

    def _adapter_upload(self, folder: Path, message: str) -> Upload:
        options = {"private": self._args.hub_private_repo, "revision": self._args.hub_revision}
        options |= {"commit_message": message, "overwrite": self.hub_overwrite}
        return Upload(folder, self._adapter_id, options)

    def _push_saved_adapter(self, checkpoint: Path, message: str) -> None:
        target = (self._adapter_id, self._args.hub_revision)
        # As the trainer does: the next one holds what is left out now
        if not checkpoint.is_dir() or (self._uploads.is_pending(target) and not self._args.hub_always_push):
            return
        # The checkpoint may be deleted before its turn
        snapshot = take_snapshot(checkpoint, self._args.output_dir)
        self._uploads.add(dataclasses.replace(self._adapter_upload(snapshot, message), is_snapshot=True))

    def _adapter_is_saved(self) -> bool:
        """Whether a run that had come to its end before has saved the adapter already, which is not saved anew then."""
        folder = Path(self._args.output_dir)
        if self._resumed_from is None or not all((folder / name).is_file() for name in (CARD_FILE, TRAINING_FILE)):
            return False
        if self._trainer.state.global_step != self._started_at or self._args.load_best_model_at_end:
            return False
        try:
            return weights_fingerprint(folder) == weights_fingerprint(self._resumed_from)
        except (OSError, ValueError):
            return False

    def _delete_old(self) -> None:
        """Deletes merged models whose checkpoints the trainer has deleted, once they are pushed."""
        if not self.merge_at_every_checkpoint or self._args.save_total_limit is None:
            return
        for step, folder in step_folders(self.merge_output_dir).items():
            checkpoint = Path(self._args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            is_own = folder in self.merged_folders or self._goes_on()
            if is_own and not checkpoint.exists() and not self._uploads.holds(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _goes_on(self) -> bool:
        """Whether the models of checkpoints that are there are this run's, from before it was killed."""
        return is_own_checkpoint(self._args, self._resumed_from)

    def _try(self, what: str, function: Any, *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            logger.warning(f"{what}: {error}")


def _commit_message(step: int, state: TrainerState) -> str:
    losses = [log["loss"] for log in state.log_history if "loss" in log and log["step"] <= step]
    return f"Step {step}" + (f", loss {losses[-1]:.4f}" if losses else "")
