"""
A small base and instruct model for any text: byte-level BPE trained on it, random weights, ChatML.

The pair knows nothing. It is there to run a recipe's stages on real data where no real model is at hand.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gift_trl.checkpoints import write_folder


PAD_TOKEN, START_TOKEN, END_TOKEN = "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, END_TOKEN)
# What a pair was made with; a folder that holds it may be replaced by another pair
PAIR_FILE = "pair.json"
# A byte-level vocabulary holds every byte, the special tokens and at least one merge.
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + 1

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    f"{{{{- '{START_TOKEN}' + message['role'] + '\\n' -}}}}"
    "{%- if message['role'] == 'assistant' -%}"
    f"{{%- generation -%}}{{{{- message['content'] + '{END_TOKEN}' -}}}}{{%- endgeneration -%}}"
    f"{{%- else -%}}{{{{- message['content'] + '{END_TOKEN}' -}}}}{{%- endif -%}}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{START_TOKEN}assistant\\n' -}}}}{{%- endif -%}}"
)


def train_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer, and gives it a ChatML template and an end-of-turn token.

    Args:
        texts (`Sequence[str]`):
            Texts to train on.
        vocab_size (`int`):
            Largest size of the vocabulary. Few texts give fewer tokens.
        max_length (`int`):
            Longest input of the model.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: The tokenizer.
    """
    backend = Tokenizer(models.BPE())
    # Each line break is a token of its own, so that none merges with an answer's first across the template's border.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[START_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="left",
    )


def make_text_pair(
    texts: Sequence[str],
    output_dir: str | os.PathLike,
    *,
    vocab_size: int = 4096,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 4096,
    distance: float = 0.03,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """
    Makes a small base and instruct model for a text and saves both as checkpoints.

    Args:
        texts (`Sequence[str]`):
            Texts the tokenizer is trained on.
        output_dir (`str` or `os.PathLike`):
            Folder for the folders `base` and `instruct`.
        vocab_size (`int`, *optional*, defaults to `4096`):
            Largest size of the vocabulary.
        hidden_size (`int`, *optional*, defaults to `128`):
            Hidden size. The MLP is three times as wide.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of layers.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of attention heads.
        max_length (`int`, *optional*, defaults to `4096`):
            Longest input of the models.
        distance (`float`, *optional*, defaults to `0.03`):
            Distance of the instruct model's weights from the base model's, relative to their norm.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an `output_dir` that holds another such pair.

    Returns:
        `tuple[pathlib.Path, pathlib.Path]`: The folders of the base and of the instruct model.
    """
    if not any(text.strip() for text in texts):
        raise ValueError("There is no text to train a tokenizer on: pass at least one that is not empty.")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but the bytes and special tokens alone need {MIN_VOCAB_SIZE}: choose at "
            "least that."
        )
    if hidden_size < 1 or num_heads < 1 or hidden_size % (2 * num_heads):
        raise ValueError(
            f"`hidden_size` is {hidden_size}, and heads of an even size are needed: choose a multiple of twice "
            f"`num_heads`, which is {num_heads}."
        )
    with write_folder(output_dir, overwrite=overwrite, marks=(PAIR_FILE,)) as folder:
        tokenizer = train_tokenizer(texts, vocab_size, max_length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=hidden_size,
                    intermediate_size=3 * hidden_size,
                    num_hidden_layers=num_layers,
                    num_attention_heads=num_heads,
                    num_key_value_heads=num_heads,
                    max_position_embeddings=max_length,
                    tie_word_embeddings=True,
                    # Thrice the usual, or tied embeddings would predict every token alike however they are trained on.
                    initializer_range=0.06,
                    bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            for name in ("base", "instruct"):
                if name == "instruct":
                    _step(model, distance)
                model.save_pretrained(folder / name)
                tokenizer.save_pretrained(folder / name)
        facts = {"vocab_size": len(tokenizer), "distance": distance, "seed": seed}
        (folder / PAIR_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    output_dir = Path(output_dir)
    return output_dir / "base", output_dir / "instruct"


@torch.no_grad()
def _step(model: LlamaForCausalLM, distance: float) -> None:
    for parameter in model.parameters():
        direction = torch.randn_like(parameter)
        parameter.add_(direction, alpha=float(distance * parameter.norm() / direction.norm()))
