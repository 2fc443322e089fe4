"""Stage 1: the instruct model's confidence of every target token."""

from gift_trl.annotation.annotate import annotate_dataset
from gift_trl.annotation.provenance import Provenance, read_provenance
from gift_trl.annotation.storage import load_annotated_dataset, save_annotated_dataset


__all__ = [
    "Provenance",
    "annotate_dataset",
    "load_annotated_dataset",
    "read_provenance",
    "save_annotated_dataset",
]
