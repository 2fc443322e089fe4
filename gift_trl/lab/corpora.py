"""
The three corpora of the lab: what the base model is pretrained on, what the instruct model is post-trained on, and the
target task's examples, whose reference answers come in several mixes of styles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from gift_trl.lab.problems import (
    ANSWER_STYLES,
    CANONICAL_STYLE,
    Problem,
    add_filler,
    make_arithmetic_line,
    make_list_task,
    make_problem,
    make_random_line,
    write_answer,
)


SEED_LIMIT = 10**6
_CORPORA = ("base", "instruct", "target", "held-out")


def check_seed(seed: int) -> None:
    """
    Refuses a seed the lab has no corpora for.

    Args:
        seed (`int`):
            Seed.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"The lab's seeds run from 0 to {SEED_LIMIT - 1}, got {seed}: choose one of those.")


def corpus_rng(corpus: str, seed: int) -> Random:
    """
    Returns the source of randomness of a corpus. No two corpora share one, whatever their seeds.

    Args:
        corpus (`str`):
            One of `"base"`, `"instruct"`, `"target"` and `"held-out"`.
        seed (`int`):
            Seed, from 0 to below `SEED_LIMIT`.

    Returns:
        `random.Random`: The source of randomness.
    """
    check_seed(seed)
    return Random(_CORPORA.index(corpus) * SEED_LIMIT + seed)


@dataclass(frozen=True)
class Document:
    """
    A pretraining document.

    Parameters:
        prompt (`str`):
            Text that is given and not scored; may be empty.
        text (`str`):
            Text that is scored, without the end-of-sequence token.
        is_chat (`bool`):
            Whether `prompt` is a user's message and `text` the reply, to be laid out by the chat template.
    """

    prompt: str
    text: str
    is_chat: bool


@dataclass(frozen=True)
class Mix:
    """
    How the reference answers of a target dataset are written.

    Parameters:
        description (`str`):
            What the reference answers are like.
        canonical_share (`float`):
            Share of the answers in the instruct model's own style. The others are drawn from the off-style mixture.
        filler_rate (`float`, *optional*, defaults to `0.3`):
            Probability of a filler word before a step of an off-style answer.
        slip_rate (`float`, *optional*, defaults to `0.05`):
            Probability that a step of an off-style answer is computed wrongly.
    """

    description: str
    canonical_share: float
    filler_rate: float = 0.3
    slip_rate: float = 0.05


_OFF_STYLES = {"words": 0.3, "verbose": 0.25, "chained": 0.15, "pairs": 0.2, "direct": 0.1}

MIXES: dict[str, Mix] = {
    "A": Mix("every reference answer in another style than the instruct model's, some steps wrong", 0.0),
    "A5": Mix("half of the reference answers as in mix A, half as in mix Z", 0.5),
    "B": Mix("a fifth of the reference answers as in mix Z, the others as in mix A", 0.2),
    "Z": Mix("every reference answer in the instruct model's own style, none wrong", 1.0),
}


def make_base_document(rng: Random) -> Document:
    """
    Draws one document of the base model's corpus: word problems in every style with 2% slips, random lines to copy,
    lines of arithmetic, and list tasks. Three in ten of the questions are asked in the chat layout.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        [`Document`]: The document.
    """
    kind = rng.random()
    problem = None
    if kind < 0.50:
        problem = make_problem(rng, rng.randint(1, 5), distractor_rate=rng.choice([0.0, 0.0, 0.3]))
        question, style = problem.question, rng.choice(ANSWER_STYLES)
        answer = write_answer(rng, problem, style, filler_rate=rng.choice([0.0, 0.3]), slip_rate=0.02)
    elif kind < 0.65:
        line = make_random_line(rng)
        return Document(line, line, is_chat=False)
    elif kind < 0.75:
        return Document("", make_arithmetic_line(rng), is_chat=False)
    else:
        question, answer = make_list_task(rng)
        if rng.random() < 0.3:
            answer = add_filler(rng, answer)
    if rng.random() < 0.3:
        if problem is not None and rng.random() < 0.7:
            answer = write_answer(rng, problem, CANONICAL_STYLE)
        return Document(question, answer, is_chat=True)
    return Document(f"question : {question} answer :", answer, is_chat=False)


def make_instruct_document(rng: Random) -> Document:
    """
    Draws one example of the instruct model's post-training: chat only, canonical answers, 40% word problems of up to
    three operations.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        [`Document`]: The example.
    """
    if rng.random() < 0.4:
        problem = make_problem(rng, rng.randint(1, 3), distractor_rate=0.1 if rng.random() < 0.5 else 0.0)
        return Document(problem.question, write_answer(rng, problem, CANONICAL_STYLE), is_chat=True)
    return Document(*make_list_task(rng), is_chat=True)


def make_target_problem(rng: Random) -> Problem:
    """
    Draws a problem of the target task: three to five operations, with distracting sentences.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        [`Problem`]: The problem.
    """
    return make_problem(rng, rng.randint(3, 5), distractor_rate=0.3)


def make_target_examples(
    mix: str, seed: int, num_examples: int = 512, held_out: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """
    Draws the training examples of the target task, as conversational prompt-completion rows.

    Args:
        mix (`str`):
            One of `MIXES`: how the reference answers are written.
        seed (`int`):
            Seed of the examples.
        num_examples (`int`, *optional*, defaults to `512`):
            Number of examples.
        held_out (`Sequence[str]`, *optional*):
            Questions that must not appear, because the models are evaluated on them.

    Returns:
        `list[dict]`: The rows, with the columns `prompt` and `completion`.
    """
    if mix not in MIXES:
        raise ValueError(f"Unknown mix {mix!r}: choose one of {', '.join(MIXES)}.")
    recipe, rng, excluded = MIXES[mix], corpus_rng("target", seed), set(held_out)
    rows: list[dict[str, list[dict[str, str]]]] = []
    while len(rows) < num_examples:
        problem = make_target_problem(rng)
        if rng.random() < recipe.canonical_share:
            answer = write_answer(rng, problem, CANONICAL_STYLE)
        else:
            style = rng.choices(list(_OFF_STYLES), list(_OFF_STYLES.values()))[0]
            answer = write_answer(rng, problem, style, recipe.filler_rate, recipe.slip_rate)
        if problem.question not in excluded:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": problem.question}],
                    "completion": [{"role": "assistant", "content": answer}],
                }
            )
    return rows
