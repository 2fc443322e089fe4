"""Answers by `generate` in batches, each drawn from a random stream of its own: the same whatever it is batched with."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gift_trl.annotation.engine import token_budget_batches
from gift_trl.evaluation.tasks import Sampling


@dataclass(frozen=True)
class Request:
    """
    An answer to be drawn.

    Args:
        task (`str`):
            Name of the task.
        problem, sample, seed (`int`):
            As in [`~gift_trl.evaluation.results.Generation`].
        prompt_ids (`list[int]`):
            Token ids of the prompt.
        max_new_tokens (`int`):
            Longest answer: that of the task, or what the prompt leaves of the model's positions.
    """

    task: str
    problem: int
    sample: int
    seed: int
    prompt_ids: list[int]
    max_new_tokens: int

    @property
    def key(self) -> tuple[int, int]:
        """Problem and sample."""
        return self.problem, self.sample

    @property
    def stream(self) -> int:
        """Seed of the answer's random stream, from 0 to 2³¹ − 1; two models draw alike."""
        name = f"{self.seed}/{self.task}/{self.problem}/{self.sample}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Completion:
    """
    An answer.

    Args:
        ids (`list[int]`):
            Token ids, with the one at which it stopped.
        finish_reason (`str`):
            `"stop"`, or `"length"` if it was cut off.
        text (`str`, *optional*):
            Text without special tokens, where a server does not tell the ids.
    """

    ids: list[int] | None
    finish_reason: str
    text: str | None = None


def plan_batches(requests: Sequence[Request], tokens_per_batch: int) -> list[list[Request]]:
    """
    Groups requests of similar length. Within a batch all may grow by as many tokens, so that none runs out of positions.

    Args:
        requests (`Sequence[Request]`):
            The requests.
        tokens_per_batch (`int`):
            Upper bound of rows × tokens of prompt and longest answer. A longer one is a batch of its own.

    Returns:
        `list[list[Request]]`: Batches, longest first, so that a memory error comes at the start. They depend on the requests
        alone.
    """
    groups: dict[int, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.max_new_tokens, []).append(request)
    batches = []
    for length, group in groups.items():
        totals = [len(request.prompt_ids) + length for request in group]
        batches += [[group[row] for row in batch] for batch in token_budget_batches(totals, tokens_per_batch)]
    return sorted(batches, key=lambda batch: -len(batch) * (len(batch[0].prompt_ids) + batch[0].max_new_tokens))


class TransformersEngine:
    """
    Draws answers with a model in this process.

    A token is drawn as the argmax of logits + Gumbel noise, after transformers' own temperature, top-k and top-p, and the
    noise of an answer is a stream seeded by seed, task, problem and sample. So an answer does not depend on what it is
    batched with, as far as the logits do not: in float32 they move by about 1e-6 with the padding, in bfloat16 by about 1e-2,
    which changes a token now and then.

    Whenever half of the answers of a batch have ended, `generate` goes on with the others alone.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        stop_ids (`Sequence[int]`):
            Token ids at which an answer ends.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int]):
        self.model = model.eval()
        self.stop_ids = list(stop_ids)
        self._drops_rows = keeps_keys_and_values_alone(model)

    def generate(
        self, batches: Iterable[list[Request]], sampling: Sampling
    ) -> Iterator[list[tuple[Request, Completion]]]:
        """
        Answers requests.

        Args:
            batches (`Iterable[list[Request]]`):
                As from [`plan_batches`].
            sampling ([`Sampling`]):
                How answers are drawn.

        Yields:
            `list[tuple[Request, Completion]]`: The answers of a batch.

        Raises:
            `ValueError`: If a single answer does not fit into memory, or the logits are not finite.
        """
        with own_generation_config(self.model):
            for batch in batches:
                yield self._generate(batch, sampling)

    def _generate(self, batch: list[Request], sampling: Sampling) -> list[tuple[Request, Completion]]:
        try:
            rows = self._run(batch, sampling)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(batch) == 1:
                raise ValueError(
                    f"There is no memory for an answer of {batch[0].max_new_tokens} tokens to a prompt of "
                    f"{len(batch[0].prompt_ids)}: lower `max_new_tokens`, use a larger or more GPUs, or a vLLM server."
                ) from error
            rows = None
        if rows is None:  # outside of the `except`, whose traceback holds the tensors
            warnings.warn(
                f"A batch of {len(batch)} answers did not fit into memory and is halved: set a smaller `tokens_per_batch`.",
                stacklevel=2,
            )
            half = len(batch) // 2
            return self._generate(batch[:half], sampling) + self._generate(batch[half:], sampling)
        return [(request, self._completion(request, ids)) for request, ids in zip(batch, rows, strict=True)]

    @torch.inference_mode()
    def _run(self, batch: list[Request], sampling: Sampling) -> list[list[int]]:
        """Token ids of the answers, padded."""
        width = max(len(request.prompt_ids) for request in batch)
        pad = self.stop_ids[0] if self.stop_ids else 0
        device, left = self.model.device, batch[0].max_new_tokens
        ids = torch.tensor([[pad] * (width - len(r.prompt_ids)) + r.prompt_ids for r in batch], device=device)
        mask = torch.tensor(
            [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch], device=device
        )
        sampler = make_sampler(batch, sampling, self.stop_ids, device)
        stops = torch.tensor(self.stop_ids, device=device)
        options: dict[str, Any] = {}
        if self._drops_rows:
            options["past_key_values"] = DynamicCache(config=self.model.config)
            options["stopping_criteria"] = StoppingCriteriaList([_HalfEnded(stops)])
        answers: list[list[int]] = [[] for _ in batch]
        rows = list(range(len(batch)))
        while rows:
            generated = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=sampler,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=left,
                    eos_token_id=self.stop_ids or None,
                    pad_token_id=pad,
                    use_cache=True,
                ),
                **options,
            )
            new = generated[:, ids.shape[1] :]
            for row, tokens in zip(rows, new.tolist(), strict=True):
                answers[row] += tokens
            left -= new.shape[1]
            going = torch.isin(new[:, -1], stops).logical_not().nonzero().flatten()
            if left == 0 or not len(going):
                break
            rows = [rows[place] for place in going.tolist()]
            options["past_key_values"].batch_select_indices(going.cpu())  # its layers may lie on several GPUs
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)[going]
            ids = generated[going]
            for step in sampler:
                if isinstance(step, _GumbelNoise):
                    step.select(going.tolist())
        return answers

    def _completion(self, request: Request, ids: list[int]) -> Completion:
        end = next((place for place, token in enumerate(ids, start=1) if token in self.stop_ids), None)
        return Completion(ids[:end], "length" if end is None else "stop")


def keeps_keys_and_values_alone(model: PreTrainedModel) -> bool:
    """
    Whether the rows of a batch can be told apart in what a model keeps of the tokens so far. It can have states of other
    kinds, and models that also read images keep positions of their own.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.

    Returns:
        `bool`: Whether it keeps nothing but keys and values.
    """
    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class _HalfEnded(StoppingCriteria):
    """Stops a batch when half of its rows have ended; `generate` fills these up with a stop id."""

    def __init__(self, stops: torch.Tensor):
        self._stops = stops

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ended = torch.isin(input_ids[:, -1], self._stops)
        return (2 * ended.sum() >= len(ended)).expand(len(ended))


@contextmanager
def own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """
    Lets `generate` apply nothing but what it is given: it would fill in the rest, such as a repetition penalty, from the
    checkpoint's generation configuration.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.

    Yields:
        Nothing; afterwards the model has its own configuration again.
    """
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def make_sampler(
    batch: list[Request], sampling: Sampling, stop_ids: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """
    The steps from logits to a token.

    Args:
        batch (`list[Request]`):
            Rows of the logits.
        sampling ([`Sampling`]):
            How answers are drawn.
        stop_ids (`Sequence[int]`):
            Token ids after which a row draws no more.
        device (`torch.device`):
            Where the logits are.

    Returns:
        [`~transformers.LogitsProcessorList`]: Processors whose argmax is the token.
    """
    if sampling.temperature == 0:
        return LogitsProcessorList([_Finite()])
    steps: list[LogitsProcessor] = [_Finite(), TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(float(sampling.top_p)))
    return LogitsProcessorList([*steps, _GumbelNoise(batch, stop_ids, device)])


class _Finite(LogitsProcessor):
    """Refuses logits of which no token can be chosen; their argmax would be some token all the same."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise ValueError(
                "The model gave NaN logits: load it in another dtype (`dtype: float32`), or check the checkpoint."
            )
        return scores


class _GumbelNoise(LogitsProcessor):
    """Adds to every row the next noise of its stream: argmax(logits + noise) is a draw from softmax(logits)."""

    def __init__(self, batch: list[Request], stop_ids: Sequence[int], device: torch.device):
        self._streams: list[torch.Generator | None] = [
            torch.Generator(device).manual_seed(request.stream) for request in batch
        ]
        self._stop_ids = set(stop_ids)
        self._started = False

    def select(self, rows: list[int]) -> None:
        """Goes on with these rows alone."""
        self._streams = [self._streams[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._started:
            last = input_ids[:, -1].tolist()
            self._streams = [
                None if token in self._stop_ids else stream for token, stream in zip(last, self._streams, strict=True)
            ]
        self._started = True
        # In float64, since 2⁻²⁴ is no small chance among 150,000 tokens
        noise = torch.full(scores.shape, 0.5, dtype=torch.float64, device=scores.device)
        for row, stream in zip(noise, self._streams, strict=True):
            if stream is not None:
                row.uniform_(generator=stream)
        return scores - noise.log_().neg_().log_().to(scores.dtype)
