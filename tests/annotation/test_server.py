import os
import random
import socket
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_server import Fault, VLLMServer

from gift_trl.annotation import server_client as server_module
from gift_trl.annotation.rows import Row
from gift_trl.annotation.server import ServerScorer


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(server_module, "_BASE_WAIT", 0.005)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture(scope="module")
def running_server(pair):
    with VLLMServer(pair[1]) as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.reset()
    return running_server


@pytest.fixture
def make_scorer(server):
    """Makes scorers of the server, and closes them."""
    made = []

    def make(base_url=server.base_url, **kwargs):
        made.append(ServerScorer(base_url, **kwargs))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()
    # So that no request of one test arrives in the next
    for thread in threading.enumerate():
        if thread.name.startswith("ask-server"):
            thread.join(10)


@pytest.fixture(scope="module")
def rows(tokenizer, conversations) -> list[Row]:
    """Rows whose targets are the answers, named otherwise than they are numbered."""
    rows = []
    for i, row in enumerate(conversations):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = np.array(tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False))
        targets = np.arange(len(prompt), len(ids))
        rows.append(Row(i, 100 + i, ids, targets, ids[targets]))
    return rows


@pytest.fixture(scope="module")
def expected(pair, rows) -> list[np.ndarray]:
    """Batch 1, whole soft-max, float64."""
    model = AutoModelForCausalLM.from_pretrained(pair[1]).double().eval()
    values = []
    for row in rows:
        with torch.no_grad():
            p = model(input_ids=torch.tensor(row.input_ids[None])).logits[0].softmax(-1)
        values.append(np.array([p[t - 1, row.input_ids[t]].item() for t in row.targets]))
    return values


def batched(rows):
    return [rows[i : i + 3] for i in range(0, len(rows), 3)]


def score_all(scorer, rows):
    scored = {row.index: q for row, q in scorer.score(batched(rows))}
    assert sorted(scored) == [row.index for row in rows]
    return [scored[row.index] for row in rows]


def assert_expected(scored, expected):
    for q, p in zip(scored, expected, strict=True):
        assert q.dtype == np.float32 and q.shape == p.shape
        np.testing.assert_allclose(q, p, rtol=1e-5, atol=0)


def test_scores_are_the_model_s_probabilities(make_scorer, rows, expected):
    scorer = make_scorer()
    scorer.check(rows)
    assert_expected(score_all(scorer, rows), expected)
    # A test on uniform probabilities would show little
    flat = np.concatenate(expected)
    assert flat.max() > 0.9 and flat.min() < 0.05


def test_only_token_ids_are_sent(server, make_scorer, pair, rows):
    score_all(make_scorer(), rows)
    assert sorted(server.prompts) == sorted(row.input_ids.tolist() for row in rows)
    sent = next(request["body"] for request in server.requests if request["body"])
    assert sent.keys() == {"model", "prompt", "max_tokens", "temperature", "prompt_logprobs", "return_token_ids"}
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["prompt_logprobs"]) == (pair[1], 1, 0, 0)


@pytest.mark.parametrize("ending", ["/v1", "/v1/", "", "/"])
def test_url_with_and_without_path(server, make_scorer, rows, ending):
    make_scorer(server.root_url + ending).check(rows[:1])
    assert [request["path"] for request in server.requests] == ["/v1/models", "/v1/completions"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost/v1", "http:///v1", ""])
def test_no_url_of_a_server(url):
    with pytest.raises(ValueError, match=r"no URL of a server: give one such as"):
        ServerScorer(url)


def test_url_with_a_password_is_refused_without_showing_it():
    with pytest.raises(ValueError, match="VLLM_API_KEY") as error:
        ServerScorer("http://me:secret@localhost:8000/v1")
    assert "secret" not in str(error.value)


def test_identity_is_asked_once_and_late(server, make_scorer, pair, rows):
    scorer = make_scorer()
    assert server.requests == []
    assert scorer.identity == {"model": pair[1], "root": pair[1]}
    scorer.check(rows)
    score_all(scorer, rows)
    assert [request["path"] for request in server.requests].count("/v1/models") == 1


def test_choice_of_the_model(server, make_scorer, pair):
    adapter = {"id": "adapter", "object": "model", "root": "/adapter", "parent": pair[1], "max_model_len": None}
    server.models = [*server.models, adapter]
    with pytest.raises(ValueError, match=r"several models \(`.*instruct`, `adapter`\): say which"):
        _ = make_scorer().identity
    with pytest.raises(ValueError, match=r"does not serve `other` but `.*instruct`, `adapter`: name one"):
        _ = make_scorer(model="other").identity
    scorer = make_scorer(model="adapter")
    assert scorer.identity == {"model": "adapter", "root": "/adapter"}
    assert scorer.max_length == server.max_model_len - 1


@pytest.mark.parametrize("concurrency", [1, 4])
def test_requests_at_once_are_bounded(server, make_scorer, rows, expected, concurrency):
    server.delay = 0.02
    taken = 0

    def batches():
        nonlocal taken
        for row in rows * 2:
            taken += 1
            yield [row]

    results = make_scorer(concurrency=concurrency).score(batches())
    next(results)
    # The rows are read as the server gets on, not all at once
    assert taken <= 2 * concurrency
    assert len(list(results)) == 2 * len(rows) - 1
    assert server.max_simultaneous == concurrency


def test_nothing_to_score(server, make_scorer):
    scorer = make_scorer()
    scorer.check([])
    assert list(scorer.score([])) == list(scorer.score([[], []])) == []
    assert server.requests == []


def test_row_of_one_target_at_the_end_and_one_at_position_1(make_scorer, rows, expected):
    row = rows[0]
    targets = np.array([1, len(row.input_ids) - 1])
    ((_, q),) = make_scorer().score([[Row(0, 0, row.input_ids, targets, row.input_ids[targets])]])
    assert q.shape == (2,) and q[1] == np.float32(expected[0][-1])


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=429, headers={"Retry-After": "0"}), Fault(status=429)],
        [Fault(status=status) for status in (500, 502, 503, 504, 408)],
        [Fault("truncate")] * 3,
        [Fault("garble")] * 3,
        [Fault("drop")] * 3,
        [Fault("hang")] * 2,
    ],
    ids=["429", "5xx", "truncate", "garble", "drop", "hang"],
)
def test_passing_failures_change_nothing(server, make_scorer, rows, faults):
    healthy = score_all(make_scorer(), rows)
    server.requests.clear()
    server.faults.extend(faults)
    for q, p in zip(
        score_all(make_scorer(timeout=1.0 if faults[0].kind == "hang" else 60.0), rows), healthy, strict=True
    ):
        assert q.tobytes() == p.tobytes()
    assert len(server.prompts) == len(rows) + len(faults) and not server.faults


def test_retry_after_is_honoured(server, make_scorer, rows):
    server.faults.append(Fault(status=429, headers={"Retry-After": "1"}))
    list(make_scorer().score([rows[:1]]))
    first, second = (request["time"] for request in server.requests if request["body"])
    assert 1.0 <= second - first < 3.0


def test_waits_grow_up_to_the_longest(server, make_scorer, rows, monkeypatch):
    monkeypatch.setattr(server_module, "_LONGEST_WAIT", 0.08)
    server.faults.extend([Fault()] * 6)
    list(make_scorer().score([rows[:1]]))
    times = [request["time"] for request in server.requests if request["body"]]
    waits = np.diff(times)
    assert (waits >= [0.005, 0.01, 0.02, 0.04, 0.08, 0.08]).all()


@pytest.mark.parametrize(
    ("fault", "error", "cause"),
    [
        (Fault(), ConnectionError, "3 attempts, the last: HTTP 503: as told"),
        (Fault("drop"), ConnectionError, "3 attempts, the last: Remote end closed connection"),
        (Fault("hang"), ConnectionError, "3 attempts, the last: timed out"),
        (Fault("truncate"), ConnectionError, "3 attempts, the last: IncompleteRead"),
        (
            Fault(status=400, body={"object": "error", "message": "no such option"}),
            ValueError,
            "HTTP 400: no such option",
        ),
        (Fault(status=422, body={"detail": [{"msg": "bad"}]}), ValueError, "HTTP 422: .*bad"),
    ],
    ids=["503", "drop", "hang", "truncate", "400", "422"],
)
def test_a_row_that_fails_for_good_is_named(server, make_scorer, rows, fault, error, cause):
    bad = rows[5].input_ids.tolist()
    server.fault_of = lambda prompt: fault if prompt == bad else None
    with pytest.raises(error, match=f"^Row 105 cannot be scored.*{cause}") as caught:
        list(
            make_scorer(max_retries=2, timeout=0.3 if fault.kind == "hang" else 60.0, concurrency=1).score([rows[:6]])
        )
    remedy = "Then run again." if error is ConnectionError else "tokenizer of the served model"
    assert remedy in str(caught.value)
    tries = sum(prompt == bad for prompt in server.prompts)
    assert tries == (3 if error is ConnectionError else 1)


def test_rows_scored_before_a_failure_are_handed_on(server, make_scorer, rows, expected):
    bad = rows[5].input_ids.tolist()
    server.fault_of = lambda prompt: Fault(status=400) if prompt == bad else None
    kept = {}
    with pytest.raises(ValueError, match="Row 105"):
        for row, q in make_scorer(concurrency=1).score(batched(rows * 20)):
            kept[row.index] = q
    assert_expected([kept[i] for i in range(5)], expected[:5])
    # What had not been started is never asked for
    assert len(server.prompts) <= 8


def test_rows_scored_beside_a_failure_are_handed_on_first(server, make_scorer, rows, expected, monkeypatch):
    monkeypatch.setattr(server_module, "_BASE_WAIT", 0.1)
    bad = rows[0].input_ids.tolist()
    server.fault_of = lambda prompt: Fault() if prompt == bad else None
    results = make_scorer(concurrency=8, max_retries=1).score([rows])
    kept = dict([next(results)])
    # Long enough for all of them to be ready, the failure among them
    while server.prompts.count(bad) < 2:
        time.sleep(0.01)
    time.sleep(0.2)
    with pytest.raises(ConnectionError, match="Row 100"):
        kept.update(results)
    assert_expected([kept[row] for row in rows[1:]], expected[1:])


@pytest.mark.parametrize("close", ["generator", "scorer"])
def test_closing_stops_the_work(server, make_scorer, rows, close):
    first = rows[0].input_ids.tolist()
    server.fault_of = lambda prompt: None if prompt == first else Fault(status=429, headers={"Retry-After": "30"})
    scorer = make_scorer(concurrency=4)
    results = scorer.score(batched(rows))
    assert next(results)[0] is rows[0]
    if close == "generator":
        results.close()
    else:
        scorer.close()
        with pytest.raises(ConnectionError, match="the work was stopped"):
            next(results)
    # None waits on, and what had not been started is never asked for
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("ask-server") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(server.prompts) <= 5


def test_a_failing_source_of_rows_is_not_hidden(make_scorer, rows):
    def batches():
        yield rows[:2]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(make_scorer().score(batches()))


def test_scorer_can_be_used_again_after_a_failure(server, make_scorer, rows, expected):
    scorer = make_scorer()
    server.fault_of = lambda prompt: Fault(status=400)
    with pytest.raises(ValueError, match="cannot be scored"):
        list(scorer.score([rows]))
    server.fault_of = lambda prompt: None
    assert_expected(score_all(scorer, rows), expected)


def change_choice(change):
    def apply(answer, prompt):
        change(answer["choices"][0])
        return answer

    return apply


def add_bos(choice):
    choice["prompt_logprobs"].insert(1, {"1": {"logprob": -1.0, "rank": 2, "decoded_token": "<s>"}})
    choice["prompt_token_ids"] = [1, *choice["prompt_token_ids"]]


def echo_another_id(choice):
    choice["prompt_logprobs"][4] = {"7": {"logprob": -1.0, "rank": 1, "decoded_token": "?"}}


def echo_another_first_id(choice):
    choice["prompt_token_ids"] = [7, *choice["prompt_token_ids"][1:]]


def set_logprob(value, rank=None):
    def change(choice):
        (entry,) = choice["prompt_logprobs"][-1].values()
        entry["logprob"] = value
        entry["rank"] = rank

    return change


DISAGREEMENTS = {
    "bos": (add_bos, r"scored other tokens than it was sent \(\d+ ids for \d+\). Annotate with the tokenizer"),
    "other id": (echo_another_id, r"other tokens than it was sent \(nothing about token \d+ at position 4\)"),
    "other first id": (echo_another_first_id, r"other tokens than it was sent \(different ids\)"),
    "an empty position": (lambda choice: choice["prompt_logprobs"].__setitem__(4, None), "at position 4"),
    "short": (lambda choice: choice["prompt_logprobs"].pop(), r"\d+ ids for \d+"),
    "missing": (lambda choice: choice.pop("prompt_logprobs"), "no `prompt_logprobs`. Use a vLLM server"),
    "null": (lambda choice: choice.update(prompt_logprobs=None), "no `prompt_logprobs`"),
    "nan": (set_logprob(float("nan")), "is nan. Serve the model in another dtype"),
    "infinity": (set_logprob(float("-inf")), "is -inf. Serve the model in another dtype"),
    "nan as null": (set_logprob(None), "is None. Serve the model in another dtype"),
    "a logit": (set_logprob(7.5), "7.5 at position .* is no log-probability. .*--logprobs-mode raw_logprobs"),
    "a negative logit": (set_logprob(-2.0, rank=90), "-2.0 at position .* is no log-probability"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
@pytest.mark.parametrize("method", ["check", "score"])
def test_answers_about_something_else_are_refused(server, make_scorer, rows, name, method):
    change, message = DISAGREEMENTS[name]
    server.change = change_choice(change)
    scorer = make_scorer(concurrency=1)
    with pytest.raises(ValueError, match=f"^Row 100: .*{message}"):
        scorer.check(rows) if method == "check" else list(scorer.score([rows]))


@pytest.mark.parametrize("answer", [{"error": "odd"}, [], {"choices": []}, {"choices": ["text"]}, None, "text"])
def test_an_answer_in_another_form(server, make_scorer, rows, answer):
    server.change = lambda *_: answer
    with pytest.raises(ValueError, match="Row 100: the answer has no `prompt_logprobs`"):
        make_scorer().check(rows)


def test_servers_that_do_not_return_token_ids_are_taken(server, make_scorer, rows, expected):
    server.change = change_choice(lambda choice: choice.pop("prompt_token_ids"))
    scorer = make_scorer()
    scorer.check(rows)
    assert_expected(score_all(scorer, rows), expected)


def test_rounding_above_1_and_probability_0(server, make_scorer, rows):
    server.change = change_choice(set_logprob(3e-5, rank=1))
    ((_, q),) = make_scorer().score([rows[:1]])
    assert q[-1] == 1.0
    server.change = change_choice(set_logprob(-9999.0, rank=384))
    ((_, q),) = make_scorer().score([rows[:1]])
    assert q[-1] == 0.0
    # In a first row, that is a sign of another model's tokenizer
    with pytest.raises(ValueError, match=r"Row 100: to the served model, token \d+ at position \d+ is impossible"):
        make_scorer().check(rows)


def test_check_sends_three_rows(server, make_scorer, rows):
    make_scorer().check(rows)
    assert server.prompts == [row.input_ids.tolist() for row in rows[:3]]


def test_token_ids_outside_the_vocabulary(make_scorer, rows):
    ids = rows[0].input_ids.copy()
    ids[3] = 5000
    row = Row(0, 42, ids, rows[0].targets, rows[0].target_ids)
    with pytest.raises(ValueError, match=r"Row 42 .*5000 is out of vocabulary\). Annotate with the tokenizer"):
        make_scorer().check([row])


def test_row_as_long_as_the_server_s_limit(server, make_scorer, rows):
    longest = max(rows, key=lambda row: len(row.input_ids))
    n = len(longest.input_ids)
    server.models = [{**server.models[0], "max_model_len": n}]
    for use in (lambda scorer: scorer.check([longest]), lambda scorer: list(scorer.score([[longest]]))):
        with pytest.raises(ValueError, match=f"Row {longest.name} is {n} tokens .* takes {n - 1} .*len {n + 1}"):
            use(make_scorer())
    assert server.prompts == []
    server.models = [{**server.models[0], "max_model_len": n + 1}]
    scorer = make_scorer()
    assert scorer.max_length == n
    scorer.check([longest])


def test_a_server_that_states_no_limit(server, make_scorer, rows):
    server.models = [{"id": server.models[0]["id"]}]
    scorer = make_scorer()
    scorer.check(rows)
    assert scorer.max_length is None and scorer.identity["root"] == server.models[0]["id"]


def test_labels_that_are_not_the_token_ids(server, make_scorer, rows):
    row = Row(0, 42, rows[0].input_ids, rows[0].targets, rows[0].target_ids + 1)
    for use in (lambda scorer: scorer.check([row]), lambda scorer: list(scorer.score([[row]]))):
        with pytest.raises(ValueError, match=r"Row 42 has labels that are not its token ids, .*transformers"):
            use(make_scorer())
    assert server.prompts == []


def test_no_server(rows):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        scorer = ServerScorer(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        with pytest.raises(
            ConnectionError, match=r"3 attempts.*refused.*Start one with `vllm serve MODEL --port 8000`"
        ):
            scorer.check(rows)


def test_wrong_path(server, make_scorer, rows):
    with pytest.raises(ValueError, match=r"HTTP 404: Not Found\). Give the URL of a vLLM server"):
        make_scorer(f"{server.root_url}/v2").check(rows)


@pytest.mark.parametrize("models", [[], None, ["name"]])
def test_a_list_without_models(server, make_scorer, models):
    server.models = models
    with pytest.raises(ValueError, match="lists no models: give the URL of a vLLM server"):
        _ = make_scorer().identity


def test_api_key_comes_from_the_environment(server, make_scorer, rows, expected, monkeypatch):
    server.api_key = "secret-key"
    with pytest.raises(ValueError, match=r"HTTP 401: Unauthorized\). Set the environment variable `VLLM_API_KEY`"):
        make_scorer().check(rows)
    monkeypatch.setenv("VLLM_API_KEY", "secret-key\n")
    assert_expected(score_all(make_scorer(), rows), expected)
    assert {request["authorization"] for request in server.requests} == {None, "Bearer secret-key"}


def test_api_key_is_not_replaced_by_a_netrc_file(server, make_scorer, rows, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("VLLM_API_KEY", "secret-key")
    make_scorer().check(rows)
    assert {request["authorization"] for request in server.requests} == {"Bearer secret-key"}


@pytest.mark.parametrize(
    "fault", [Fault(status=401, body={"error": "no: secret-key"}), Fault(body={"error": "secret-key"})]
)
def test_api_key_is_in_no_error(server, make_scorer, rows, monkeypatch, caplog, fault):
    monkeypatch.setenv("VLLM_API_KEY", "secret-key")
    server.fault_of = lambda prompt: fault
    with caplog.at_level("DEBUG"), pytest.raises((ValueError, ConnectionError)) as error:
        make_scorer(max_retries=1).check(rows)
    shown = "".join(traceback.format_exception(error.value)) + caplog.text
    assert "***" in shown and "secret-key" not in shown


def test_unusable_api_key(monkeypatch):
    for key in ("secret\nkey", "sécret"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(ValueError, match="`VLLM_API_KEY` holds letters") as error:
            ServerScorer("http://localhost:8000/v1")
        assert key not in str(error.value)


def test_unusable_concurrency():
    with pytest.raises(ValueError, match=r"`concurrency` is 0.*set 1 or more"):
        ServerScorer("http://localhost:8000/v1", concurrency=0)


def test_global_random_states_are_left_alone(server, make_scorer, rows):
    server.faults.extend([Fault(), Fault("drop")])
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    scorer = make_scorer()
    scorer.check(rows)
    score_all(scorer, rows)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_offline_mode_of_the_hub_does_not_matter(make_scorer, rows):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    make_scorer().check(rows)
