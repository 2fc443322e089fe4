"""GIFT (Guided Fine-Tuning and Transfer, https://huggingface.co/papers/2605.01256) as a TRL extension."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

__all__ = [
    "GIFTConfig",
    "GIFTSFTTrainer",
    "MergeAndPushCallback",
    "MergeReport",
    "annotate_dataset",
    "merge_adapter",
]

# Importing torch, transformers and TRL takes seconds, `gift-trl --help` should not: names are resolved on first use.
_MODULES = {
    "GIFTConfig": "gift_trl.training",
    "GIFTSFTTrainer": "gift_trl.training",
    "MergeAndPushCallback": "gift_trl.hub.callback",
    "MergeReport": "gift_trl.merging",
    "annotate_dataset": "gift_trl.annotation",
    "merge_adapter": "gift_trl.merging",
}

if TYPE_CHECKING:
    from gift_trl.annotation import annotate_dataset
    from gift_trl.hub.callback import MergeAndPushCallback
    from gift_trl.merging import MergeReport, merge_adapter
    from gift_trl.training import GIFTConfig, GIFTSFTTrainer


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
