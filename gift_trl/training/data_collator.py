"""SFTTrainer's collator with the confidences carried along, and with the lengths of the rows it joins."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad


# What the collators of this module add to a batch for the loss and the metrics
NOT_FOR_THE_MODEL = ("confidences", "row_lengths")


@dataclass
class RowDataCollator(DataCollatorForLanguageModeling):
    """
    [`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`] that says in padding-free mode how long the rows of the
    dataset are that it joins: `"row_lengths"` of shape `(rows,)`. A packed row is one, whatever it was packed from.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        if self.padding_free:
            output["row_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples])
        return output


@dataclass
class DataCollatorForGIFT(RowDataCollator):
    """
    Data collator for annotated language modeling data.

    Everything is [`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`], and `"confidences"` is joined and
    padded exactly as `"input_ids"` is: in padded mode to shape `(batch, seq_len)` with 0.0, in padding-free mode to
    shape `(1, total_len)`; float32. In padding-free mode there is `"row_lengths"` too, the number of tokens of every row
    that was joined. Neither is an input of the model.

    Raises:
        `ValueError`: If a row has no confidences, not as many as tokens, or some that are no probabilities.

    Examples:
    ```python
    >>> from gift_trl.training import DataCollatorForGIFT

    >>> collator = DataCollatorForGIFT(pad_token_id=0)
    >>> examples = [
    ...     {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "confidences": [0.0, 0.5, 0.9]},
    ...     {"input_ids": [4, 5], "labels": [-100, 5], "confidences": [0.0, 0.25]},
    ... ]
    >>> collator(examples)["confidences"]
    tensor([[0.0000, 0.5000, 0.9000],
            [0.0000, 0.2500, 0.0000]])
    ```
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for example in examples:
            if len(example.get("confidences", ())) != len(example["input_ids"]):
                raise ValueError(
                    f"A row has {len(example['input_ids'])} tokens and {len(example.get('confidences', ()))} "
                    "confidences. They are aligned token by token: annotate the dataset again with "
                    "`annotate_dataset`, and cut or join both columns alike in any step between it and the trainer."
                )
        output = super().torch_call(examples)
        confidences = [torch.tensor(example["confidences"], dtype=torch.float32) for example in examples]
        if self.padding_free:
            confidences = [torch.cat(confidences, dim=0)]
        for values in confidences:
            if not ((values >= 0) & (values <= 1)).all():  # NaN fails both
                raise ValueError(
                    "A row has confidences that are no probabilities (NaN, below 0 or above 1). Annotate the dataset "
                    "again with `annotate_dataset`."
                )
        output["confidences"] = pad(
            confidences, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        return output
