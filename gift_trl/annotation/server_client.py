"""A vLLM server, or one with the same OpenAI-compatible API, asked for many things at a time."""

import itertools
import os
import random
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from json import loads
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter


# Seconds before a request is repeated: doubled each time, up to the longest, unless the server asks for more
_BASE_WAIT = 1.0
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 600.0
_PASSING_STATUSES = {408, 429, 500, 502, 503, 504}
_API_KEY = "VLLM_API_KEY"
_NO_SERVER = "Give the URL of a vLLM server, such as http://localhost:8000/v1."

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class ServerClient:
    """
    A running server.

    After a passing failure (a busy or restarting server, a broken connection, an answer cut short) a request is repeated,
    with growing waits. No global random state is drawn from. The environment variable `VLLM_API_KEY`, if set, is sent as the
    bearer token.

    Args:
        base_url (`str`):
            URL of the server's API, such as `"http://localhost:8000/v1"`. `/v1` is added to a URL without a path.
        model (`str`, *optional*):
            Name of the model as served. Needed only where the server lists several.
        concurrency (`int`, *optional*, defaults to `16`):
            Number of things the server is asked for at the same time.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for an answer before the request is repeated.
        max_retries (`int`, *optional*, defaults to `8`):
            Number of times a request is repeated before it has failed.

    Raises:
        `ValueError`: If the URL, the key or the concurrency cannot be used. The server is not contacted yet.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        max_retries: int = 8,
    ):
        if concurrency < 1:
            raise ValueError(f"`concurrency` is {concurrency}, which asks for no row at all: set 1 or more.")
        self.base_url = _complete_url(base_url)
        self.concurrency = concurrency
        self._model = model
        self._timeout = timeout
        self._max_retries = max_retries
        self._jitter = random.Random()
        self._stopped = threading.Event()
        self._session = requests.Session()
        self._session.mount(self.base_url, HTTPAdapter(pool_maxsize=concurrency))
        self._key = os.environ.get(_API_KEY, "").strip()
        if self._key:
            # Tested here, since the error of the HTTP library would show the key
            if not (self._key.isascii() and self._key.isprintable()):
                raise ValueError(f"`{_API_KEY}` holds letters that no HTTP header can carry: set it again.")
            # Not as a header of the session, which requests replaces by what a `.netrc` file says of the host
            self._session.auth = self._sign

    @property
    def identity(self) -> dict[str, str]:
        """
        What the server says it holds: `model`, the served name, and `root`, the checkpoint behind it. Asked once.

        Raises:
            `ConnectionError`: If no server answers.
            `ValueError`: If it refuses, is no vLLM server, or does not serve the model.
        """
        return {"model": self._served["id"], "root": self._served.get("root") or self._served["id"]}

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer that the server takes, `None` if it does not say. Errors as [`identity`]."""
        return self._served["max_model_len"]

    def complete(
        self, body: dict[str, Any], failed: str, remedy: str, refused: str, stopped: threading.Event | None = None
    ) -> Any:
        """
        Asks for a completion.

        Args:
            body (`dict[str, Any]`):
                Fields of the request, without the model.
            failed (`str`):
                What has failed, should it fail: the beginning of the message.
            remedy (`str`):
                What to do if no answer comes: its end.
            refused (`str`):
                What to do if the server refuses the request.
            stopped (`threading.Event`, *optional*):
                Set when nobody waits for the answer any more.

        Returns:
            `Any`: The decoded answer.

        Raises:
            `ConnectionError`: If there is no answer after all repetitions.
            `ValueError`: If the server refuses.
        """
        body = {"model": self._served["id"], **body}
        return self._request(
            "POST", "completions", failed, remedy, refused, self._timeout, self._max_retries, body, stopped
        )

    def map(
        self, ask: Callable[[Item, threading.Event], Answer], items: Iterable[Item]
    ) -> Generator[tuple[Item, Answer], None, None]:
        """
        Asks about items, a bounded number of them at a time.

        Args:
            ask (`Callable`):
                Asks about an item in a thread, until the event is set.
            items (`Iterable`):
                The items, read as the server gets on with them.

        Yields:
            `tuple`: An item and the answer, in the order of completion. If one fails, the others that are there come first.
        """
        items = iter(items)
        pending: dict[Future, Item] = {}
        self._stopped = stopped = threading.Event()
        executor = ThreadPoolExecutor(self.concurrency, thread_name_prefix="ask-server")
        try:
            while True:
                # More than the workers hold, so that none of them waits for this thread
                for item in itertools.islice(items, 2 * self.concurrency - len(pending)):
                    pending[executor.submit(ask, item, stopped)] = item
                if not pending:
                    return
                wait(pending, return_when=FIRST_COMPLETED)
                done = [future for future in pending if future.done()]
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield pending.pop(future), future.result()
        finally:
            stopped.set()
            executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stops what is under way and closes the connections."""
        self._stopped.set()
        self._session.close()

    @cached_property
    def _served(self) -> dict[str, Any]:
        # A wrong URL is to be noticed at once
        retries, timeout = min(self._max_retries, 2), min(self._timeout, 30.0)
        failed = "The served models cannot be listed"
        remedy = "Start one with `vllm serve MODEL --port 8000`, or correct the URL, which ends in `/v1`."
        answer = self._request("GET", "models", failed, remedy, _NO_SERVER, timeout, retries)
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not cards or not all(isinstance(c, dict) and "id" in c for c in cards):
            raise ValueError(f"{self.base_url} lists no models: give the URL of a vLLM server, which ends in `/v1`.")
        names = ", ".join(f"`{card['id']}`" for card in cards)
        if self._model is None and len(cards) > 1:
            raise ValueError(f"{self.base_url} serves several models ({names}): say which one is meant.")
        card = next((card for card in cards if self._model in (None, card["id"])), None)
        if card is None:
            raise ValueError(f"{self.base_url} does not serve `{self._model}` but {names}: name one of these.")
        # The entry of an adapter does not repeat the limit of the model under it
        limit = next((card["max_model_len"] for card in (card, *cards) if card.get("max_model_len")), None)
        return {**card, "max_model_len": limit}

    def _request(
        self,
        method: str,
        path: str,
        failed: str,
        remedy: str,
        refused: str,
        timeout: float,
        retries: int,
        body: dict[str, Any] | None = None,
        stopped: threading.Event | None = None,
    ) -> Any:
        """Decoded JSON answer. `failed` begins the message of an error, `remedy` or `refused` ends it."""
        stopped, pause = stopped or threading.Event(), 0.0
        for attempt in itertools.count(1):
            # The jitter keeps the workers from coming back all at once
            if stopped.wait(pause * (1.0 + 0.25 * self._jitter.random())):
                raise ConnectionError(f"{failed}: the work was stopped. Run again.")
            cause, pause = None, min(_LONGEST_WAIT, _BASE_WAIT * 2 ** (attempt - 1))
            try:
                response = self._session.request(method, f"{self.base_url}/{path}", timeout=timeout, json=body)
                if response.ok:
                    return loads(response.content)
            except (requests.RequestException, ValueError) as error:
                # A `ValueError` is an answer that is no JSON, as one cut short is
                cause, reason = error, _innermost(error)
            else:
                reason = f"HTTP {response.status_code}: {self._server_message(response)}"
                if response.status_code not in _PASSING_STATUSES:
                    raise ValueError(f"{failed} ({reason}). {_refusal_remedy(response, refused)}")
                if response.headers.get("Retry-After", "").isdecimal():
                    pause = max(pause, min(float(response.headers["Retry-After"]), _LONGEST_RETRY_AFTER))
            if attempt > retries:
                failed = f"{failed}: no server at {self.base_url} answers ({attempt} attempts, the last: {reason})"
                raise ConnectionError(f"{failed}. {remedy}") from cause

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _server_message(self, response: requests.Response) -> str:
        try:
            text = loads(response.content)
        except ValueError:
            text = response.text
        # {"error": {"message": …}}, {"message": …}, {"error": …} or {"detail": …}, by version and kind of error
        while isinstance(text, dict):
            text = next((text[key] for key in ("error", "message", "detail") if text.get(key)), None)
        text = " ".join(str(text or response.reason).split())
        # It may repeat the key it refuses, and the whole request
        return (text.replace(self._key, "***") if self._key else text)[:300]


def _complete_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.username or parts.password:
        raise ValueError(f"The server's URL holds a name or password: leave them out and set `{_API_KEY}` instead.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"'{base_url}' is no URL of a server: give one such as http://localhost:8000/v1.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def _refusal_remedy(response: requests.Response, refused: str) -> str:
    if response.status_code in (401, 403):
        return f"Set the environment variable `{_API_KEY}` to the key the server was started with."
    return _NO_SERVER if response.status_code in (404, 405) else refused


def _innermost(error: BaseException) -> str:
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    return str(error) or type(error).__name__
