"""What a model is sent: token ids by its own chat template, and the ids at which its answers end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gift_trl.evaluation.tasks import TaskData
from gift_trl.model_pair import end_of_turn_token_ids, load_config, load_tokenizer


logger = get_logger(__name__)

# Stands for an answer when a chat template is asked what comes after one
_ANSWER = "Yes."


@dataclass(frozen=True)
class Renderer:
    """
    Makes token ids of messages.

    Args:
        name (`str`):
            Name of the model in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        stop_ids (`tuple[int, ...]`):
            Token ids at which an answer ends.
        max_length (`int` or `None`):
            Tokens of prompt and answer that the model has positions for; `None` if it does not say.
        template_kwargs (`dict[str, Any]`):
            Variables of the chat template, such as `enable_thinking`.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    max_length: int | None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def render(self, data: TaskData) -> list[list[int]]:
        """
        Makes the prompts of a task.

        Args:
            data ([`TaskData`]):
                The task.

        Returns:
            `list[list[int]]`: Token ids of every problem's prompt.

        Raises:
            `ValueError`: If the model has no chat template where the task needs one, or it does not take the messages.
        """
        if not data.task.prompt.chat:
            texts = ["\n\n".join(message["content"] for message in problem.messages) for problem in data.problems]
            return [_once(ids, self.tokenizer.bos_token_id) for ids in self.tokenizer(texts)["input_ids"]]
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The model `{self.name}` has no chat template, and task `{data.task.name}` asks in the chat format. Copy the "
                "instruct model's `chat_template.jinja` beside its tokenizer, or set `prompt.chat: false` to let it continue "
                "plain text."
            )
        conversations = [list(problem.messages) for problem in data.problems]
        try:
            rows = self.tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, return_dict=True, **self.template_kwargs
            )["input_ids"]
        except TemplateError as error:
            raise ValueError(
                f"The chat template of `{self.name}` refuses the messages of task `{data.task.name}` ({error}). Where it takes "
                "no system message, set `prompt.system: null`."
            ) from error
        rows = [_once(ids, self.tokenizer.bos_token_id) for ids in rows]
        self._compare_start(rows[0])
        return rows

    def _compare_start(self, ids: list[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and bos not in ids and self.tokenizer(_ANSWER)["input_ids"][:1] == [bos]:
            _warn(
                f"`{self.name}` has a chat template without the `{self.tokenizer.bos_token}` that its tokenizer puts before "
                "other texts. The template is followed, as in training; if the model was post-trained with it, correct the "
                "template."
            )

    def describe(self, ids: Sequence[int]) -> str:
        """
        Text of token ids with special tokens.

        Args:
            ids (`Sequence[int]`):
                Token ids.

        Returns:
            `str`: The text.
        """
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer(self, ids: Sequence[int]) -> str:
        """
        Text of an answer.

        Args:
            ids (`Sequence[int]`):
                Token ids, with the one at which it stopped.

        Returns:
            `str`: The text without special tokens.
        """
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def make_renderer(
    name: str,
    model: str,
    *,
    template_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
    **kwargs: Any,
) -> Renderer:
    """
    Reads what is needed to make a model's prompts; no weights.

    Args:
        name (`str`):
            Name of the model in messages.
        model (`str`):
            Hub id or folder.
        template_kwargs (`dict[str, Any]`, *optional*):
            Variables of the chat template.
        max_length (`int`, *optional*):
            Tokens of prompt and answer. Defaults to what the configuration says.
        kwargs (`dict[str, Any]`):
            Keyword arguments of `from_pretrained`, such as `revision`.

    Returns:
        [`Renderer`]: The renderer.

    Raises:
        `ValueError`, `FileNotFoundError`: If there is no tokenizer or no configuration.
    """
    tokenizer = load_tokenizer(model, **kwargs)
    if max_length is None:
        max_length = getattr(load_config(model, **kwargs).get_text_config(), "max_position_embeddings", None)
    return make_renderer_of(
        name, tokenizer, end_of_turn_token_ids(tokenizer, model, **kwargs), max_length, template_kwargs
    )


def make_renderer_of(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_length: int | None,
    template_kwargs: dict[str, Any] | None = None,
) -> Renderer:
    """
    As [`make_renderer`], of a tokenizer at hand.

    Args:
        name (`str`):
            Name of the model in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        stop_ids (`Sequence[int]`):
            Token ids at which generation stops, to which the one that ends a turn in the chat template is added.
        max_length (`int` or `None`):
            Tokens of prompt and answer.
        template_kwargs (`dict[str, Any]`, *optional*):
            Variables of the chat template.

    Returns:
        [`Renderer`]: The renderer.
    """
    template_kwargs = template_kwargs or {}
    stops = {*stop_ids, *_template_stop(tokenizer, template_kwargs)}
    if not stops:
        _warn(
            f"Nothing says at which token the answers of `{name}` end: its generation configuration, its tokenizer and its "
            "chat template name none. Every answer will be cut off at `max_new_tokens`."
        )
    return Renderer(name, tokenizer, tuple(sorted(stops)), max_length, template_kwargs)


def _template_stop(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> set[int]:
    """The special token that the chat template puts right after an assistant's answer."""
    if tokenizer.chat_template is None:
        return set()
    messages = [{"role": "user", "content": _ANSWER}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    except TemplateError:
        return set()
    rest = text.rpartition(_ANSWER)[2].lstrip()
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    following = tokenizer(rest, add_special_tokens=False)["input_ids"][:1]
    return {token for token in following if token in special}


def _warn(message: str) -> None:
    PartialState()  # without which accelerate's logger does not know the main process
    logger.warning(message)


def _once(ids: list[int], bos: int | None) -> list[int]:
    """Without the second of two tokens that begin a text: one of the template or the text, one of the tokenizer."""
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return list(ids)
