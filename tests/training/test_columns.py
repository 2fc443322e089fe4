"""The way of the `confidences` column from the dataset to the batch: every confidence stays with its token."""

import itertools

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, concatenate_datasets
from datasets.distributed import split_dataset_by_node

from gift_trl import GIFTSFTTrainer, annotate_dataset


LENGTHS = (9, 4, 17, 3, 8, 12, 6, 5)
PACKINGS = [{"packing": True, "max_length": 8, "packing_strategy": name} for name in ("bfd", "bfd_split", "wrapped")]


def confidence_of(ids: torch.Tensor) -> torch.Tensor:
    """No two tokens of the data have the same id, so that a confidence tells its token, its row and its place."""
    return torch.where(ids == 0, 0.0, ids / 128)


@pytest.fixture
def rows() -> Dataset:
    ends = np.cumsum(LENGTHS) + 3
    ids = [list(range(end - length, end)) for end, length in zip(ends, LENGTHS, strict=True)]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            # The second token of every row is no target
            "labels": [[row[0], -100, *row[2:]] for row in ids],
            "confidences": [confidence_of(torch.tensor(row)).tolist() for row in ids],
            "source": ["web"] * len(ids),
        }
    )


@pytest.fixture
def construct(pair, config):
    def make(dataset, settings=None, **kwargs) -> GIFTSFTTrainer:
        args = config(
            **{
                "instruct_model_name_or_path": None,
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 3,
                **(settings or {}),
            }
        )
        return GIFTSFTTrainer(pair[0], args, train_dataset=dataset, **kwargs)

    return make


def assert_aligned(loaders) -> list[int]:
    """Checks every token of every batch, and returns the tokens in their order."""
    tokens = []
    for batch in itertools.chain.from_iterable(loaders):
        assert batch["confidences"].shape == batch["input_ids"].shape == batch["labels"].shape
        torch.testing.assert_close(batch["confidences"], confidence_of(batch["input_ids"]))
        tokens += batch["input_ids"][batch["input_ids"] != 0].tolist()
    return tokens


def all_tokens(dataset) -> list[int]:
    return sorted(token for row in dataset for token in row["input_ids"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pad_to_multiple_of": 8},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
        *PACKINGS,
        *({**packing, "pad_to_multiple_of": 8, "shuffle_dataset": True} for packing in PACKINGS),
        {"packing": True, "packing_strategy": "wrapped", "max_length": 8, "padding_free": True},
        {"max_length": 6},
        {"max_length": 6, "pad_to_multiple_of": 4, "shuffle_dataset": True},
        {"remove_unused_columns": False},
        {"dataloader_num_workers": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"packing": True, "max_length": 8, "eval_packing": False},
        {"packing": False, "max_length": 8, "eval_packing": True},
    ],
)
def test_batches(rows, construct, settings):
    trainer = construct(rows, settings, eval_dataset={"one": rows})
    prepared = trainer.train_dataset
    assert sorted(assert_aligned([trainer.get_train_dataloader()])) == all_tokens(prepared)
    prepared = trainer.eval_dataset["one"]
    for loader in (trainer.get_eval_dataloader("one"), trainer.get_test_dataloader(prepared)):
        assert sorted(assert_aligned([loader])) == all_tokens(prepared)


@pytest.mark.parametrize("settings", [{}, {"max_length": 6}, {"padding_free": True, "max_length": None}, *PACKINGS])
def test_streamed_batches(rows, construct, settings):
    # Through two files and a buffer that shuffles, as a stream from the Hub comes
    stream = rows.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=3)
    stored = construct(rows, settings)
    streamed = construct(stream, {**settings, "max_steps": 4})
    tokens = assert_aligned([streamed.get_train_dataloader()])
    if not settings.get("packing"):
        assert sorted(tokens) == all_tokens(stored.train_dataset)
        assert tokens != sorted(tokens)
    else:
        # What packing cuts off depends on the order
        assert set(tokens) <= set(all_tokens(rows))


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("mode", "kept"), [("keep_start", slice(0, 6)), ("keep_end", slice(-6, None))])
def test_rows_that_truncation_leaves_without_target(rows, construct, mode, kept, streamed):
    # Those rows are left out, and the confidences of other rows must not take the place of theirs
    def mask(row, index):
        labels = row["labels"]
        if index % 3 == 2:
            labels[kept] = [-100] * len(labels[kept])
        return {"labels": labels}

    data = rows.map(mask, with_indices=True)
    settings = {"max_length": 6, "truncation_mode": mode, "max_steps": 4}
    trainer = construct(data.to_iterable_dataset() if streamed else data, settings)
    expected = [token for i, row in enumerate(rows) if i % 3 != 2 for token in row["input_ids"][kept]]
    assert sorted(assert_aligned([trainer.get_train_dataloader()])) == expected


def test_shuffling_follows_the_seed(rows, construct):
    def order(**settings):
        return [row["input_ids"][0] for row in construct(rows, {"shuffle_dataset": True, **settings}).train_dataset]

    assert order(seed=1) == order(seed=1) != order(seed=2)
    shuffled = construct(rows, {"shuffle_dataset": True, **PACKINGS[1]}).train_dataset
    assert shuffled["input_ids"][:] != construct(rows, PACKINGS[1]).train_dataset["input_ids"][:]


@pytest.mark.parametrize("settings", [{}, *PACKINGS])
@pytest.mark.parametrize("streamed", [False, True])
def test_processes_share_the_batches(rows, construct, settings, streamed):
    data = rows.to_iterable_dataset(num_shards=2) if streamed else rows
    trainer = construct(data, {**settings, "max_steps": 4})
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator)
    loader = torch.utils.data.DataLoader(trainer.train_dataset, batch_size=2, collate_fn=collator)
    # What accelerate gives to each of two processes
    shares = [
        assert_aligned(
            [prepare_data_loader(loader, num_processes=2, process_index=i, put_on_device=False, even_batches=False)]
        )
        for i in range(2)
    ]
    assert all(shares)
    # The end of a stream is filled up with rows of its beginning, for every process to have as many
    together = set(shares[0] + shares[1]) if streamed else shares[0] + shares[1]
    assert sorted(together) == all_tokens(trainer.train_dataset)


@pytest.mark.parametrize("settings", [{}, *PACKINGS])
def test_shards_are_parts(rows, construct, settings):
    for cut in (lambda i: rows.shard(3, i), lambda i: split_dataset_by_node(rows.to_iterable_dataset(3), i, 3)):
        tokens = []
        for i in range(3):
            trainer = construct(cut(i), {**settings, "max_steps": 4})
            tokens += assert_aligned([trainer.get_train_dataloader()])
        kept = 8 if settings.get("packing_strategy") == "bfd" else None  # the one strategy that cuts tokens off
        assert sorted(tokens) == sorted(token for row in rows for token in row["input_ids"][:kept])


def test_datasets_may_be_joined_and_chosen_from(rows, construct):
    joined = concatenate_datasets([rows.select([7, 2, 2]), rows.filter(lambda row: len(row["input_ids"]) < 9)])
    trainer = construct(joined, {"packing": True, "max_length": 20})
    assert sorted(assert_aligned([trainer.get_train_dataloader()])) == all_tokens(joined)


@pytest.fixture
def long_rows(conversations) -> Dataset:
    """Two conversations of several turns."""
    turns = [turn for row in conversations for turn in row["prompt"] + row["completion"]]
    return Dataset.from_dict({"messages": [turns[:6], turns[6:]]})


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_what_packing_cuts_is_scored_in_full_context(pair, config, construct, long_rows, strategy):
    args = config(max_length=None)
    whole = annotate_dataset(long_rows, pair[1], args=args).to_list()
    if strategy == "wrapped":
        whole = [{name: whole[0][name] + whole[1][name] for name in ("input_ids", "confidences")}]
    expected = [
        (row["input_ids"][i : i + 24], row["confidences"][i : i + 24])
        for row in whole
        for i in range(0, 24 if strategy == "bfd" else len(row["input_ids"]), 24)
    ]
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 24}
    packed = construct(long_rows, {"instruct_model_name_or_path": pair[1], **settings}).train_dataset
    found = []
    for row in packed:
        ends = np.cumsum(row.get("seq_lengths", [len(row["input_ids"])]))
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            found.append((row["input_ids"][start:end], row["confidences"][start:end]))
    assert sorted(found) == sorted(expected)
    if strategy != "bfd":
        # Scored by itself, a piece has other confidences
        ids, confidences = expected[1]
        (alone,) = annotate_dataset(Dataset.from_dict({"input_ids": [ids]}), pair[1], args=args)["confidences"]
        assert np.abs(np.subtract(alone, confidences)[1:]).max() > 0.01
