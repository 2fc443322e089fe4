"""A pair of the lab trained for a handful of steps: real checkpoints that know next to nothing."""

from pathlib import Path

import pytest

from gift_trl.lab.pair import PairSettings, make_pair


SHORT_TRAINING = PairSettings(hidden_size=32, base_steps=12, instruct_steps=4)


@pytest.fixture(scope="session")
def short_training() -> PairSettings:
    return SHORT_TRAINING


@pytest.fixture(scope="session")
def lab_pair(tmp_path_factory, short_training) -> tuple[Path, Path]:
    return make_pair(0, tmp_path_factory.mktemp("lab"), settings=short_training)
