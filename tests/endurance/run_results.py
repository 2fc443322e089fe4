"""What a run has made, hashed file by file; the log; the table of faults."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from command_lives import Broken
from hub_server import HubServer


# What tells the time and the machine's speed, at any depth of a JSON file
_TIMES = ("duration_s", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
# Pickles of the arguments, in which a run that goes on says so, and the list of branches that a run may replace
_LEFT_OUT = ("training_args.bin", "_gift_trl_pushes.json")


def hash_content(name: str, content: bytes) -> str:
    """SHA-256 of a file; of a JSON file with times in it, without them."""
    if name.endswith(("merge_report.json", "trainer_state.json")):
        content = json.dumps(without_times(json.loads(content)), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def without_times(value: Any) -> Any:
    """What JSON holds, without the entries that tell the time."""
    if isinstance(value, dict):
        return {name: without_times(found) for name, found in value.items() if name not in _TIMES}
    return [without_times(found) for found in value] if isinstance(value, list) else value


def hash_folder(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder, checkpoints of the training among them."""
    return {
        str(file.relative_to(folder)): hash_content(file.name, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in _LEFT_OUT
    }


def hash_repository(server: HubServer, name: str) -> dict[str, str]:
    """Hash of every file of a repository's main branch, after one commit with the content was found in it."""
    commits = [commit.message for commit in server.repositories["model", name].commits]
    if len(commits) != 2:  # the first comes with the repository
        raise Broken(f"the repository {name} has the commits {commits}, where one with the content should be")
    return {path: hash_content(path, content) for path, content in server.files("model", name).items()}


def compare(what: str, found: dict[str, str], expected: dict[str, str]) -> None:
    """
    Compares what was made with what an undisturbed run has made.

    Args:
        what (`str`):
            Name for the message.
        found, expected (`dict[str, str]`):
            Hashes by file.

    Raises:
        [`Broken`]: If a file is missing, too many, or of other content.
    """
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        kinds = {
            name: "missing" if name not in found else "too many" if name not in expected else "other" for name in wrong
        }
        shown = ", ".join(f"{name} ({kind})" for name, kind in list(kinds.items())[:8])
        raise Broken(f"{what} differs from the undisturbed run in {len(wrong)} files: {shown}")


class Log:
    """
    The log of an endurance run, a line of JSON for each life of a command, and the table made of it.

    Args:
        path (`Path`):
            The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.counts: dict[str, Counter] = {"tried": Counter(), "hit": Counter(), "recovered": Counter()}
        self._open: Counter = Counter()

    def write(self, **fields: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def count(self, stage: str, kind: str, hit: bool) -> None:
        """Counts a fault of the stage that runs."""
        self.counts["tried"][stage, kind] += 1
        self.counts["hit"][stage, kind] += hit
        self._open[stage, kind] += hit

    def recovered(self) -> None:
        """The stage that ran has ended with the right bytes: what hit it did no harm."""
        self.counts["recovered"].update(self._open)
        self._open.clear()

    def table(self) -> str:
        """Faults by stage and kind: tried, hit while the command ran, recovered from."""
        rows = ["| stage | fault | tried | hit while running | recovered |", "| --- | --- | ---: | ---: | ---: |"]
        for stage, kind in self.counts["tried"]:
            numbers = " | ".join(str(count[stage, kind]) for count in self.counts.values())
            rows.append(f"| {stage} | {kind} | {numbers} |")
        totals = " | ".join(str(count.total()) for count in self.counts.values())
        return "\n".join([*rows, f"| all | | {totals} |"])
