"""Answers by a vLLM server, asked for with the same token ids that `generate` is given."""

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gift_trl.annotation.server_client import ServerClient
from gift_trl.evaluation.generation import Completion, Request
from gift_trl.evaluation.tasks import Sampling


class ServerEngine:
    """
    Draws answers with a server.

    Every answer has a seed of its own, and whatever the server would take from the checkpoint's generation configuration is
    sent. What a seed gives is the server's matter: vLLM draws the same for the same batch.

    Args:
        client ([`~gift_trl.annotation.server_client.ServerClient`]):
            The server.
        stop_ids (`Sequence[int]`):
            Token ids at which an answer ends.
    """

    def __init__(self, client: ServerClient, stop_ids: Sequence[int]):
        self._client = client
        self._stop_ids = list(stop_ids)

    def generate(
        self, batches: Iterable[list[Request]], sampling: Sampling
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """
        Answers requests, a bounded number of them at a time.

        Args:
            batches (`Iterable[list[Request]]`):
                Requests; how they are grouped makes no difference.
            sampling ([`Sampling`]):
                How answers are drawn.

        Yields:
            `list[tuple[Request, Completion]]`: An answer, in the order of completion.

        Raises:
            `ConnectionError`: If the server does not answer. What it answered before has been yielded.
            `ValueError`: If it refuses a request, or answers something else than was asked.
        """

        def ask(request: Request, stopped: threading.Event) -> Completion:
            return self._ask(request, sampling, stopped)

        with contextlib.closing(self._client.map(ask, itertools.chain.from_iterable(batches))) as answers:
            for answer in answers:
                yield [answer]

    def _ask(self, request: Request, sampling: Sampling, stopped: threading.Event) -> Completion:
        failed = f"Problem {request.problem} of task `{request.task}` cannot be answered"
        remedy = (
            "Look at the server's log, or ask for less at a time or wait longer (`concurrency`, `timeout`). What is answered "
            "is kept: run again to go on."
        )
        refused = "Serve the model whose tokenizer makes the prompts, with the `max_new_tokens` that the tasks need."
        body = {
            "prompt": request.prompt_ids,
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "seed": request.stream,
            "stop_token_ids": self._stop_ids,
            "return_token_ids": True,
            # Defaults that the server would take from the checkpoint
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        return self._read(self._client.complete(body, failed, remedy, refused, stopped), request, failed)

    def _read(self, answer: Any, request: Request, failed: str) -> Completion:
        try:
            choice = answer["choices"][0]
            reason, text, ids = choice["finish_reason"], choice["text"], choice.get("token_ids")
            echo = choice.get("prompt_token_ids") or request.prompt_ids
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{failed}: the server's answer is no completion. Give the URL of a vLLM server."
            ) from error
        if echo != request.prompt_ids:
            raise ValueError(
                f"{failed}: the server answered another prompt than it was sent. Reach it without anything in between that "
                "changes prompts."
            )
        if reason not in ("stop", "length"):
            raise ValueError(f"{failed}: the server ended it by itself (`finish_reason` {reason!r}). Look at its log.")
        if ids is None:
            return Completion(None, reason, text)
        # The token at which it stopped may be told apart
        if (
            reason == "stop"
            and ids[-1:] != [choice.get("stop_reason")]
            and choice.get("stop_reason") in self._stop_ids
        ):
            ids = [*ids, choice["stop_reason"]]
        return Completion(ids, reason)
