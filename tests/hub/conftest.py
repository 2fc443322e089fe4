"""A Hub on the loopback interface, and a process of its clients."""

import pytest
from hub_server import HubServer, client_process


TOKEN = "hf_canaryThatMustBeReadNowhere"


@pytest.fixture(scope="module")
def server():
    with HubServer(token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "output.txt"
    with client_process(server.environment(tmp_path_factory.mktemp("home")), log) as call:
        yield call
    assert TOKEN not in log.read_text()
