"""Stage 2: the adapter is trained on the base model with the cross-entropy weighted by the confidences."""

from gift_trl.training.config import GIFTConfig
from gift_trl.training.data_collator import DataCollatorForGIFT
from gift_trl.training.trainer import GIFTSFTTrainer
from gift_trl.training.weights import token_weights


__all__ = ["DataCollatorForGIFT", "GIFTConfig", "GIFTSFTTrainer", "token_weights"]
