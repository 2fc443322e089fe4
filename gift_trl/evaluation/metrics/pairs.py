"""What all metrics ask of their predictions and references."""

from collections.abc import Sequence

import datasets


class TextPairs:
    """
    Goes before [`~evaluate.Metric`] in the bases of a metric of texts and refuses whatever is no text, before it is kept.
    """

    def add_batch(self, *, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> None:
        """
        Adds pairs.

        Args:
            predictions (`Sequence[str]`):
                Generated texts.
            references (`Sequence[str]` or `Sequence[Sequence[str]]`):
                What is right.

        Raises:
            ValueError: If there are none, not equally many, or if one is not a text.
        """
        predictions, references = list(predictions), list(references)
        if not predictions:
            raise ValueError(f"There is nothing to score: `{self.name}` was given no predictions.")
        for name, texts in (("prediction", predictions), ("reference", references)):
            for index, text in enumerate(texts):
                several = name == "reference" and isinstance(text, list | tuple) and bool(text)
                if not all(isinstance(part, str) for part in (text if several else [text])):
                    raise ValueError(f"`{self.name}` compares texts, and {name} {index} is {text!r:.100}.")
        # Half of a surrogate pair, as JSON can hold, cannot be written as UTF-8
        predictions = [text.encode(errors="replace").decode() for text in predictions]
        super().add_batch(predictions=predictions, references=references)


def text_features(*, several_references: bool) -> datasets.Features | list[datasets.Features]:
    """
    The columns of a metric of texts.

    Args:
        several_references (`bool`):
            Whether a prediction may have a list of references.

    Returns:
        [`~datasets.Features`] or `list`: The columns, or the two ways in which they may come. Texts are of the type
        `large_string`, which holds more than 2 GiB in a batch.
    """
    text = datasets.Value("large_string")
    one = datasets.Features({"predictions": text, "references": text})
    if not several_references:
        return one
    return [datasets.Features({"predictions": text, "references": datasets.List(text)}), one]
