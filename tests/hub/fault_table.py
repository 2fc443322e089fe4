"""
What a push does when the network or the Hub fails: every fault at every request, and pushes that are killed.

    python tests/hub/fault_table.py --output docs/guides/hub_faults.md

Every case pushes a small model with `gift-trl push` to the Hub of `tests/hub_server.py`, in a process of its own. If the
push ends with an error, the fault is mended, and the command that the message names is run. After each, exactly one commit
must hold the model, no commit a part of it, the folder must be as it was, and the token must stand in nothing that was
printed. Waits are cut short, and the limit for a request that does not move is a quarter of a second.
"""

import argparse
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).parents[1]))  # run as a script, only this folder is on it

from fault_bench import BRANCH, REPOSITORY, Bench, Case, Outcome, kill
from hub_server import HubServer
from tqdm import tqdm


FOREVER = 10**6
# What the commands of a push ask for, in this order
REQUESTS = {
    "who am I": r"GET /api/whoami-v2$",
    "what the repository is": r"GET /api/models/user/model$",
    "create the repository": r"POST /api/repos/create$",
    "may I write": r"GET .*/auth-check/write$",
    "branches and tags": r"GET .*/refs$",
    "files of the branch": r"GET .*/tree/",
    "validate the card": r"POST /api/validate-yaml$",
    "create the branch": r"POST .*/branch/",
    "how to upload": r"POST .*/preupload/",
    "where to upload": r"POST .*/objects/batch$",
    "upload a file": r"PUT /lfs/",
    "verify the upload": r"POST /lfs/.*/verify$",
    "commit": r"POST .*/commit/",
    "files of the commit": r"GET .*/tree/",
    "create the tag": r"POST .*/tag/",
    "where the tag is": r"GET .*/refs$",
}
_COMMIT = REQUESTS["commit"]
_AFTER = {"files of the commit": _COMMIT, "where the tag is": REQUESTS["create the tag"]}
_LATER, _CONNECTION = "try again later", "check the connection"
# How a request fails, and what the message must say where that does not mend itself
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "401": ({"status": 401}, "hf auth login"),
    "403": ({"status": 403}, "give the token write permission"),
    "404": ({"status": 404}, "check its name"),
    "413": ({"status": 413}, "max_shard_size"),
    "409": ({"status": 409}, _LATER),
    "429, Retry-After: 7": ({"status": 429, "headers": {"Retry-After": "7"}}, _LATER),
    "429, Retry-After: 7200": ({"status": 429, "headers": {"Retry-After": "7200"}}, "wait for 7,200 seconds"),
    "500": ({"status": 500}, _LATER),
    "503": ({"status": 503}, _LATER),
    "dropped connection": ({"how": "reset"}, _CONNECTION),
    "dropped in the middle of the request": ({"how": "cut"}, _CONNECTION),
    "answer lost": ({"how": "drop", "applied": True}, _CONNECTION),
    "stalled connection": ({"how": "stall"}, _CONNECTION),
    "half of the answer": ({"how": "half"}, _CONNECTION),
    "answer is a web page": ({"status": 200, "body": b"<html>Please log in</html>"}, _CONNECTION),
    "answer is other JSON": ({"status": 200, "body": b'{"message": "Please log in"}'}, _CONNECTION),
}
# The address of an upload is signed and need not be the Hub's: other things are meant there
_OF_UPLOADS = dict.fromkeys(("403", "404", "answer is a web page", "answer is other JSON"), _LATER)
# Where an answer is read by its status alone, that nothing was made is seen afterwards
_OF_CHANGES = dict.fromkeys(("answer is a web page", "answer is other JSON"), _LATER)
_REASONS = {
    "upload a file": _OF_UPLOADS,
    "verify the upload": _OF_UPLOADS,
    "create the branch": _OF_CHANGES,
    "create the tag": _OF_CHANGES,
}
_NOT_REPEATED = ("401", "403", "404", "413", "429, Retry-After: 7200")


def make_cases(seed: int = 0, random_kills: int = 20) -> list[Case]:
    """
    All cases.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the moments at which pushes are killed.
        random_kills (`int`, *optional*, defaults to `20`):
            Number of them.

    Returns:
        `list[Case]`: The cases, in the order of the requests.
    """
    cases = []
    for request in REQUESTS:
        for fault, (settings, reason) in FAULTS.items():
            if settings.get("how") == "cut" and REQUESTS[request].startswith("GET"):
                continue
            for times, number in (("twice", 2), ("always", FOREVER)):
                if times == "always" or fault not in _NOT_REPEATED:
                    said = _REASONS.get(request, {}).get(fault, reason)
                    cases.append(Case(request, fault, times, _fail(request, number, **settings), said, _waits(fault)))
        for fault, applied in (("killed before it takes effect", False), ("killed after it took effect", True)):
            cases.append(Case(request, fault, "once", _killing(request, applied), killed=True))
    return [*cases, *_others(), *_replacing(), *_at_random(seed, random_kills)]


def _waits(fault: str) -> float:
    return 7.0 if fault == "429, Retry-After: 7" else 0.0


def _fail(request: str, times: int, **settings: Any) -> Any:
    def arm(hub: HubServer, pid_file: Path) -> None:
        hub.fail(REQUESTS[request], times=times, after=_AFTER.get(request), **settings)

    return arm


def _killing(request: str, applied: bool) -> Any:
    def arm(hub: HubServer, pid_file: Path) -> None:
        action = lambda: kill(pid_file)  # noqa: E731
        hub.fail(REQUESTS[request], "drop", applied=applied, after=_AFTER.get(request), action=action)

    return arm


def _others() -> Iterator[Case]:
    """What somebody else does to the repository meanwhile."""

    def create(hub: HubServer) -> None:
        hub.create("model", REPOSITORY, private=True)

    def branch(hub: HubServer) -> None:
        repo = hub.repositories["model", REPOSITORY]
        repo.branches[BRANCH] = repo.branches["main"]

    def commit(hub: HubServer) -> None:
        hub.commit("model", REPOSITORY, {"notes.md": b"notes"}, BRANCH)

    refused = "somebody else has committed"
    for request, fault, action, how, reason in (
        ("create the repository", "somebody else is faster", create, "none", ""),
        ("create the branch", "somebody else is faster", branch, "none", ""),
        ("how to upload", "somebody else commits", commit, "none", refused),
        ("commit", "somebody else commits", commit, "none", refused),
        ("commit", "answer lost, then somebody else commits", commit, "drop", ""),
        ("files of the commit", "somebody else commits", commit, "none", ""),
    ):
        yield Case(request, fault, "once", _meanwhile(request, action, how), reason)


def _meanwhile(request: str, action: Any, how: str) -> Any:
    def arm(hub: HubServer, pid_file: Path) -> None:
        hub.fail(REQUESTS[request], how, applied=True, after=_AFTER.get(request), action=lambda: action(hub))

    return arm


def _replacing() -> Iterator[Case]:
    """Pushes that replace another model."""
    for fault in ("403", "500", "dropped in the middle of the request", "answer lost", "half of the answer"):
        settings, reason = FAULTS[fault]
        for times, number in (("twice", 2), ("always", FOREVER)):
            if times == "always" or fault not in _NOT_REPEATED:
                yield Case("commit", fault, times, _fail("commit", number, **settings), reason, overwrite=True)
    for fault, applied in (("killed before it takes effect", False), ("killed after it took effect", True)):
        yield Case("commit", fault, "once", _killing("commit", applied), overwrite=True, killed=True)


def _at_random(seed: int, number: int) -> Iterator[Case]:
    """Pushes that are killed at some moment."""
    moments = random.Random(seed)

    def arm(delay: float) -> Any:
        def wait_and_kill(pid_file: Path) -> None:
            while not pid_file.exists() and not ended.is_set():
                time.sleep(0.001)
            if not ended.wait(delay):
                kill(pid_file)

        ended = threading.Event()

        def start(hub: HubServer, pid_file: Path) -> Any:
            threading.Thread(target=wait_and_kill, args=(pid_file,), daemon=True).start()
            return ended.set

        return start

    for delay in sorted(moments.uniform(0, 0.4) for _ in range(number)):
        yield Case("at a random moment", f"killed after {delay:.3f} s", "once", arm(delay), killed=True)


_PAGE = """\
# When the network or the Hub fails

What `gift-trl push` does when a request fails, tried against a Hub on the loopback interface with the real client:

```bash
{command}
```

{number} pushes of a small model in three shards to a new private repository, with `--revision` and `--tag`. A fault happens
twice, or always. Where it does not pass by itself, the push ends with a message that says why, and with the command that
finishes the job; that command was run once the fault was mended.

After each of them, exactly one commit held the model, no commit a part of it, branch and tag were at the whole model, the
folder was as before, byte by byte, and the token stood in nothing that was printed: {verdict}.

| | pushes |
| --- | --- |
{summary}

Waits were cut short. In use, requests are repeated after 1, 2, 4, 8, 16 and 32 seconds or when the Hub asks for it, which
may be up to ten minutes later, and a request that does not move is given up after three minutes.
"""
_SECTION = (
    "\n## {request}\n\n| fault | how often | outcome | cause and remedy in the message |\n| --- | --- | --- | --- |\n"
)
_COMMAND = "python tests/hub/fault_table.py --output docs/guides/hub_faults.md"


def make_page(outcomes: list[Outcome]) -> str:
    """
    The table as a page.

    Args:
        outcomes (`list[Outcome]`):
            What became of the cases.

    Returns:
        `str`: Markdown.
    """
    summary = Counter("wrong" if outcome.problems else outcome.text for outcome in outcomes)
    page = _PAGE.format(
        command=_COMMAND,
        number=len(outcomes),
        verdict="true of all" if not summary["wrong"] else f"**not true of {summary['wrong']}**",
        summary="\n".join(f"| {text} | {number} |" for text, number in summary.most_common()),
    )
    for request in dict.fromkeys(outcome.case.request for outcome in outcomes):
        page += _SECTION.format(request=request[0].upper() + request[1:])
        page += "".join(f"{_row(outcome)}\n" for outcome in outcomes if outcome.case.request == request)
    return page


def _row(outcome: Outcome) -> str:
    case, message = outcome.case, outcome.message
    # What stands in every message
    message = re.sub(r"^The push to '\S+' failed while ([^:]*): ", r"While \1: ", message)
    message = re.sub(r" (The files are safe in|Then push with) .*", "", message)
    replaces = ", replacing another model" if case.overwrite else ""
    cells = (f"{case.fault}{replaces}", case.times, outcome.text, message)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def main(argv: list[str] | None = None) -> None:
    """Runs the cases and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the page; printed if not given")
    parser.add_argument("--only", default="", help="regular expression of cases, as 'REQUEST: FAULT, TIMES'")
    arguments = parser.parse_args(argv)
    outcomes = []
    with tempfile.TemporaryDirectory() as root, Bench(Path(root)) as bench:
        for case in tqdm([case for case in make_cases() if re.search(arguments.only, str(case))]):
            outcomes.append(bench.run(case))
            if outcomes[-1].problems:
                print(f"{case}: {outcomes[-1].text}\n  {outcomes[-1].message}", file=sys.stderr)
    page = make_page(outcomes)
    if arguments.output is None:
        print(page, end="")
    else:
        arguments.output.write_text(page, encoding="utf-8")
    raise SystemExit(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    main()
