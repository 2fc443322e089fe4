"""What will go wrong, drawn from a seed: kinds of faults take turns, and when and where each strikes is random."""

import random
from dataclasses import asdict, dataclass
from typing import Any


LAUNCHED = ("kill rank", "kill all", "kill launcher", "terminate launcher", "disk full")
ALONE = ("kill process", "terminate process", "disk full")
# Of the Hub: how `HubServer.fail` is told
REQUESTS: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "headers": {"Retry-After": "1"}},
    "500": {"status": 500},
    "503": {"status": 503},
    "dropped": {"how": "drop"},
    "reset": {"how": "reset"},
    "stalled": {"how": "stall"},
    "half an answer": {"how": "half"},
    "lost answer": {"how": "drop", "applied": True},
}
KINDS = {
    "annotate": LAUNCHED,
    "train": LAUNCHED,
    "merge": ALONE,
    "push": ("kill process", "server restarted", *REQUESTS),
    "all": (*LAUNCHED, "server restarted", *REQUESTS),
}
# More often than the client and the push repeat a request: the push fails, and is made again
_OUTLASTING = 9


@dataclass(frozen=True)
class RequestFault:
    """
    A request to the Hub that fails.

    Args:
        kind (`str`):
            One of `REQUESTS`.
        request (`float`):
            Which of the requests of an undisturbed push, as a share of their number.
        times (`int`):
            How many times it fails.
    """

    kind: str
    request: float
    times: int


@dataclass(frozen=True)
class Fault:
    """
    What happens in one life of a command.

    Args:
        kind (`str`):
            One of `KINDS` of the stage.
        moment (`float`):
            Share of the seconds that the command takes undisturbed, or, with `at_file`, of the files that it makes.
        at_file (`bool`):
            Whether it strikes when a new file or folder has appeared, which is where files are half written.
        delay (`float`):
            Seconds after that file.
        rank (`int`):
            Which of the processes is killed.
        size (`int`):
            Bytes that are left on the disk, or seconds × 1000 that the server is away.
        requests (`tuple[RequestFault, ...]`):
            Requests that fail in this life.
    """

    kind: str
    moment: float
    at_file: bool
    delay: float
    rank: int
    size: int
    requests: tuple[RequestFault, ...] = ()

    def describe(self) -> dict[str, Any]:
        """The fault for the log."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def plan_round(seed: int, number: int, lives: dict[str, int]) -> dict[str, list[Fault]]:
    """
    Faults of a round, the same for the same arguments.

    Args:
        seed (`int`):
            Seed of the endurance run.
        number (`int`):
            Number of the round, from 0.
        lives (`dict[str, int]`):
            How many lives of each stage are disturbed.

    Returns:
        `dict[str, list[Fault]]`: Faults by stage.
    """
    plan = {}
    for stage, kinds in KINDS.items():
        rng = random.Random(f"{seed}/{number}/{stage}")
        plan[stage] = []
        for life in range(lives[stage]):
            turn = number * lives[stage] + life
            # Every kind once before any comes again, in an order of its own each time
            deck = random.Random(f"{seed}/{stage}/{turn // len(kinds)}").sample(kinds, len(kinds))
            plan[stage].append(_draw(rng, deck[turn % len(kinds)], asks_hub=stage in ("push", "all")))
    return plan


def _draw(rng: random.Random, kind: str, *, asks_hub: bool) -> Fault:
    requests = []
    if asks_hub and kind not in ("disk full", "server restarted"):
        chosen = [kind] if kind in REQUESTS else []
        chosen += rng.choices(list(REQUESTS), k=rng.randrange(3))
        requests = [RequestFault(name, rng.random(), rng.choice((1, 1, 2, _OUTLASTING))) for name in chosen]
    return Fault(
        kind=kind,
        moment=rng.random(),
        at_file=rng.random() < 0.6,
        delay=rng.choice((0.0, 0.001, 0.005, 0.02)) * rng.random(),
        rank=rng.randrange(2),
        size=rng.choice((0, rng.randrange(65_536), rng.randrange(1_000_000))),
        requests=tuple(requests),
    )
