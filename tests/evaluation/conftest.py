"""A task on local data for the tiny pair, and an evaluation of it."""

import json

import pytest

from gift_trl.evaluation.config import make_config


SUMS = [{"uid": f"row-{a}-{b}", "ask": f"What is {a} plus {b}?", "right": a + b} for a in range(3) for b in range(2)]


@pytest.fixture
def sums(tmp_path):
    """Fields of a task of six questions."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return {
        "name": "sums",
        "dataset": str(path),
        "fields": {"question": "ask", "answer": "right", "id": "uid"},
        "sampling": {"max_new_tokens": 12, "n": 2},
        "metric": "exact_match",
    }


@pytest.fixture
def configure(tmp_path, pair, sums):
    """Makes the configuration of an evaluation of the tiny instruct model; keyword arguments win."""

    def make(**values):
        settings = {"output_dir": str(tmp_path / "results"), "models": {"instruct": pair[1]}, "tasks": [sums]}
        settings |= {"use_cpu": True, "tokens_per_batch": 100}
        return make_config({**settings, **values})

    return make
