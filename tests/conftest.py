"""Session fixtures: a tiny base/instruct pair made from a configuration, with a real tokenizer and chat template."""

import json
import os
import tempfile
import threading
import time
from typing import TYPE_CHECKING


# Set before any Hugging Face library is imported: no test talks to the Hub or fills the user's cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="gift_trl_tests_"))
if _worker := os.environ.get("PYTEST_XDIST_WORKER"):  # each process of the tests has its own
    os.environ["HF_HOME"] = os.path.join(os.environ["HF_HOME"], _worker)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Threads cost more than they give on matrices this small, and very much more on a machine that is busy
os.environ["OMP_NUM_THREADS"] = "1"
# A compiler of DeepSpeed's extensions takes 1.5 GB
os.environ.setdefault("MAX_JOBS", "1")

import pytest
import yaml
from tqdm import tqdm


# tqdm's own lock is shared by all forks, and a test that kills one while it draws would leave it locked for ever
tqdm.set_lock(threading.RLock())

# Imported where they are used: the process that hands the tests out to the others needs half a gigabyte less
if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
QUESTIONS = [
    ("What is two plus two?", "Two plus two is four."),
    ("Name a colour.", "Blue."),
    ("Count to five, please.", "One, two, three, four, five."),
    ("Say hello to the whole wide world in a long sentence.", "Hello, you whole wide world, and good morning to all!"),
    ("Is water wet?", "Yes."),
    ("What follows ten?", "Eleven follows ten."),
    ("Spell cat.", "C, a, t."),
    ("Which is bigger, one or nine?", "Nine is bigger than one."),
]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Names what takes long while the tests run: a run that is cut off shows where its time went."""
    if report.duration > 30 and not _worker:
        print(f"\n[{time.strftime('%H:%M:%S')}] {report.nodeid}: {report.when} took {report.duration:.0f} s")


@pytest.fixture(autouse=True)
def own_annotation_cache(tmp_path, monkeypatch):
    """What one test has scored, no other finds."""
    monkeypatch.setattr("gift_trl.annotation.cache.HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE of 384 tokens with a ChatML-like template; its end-of-turn token is no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for pair in QUESTIONS for text in pair], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def make_llama(seed: int, vocab_size: int = 384, **overrides) -> "LlamaForCausalLM":
    """A Llama of two layers with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


def fit(model: "LlamaForCausalLM", rows: list[list[int]], steps: int) -> None:
    """Trains a model on whole rows, so that its probabilities are neither uniform nor all alike."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(torch.arange(width) >= torch.tensor([[len(row)] for row in rows]), -100)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """Folders of a base model and of the instruct model post-trained from it."""
    folder = tmp_path_factory.mktemp("pair")
    model = make_llama(0)
    fit(model, [tokenizer(" ".join(pair)).input_ids for pair in QUESTIONS], 40)
    model.save_pretrained(folder / "base")
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in QUESTIONS[::2]
    ]
    fit(model, [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats], 60)
    model.save_pretrained(folder / "instruct")
    for name in ("base", "instruct"):
        tokenizer.save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "instruct")


@pytest.fixture(scope="session")
def conversations() -> "Dataset":
    """Conversational prompt-completion rows of different lengths."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for question, answer in QUESTIONS
        ]
    )


@pytest.fixture
def recipe(tmp_path, pair, conversations):
    """Writes a recipe for the tiny pair; `None` removes a key."""
    data = tmp_path / "data.jsonl"
    rows = [
        {"question": row["prompt"][0]["content"], "answer": row["completion"][0]["content"]} for row in conversations
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**overrides) -> str:
        settings = {
            "model_name_or_path": pair[0],
            "instruct_model_name_or_path": pair[1],
            "dataset_name": str(data),
            "prompt_column": "question",
            "completion_column": "answer",
            "prompt_suffix": " Be brief.",
            "system_prompt": "You are a helpful assistant.",
            "use_peft": True,
            "lora_r": 4,
            "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
            "lora_dropout": 0.0,
            "output_dir": str(tmp_path / "adapter"),
            "merge_output_dir": str(tmp_path / "merged"),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
        settings.update(overrides)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """Writes a checkpoint like the base model's, with other settings and no training."""

    def make(folder, **overrides):
        make_llama(0, **overrides).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def relative_difference():
    """Relative L2 distance of two sets of tensors, in float64."""
    import torch

    def measure(found: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]") -> float:
        assert found.keys() == expected.keys()
        a = torch.cat([found[name].double().flatten() for name in expected])
        b = torch.cat([expected[name].double().flatten() for name in expected])
        return ((a - b).norm() / b.norm()).item()

    return measure
