import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_round_of_faults_ends_with_the_bytes_of_the_undisturbed_run(tmp_path):
    command = [sys.executable, Path(__file__).with_name("endurance.py"), "--output_dir", tmp_path / "run"]
    command += ["--rounds", "1", "--seed", "3", "--undisturbed", "1", "--interpreters", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    tried, hit, recovered = map(int, re.search(r"\| all \| \| (\d+) \| (\d+) \| (\d+) \|", run.stdout).groups())
    assert tried >= hit == recovered >= 5, run.stdout
