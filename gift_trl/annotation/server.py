"""Probability of every target token under a model that a vLLM server holds."""

import itertools
import math
import os
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from json import loads
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
from requests.adapters import HTTPAdapter

from gift_trl.annotation.rows import Row


# Seconds before a request is repeated: doubled each time, up to the longest, unless the server asks for more
_BASE_WAIT = 1.0
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 600.0
_PASSING_STATUSES = {408, 429, 500, 502, 503, 504}
# vLLM's stand-in for minus infinity, which JSON cannot hold
_LOG_OF_ZERO = -9999.0
_ROUNDING = 1e-3
_API_KEY = "VLLM_API_KEY"


class ServerScorer:
    """
    Scores rows with a running vLLM server, through the `prompt_logprobs` of its completions.

    Token ids are sent, never text, and every answer must be about the very ids that were sent. After a passing failure
    (a busy or restarting server, a broken connection, an answer cut short) a request is repeated, with growing waits.
    No global random state is drawn from. The environment variable `VLLM_API_KEY`, if set, is sent as the bearer token.

    Args:
        base_url (`str`):
            URL of the server's API, such as `"http://localhost:8000/v1"`. `/v1` is added to a URL without a path.
        model (`str`, *optional*):
            Name of the model as served. Needed only where the server lists several.
        concurrency (`int`, *optional*, defaults to `16`):
            Number of rows the server is asked for at the same time.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for an answer before the request is repeated.
        max_retries (`int`, *optional*, defaults to `8`):
            Number of times a request is repeated before its row counts as failed.

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
    def max_length(self) -> int | None:
        """Tokens of the longest row the server takes, `None` if it does not say. Errors as [`identity`]."""
        # vLLM generates at least one token, which needs a place too
        return self._served["max_model_len"] - 1 if self._served["max_model_len"] else None

    def check(self, rows: list[Row]) -> None:
        """
        Scores the first three rows, so that a server that cannot be used is noticed before the long work.

        Args:
            rows (`list[Row]`):
                Rows to be scored, the longest first.

        Raises:
            `ConnectionError`: If the server does not answer.
            `ValueError`: If it refuses a row, scores other tokens than those sent, or gives no probabilities.
        """
        for row in rows[:3]:
            self._check_row(row)
            impossible = row.targets[self._ask(row)[row.targets - 1] <= _LOG_OF_ZERO]
            if len(impossible):
                raise ValueError(
                    f"Row {row.name}: to the served model, token {row.input_ids[impossible[0]]} at position "
                    f"{impossible[0]} is impossible. Annotate with the tokenizer of the served model."
                )

    def score(self, batches: Iterable[list[Row]], passes: int = 0) -> Iterator[tuple[Row, np.ndarray]]:
        """
        Scores rows, a bounded number of them at a time.

        Args:
            batches (`Iterable[list[Row]]`):
                Rows to score, read as the server gets on with them. How they are grouped makes no difference.
            passes (`int`, *optional*, defaults to `0`):
                Ignored: only a model sharded over processes needs the number of forward passes.

        Yields:
            `tuple[Row, np.ndarray]`: A row and its probabilities of shape `(targets,)` and dtype float32, in the order
            of completion.

        Raises:
            `ConnectionError`: If a row was not answered after all repetitions. Rows scored before have been yielded.
            `ValueError`: If a row cannot be scored; the message names it.
        """
        rows = itertools.chain.from_iterable(batches)
        pending: dict[Future, Row] = {}
        self._stopped = stopped = threading.Event()
        executor = ThreadPoolExecutor(self.concurrency, thread_name_prefix="score")
        try:
            while True:
                # More than the workers hold, so that none of them waits for this thread
                for row in itertools.islice(rows, 2 * self.concurrency - len(pending)):
                    self._check_row(row)
                    pending[executor.submit(self._ask, row, stopped)] = row
                if not pending:
                    return
                wait(pending, return_when=FIRST_COMPLETED)
                done = [future for future in pending if future.done()]
                # Failures last: what is scored is handed on first
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    row, logprobs = pending.pop(future), future.result()
                    # Rounding may put the logarithm of a certain token a last digit above 0
                    yield row, np.exp(np.minimum(logprobs[row.targets - 1], 0.0)).astype(np.float32)
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
        answer = self._request("GET", "models", failed, remedy, timeout, retries)
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not cards or not all(isinstance(c, dict) and "id" in c for c in cards):
            raise ValueError(f"{self.base_url} lists no models: give the URL of a vLLM server, which ends in `/v1`.")
        names = ", ".join(f"`{card['id']}`" for card in cards)
        if self._model is None and len(cards) > 1:
            raise ValueError(f"{self.base_url} serves several models ({names}): say which one is to score.")
        card = next((card for card in cards if self._model in (None, card["id"])), None)
        if card is None:
            raise ValueError(f"{self.base_url} does not serve `{self._model}` but {names}: name one of these.")
        # The entry of an adapter does not repeat the limit of the model under it
        limit = next((card["max_model_len"] for card in (card, *cards) if card.get("max_model_len")), None)
        return {**card, "max_model_len": limit}

    def _check_row(self, row: Row) -> None:
        length = len(row.input_ids)
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"Row {row.name} is {length} tokens long, but the server takes {self.max_length} (its `max_model_len` "
                "less the one token it generates). Set `max_length` to that or less, or start the server with "
                f"`--max-model-len {length + 1}`."
            )
        if not np.array_equal(row.target_ids, row.input_ids[row.targets]):
            raise ValueError(
                f"Row {row.name} has labels that are not its token ids, and a server scores only the ids it is sent. "
                "Make the labels equal to `input_ids`, or `-100`, or score with transformers."
            )

    def _ask(self, row: Row, stopped: threading.Event | None = None) -> np.ndarray:
        failed = f"Row {row.name} cannot be scored"
        remedy = (
            "Look at the server's log (one that runs out of memory takes a smaller `--max-num-batched-tokens`), or "
            "ask for fewer rows at a time or wait longer (`concurrency`, `timeout`). Then run again."
        )
        body = {
            "model": self._served["id"],
            "prompt": row.input_ids.tolist(),
            "max_tokens": 1,
            # Greedy, so that no default of the model's generation configuration changes the probabilities
            "temperature": 0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        }
        answer = self._request("POST", "completions", failed, remedy, self._timeout, self._max_retries, body, stopped)
        return _read_logprobs(answer, row)

    def _request(
        self,
        method: str,
        path: str,
        failed: str,
        remedy: str,
        timeout: float,
        retries: int,
        body: dict[str, Any] | None = None,
        stopped: threading.Event | None = None,
    ) -> Any:
        """Decoded JSON answer. `failed` begins the message of an error and `remedy` ends it."""
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
                    raise ValueError(f"{failed} ({reason}). {_refusal_remedy(response, path)}")
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


def _read_logprobs(answer: Any, row: Row) -> np.ndarray:
    """Logarithms of the probabilities of the tokens from position 1 on, in float64."""
    ids = row.input_ids.tolist()
    try:
        choice = answer["choices"][0]
        entries, echo = choice["prompt_logprobs"], choice.get("prompt_token_ids") or ids
    except (LookupError, TypeError, AttributeError):
        entries = None
    if not isinstance(entries, list):
        raise ValueError(
            f"Row {row.name}: the answer has no `prompt_logprobs`. Use a vLLM server, with nothing in between that "
            "drops the field, and without settings under which vLLM does not give it."
        )
    if len(entries) != len(ids) or echo != ids:
        raise _other_tokens(row, f"{len(entries)} ids for {len(ids)}" if len(entries) != len(ids) else "different ids")
    logprobs = np.empty(max(len(ids) - 1, 0))
    for position, (token, entry) in enumerate(zip(ids[1:], entries[1:], strict=True), start=1):
        scored = entry.get(str(token)) if isinstance(entry, dict) else None
        if not isinstance(scored, dict):
            raise _other_tokens(row, f"nothing about token {token} at position {position}")
        value, rank = scored.get("logprob"), scored.get("rank") or 1
        # Some JSON writers turn NaN into null
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"Row {row.name}: the log-probability of the token at position {position} is {value}. Serve the model "
                "in another dtype (such as `--dtype bfloat16`), or check the checkpoint."
            )
        # At least `rank` tokens are as probable as this one, so its probability is 1 / rank at most
        if value > _ROUNDING - math.log(rank):
            raise ValueError(
                f"Row {row.name}: {value} at position {position} (rank {rank}) is no log-probability. Start the "
                "server with `--logprobs-mode raw_logprobs`, vLLM's default."
            )
        logprobs[position - 1] = value
    return logprobs


def _other_tokens(row: Row, detail: str) -> ValueError:
    return ValueError(
        f"Row {row.name}: the server scored other tokens than it was sent ({detail}). Annotate with the tokenizer of "
        "the served model, and reach the server without anything in between that changes prompts."
    )


def _refusal_remedy(response: requests.Response, path: str) -> str:
    if response.status_code in (401, 403):
        return f"Set the environment variable `{_API_KEY}` to the key the server was started with."
    if response.status_code in (404, 405) or path == "models":
        return "Give the URL of a vLLM server, such as http://localhost:8000/v1."
    return "Annotate with the tokenizer of the served model, and with rows the server takes."


def _innermost(error: BaseException) -> str:
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    return str(error) or type(error).__name__
