"""To the Hub: merged models and adapters that arrive complete."""

import importlib
from typing import TYPE_CHECKING, Any


__all__ = [
    "EvaluationResult",
    "MergeAndPushCallback",
    "PushReport",
    "check_push_target",
    "push_command",
    "push_folder",
    "write_merged_card",
]

# Resolved on first use: `gift-trl push` needs neither torch nor transformers
_MODULES = {
    "EvaluationResult": "gift_trl.hub.card",
    "MergeAndPushCallback": "gift_trl.hub.callback",
    "PushReport": "gift_trl.hub.push",
    "check_push_target": "gift_trl.hub.target",
    "push_command": "gift_trl.hub.push",
    "push_folder": "gift_trl.hub.push",
    "write_merged_card": "gift_trl.hub.card",
}

if TYPE_CHECKING:
    from gift_trl.hub.callback import MergeAndPushCallback
    from gift_trl.hub.card import EvaluationResult, write_merged_card
    from gift_trl.hub.push import PushReport, push_command, push_folder
    from gift_trl.hub.target import check_push_target


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
