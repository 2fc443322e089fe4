"""The lab's texts: right where they say so, wrong as often as they say, and the same for the same seed."""

import re
from random import Random

import pytest

from gift_trl.lab.corpora import (
    MIXES,
    SEED_LIMIT,
    corpus_rng,
    make_base_document,
    make_instruct_document,
    make_target_examples,
    make_target_problem,
)
from gift_trl.lab.problems import (
    ANSWER_STYLES,
    LIST_TASKS,
    MAX_NUMBER,
    VOCABULARY,
    make_list_task,
    make_problem,
    write_answer,
)


def _results(answer: str) -> list[int]:
    """The numbers an answer gives as results: after "=", after "makes" and so on, and at the end."""
    return [int(n) for n in re.findall(r"(?:=|makes|(?<!he )gives|is|has|with|####) (\d+)", answer)]


def test_problem_follows_from_its_own_sentences():
    rng = Random(0)
    for _ in range(200):
        problem = make_problem(rng, rng.randint(1, 5), distractor_rate=0.5)
        gains, losses = {"buys", "finds", "gets", "picks"}, {"loses", "eats", "sells", "gives"}
        value = int(re.match(r"\w+ has (\d+)", problem.question).group(1))
        for verb, amount in re.findall(r"\bhe (\w+) (\d+)", problem.question):
            value += int(amount) * ((verb in gains) - (verb in losses))
            assert 0 <= value <= MAX_NUMBER
        assert value == problem.answer


@pytest.mark.parametrize("style", ANSWER_STYLES)
def test_answers_without_slips_are_right(style):
    rng = Random(1)
    for _ in range(100):
        problem = make_problem(rng, rng.randint(1, 5))
        running = [problem.start]
        for sign, amount, _ in problem.operations:
            running.append(running[-1] + sign * amount)
        answer = write_answer(rng, problem, style, filler_rate=0.3)
        results = _results(answer)
        assert results[-1] == problem.answer
        assert set(results) <= set(running)
        for expression, result in re.findall(r"((?:\d+ [+-] )+\d+) = (\d+)", answer):
            assert eval(expression) == int(result)


@pytest.mark.parametrize("style", ANSWER_STYLES)
def test_slips_come_at_the_rate_asked_for(style):
    rng = Random(2)
    wrong = steps = 0
    for _ in range(400):
        problem = make_problem(rng, 1)
        answer = write_answer(rng, problem, style, slip_rate=0.3)
        wrong += _results(answer)[-1] != problem.answer
        steps += 1
    # A slip beyond 0 or 20 is cut back, so a few land on the right number.
    assert 0.2 < wrong / steps < 0.4


def test_canonical_answer_is_written_as_documented():
    problem = make_problem(Random(3), 2)
    (sign_1, a, _), (sign_2, b, _) = problem.operations
    middle = problem.start + sign_1 * a
    plus = {1: "+", -1: "-"}
    expected = (
        f"{problem.start} {plus[sign_1]} {a} = {middle} ; {middle} {plus[sign_2]} {b} = {problem.answer} ; "
        f"#### {problem.answer}"
    )
    assert write_answer(Random(0), problem, "canonical") == expected


@pytest.mark.parametrize(
    ("task", "solve"),
    [
        ("copy", lambda words: words),
        ("reverse", lambda words: words[::-1]),
        ("last", lambda words: words[-1:]),
        ("biggest", lambda words: [str(max(map(int, words)))]),
        ("smallest", lambda words: [str(min(map(int, words)))]),
        ("sort", lambda words: sorted(words, key=int)),
        ("count", lambda words: [str(words[1:].count(words[0]))]),
    ],
)
def test_list_tasks_are_solved_right(task, solve):
    rng = Random(4)
    for _ in range(50):
        question, answer = make_list_task(rng, task)
        words = [word for word in question.split()[1:] if word not in ("of", "in")]
        assert answer.split() == solve(words)


def test_every_text_is_made_of_the_vocabulary():
    rng, known = Random(5), set(VOCABULARY)
    texts = [document.prompt + " " + document.text for document in (make_base_document(rng) for _ in range(500))]
    texts += [document.prompt + " " + document.text for document in (make_instruct_document(rng) for _ in range(500))]
    texts += [" ".join(make_list_task(rng, task)) for task in LIST_TASKS for _ in range(20)]
    assert len(known) == len(VOCABULARY)
    assert {word for text in texts for word in text.split()} <= known


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_have_the_share_of_canonical_answers_they_say(mix):
    rows = make_target_examples(mix, seed=0, num_examples=400)
    steps = re.compile(r"(\d+ [+-] \d+ = \d+ ; )+#### \d+")
    canonical = sum(steps.fullmatch(row["completion"][0]["content"]) is not None for row in rows) / len(rows)
    assert abs(canonical - MIXES[mix].canonical_share) < 0.08


def test_examples_depend_on_the_seed_alone():
    assert make_target_examples("A", 0, 20) == make_target_examples("A", 0, 20)
    assert make_target_examples("A", 0, 20) != make_target_examples("A", 1, 20)


def test_held_out_questions_do_not_appear():
    questions = [row["prompt"][0]["content"] for row in make_target_examples("A", 0, 20)]
    rows = make_target_examples("A", 0, 20, held_out=questions[:5])
    assert [row["prompt"][0]["content"] for row in rows[:15]] == questions[5:]
    assert len(rows) == 20


def test_corpora_share_no_source_of_randomness():
    first = {
        corpus: make_target_problem(corpus_rng(corpus, 7)) for corpus in ("base", "instruct", "target", "held-out")
    }
    assert len({problem.question for problem in first.values()}) == 4
    with pytest.raises(ValueError, match=f"from 0 to {SEED_LIMIT - 1}, got {SEED_LIMIT}"):
        corpus_rng("base", SEED_LIMIT)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="choose one of A, A5, B, Z"):
        make_target_examples("C", 0)
    with pytest.raises(ValueError, match="choose one of canonical, words"):
        write_answer(Random(0), make_problem(Random(0), 1), "poem")
    with pytest.raises(ValueError, match="choose one of copy, reverse"):
        make_list_task(Random(0), "sing")
