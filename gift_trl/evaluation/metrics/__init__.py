"""
Metrics of generated text, each an `evaluate.Metric` in a folder that `evaluate.load` takes by its path, without the Hub.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import evaluate

METRICS = ("exact_match", "math_accuracy", "multiple_choice_accuracy", "rouge")


def load_metric(name: str) -> "evaluate.Metric":
    """
    Loads a metric of this package.

    Its `compute(predictions=[...], references=[...])` returns a dictionary with the mean under the metric's name, in
    [0, 1], and pair by pair `"scores"` (`list[float]`) and `"answers"` (`list[str | None]`): what the prediction was taken
    to say, written so that equal answers are equal strings, `None` where it gives no answer.

    Args:
        name (`str`):
            One of `METRICS`.

    Returns:
        [`~evaluate.Metric`]: The metric.

    Raises:
        ValueError: If there is no such metric.
        ImportError: If the metric needs a library that is not installed.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r} here: use one of {', '.join(METRICS)}.")
    try:
        module = importlib.import_module(f"gift_trl.evaluation.metrics.{name}.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(f"The metric {name} needs {error.name}: pip install 'gift_trl[evaluation]'.") from error
    # `exact_match` is the class ExactMatch, as evaluate derives the one name from the other
    return getattr(module, name.title().replace("_", ""))()
