"""A way to run commands that fail."""

import pytest

from gift_trl.scripts.cli import run


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with one message and the exit status 1; returns the message."""

    def fail(main, *argv: str) -> str:
        with pytest.raises(SystemExit) as status:
            run(main, list(argv))
        assert status.value.code == 1
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "Traceback" not in error
        return error.split("error: ", 1)[1]

    return fail
