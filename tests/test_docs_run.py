"""The commands of the pages are run in a reader's folder; `python tests/run_docs.py PAGE` prints the table."""

import os
import subprocess
import sys

import pytest
from docs_commands import ROOT, Command, pages
from run_docs import run_command


READ = ("README.md", "CONTRIBUTING.md", "recipes/README.md", "docs/faq.md")
GUIDES = [path.relative_to(ROOT).as_posix() for path in pages("docs/guides/*.md")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "read", [[*READ, *GUIDES], ["recipes/qwen2.5-0.5b/README.md"]], ids=["guides", "a model's page"]
)
def test_commands_end_well(read):
    command = [sys.executable, str(ROOT / "tests" / "run_docs.py"), *read]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    status = [line.split(" | ")[1] for line in done.stdout.splitlines() if line.count(" | ") >= 3][1:]
    assert status.count("0") >= 10 and set(status) <= {"0", "parsed", *(s for s in status if not s.isdigit())}


def test_a_command_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run_command(Command("page", 1, ("gift-trl", "report", "nowhere")))
    assert outcome.status == 1 and "There is no folder 'nowhere'" in outcome.how
    assert run_command(Command("page", 2, ("make", "test"))).how == "parsed"
    with pytest.raises(ValueError, match="tset"):
        run_command(Command("page", 3, ("make", "tset")))
