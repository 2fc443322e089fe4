"""Tokens for the Hub are read from the environment or the login cache, and refused anywhere else."""

import os
import re
from typing import Any


_NAMES = ("token", "hub_token", "hf_token", "use_auth_token", "push_to_hub_token", "hugging_face_hub_token")
# argparse takes an option by its beginning too
_ABBREVIATIONS = tuple("hub_token"[:length] for length in range(len("hub_t"), len("hub_token")))
_LOOKS_LIKE_ONE = re.compile(r"(?<![A-Za-z0-9])(hf_|hf_oauth_|api_org_)[A-Za-z0-9]{24,}")


def refuse_tokens(argv: list[str]) -> None:
    """
    Refuses a token among the arguments of a command, or in the recipe that they name.

    Args:
        argv (`list[str]`):
            Arguments of a command.

    Raises:
        `ValueError`: If there is one. The message does not quote it.
    """
    where = "on the command line, which other users and the shell's history see"
    for position, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        option = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and option in (*_NAMES, *_ABBREVIATIONS):
            raise ValueError(_refusal(f"`{name}` is given {where}"))
        if _holds_token(argument):
            raise ValueError(_refusal(f"There is a token {where}"))
        if key := _token_key(value if name.startswith("--") else argument):
            raise ValueError(_refusal(f"`{key}` is set {where}"))
        if name == "--config":
            path = value or next(iter(argv[position + 1 :]), "")
            if os.path.isfile(path):
                _refuse_in_recipe(path)


def _refuse_in_recipe(path: str) -> None:
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    where = f"the recipe '{path}', which is read by everyone it is shared with"
    # Also where it is no valid YAML: the message about that would quote it
    if _holds_token(text):
        raise ValueError(_refusal(f"There is a token in {where}"))
    if name := _token_key(_parse(text)):
        raise ValueError(_refusal(f"`{name}` is set in {where}"))


def _parse(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _token_key(value: Any) -> str | None:
    """Name under which a token stands in a value, as deep as it may be."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parse(value)
    if isinstance(value, list):
        return next(filter(None, map(_token_key, value)), None)
    if not isinstance(value, dict):
        return None
    for key, item in value.items():
        # `token: true` stands for the login, and `null` for none
        if isinstance(item, str) and str(key).lower().replace("-", "_") in _NAMES:
            return str(key)
    return _token_key(list(value.values()))


def _holds_token(text: str) -> bool:
    own = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    return _LOOKS_LIKE_ONE.search(text) is not None or any(len(token) > 8 and token in text for token in own)


def _refusal(reason: str) -> str:
    return (
        f"{reason}: take it out. Tokens are read only from `HF_TOKEN` and from the login of `hf auth login`. If anybody "
        "may have seen it, make a new one at https://huggingface.co/settings/tokens."
    )
