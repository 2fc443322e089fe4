"""Pushes with faults on the way: each completes by itself or says how it is completed, and nothing is lost meanwhile."""

import re

import pytest
from fault_bench import BRANCH, Bench, Case
from fault_table import REQUESTS, make_cases, make_page


CASES = make_cases()
# What matters most, and of every request something
CHOSEN = (
    r"commit: .*(answer lost|killed|somebody|dropped in the middle|half|503)",
    r"commit: (403|429, Retry-After: 7,|409, twice|413)",
    r"who am I: (401|answer is other JSON)",
    r"what the repository is: answer is other JSON, always",
    r"create the repository: (409|answer lost, twice|somebody)",
    r"may I write: 403",
    r"branches and tags: 503",
    r"files of the branch: 429, Retry-After: 7200",
    r"validate the card: answer is a web page, twice",
    r"create the branch: (answer is a web page|409|somebody)",
    r"how to upload: (answer is other JSON|stalled connection), twice",
    r"where to upload: answer is other JSON, twice",
    r"upload a file: (403, always|answer is a web page, twice|killed)",
    r"verify the upload: half of the answer, twice",
    r"files of the commit: 500, always",
    r"create the tag: (answer is a web page|404|409, twice)",
    r"where the tag is: dropped connection, twice",
    r"at a random moment",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with Bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


def check(bench, cases) -> None:
    outcomes = [bench.run(case) for case in cases]
    assert not [f"{o.case}: {o.text} [{o.message}]" for o in outcomes if o.problems]


def chosen() -> list:
    found = [case for case in CASES if any(re.match(pattern, str(case)) for pattern in CHOSEN)]
    return [case for case in found if case.request != "at a random moment"] + found[-20::7]


@pytest.mark.parametrize("request_name", [*REQUESTS, "at a random moment"])
def test_a_push_survives_faults(bench, request_name):
    cases = [case for case in chosen() if case.request == request_name]
    assert cases
    check(bench, cases)


@pytest.mark.slow
def test_a_push_survives_every_fault(bench):
    check(bench, CASES)


def test_a_problem_is_seen(bench):
    """What the table says of a push is not said whatever happens."""

    def commit_in_parts(hub):
        repo = hub.repositories["model", "user/model"]
        whole = repo.branches[BRANCH].files
        for files in ({}, dict(list(whole.items())[:3]), whole):
            repo.commit("in parts", files, BRANCH)

    def arm(hub, pid_file):
        hub.fail("POST .*/tag/", "none", action=lambda: commit_in_parts(hub))
        (bench.folder / "config.json").touch()

    outcome = bench.run(Case("create the tag", "a push in parts", "once", arm))
    assert outcome.problems == [
        "2 commits with the content",
        "a commit holds a part of the model",
        "the folder has changed",
    ]
    assert "not true of 1" in make_page([outcome])
