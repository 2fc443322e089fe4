"""
The lab's base and instruct model: pretrained and post-trained on the spot, and saved as checkpoints like any others.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import huggingface_hub
import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gift_trl.checkpoints import write_folder
from gift_trl.lab.corpora import Document, check_seed, corpus_rng, make_base_document, make_instruct_document
from gift_trl.lab.problems import BOT_TOKEN, EOS_TOKEN, PAD_TOKEN, USER_TOKEN, VOCABULARY
from gift_trl.lab.progress import progress_display


# Raised whenever the code below, or the corpora, would make another pair from the same settings.
PAIR_VERSION = 1

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    f"{{{{ '{USER_TOKEN} ' + message['content'] + ' {BOT_TOKEN} ' }}}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- generation -%}"
    f"{{{{ message['content'] + ' {EOS_TOKEN}' }}}}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{{ raise_exception('The lab models know the roles user and assistant only, got: ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class PairSettings:
    """
    Everything that decides which pair a seed gives.

    Parameters:
        hidden_size (`int`, *optional*, defaults to `128`):
            Hidden size of the models. The MLP is three times as wide.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of attention heads.
        batch_size (`int`, *optional*, defaults to `32`):
            Documents per step, in both trainings.
        base_steps (`int`, *optional*, defaults to `1300`):
            Pretraining steps of the base model.
        base_learning_rate (`float`, *optional*, defaults to `3e-3`):
            Learning rate of the pretraining, for Muon on the matrices as for AdamW on the embeddings and norms.
        instruct_steps (`int`, *optional*, defaults to `200`):
            Post-training steps of the instruct model.
        instruct_learning_rate (`float`, *optional*, defaults to `2e-4`):
            Learning rate of the post-training. The instruct model has to stay near the base model: an adapter only
            carries over between models that are close.
        num_threads (`int`, *optional*, defaults to `1`):
            CPU threads while training. Part of the settings because it may change the order of floating-point sums. On
            matrices this small a second thread gains little, and on a busy machine two wait for each other.
    """

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    batch_size: int = 32
    base_steps: int = 1300
    base_learning_rate: float = 3e-3
    instruct_steps: int = 200
    instruct_learning_rate: float = 2e-4
    num_threads: int = 1

    def fingerprint(self) -> str:
        """Returns a short hash of all that changes the models besides the seed."""
        described = {**asdict(self), "version": PAIR_VERSION, "torch": torch.__version__}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """
    Builds the word-level tokenizer of the lab, with its chat template.

    A word it does not know is an error rather than an unknown token: all texts of the lab are made of its vocabulary.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: The tokenizer.
    """
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[USER_TOKEN, BOT_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="left",
    )


def make_pair(
    seed: int,
    cache_dir: str | os.PathLike | None = None,
    *,
    settings: PairSettings | None = None,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """
    Pretrains the lab's base model, post-trains its instruct model, and saves both as checkpoints.

    A pair that was made before with the same seed and settings is found again in the cache, and nothing is trained.

    Args:
        seed (`int`):
            Seed of the weights and of the corpora.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder of the cache. Defaults to `gift_trl/lab` in the Hugging Face home.
        settings ([`PairSettings`], *optional*):
            Size and training of the models.
        progress ([`~rich.progress.Progress`], *optional*):
            Display to report to. Defaults to one of its own.

    Returns:
        `tuple[pathlib.Path, pathlib.Path]`: The folders of the base and of the instruct model.
    """
    check_seed(seed)
    settings = settings or PairSettings()
    if cache_dir is None:
        cache_dir = os.path.join(huggingface_hub.constants.HF_HOME, "gift_trl", "lab")
    folder = Path(cache_dir) / f"seed{seed}-{settings.fingerprint()}"
    base_folder, instruct_folder = folder / "base", folder / "instruct"
    # Folders appear whole or not at all, so one that exists is complete.
    if not instruct_folder.is_dir() or not base_folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer()
        with progress_display(progress) as display, _num_threads(settings.num_threads):
            if not base_folder.is_dir():
                _save(_pretrain(seed, settings, tokenizer, display), tokenizer, base_folder)
            base_model = LlamaForCausalLM.from_pretrained(base_folder)
            _save(_post_train(base_model, seed, settings, tokenizer, display), tokenizer, instruct_folder)
    return base_folder, instruct_folder


def _pretrain(
    seed: int, settings: PairSettings, tokenizer: PreTrainedTokenizerBase, display: Progress
) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.hidden_size,
                intermediate_size=3 * settings.hidden_size,
                num_hidden_layers=settings.num_layers,
                num_attention_heads=settings.num_heads,
                num_key_value_heads=settings.num_heads,
                max_position_embeddings=tokenizer.model_max_length,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed_tokens" not in name else others).append(parameter)
    # Muon learns this task several times faster than AdamW alone, which is what makes minutes on a CPU enough.
    rate = settings.base_learning_rate
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, fused=True),
    ]
    batches = _batches(corpus_rng("base", seed), make_base_document, tokenizer, settings.batch_size)
    _train(model, optimizers, batches, settings.base_steps, display, "Pretraining the base model")
    return model


def _post_train(
    model: LlamaForCausalLM, seed: int, settings: PairSettings, tokenizer: PreTrainedTokenizerBase, display: Progress
) -> LlamaForCausalLM:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.instruct_learning_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True
    )
    batches = _batches(corpus_rng("instruct", seed), make_instruct_document, tokenizer, settings.batch_size)
    _train(model, [optimizer], batches, settings.instruct_steps, display, "Post-training the instruct model")
    return model


def _encode(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """For each document, the ids that are given and the ids that are scored."""
    texts = []
    for document in documents:
        if document.is_chat:
            message = {"role": "user", "content": document.prompt}
            texts.append(tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
        else:
            # A text without a prompt starts as in a stream of documents, after the end of another.
            texts.append(document.prompt or EOS_TOKEN)
        texts.append(f"{document.text} {EOS_TOKEN}")
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return list(zip(ids[::2], ids[1::2], strict=True))


def _batches(
    rng: Random,
    make_document: Callable[[Random], Document],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of ids and labels. Documents are sorted by length, 32 batches at a time, to save padding."""
    while True:
        pool = _encode([make_document(rng) for _ in range(32 * batch_size)], tokenizer)
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        batches = [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        for batch in reversed(batches):
            length = max(len(prompt_ids) + len(text_ids) for prompt_ids, text_ids in batch)
            input_ids = torch.full((batch_size, length), tokenizer.pad_token_id)
            labels = torch.full((batch_size, length), -100)
            for row, (prompt_ids, text_ids) in enumerate(batch):
                end = len(prompt_ids) + len(text_ids)
                input_ids[row, :end] = torch.tensor(prompt_ids + text_ids)
                labels[row, len(prompt_ids) : end] = torch.tensor(text_ids)
            yield input_ids, labels


def _train(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    num_steps: int,
    display: Progress,
    description: str,
) -> None:
    warmup = max(1.0, 0.05 * num_steps)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, max(0.05, (num_steps - step) / (0.95 * num_steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    task = display.add_task(description, total=num_steps)
    for _ in range(num_steps):
        input_ids, labels = next(batches)
        # Right padding needs no mask under causal attention, and only scored positions go through the head.
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        scored = targets != -100
        F.cross_entropy(model.lm_head(hidden[scored]), targets[scored]).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(norm):
            raise FloatingPointError(f"{description} diverged: lower the learning rate in `PairSettings`.")
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        display.advance(task)
    model.eval()


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with write_folder(folder, overwrite=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def _num_threads(num_threads: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
