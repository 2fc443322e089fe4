import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kills_corrupted_inputs_and_full_disks():
    # A process of its own, which has no threads when it forks
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("merge_fuzz.py"), "--kills", "200", "--corruptions", "50"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    for words in ("200 kills", "50 corrupted inputs", "14 full and read-only disks", "killed, none", "refused"):
        assert words in run.stdout
