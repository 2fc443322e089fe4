"""
Annotates, trains, merges and pushes over and over, in two processes, while processes are killed, disks fill up and the Hub fails.

    python tests/endurance/endurance.py --minutes 60

A round is the four stages with the real commands on a tiny model pair, and each stage is disturbed in several lives before it
may end: a rank, the launcher or all processes are killed, at a random moment or when a file has just appeared; the disk is full
(a small file system where one can be mounted, else a limit on the size of files); requests to a Hub on the loopback
interface fail, or their answers are lost. Every life is followed by the same command again. The round ends with the bytes of an undisturbed
run, in the annotated data, the checkpoints and the adapter, the merged model, and on the Hub with one commit in each repository. The first wrong byte, a command that hangs or
does not recover, a process or a file that is left over: the run ends with status 1 and keeps the folder.

Most lives are forks of a process with everything imported, see `command_forks.py`; every `--interpreters` rounds the training is killed as a user runs it.
The plan of faults comes from the seed: `--seed S --first_round N --rounds 1` does round N again. `log.jsonl` has a line for each life.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # of `hub_server`

from command_lives import Broken, Forks, Interpreters, environment
from fault_plan import plan_round
from full_disk import Disk
from hub_server import HubServer
from pipeline import Pipeline
from run_inputs import make_inputs
from run_results import Log


# How many lives of each stage are disturbed in a round; those of the push are shared by the adapter and the merged model
LIVES = {"annotate": 2, "train": 3, "merge": 2, "push": 4, "all": 2}


def main(arguments: list[str] | None = None) -> int:
    """Runs until the time is over or something is wrong; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="time after which no other round begins")
    parser.add_argument("--rounds", type=int, help="number of rounds after which it ends")
    parser.add_argument("--seed", type=int, default=0, help="seed of the plan of faults")
    parser.add_argument("--first_round", type=int, default=0, help="number of the first round in the plan")
    parser.add_argument(
        "--accelerate_config", default="ddp", help="ddp, zero2, zero3: how the two processes work together"
    )
    parser.add_argument(
        "--interpreters", type=int, default=10, help="each how many rounds a life is no fork; 0: never"
    )
    parser.add_argument("--undisturbed", type=int, default=2, help="how often to run undisturbed first")
    parser.add_argument("--output_dir", type=Path, help="folder for everything, empty or new")
    options = parser.parse_args(arguments)
    folder = options.output_dir or Path(tempfile.mkdtemp(prefix="gift_trl_endurance_"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Endurance run in {folder}, seed {options.seed}, {options.accelerate_config}", flush=True)
    log, started, done, error = Log(folder / "log.jsonl"), time.monotonic(), 0, None
    number = options.first_round
    with HubServer() as server:  # whose port is free, and is that of the servers of the rounds
        port = server.port
        hub = server.environment(folder / "home")
        hub = environment(**{name: hub[name] for name in hub if name.startswith(("HF_", "NO_PROXY"))})
    with Disk(folder / "disk") as disk:
        stack, push = (Forks(kind, hub, folder / f"{kind}.log") for kind in ("stack", "push"))
        config = options.accelerate_config
        pipeline = Pipeline(folder, disk, log, stack, push, Interpreters(hub), config, port)
        try:
            make_inputs(folder)
            for forks in (stack, push):
                forks.wait_until_ready()
            pipeline.run_undisturbed(options.undisturbed, with_interpreters=options.interpreters > 0)
            while done != options.rounds and time.monotonic() - started < 60 * options.minutes:
                real = options.interpreters > 0 and number % options.interpreters == 0
                pipeline.run_round(number, plan_round(options.seed, number, LIVES), real=real)
                number, done = number + 1, done + 1
        except Broken as broken:
            error = f"Round {number}, {broken}"
        except KeyboardInterrupt:
            error = f"Round {number} was interrupted"
        finally:
            stack.close()
            push.close()
    minutes = (time.monotonic() - started) / 60
    print(
        f"{done} rounds in {minutes:.0f} minutes, seed {options.seed}, {options.accelerate_config}\n\n{log.table()}\n"
    )
    if error is not None:
        print(f"BROKEN. {error}\nEverything is in {folder}", file=sys.stderr)
        return 1
    print(f"Every round has ended with the bytes of the undisturbed run. Log: {log.path}")
    if options.output_dir is None:
        shutil.move(log.path, Path(tempfile.gettempdir()) / f"{folder.name}.jsonl")
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
