"""The results of a comparison: what the terminal table, the page, the picture and the JSON file are made from."""

from dataclasses import dataclass
from functools import cached_property

from gift_trl.lab.evaluation import Scores


@dataclass(frozen=True)
class Setting:
    """
    What the methods are compared on.

    Parameters:
        mix (`str`):
            How the reference answers are written, one of `gift_trl.lab.corpora.MIXES`.
        learning_rate (`float`):
            Learning rate, the same for every method.
    """

    mix: str
    learning_rate: float

    def __str__(self) -> str:
        return f"mix {self.mix}, learning rate {self._rate}"

    def model_name(self, method: str) -> str:
        """Name of the model a method makes in this setting, in the results of the evaluation: `GIFT@A-3e-3`."""
        return f"{method}@{self.mix}-{self._rate}"

    @property
    def _rate(self) -> str:
        mantissa, exponent = f"{self.learning_rate:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class MethodResult:
    """
    One method in one setting.

    Parameters:
        method (`str`):
            Name of the method.
        scores ([`Scores`]):
            What the merged model got right.
        signal (`tuple[float, ...]`):
            Share, in percent, of the weighted loss before training that comes from tokens in each confidence band.
        training_loss (`float`):
            Mean training loss of the run.
        seconds (`float`):
            Time for training, merging and evaluation.
    """

    method: str
    scores: Scores
    signal: tuple[float, ...]
    training_loss: float
    seconds: float


@dataclass(frozen=True)
class SettingResult:
    """
    Every method in one setting.

    Parameters:
        setting ([`Setting`]):
            The setting.
        tokens (`tuple[float, ...]`):
            Share, in percent, of the target tokens in each confidence band.
        results (`tuple[MethodResult, ...]`):
            The methods, in the order of `METHODS`.
    """

    setting: Setting
    tokens: tuple[float, ...]
    results: tuple[MethodResult, ...]

    @cached_property
    def by_method(self) -> dict[str, MethodResult]:
        """The results by the name of the method."""
        return {result.method: result for result in self.results}


@dataclass(frozen=True)
class ScoredExample:
    """
    A training example with the instruct model's confidence of every token of its answer.

    Parameters:
        mix (`str`):
            The mix it is from.
        question (`str`):
            The question.
        tokens (`tuple[tuple[str, float], ...]`):
            The tokens of the answer and their confidences.
    """

    mix: str
    question: str
    tokens: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Comparison:
    """
    The methods in all settings, beside the models they started from.

    Parameters:
        seed (`int`):
            Seed of the pair, of the data and of the training.
        base ([`Scores`]):
            What the base model gets right.
        instruct ([`Scores`]):
            What the instruct model gets right.
        settings (`tuple[SettingResult, ...]`):
            The settings.
        example ([`ScoredExample`]):
            An example from the first setting.
    """

    seed: int
    base: Scores
    instruct: Scores
    settings: tuple[SettingResult, ...]
    example: ScoredExample
