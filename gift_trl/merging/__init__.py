"""Stage 3: the adapter trained on the base model is added to the instruct model's checkpoint."""

from gift_trl.merging.merge import merge_adapter, merge_recipe
from gift_trl.merging.recipe import MergeRecipe
from gift_trl.merging.report import MergeReport


__all__ = ["MergeRecipe", "MergeReport", "merge_adapter", "merge_recipe"]
