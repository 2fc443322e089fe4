"""The annotation of datasets with one model: tokens, checks, cache, scoring, provenance."""

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object, release_memory
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from gift_trl.annotation.cache import AnnotationCache, fingerprint
from gift_trl.annotation.checks import (
    ORIGINAL_INDEX,
    check_dataset,
    check_lengths,
    check_server,
    check_token_ids,
    check_tokenizer,
    warn_of_empty_answers,
)
from gift_trl.annotation.engine import find_scored_rows, keep_random_state, score_rows, share_files, together
from gift_trl.annotation.imports import attach_scores
from gift_trl.annotation.loading import check_scoring_model, load_scoring_model
from gift_trl.annotation.provenance import (
    Provenance,
    add_provenance,
    hash_chat_template,
    hash_vocabulary,
    identify_code,
    identify_commit,
    identify_weights,
    library_versions,
    model_name,
)
from gift_trl.annotation.rows import Row, RowStatistics, measure_rows, read_rows
from gift_trl.annotation.scoring import default_tokens_per_batch, describe_quantization, scorer_of
from gift_trl.annotation.server import ServerScorer
from gift_trl.annotation.tokenization import (
    SortedRows,
    completions_only,
    prepare_processing_class,
    sort_out_rows,
    tokenize_dataset,
    written_eos_token,
)
from gift_trl.model_pair import end_of_turn_token_ids, load_tokenizer


logger = get_logger(__name__)

ENGINES = ("transformers", "vllm")
# Raised when the same tokens and weights would come out differently: what older versions have cached is not used
_CACHE_VERSION = 1
# Rows a server is asked for at a time; it makes its own batches
_SERVER_TOKENS = 4096


class Annotator:
    """
    Annotates several datasets with one model, which is loaded when the first of them is not in the cache, and freed at
    the end of the `with` statement.

    Args:
        instruct_model, processing_class, args, revision, model_init_kwargs, formatting_func, engine, base_url, \
served_model_name, concurrency, tokens_per_batch, cache_dir:
            As for [`annotate_dataset`].
    """

    def __init__(
        self,
        instruct_model: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        args: SFTConfig | None = None,
        revision: str | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        engine: str = "transformers",
        base_url: str | None = None,
        served_model_name: str | None = None,
        concurrency: int = 16,
        tokens_per_batch: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        if args is None:
            args = _default_arguments()
        self._args = args
        self._formatting_func = formatting_func
        self._model: Any = instruct_model
        self._load_kwargs = dict(model_init_kwargs or {})
        revision = self._load_kwargs.setdefault("revision", revision)
        self._config_kwargs = {
            "revision": revision,
            "trust_remote_code": self._load_kwargs.get("trust_remote_code", False),
        }
        self._tokens_per_batch = tokens_per_batch
        self._cache_dir = cache_dir
        self._engine = engine
        self._server = _connect(engine, base_url, served_model_name, concurrency, instruct_model)
        self._config = check_scoring_model(instruct_model, **self._config_kwargs)
        self._own_tokenizer = processing_class is None
        if processing_class is None:
            processing_class = load_tokenizer(instruct_model, **self._config_kwargs)
        self.processing_class = prepare_processing_class(processing_class, self._args)
        self._commit = identify_commit(instruct_model, revision)
        self._weights: str | None = None
        self._identity = self._identify()
        self._end_of_turn_token_ids = end_of_turn_token_ids(
            self.processing_class, instruct_model, **self._config_kwargs
        )
        self._loaded: Any = None  # the model, and what runs its forward pass if not the model itself

    def _identify(self) -> list[str | None] | None:
        """What identifies the model: its commit, or the content of its folder; nothing does a loaded one."""
        if not isinstance(self._model, str):
            return None
        if self._commit is not None:
            return [self._model, self._commit]
        code = identify_code(self._model)
        if self._server is not None:
            # The weights may be on the server's machine only
            return [model_name(self._model), code]
        # Also finds a checkpoint without safetensors, before anything is scored
        self._weights = identify_weights(self._model)
        return [self._weights, code]

    def __enter__(self) -> "Annotator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        if self._loaded is not None and isinstance(self._model, str):
            if self._loaded[1] is not None:
                self._loaded[1].destroy()
            self._loaded = None
            release_memory()

    def annotate(self, dataset: Dataset, *, packing: bool | None = None, dataset_name: str = "train") -> Dataset:
        """
        Annotates a dataset.

        Args:
            dataset, packing, dataset_name:
                As for [`annotate_dataset`].

        Returns:
            [`~datasets.Dataset`]: As [`annotate_dataset`].
        """
        tokenized = self._tokenize(dataset, dataset_name)
        rows, whole = self._sort_out(tokenized, packing, dataset_name)
        max_length = self._max_length(packing)
        positions = getattr(self._config, "max_position_embeddings", None)
        check_lengths(rows, positions, cut_later=max_length is None and self._args.max_length is not None)
        confidences, record = self._confidences(rows, max_length, dataset_name)
        annotated = concatenate_datasets([rows.rows, confidences], axis=1)
        return self._describe(
            annotated, rows, whole, max_length, {**record, **self._describe_tokens(dataset)}, dataset_name
        )

    def import_scores(self, dataset: Dataset, *, packing: bool | None = None, dataset_name: str = "train") -> Dataset:
        """
        Annotates a dataset with the scores in its column `scores`; no model is loaded.

        Args:
            dataset ([`~datasets.Dataset`]):
                Dataset with a column `scores`, see [`~gift_trl.annotation.imports.attach_scores`].
            packing, dataset_name:
                As for [`annotate_dataset`].

        Returns:
            [`~datasets.Dataset`]: As [`annotate_dataset`].
        """
        tokenized = attach_scores(self._tokenize(dataset, dataset_name), self._end_of_turn_token_ids, dataset_name)
        rows, whole = self._sort_out(tokenized, packing, dataset_name)
        # Nothing tells which weights the scores were made with
        record = {
            **{"model": model_name(self._model), "commit": None, "weights": None, "dtype": "unknown"},
            **{"engine": "imported", "versions": library_versions()},
            **self._describe_tokens(dataset),
        }
        return self._describe(rows.rows, rows, whole, self._max_length(packing), record, dataset_name)

    def _tokenize(self, dataset: Dataset, dataset_name: str) -> Dataset:
        check_dataset(dataset, dataset_name)
        return tokenize_dataset(
            dataset,
            self.processing_class,
            self._args,
            formatting_func=self._formatting_func,
            dataset_name=dataset_name,
        )

    def _max_length(self, packing: bool | None) -> int | None:
        packing = self._args.packing if packing is None else packing
        return None if packing else self._args.max_length

    def _sort_out(self, tokenized: Dataset, packing: bool | None, dataset_name: str) -> tuple[SortedRows, int]:
        whole = measure_rows(tokenized)
        check_token_ids(whole, self._config.vocab_size, self.processing_class)
        rows = sort_out_rows(tokenized, whole, self._args, truncate=self._max_length(packing) is not None)
        if len(rows.rows) == 0:
            raise ValueError(
                f"No row of the {dataset_name} dataset has a token to learn from ({rows.reasons()}). Raise "
                "`max_length`, or check that the completions are not empty and the masks not all zero."
            )
        warn_of_empty_answers(rows.rows, self._end_of_turn_token_ids, self.processing_class, dataset_name, rows.names)
        return rows, len(tokenized)

    def _describe_tokens(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "assistant_only_loss": self._args.assistant_only_loss,
            "completion_only_loss": completions_only(dataset, self._args),
            "truncation_mode": self._args.truncation_mode,
            "eos_token": written_eos_token(dataset, self.processing_class),
        }

    def _describe(
        self,
        annotated: Dataset,
        rows: SortedRows,
        whole: int,
        max_length: int | None,
        record: dict[str, Any],
        dataset_name: str,
    ) -> Dataset:
        if ORIGINAL_INDEX not in annotated.column_names:
            annotated = annotated.add_column(ORIGINAL_INDEX, rows.names)
        if rows.dropped:
            logger.warning(
                f"{whole - len(annotated)} of {whole} rows of the {dataset_name} dataset were left out: "
                f"{rows.reasons()}. The provenance lists them."
            )
        provenance = Provenance(
            vocabulary=hash_vocabulary(self.processing_class),
            chat_template=hash_chat_template(self.processing_class.chat_template),
            max_length=max_length,
            end_of_turn_token_ids=self._end_of_turn_token_ids,
            rows=len(annotated),
            truncated=rows.truncated,
            dropped=rows.dropped,
            **record,
        )
        return add_provenance(annotated, provenance)

    def _confidences(
        self, rows: SortedRows, max_length: int | None, dataset_name: str
    ) -> tuple[Dataset, dict[str, Any]]:
        statistics = rows.statistics
        digests = _gather(statistics.digest)
        if len(set(digests)) > 1:
            raise ValueError(
                f"The processes hold different rows of the {dataset_name} dataset, and each would score a part of "
                "another one. Give every process the same data: the same files, and no shuffling without a seed."
            )
        cache = together(lambda: AnnotationCache(self._fingerprint(statistics, max_length), self._cache_dir))
        if not any(_gather(cache.is_complete)):
            arrow = rows.rows.select_columns(["input_ids", "labels"]).with_format("arrow")
            with keep_random_state():
                record = self._score(arrow, rows.names, statistics, cache, dataset_name)
            share_files(cache, with_main_only=True)
            is_main = PartialState().is_main_process
            together(lambda: is_main and not cache.is_complete and cache.assemble(arrow, statistics, record))
        share_files(cache)
        return together(cache.load)

    def _fingerprint(self, statistics: RowStatistics, max_length: int | None) -> str | None:
        if not isinstance(self._model, str):
            return None
        # Where the model lies, and who may read it or run its code, does not change what it says
        kwargs = {
            name: str(value)
            for name, value in self._load_kwargs.items()
            if value is not None and name not in ("revision", "device_map", "token", "trust_remote_code")
        }
        return fingerprint(
            {
                "version": _CACHE_VERSION,
                "model": self._identity,
                "engine": self._engine,
                "kwargs": {"dtype": "auto", **kwargs},
                "tokens": statistics.digest,
                "vocabulary": hash_vocabulary(self.processing_class),
                "chat_template": hash_chat_template(self.processing_class.chat_template),
                "max_length": max_length,
                "versions": [torch.__version__, transformers.__version__],
            }
        )

    def _score(
        self, rows: Dataset, names: np.ndarray, statistics: RowStatistics, cache: AnnotationCache, dataset_name: str
    ) -> dict[str, Any]:
        scored = find_scored_rows(cache, statistics)
        plan = next((plan for plan in _gather(cache.read_plan()) if plan is not None), None)
        if scored.all() and plan is not None:  # killed after its last part
            return plan
        options: dict[str, Any] = {"scored": scored, "description": f"Scoring {dataset_name} dataset"}
        shortest = read_rows(rows, np.argsort(statistics.lengths, kind="stable")[:2].tolist(), names)
        longest = read_rows(rows, [int(statistics.lengths.argmax())], names)
        together(lambda: self._prepare_scoring(cache, statistics, scored, names, [*longest, *shortest]))
        plan = self._describe_scoring() if plan is None else plan
        if self._tokens_per_batch is not None:
            plan["tokens_per_batch"] = self._tokens_per_batch
        if PartialState().num_processes > 1:
            plan = _from_main(plan)
        together(lambda: cache.write_plan(plan))
        if self._server is not None:
            score_rows(rows, names, statistics, cache, self._server, tokens_per_batch=_SERVER_TOKENS, **options)
            return plan
        model, run = self._loaded
        with scorer_of(model, run) as scorer:
            together(lambda: scorer.check(shortest[0].input_ids))
            score_rows(
                rows,
                names,
                statistics,
                cache,
                scorer,
                tokens_per_batch=plan["tokens_per_batch"],
                sharded=run is not None,
                **options,
            )
        return plan

    def _prepare_scoring(
        self,
        cache: AnnotationCache,
        statistics: RowStatistics,
        scored: np.ndarray,
        names: np.ndarray,
        examples: list[Row],
    ) -> None:
        cache.check_space(statistics, scored)
        if not self._own_tokenizer and isinstance(self._model, str):
            check_tokenizer(self.processing_class, self._model, **self._config_kwargs)
        if self._server is not None:
            check_server(self._server, self._model, statistics, names)
            self._server.check(examples)
        elif self._loaded is None:
            self._loaded = (
                load_scoring_model(self._model, self._load_kwargs)
                if isinstance(self._model, str)
                else (self._model, None)
            )

    def _describe_scoring(self) -> dict[str, Any]:
        description = {"model": model_name(self._model), "versions": library_versions()}
        if self._server is not None:
            # Nothing tells which weights a server has loaded
            return {**description, "commit": None, "weights": None, "dtype": "unknown", "engine": "vllm"}
        model = self._loaded[0]
        weights = self._weights
        if self._commit is not None:
            weights = identify_weights(self._model, self._config_kwargs["revision"])
        return {
            **description,
            "commit": self._commit,
            "weights": weights,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": describe_quantization(model),
            "tokens_per_batch": self._tokens_per_batch or default_tokens_per_batch(model),
        }


def _default_arguments() -> SFTConfig:
    # TRL turns bf16 on by default, which fails on a machine without a GPU; scoring does not read it. Without `use_cpu`,
    # several processes on such a machine would forget each other, and a trainer that is at work would lose its state
    state = dict(AcceleratorState._shared_state)
    args = SFTConfig(bf16=False, use_cpu=PartialState().device.type == "cpu")
    AcceleratorState._shared_state.update(state)
    return args


def _from_main(value: Any) -> Any:
    values = [value]
    broadcast_object_list(values)
    return values[0]


def _gather(value: Any) -> list[Any]:
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def _connect(
    engine: str,
    base_url: str | None,
    served_model_name: str | None,
    concurrency: int,
    instruct_model: str | PreTrainedModel,
) -> ServerScorer | None:
    if engine not in ENGINES:
        raise ValueError(f"`engine` is {engine!r}; choose one of {ENGINES}.")
    if engine == "transformers":
        if base_url is not None:
            raise ValueError("`base_url` is the address of a server; set `engine` to 'vllm' to score with it.")
        return None
    if base_url is None:
        raise ValueError("The engine 'vllm' needs the address of a server: set `base_url` (`http://HOST:8000/v1`).")
    if not isinstance(instruct_model, str):
        raise ValueError("The engine 'vllm' scores with the model of a server. Name the instruct model it serves.")
    return ServerScorer(base_url, model=served_model_name, concurrency=concurrency)
