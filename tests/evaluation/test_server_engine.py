"""A server answers as `generate` does: the same prompts, every answer with a seed of its own, none lost."""

import json
import threading
from pathlib import Path

import pytest
from vllm_server import Fault, VLLMServer

from gift_trl.annotation import server_client
from gift_trl.evaluation.results import load_results
from gift_trl.evaluation.run import evaluate


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(server_client, "_BASE_WAIT", 0.005)


@pytest.fixture(scope="module")
def running_server(pair):
    with VLLMServer(pair[1]) as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.reset()
    return running_server


@pytest.fixture
def ask(configure, server, sums):
    """Makes the configuration of an evaluation with the server; greedy unless `sampling` says otherwise."""

    def make(sampling=None, **values):
        task = {**sums, "sampling": sampling or {"max_new_tokens": 12, "temperature": 0}}
        settings = {"engine": "vllm", "base_url": server.base_url, "concurrency": 3, "tasks": [task]}
        return configure(**{**settings, **values})

    return make


def test_greedy_answers_are_those_of_transformers(ask, tmp_path, server):
    local = evaluate(ask(engine="transformers", output_dir=str(tmp_path / "local")))
    remote = evaluate(ask())
    expected, found = (list(results.runs["instruct", "sums"].generations()) for results in (local, remote))
    assert found == expected
    assert {g.finish_reason for g in found} == {"stop"} and server.max_simultaneous <= 3
    assert remote.config["engine"] == "vllm" and remote.config["models"]["instruct"]["served"] == "instruct"
    assert str(Path(server._folder).parent) not in (remote.folder / "evaluation.yaml").read_text()


def test_the_request_says_all_that_the_server_would_fill_in(ask, server):
    sampling = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 11, "n": 2}
    results = evaluate(ask(sampling))
    bodies = [request["body"] for request in server.requests if request["path"] == "/v1/completions"]
    assert len(bodies) == 12 and len({body["seed"] for body in bodies}) == 12
    for name, value in (
        ("temperature", 0.7),
        ("top_p", 0.9),
        ("top_k", 11),
        ("max_tokens", 9),
        ("repetition_penalty", 1),
    ):
        assert {body[name] for body in bodies} == {value}
    assert bodies[0]["stop_token_ids"] == [2]
    first = list(results.runs["instruct", "sums"].generations())
    assert sorted(body["prompt"] for body in bodies) == sorted(g.prompt_ids for g in first)
    again = evaluate(ask(sampling, overwrite=True, seeds=[0], output_dir=str(results.folder.parent / "again")))
    assert list(again.runs["instruct", "sums"].generations()) == first


def test_a_server_that_does_not_tell_token_ids(ask, server):
    def forget(answer, prompt):
        for name in ("token_ids", "prompt_token_ids"):
            del answer["choices"][0][name]
        return answer

    expected = [g.text for g in evaluate(ask()).runs["instruct", "sums"].generations()]
    server.change = forget
    results = evaluate(ask(output_dir=str(Path(ask().output_dir).parent / "text")))
    found = list(results.runs["instruct", "sums"].generations())
    assert [g.text for g in found] == expected and {g.ids for g in found} == {None}
    summary = results.runs["instruct", "sums"].summary
    assert summary.mean_tokens is None and summary.truncated == 0


def test_a_stop_token_that_is_told_apart(ask, server):
    def shorten(answer, prompt):
        answer["choices"][0]["token_ids"].pop()
        return answer

    server.change = shorten
    results = evaluate(ask())
    assert all(g.ids[-1] == 2 and g.finish_reason == "stop" for g in results.runs["instruct", "sums"].generations())


@pytest.mark.parametrize("kind", ["status", "truncate", "garble", "drop"])
def test_passing_failures_change_nothing(ask, server, kind):
    expected = list(evaluate(ask()).runs["instruct", "sums"].generations())
    server.faults.extend([Fault(kind)] * 4)
    results = evaluate(ask(output_dir=str(Path(ask().output_dir).parent / "troubled")))
    assert list(results.runs["instruct", "sums"].generations()) == expected


def test_a_server_that_goes_down_loses_no_answer(ask, server):
    config = ask({"max_new_tokens": 12, "n": 3}, max_retries=1)
    asked = []

    def down(prompt):
        asked.append(prompt)
        return Fault("drop") if len(asked) > 7 else None

    server.fault_of = down
    with pytest.raises(
        ConnectionError, match=r"Problem \d of task `sums` cannot be answered: no server .*run again to go on"
    ):
        evaluate(config)
    part = Path(config.output_dir) / "instruct" / "sums" / "generations.part-00000.jsonl"
    done = len(part.read_text().splitlines())
    assert 4 <= done <= 7
    for thread in threading.enumerate():  # what was under way arrives before the second run
        if thread.name.startswith("ask-server"):
            thread.join(10)
    server.reset()
    evaluate(config)
    assert len(server.prompts) == 18 - done
    results = load_results(config.output_dir)
    assert len(list(results.runs["instruct", "sums"].generations())) == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer, prompt: {"choices": []}, "the server's answer is no completion"),
        (
            lambda answer, prompt: {"choices": [{**answer["choices"][0], "prompt_token_ids": [1]}]},
            "answered another prompt than it was sent",
        ),
        (
            lambda answer, prompt: {"choices": [{**answer["choices"][0], "finish_reason": "abort"}]},
            r"ended it by itself \(`finish_reason` 'abort'\)",
        ),
    ],
)
def test_answers_that_cannot_be_right(ask, server, change, message):
    server.change = change
    with pytest.raises(ValueError, match=f"Problem . of task `sums` cannot be answered: .*{message}"):
        evaluate(ask())


def test_prompts_that_the_server_does_not_take_are_listed(ask, server, sums, tmp_path):
    rows = [{"ask": "?", "right": "x"}, {"ask": "long " * 60, "right": "y"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums["fields"] = {"question": "ask", "answer": "right"}
    server.models = [{**server.models[0], "max_model_len": 40}]
    (skip,) = evaluate(ask()).runs["instruct", "sums"].summary.skipped
    assert skip.problem == 1 and "fills the model's 40 positions" in skip.reason


def test_servers_are_looked_for_before_the_work(ask, server, pair, caplog):
    with pytest.raises(ConnectionError, match="The served models cannot be listed"):
        evaluate(ask(base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(ValueError, match="`base` and `instruct` would be answered by the same model"):
        ask(models={"instruct": pair[1], "base": pair[0]})
    evaluate(ask(models={"base": pair[0]}))
    assert "its answers are taken for those of `base`" in caplog.text
