"""The places of TRL and transformers that GIFT builds on, checked before anything is trained."""

import inspect

import trl
from transformers import Trainer
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput


# Every method we override or call from outside, with the parameters we rely on
_HOOKS = (
    (
        SFTTrainer,
        "_prepare_dataset",
        ("self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
    ),
    (SFTTrainer, "_set_signature_columns_if_needed", ("self",)),
    (SFTTrainer, "compute_loss", ("self", "model", "inputs", "return_outputs", "num_items_in_batch")),
    (SFTTrainer, "evaluate", ("self", "eval_dataset", "ignore_keys", "metric_key_prefix")),
    (SFTTrainer, "log", ("self", "logs", "start_time")),
    (Trainer, "_get_num_items_in_batch", ("self", "batch_samples", "device")),
    (Trainer, "_prepare_inputs", ("self", "inputs")),
    (
        Trainer,
        "_maybe_log_save_evaluate",
        (
            *("self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
            "learning_rate",
        ),
    ),
    (
        Trainer,
        "evaluation_loop",
        ("self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    ),
    (Trainer, "_finalize_training", ("self", "trial", "num_train_samples", "start_time")),
    (Trainer, "save_model", ("self", "output_dir", "_internal_call")),
    (SFTTrainer, "create_model_card", ("self", "model_name", "dataset_name", "tags")),
)


def check_trl_hooks() -> None:
    """
    Checks that the installed TRL has the methods GIFT overrides, with the parameters it knows.

    A subclass whose parent no longer calls the overridden method trains with the parent's loss, without a word. This
    makes it an error at construction instead.

    Raises:
        `RuntimeError`: If a hook is missing or has other parameters.
    """
    moved = [
        f"{cls.__name__}.{name}"
        for cls, name, parameters in _HOOKS
        if tuple(inspect.signature(getattr(cls, name, lambda: None)).parameters) != parameters
    ]
    outputs = FusedCausalLMOutput.__dataclass_fields__
    moved += [f"FusedCausalLMOutput.{name}" for name in ("log_probs", "label_mask", "aux_loss") if name not in outputs]
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        moved.append("Trainer.loss_is_scaled_for_ga")
    if moved:
        raise RuntimeError(
            f"TRL {trl.__version__} has moved or changed {', '.join(moved)}, on which the GIFT loss is built. Install "
            "the versions of gift_trl's `constraints.txt`, or a newer gift_trl."
        )
