"""Stage 3: the adapter trained on the base model is added to the instruct model's checkpoint."""

from gift_trl.merging.merge import merge_adapter, merge_recipe
from gift_trl.merging.recipe import MergeRecipe
from gift_trl.merging.report import MergeReport
from gift_trl.merging.sweep import Sweep, sweep_scales
from gift_trl.merging.verify import Verification, verify_merge, verify_recipe


__all__ = [
    "MergeRecipe",
    "MergeReport",
    "Sweep",
    "Verification",
    "merge_adapter",
    "merge_recipe",
    "sweep_scales",
    "verify_merge",
    "verify_recipe",
]
