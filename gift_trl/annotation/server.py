"""Probability of every target token under a model that a vLLM server holds."""

import contextlib
import itertools
import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gift_trl.annotation.rows import Row
from gift_trl.annotation.server_client import ServerClient


# vLLM's stand-in for minus infinity, which JSON cannot hold
_LOG_OF_ZERO = -9999.0
_ROUNDING = 1e-3


class ServerScorer(ServerClient):
    """
    Scores rows with a running vLLM server, through the `prompt_logprobs` of its completions.

    Token ids are sent, never text, and every answer must be about the very ids that were sent. The arguments are those of
    [`ServerClient`].
    """

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest row the server takes, `None` if it does not say. Errors as [`identity`]."""
        # vLLM generates at least one token, which needs a place too
        return self.max_model_len - 1 if self.max_model_len else None

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
        rows = map(self._check_row, itertools.chain.from_iterable(batches))
        with contextlib.closing(self.map(self._ask, rows)) as answers:
            for row, logprobs in answers:
                # Rounding may put the logarithm of a certain token a last digit above 0
                yield row, np.exp(np.minimum(logprobs[row.targets - 1], 0.0)).astype(np.float32)

    def _check_row(self, row: Row) -> Row:
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
        return row

    def _ask(self, row: Row, stopped: threading.Event | None = None) -> np.ndarray:
        failed = f"Row {row.name} cannot be scored"
        remedy = (
            "Look at the server's log (one that runs out of memory takes a smaller `--max-num-batched-tokens`), or "
            "ask for fewer rows at a time or wait longer (`concurrency`, `timeout`). Then run again."
        )
        body = {
            "prompt": row.input_ids.tolist(),
            "max_tokens": 1,
            # Greedy, so that no default of the model's generation configuration changes the probabilities
            "temperature": 0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        }
        refused = "Annotate with the tokenizer of the served model, and with rows the server takes."
        return _read_logprobs(self.complete(body, failed, remedy, refused, stopped), row)


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
