"""The four stages in a folder of their own: run undisturbed once, then in rounds of disturbed lives."""

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import hub_server
from command_lives import Broken, Forks, Interpreters, Life
from fault_plan import REQUESTS, Fault
from full_disk import Disk
from run_results import Log, compare, hash_folder, hash_repository


RANKS = 2
STAGES = ("annotate", "train", "merge", "push adapter", "push merged", "all in one")
# The training that merges and pushes itself takes half of a round: it is in each of so many
_ALL_IN_ONE = 2
# Longest a command may take: its undisturbed seconds so often, and these on top, for a machine that does other work
_SLOWNESS, _PATIENCE = 10.0, 90.0
_OUTPUTS = {"annotate": "annotated", "train": "adapter", "merge": "merged", "all in one": "one"}
_OUTPUTS |= {"push adapter": "adapter", "push merged": "merged"}
_ALL_IN_ONE_OPTIONS = ["--output_dir", "one/adapter", "--merge_output_dir", "one/merged", "--push_to_hub", "true"]
_ALL_IN_ONE_OPTIONS += ["--hub_strategy", "end", "--hub_model_id", "user/one-adapter"]
_ALL_IN_ONE_OPTIONS += ["--hub_merged_model_id", "user/one-merged"]


@dataclass
class Undisturbed:
    """
    What is known of a stage from its undisturbed run.

    Args:
        seconds (`float`):
            How long it takes as a fork.
        interpreter_seconds (`float`):
            How long with an interpreter of its own.
        files (`int`):
            How many new files and folders are seen while it runs.
        result (`dict[str, str]`):
            Hashes of what it makes.
        requests (`list[str]`):
            What it asks of the Hub.
    """

    seconds: float = 0.0
    interpreter_seconds: float = 0.0
    files: int = 0
    result: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


class Pipeline:
    """
    The stages, their faults, and what they must come to.

    Args:
        folder (`Path`):
            Folder with the inputs, for the logs of the commands.
        disk ([`Disk`]):
            Where the rounds are.
        log ([`Log`]):
            Log of the lives.
        stack, push ([`Forks`]):
            What starts the commands.
        interpreters ([`Interpreters`]):
            What starts them as a user does.
        accelerate_config (`str`):
            How annotation and training are launched.
        port (`int`):
            Port of the Hub.
    """

    def __init__(
        self,
        folder: Path,
        disk: Disk,
        log: Log,
        stack: Forks,
        push: Forks,
        interpreters: Interpreters,
        accelerate_config: str,
        port: int,
    ):
        self.inputs, self.disk, self.log, self.port = folder, disk, log, port
        self.stack, self.push, self.interpreters = stack, push, interpreters
        self.accelerate_config = accelerate_config
        self.undisturbed = {stage: Undisturbed() for stage in STAGES}
        self.logs = folder / "logs"
        self.logs.mkdir()

    def run_undisturbed(self, times: int, *, with_interpreters: bool) -> None:
        """
        Makes the pair and the right results, and measures how long it takes.

        Args:
            times (`int`):
                How often to run them as forks; each time must come to the same.
            with_interpreters (`bool`):
                Whether to run them as a user does too, before.
        """
        arguments = ["make-pair", "--dataset", "data.jsonl", "--output_dir", "pair"]
        arguments += ["--vocab_size", "512", "--hidden_size", "64", "--max_length", "512"]
        self._must_succeed(self.stack.start(arguments, self.inputs, self.logs / "make-pair.log"), "make-pair", 300.0)
        self.hashes = self._hash_inputs()
        for name in ["interpreters"] * with_interpreters + [f"undisturbed-{turn}" for turn in range(times)]:
            folder = self._open(name)
            for stage, known in self.undisturbed.items():
                if name == "interpreters" and stage not in ("annotate", "train"):
                    continue
                self.server.requests.clear()
                life = self._start(stage, name, real=name == "interpreters")
                before, new = self._paths(), set()
                while life.is_running(0.01):
                    life.ranks()
                    new |= self._paths() - before
                self._must_succeed(life, f"{name}, {stage}", 300.0)
                result = self._result(stage)
                if name != "interpreters" and stage in ("annotate", "train") and len(self._notes(stage)) != RANKS:
                    raise Broken(f"{stage} has not run in {RANKS} processes: {self._notes(stage)}")
                if known.result:
                    compare(f"{stage} ({name})", result, known.result)
                known.result, known.requests = result, list(self.server.requests)
                known.files = max(known.files, len(new))
                if name == "interpreters":
                    known.interpreter_seconds = life.seconds
                else:
                    known.seconds = life.seconds
                self.log.write(round=name, stage=stage, seconds=round(life.seconds, 2), files=len(new))
            self._close(folder)

    def run_round(self, number: int, plan: dict[str, list[Fault]], *, real: bool) -> None:
        """
        Runs the stages of a round, each in disturbed lives first.

        Args:
            number (`int`):
                Number of the round.
            plan (`dict[str, list[Fault]]`):
                Its faults by stage.
            real (`bool`):
                Whether the first life of the training is no fork.

        Raises:
            [`Broken`]: If anything is not as it must be.
        """
        folder = self._open(f"round-{number}")
        for stage in STAGES[: len(STAGES) - (number % _ALL_IN_ONE > 0)]:
            faults = plan[stage.split()[0]]
            if stage.startswith("push"):
                faults = faults[stage == "push merged" :: 2]
            for life, fault in enumerate([*faults, None]):
                is_real = real and stage == "train" and life == 0
                if self._live(number, stage, life, fault, real=is_real):
                    break
            compare(stage, self._result(stage), self.undisturbed[stage].result)
            self.log.recovered()
        self._close(folder)

    def _live(self, number: int, stage: str, number_of_life: int, fault: Fault | None, *, real: bool) -> bool:
        """Lets a command live once; returns whether the stage is done."""
        kind = stage.split()[0]
        name = f"{number}-{stage.replace(' ', '-')}-{number_of_life}"
        requests = self._break_requests(stage, fault)
        life = self._start(stage, name, real=real)
        struck = fault is not None and self._disturb(life, stage, fault, real=real)
        known = self.undisturbed[stage]
        usual = known.interpreter_seconds if real else known.seconds
        try:
            status = life.wait(_SLOWNESS * usual + _PATIENCE)
        except Broken as broken:
            raise Broken(
                f"{stage} after {fault.describe() if fault else 'no fault'}: {broken}; see {name}.log"
            ) from None
        self.disk.relieve()
        if fault is None:  # as busy as the machine is now
            known.seconds = 0.7 * known.seconds + 0.3 * life.seconds
        hits = {fault.kind: struck and (status != 0 or fault.kind == "server restarted")} if fault else {}
        for what, broken, times in requests:
            hits[what] = hits.get(what, False) or broken.times < times
        for what, hit in hits.items():
            self.log.count(kind, what, hit)
        done = status == 0 or (kind == "annotate" and self._output(stage).exists())
        # A full disk ends a merge without a card, which is a warning
        done = done and (kind != "merge" or (self._output(stage) / "README.md").exists())
        message = (self.logs / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:]
        self.log.write(
            round=number,
            stage=stage,
            life=number_of_life,
            fault=fault and fault.describe(),
            hit=[what for what, hit in hits.items() if hit],
            struck=struck,
            status=status,
            outcome="done" if done else "to be finished",
            seconds=round(life.seconds, 2),
            fork=not real,
            message=message[0][:400] if message and status else "",
        )
        if status != 0 and not any(hits.values()):
            raise Broken(f"{stage}: nothing disturbs the command, and it ends with status {status}, see {name}.log")
        return done

    def _disturb(self, life: Life, stage: str, fault: Fault, *, real: bool) -> bool:
        """Waits for the moment of a fault, and lets it strike if the command still runs."""
        if fault.kind in REQUESTS:
            return False
        known = self.undisturbed[stage]
        # The imports of an interpreter are none of our business
        start = max(0.0, known.interpreter_seconds - known.seconds) if real else 0.0
        if fault.at_file and known.files:
            # Old checkpoints go while new ones come
            before, seen, wanted = self._paths(), set(), 1 + int(fault.moment * known.files)
            while life.is_running(0.003) and len(seen) < wanted:
                seen |= self._paths() - before
            time.sleep(fault.delay)
        else:
            end = life.started + start + fault.moment * known.seconds
            while life.is_running(0.01) and time.monotonic() < end:
                pass
        if not life.is_running():
            return False
        if fault.kind == "disk full":
            self.disk.fill(life, fault.size)
            return True
        if fault.kind == "server restarted":
            self.server.__exit__()
            time.sleep(fault.size / 1e6)
            self._serve(self.server.root)
            return True
        verb, target = fault.kind.split()
        return life.kill("terminate" if verb == "terminate" else target, fault.rank)

    def _break_requests(self, stage: str, fault: Fault | None) -> list[tuple[str, hub_server.Fault, int]]:
        """Tells the server which requests fail, and how often; returns that, with the kinds."""
        asked = self.undisturbed[stage].requests
        told = []
        self.server.faults.clear()
        self.server.requests.clear()
        for broken in fault.requests if fault else ():
            line = asked[int(broken.request * len(asked))]
            # The client itself repeats an upload, with waits of many seconds
            patient = re.search(r"/lfs/|preupload|\.git/", line) is not None
            times = min(broken.times, 2) if patient or broken.kind == "stalled" else broken.times
            self.server.fail(f"^{re.escape(line)}$", times=times, **REQUESTS[broken.kind])
            told.append((broken.kind, self.server.faults[-1], times))
        return told

    def _start(self, stage: str, name: str, *, real: bool) -> Life:
        launch = ["--accelerate_config", self.accelerate_config, "--num_processes", str(RANKS)]
        launch += ["--main_process_port", "0", "--mixed_precision", "no"]
        recipe = ["--config", str(self.inputs / "recipe.yaml")]
        if stage == "annotate":
            arguments = ["annotate", *recipe, "--annotation_output_dir", "annotated", *launch]
        elif stage == "train":
            arguments = ["train", *recipe, "--dataset_name", "annotated", *launch]
        elif stage == "merge":
            instruct = str(self.inputs / "pair" / "instruct")
            arguments = ["merge", "--adapter", "adapter", "--instruct_model", instruct, "--output_dir", "merged"]
            # Its card comes last, and a model without one may be what a kill has left
            arguments += ["--overwrite"] * self._output(stage).exists()
        elif stage == "all in one":
            arguments = ["train", *recipe, "--dataset_name", "annotated", *_ALL_IN_ONE_OPTIONS, *launch]
        else:
            folder = stage.split()[1]
            arguments = ["push", folder, "--repo_id", f"user/{folder}"]
        # Without the Hub, all but the pushes
        starter = self.push if stage.startswith("push") else self.interpreters if real else self.stack
        online = stage.startswith(("push", "all"))
        return starter.start(arguments, self.folder, self.logs / f"{name}.log", online=online)

    def _result(self, stage: str) -> dict[str, str]:
        if stage.startswith("push"):
            return hash_repository(self.server, f"user/{stage.split()[1]}")
        found = hash_folder(self._output(stage))
        if stage != "merge":
            self._check_ranks(stage)
        if stage == "all in one":
            for name in ("one-adapter", "one-merged"):
                content = hash_repository(self.server, f"user/{name}")
                found |= {f"{name} on the Hub: {path}": digest for path, digest in content.items()}
        return found

    def _output(self, stage: str) -> Path:
        return self.folder / _OUTPUTS[stage]

    def _check_ranks(self, stage: str) -> None:
        """Who took part must have been among several processes; who was killed after the work was done has left no note."""
        found = self._notes(stage)
        kinds = {"MULTI_CPU"} if self.accelerate_config == "ddp" else {"DEEPSPEED"}
        kinds |= {"MULTI_CPU"} if stage == "annotate" else set()
        if any(rank["num_processes"] != RANKS or rank["distributed_type"] not in kinds for rank in found):
            raise Broken(f"{stage} has run in these processes: {found}")

    def _notes(self, stage: str) -> list[dict]:
        module = "annotate" if stage == "annotate" else "train"
        # Empty is one whose process was killed, or found the disk full, as it wrote it after the command
        texts = [path.read_text() for path in sorted(self.folder.glob(f"{module}-rank*.json"))]
        return [json.loads(text) for text in texts if text]

    def _open(self, name: str) -> Path:
        self.folder = self.disk.folder / name
        self.folder.mkdir()
        # Not on the disk that fills up, which is the client's
        self._serve(self.inputs / "hub" / name)
        return self.folder

    def _serve(self, root: Path) -> None:
        self.server = hub_server.HubServer(root=root, port=self.port).__enter__()

    def _close(self, folder: Path) -> None:
        """Ends a round: nothing but the results is there, and the inputs are what they were."""
        self.server.__exit__()
        notes = {path.name for path in folder.glob("*-rank?.json")}
        left = sorted({path.name for path in folder.iterdir()} - notes - set(_OUTPUTS.values()) - {"home"})
        if left:
            raise Broken(f"there is left over: {', '.join(left)}")
        compare("the inputs", self._hash_inputs(), self.hashes)
        shutil.rmtree(folder)
        shutil.rmtree(self.server.root)

    def _hash_inputs(self) -> dict[str, str]:
        return hash_folder(self.inputs / "pair") | {"data.jsonl": (self.inputs / "data.jsonl").read_text()}

    def _paths(self) -> set[str]:
        """What there is in the round's folders now, deeper than which no fault aims."""
        found, folders = set(), [(str(self.folder), 4), (str(self.server.root), 2)]
        while folders:
            folder, depth = folders.pop()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # gone since
                for entry in os.scandir(folder):
                    found.add(entry.path)
                    if depth > 1 and entry.is_dir(follow_symlinks=False):
                        folders.append((entry.path, depth - 1))
        return found

    def _must_succeed(self, life: Life, name: str, seconds: float) -> None:
        if life.wait(seconds) != 0:
            raise Broken(f"undisturbed, {name} ends with status {life.status}: see {self.logs}")
