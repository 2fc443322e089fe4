"""
The lab's language, as text: word problems, the answer styles they are solved in, list tasks and lines of arithmetic.

Everything is drawn from a `random.Random`, so the same seed gives the same texts. The vocabulary is small enough for
a word-level tokenizer: each word and each number from 0 to 20 is one token.
"""

from dataclasses import dataclass
from random import Random


PAD_TOKEN, EOS_TOKEN, USER_TOKEN, BOT_TOKEN = "<pad>", "<eos>", "<user>", "<bot>"
ANSWER_MARK = "####"
MAX_NUMBER = 20

_NAMES = "tom mia sam eva leo zoe max ida".split()
_OBJECTS = "apples pens books coins cards shells".split()
_GAIN_VERBS = "buys finds gets picks".split()
_LOSS_VERBS = "loses eats sells gives".split()
_LETTERS = "a b c d e f g h i j k l".split()
_OPPOSITES = [
    pair.split("/")
    for pair in "hot/cold big/small up/down day/night wet/dry fast/slow old/young rich/poor hard/soft full/empty".split()
]
_FILLERS = "well okay so now hmm right first next alright look".split()
_GRAMMAR = (
    f"{PAD_TOKEN} {EOS_TOKEN} {USER_TOKEN} {BOT_TOKEN} question answer : . ; , ? + - = {ANSWER_MARK} has he how many "
    "does have what is plus minus makes then starts with after the it gives copy reverse last first biggest smallest "
    "sort of count in swap opposite sees also near there are add take away and left total we get"
).split()

# In order of first appearance, which is the order of the token ids.
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *_GRAMMAR,
            *map(str, range(MAX_NUMBER + 1)),
            *_NAMES,
            *_OBJECTS,
            *_GAIN_VERBS,
            *_LOSS_VERBS,
            *_LETTERS,
            *(word for pair in _OPPOSITES for word in pair),
            *_FILLERS,
        ]
    )
)
_PLAIN_WORDS = VOCABULARY[4:]  # all but the special tokens

CANONICAL_STYLE = "canonical"
ANSWER_STYLES = (CANONICAL_STYLE, "words", "verbose", "chained", "direct", "pairs")
LIST_TASKS = ("copy", "reverse", "last", "biggest", "smallest", "sort", "count", "opposite", "calc")
RETENTION_TASKS = ("copy", "reverse", "last", "biggest", "smallest", "sort", "count", "calc")


@dataclass(frozen=True)
class Problem:
    """
    A word problem and what is needed to write its solution in any style.

    Parameters:
        question (`str`):
            The text of the problem.
        name (`str`):
            Whom the problem is about.
        start (`int`):
            The number at the start.
        operations (`tuple[tuple[int, int, str], ...]`):
            The operations in order: sign (1 or -1), amount and verb.
        answer (`int`):
            The number at the end.
    """

    question: str
    name: str
    start: int
    operations: tuple[tuple[int, int, str], ...]
    answer: int


def make_problem(rng: Random, num_operations: int, distractor_rate: float = 0.0) -> Problem:
    """
    Draws a word problem whose intermediate results all lie between 0 and `MAX_NUMBER`.

    Args:
        rng (`random.Random`):
            Source of randomness.
        num_operations (`int`):
            Number of additions and subtractions.
        distractor_rate (`float`, *optional*, defaults to `0.0`):
            Probability of an irrelevant sentence before each operation.

    Returns:
        [`Problem`]: The problem.
    """
    name, thing = rng.choice(_NAMES), rng.choice(_OBJECTS)
    start = value = rng.randint(1, 9)
    sentences, operations = [f"{name} has {start} {thing} ."], []
    for _ in range(num_operations):
        if rng.random() < distractor_rate:
            other = rng.choice([candidate for candidate in _NAMES if candidate != name])
            about_other = f"{other} has {rng.randint(1, 9)} {rng.choice(_OBJECTS)} ."
            about_sight = f"he sees {rng.randint(1, 9)} {rng.choice(_OBJECTS)} ."
            sentences.append(rng.choice([about_other, about_sight]))
        subtract = rng.random() < 0.5 and value >= 1
        amount = rng.randint(1, min(9, value)) if subtract else rng.randint(1, 9)
        if value + amount > MAX_NUMBER:
            subtract = True
        sign = -1 if subtract else 1
        value += sign * amount
        verb = rng.choice(_LOSS_VERBS if subtract else _GAIN_VERBS)
        operations.append((sign, amount, verb))
        sentences.append(f"he {verb} {amount} .")
    sentences.append(rng.choice([f"how many {thing} does {name} have ?", "how many now ?"]))
    return Problem(" ".join(sentences), name, start, tuple(operations), value)


class _Writer:
    """Small liberties of an answer: filler words and slips of the pen."""

    def __init__(self, rng: Random, filler_rate: float, slip_rate: float):
        self.rng, self.filler_rate, self.slip_rate = rng, filler_rate, slip_rate

    def filler(self) -> str:
        return f"{self.rng.choice(_FILLERS)} " if self.rng.random() < self.filler_rate else ""

    def result(self, value: int) -> int:
        """`value` as written down: within the numbers the language has, and now and then wrong."""
        value = max(0, min(MAX_NUMBER, value))
        if self.rng.random() < self.slip_rate:
            value = max(0, min(MAX_NUMBER, value + self.rng.choice([-2, -1, 1, 2])))
        return value


def write_answer(rng: Random, problem: Problem, style: str, filler_rate: float = 0.0, slip_rate: float = 0.0) -> str:
    """
    Writes the solution of a word problem. A slip is carried on through the steps that follow it.

    Args:
        rng (`random.Random`):
            Source of randomness.
        problem ([`Problem`]):
            The problem to solve.
        style (`str`):
            One of `ANSWER_STYLES`. `"canonical"` is the instruct model's: `7 + 5 = 12 ; ... #### 12`.
        filler_rate (`float`, *optional*, defaults to `0.0`):
            Probability of a filler word before a step.
        slip_rate (`float`, *optional*, defaults to `0.0`):
            Probability that a step is computed wrongly.

    Returns:
        `str`: The answer, which ends in `#### n`.
    """
    writer = _Writer(rng, filler_rate, slip_rate)
    value, steps = problem.start, []
    # Results are drawn before fillers and wording in every style: the order of draws is part of what a seed means.
    if style in ("canonical", "words", "verbose"):
        for index, (sign, amount, verb) in enumerate(problem.operations):
            result = writer.result(value + sign * amount)
            if style == "canonical":
                steps.append(f"{writer.filler()}{value} {'+' if sign > 0 else '-'} {amount} = {result} ;")
            elif style == "words":
                lead = f"{writer.filler()}{'then ' if index else ''}"
                operator, copula = "plus" if sign > 0 else "minus", rng.choice(["makes", "is", "gives"])
                steps.append(f"{lead}{value} {operator} {amount} {copula} {result} .")
            else:
                if index == 0:
                    steps.append(f"{problem.name} starts with {value} .")
                steps.append(f"{writer.filler()}after he {verb} {amount} he has {result} .")
            value = result
    elif style in ("chained", "pairs"):
        size = 2 if style == "pairs" else len(problem.operations)
        for first in range(0, len(problem.operations), size):
            expression = str(value)
            for sign, amount, _ in problem.operations[first : first + size]:
                expression += f" {'+' if sign > 0 else '-'} {amount}"
                value += sign * amount
            value = writer.result(value)
            steps.append(f"{writer.filler()}{expression} = {value} ;")
    elif style == "direct":
        value = writer.result(problem.answer)
        lead = writer.filler()
        sentences = [f"the answer is {value} .", f"it is {value} .", f"{problem.name} has {value} ."]
        steps.append(f"{lead}{rng.choice(sentences)}")
    else:
        raise ValueError(f"Unknown answer style {style!r}: choose one of {', '.join(ANSWER_STYLES)}.")
    return f"{' '.join(steps)} {ANSWER_MARK} {value}"


def make_list_task(rng: Random, task: str | None = None) -> tuple[str, str]:
    """
    Draws a short task on letters, numbers or opposites.

    Args:
        rng (`random.Random`):
            Source of randomness.
        task (`str`, *optional*):
            One of `LIST_TASKS`; drawn when not given.

    Returns:
        `tuple[str, str]`: The question and its one right answer.
    """
    task = task or rng.choice(LIST_TASKS)
    letters = rng.sample(_LETTERS, rng.randint(3, 5))
    numbers = rng.sample(range(MAX_NUMBER + 1), rng.randint(3, 5))
    if task == "copy":
        return f"copy {' '.join(letters)}", " ".join(letters)
    if task == "reverse":
        return f"reverse {' '.join(letters)}", " ".join(reversed(letters))
    if task == "last":
        return f"last of {' '.join(letters)}", letters[-1]
    if task == "biggest":
        return f"biggest of {' '.join(map(str, numbers))}", str(max(numbers))
    if task == "smallest":
        return f"smallest of {' '.join(map(str, numbers))}", str(min(numbers))
    if task == "sort":
        numbers = numbers[:4]
        return f"sort {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))
    if task == "count":
        wanted = rng.choice(_LETTERS[:3])
        letters = [rng.choice(_LETTERS[:3]) for _ in range(rng.randint(3, 6))]
        return f"count {wanted} in {' '.join(letters)}", str(letters.count(wanted))
    if task == "opposite":
        pair = list(rng.choice(_OPPOSITES))
        rng.shuffle(pair)
        return f"opposite of {pair[0]}", pair[1]
    if task == "calc":
        left, right = rng.randint(0, MAX_NUMBER), rng.randint(0, 9)
        subtract = (rng.random() < 0.5 and left >= right) or left + right > MAX_NUMBER
        sign, result = ("-", left - right) if subtract else ("+", left + right)
        return f"what is {left} {sign} {right} ?", f"{left} {sign} {right} = {result} ; {ANSWER_MARK} {result}"
    raise ValueError(f"Unknown list task {task!r}: choose one of {', '.join(LIST_TASKS)}.")


def make_arithmetic_line(rng: Random) -> str:
    """
    Draws a line of three to six additions and subtractions, each starting from the last result.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `str`: The line.
    """
    value, steps = rng.randint(0, MAX_NUMBER), []
    for _ in range(rng.randint(3, 6)):
        amount = rng.randint(0, 9)
        add = (rng.random() < 0.5 or value < amount) and value + amount <= MAX_NUMBER
        result = value + amount if add else value - amount
        symbols = f"{value} {'+' if add else '-'} {amount} = {result} ;"
        words = f"{value} {'plus' if add else 'minus'} {amount} {rng.choice(['makes', 'is', 'gives'])} {result} ."
        steps.append(rng.choice([symbols, words]))
        value = result
    return " ".join(steps)


def make_random_line(rng: Random) -> str:
    """
    Draws a line of four to twelve different words without meaning.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `str`: The line.
    """
    return " ".join(rng.sample(_PLAIN_WORDS, rng.randint(4, 12)))


def add_filler(rng: Random, text: str) -> str:
    """
    Puts a filler word in front of a text.

    Args:
        rng (`random.Random`):
            Source of randomness.
        text (`str`):
            The text.

    Returns:
        `str`: The text with the filler.
    """
    return f"{rng.choice(_FILLERS)} {text}"
