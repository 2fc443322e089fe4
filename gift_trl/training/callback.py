"""What a callback of a later stage is told by the trainer, beyond the events of transformers."""

from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from peft import PeftConfig
from transformers import TrainerCallback

from gift_trl.training.config import GIFTConfig


if TYPE_CHECKING:
    from gift_trl.training.trainer import GIFTSFTTrainer


class StageCallback(TrainerCallback):
    """
    Callback that goes on with the adapter after the training. [`GIFTSFTTrainer`] calls it where transformers has no event:
    before the data is scored, when what would fail at the end can be refused at once, and with the trainer that saves.
    """

    def before_annotation(self, args: GIFTConfig, peft_config: PeftConfig | None) -> GIFTConfig:
        """
        Called first of all, on every process.

        Args:
            args ([`GIFTConfig`]):
                Arguments of the trainer, which are not changed.
            peft_config ([`~peft.PeftConfig`] or `None`):
                Configuration of the adapter.

        Returns:
            [`GIFTConfig`]: The arguments that the trainer is to have.
        """
        return args

    def before_training(self, trainer: "GIFTSFTTrainer", resume_from_checkpoint: str | None) -> None:
        """
        Called at the beginning of `train`, on every process.

        Args:
            trainer ([`GIFTSFTTrainer`]):
                The trainer.
            resume_from_checkpoint (`str` or `None`):
                Folder of the checkpoint that the training goes on from.
        """


def adapter_config(model: Any, peft_config: Any = None) -> Any:
    """The [`~peft.PeftConfig`] of the adapter that is given, or that a model has already."""
    if peft_config is None and not isinstance(model, str) and is_peft_model(model):
        return model.active_peft_config
    return peft_config
