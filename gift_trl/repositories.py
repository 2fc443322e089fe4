"""Repositories on the Hub: whether one may be pushed to, requests that end and are repeated, what an error says."""

import json
import logging
import re
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token, is_offline_mode, whoami
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo
from huggingface_hub.utils import _http, get_session, parse_ratelimit_headers, validate_repo_id


T = TypeVar("T")

# Seconds between the attempts, where the Hub names none
RETRY_WAITS = (1, 2, 4, 8, 16, 32)
# Seconds after the first failure, from which on nothing is repeated
MAX_RETRY_TIME = 1800
# Longest wait in seconds that the Hub may ask for: its limits of the rate count windows of five minutes
MAX_RETRY_AFTER = 600
# Seconds until a request that does not move is given up. An answer may take the Hub a minute of work.
TIME_LIMITS = {"connect": 30.0, "read": 180.0, "write": 180.0, "pool": 180.0}
# The Hub answers 409 while another request changes the same repository
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
# Those that name the addresses of requests
_LOGGERS = ("huggingface_hub.utils._http", "httpx", "httpx2")
_INSTALLATION = threading.Lock()
# Whether a request is one of `call_hub`
_PUSHING = ContextVar("_PUSHING", default=False)
_NOT_THE_HUBS = "the answer is cut off, or not the Hub's"


class LongWaitError(OSError):
    """The Hub asks to wait for longer than is done here."""


class MalformedAnswerError(OSError):
    """An answer is JSON, but not what the Hub says to such a request."""


class UnconfirmedError(OSError):
    """The Hub took a change and does not show it."""


# What a request of the Hub client raises: no answer or a wrong one, one that asks to wait, one that is no JSON
HUB_ERRORS = (HTTPError, LongWaitError, MalformedAnswerError, UnconfirmedError, json.JSONDecodeError)
# What the client raises about an answer that it does not understand; the last one where it reads those about uploads
_MISREADINGS = (AttributeError, IndexError, KeyError, TypeError)
_READERS_OF_UPLOADS = ("huggingface_hub.lfs", "huggingface_hub._commit_api")


def check_repository(
    repo_id: str, *, repo_type: str = "model", private: bool | None = None
) -> tuple[str, ModelInfo | DatasetInfo | None]:
    """
    Checks that a repository can be pushed to.

    Nothing is created. Whether a fine-grained token may create a repository cannot be asked; all else is known
    afterwards.

    Args:
        repo_id (`str`):
            Id of the repository. Without a namespace, it is the user's.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"` or `"dataset"`.
        private (`bool`, *optional*):
            Whether the repository has to be private.

    Returns:
        `tuple[str, ModelInfo | DatasetInfo | None]`: The id with its namespace, and what the Hub says of its default
        branch; `None` if the repository is to be created.

    Raises:
        `ValueError`: If it is no legal id, or the repository is public and `private` is set.
        `PermissionError`: If there is no login, or it may not write there.
        `ConnectionError`: If the Hub cannot be asked.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"'{repo_id}' cannot be the id of a repository on the Hub: write USER/NAME. {error}"
        ) from error
    if is_offline_mode():
        raise ConnectionError(
            "Nothing can be pushed to the Hub in offline mode: unset `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE`."
        )
    if get_token() is None:
        raise PermissionError("There is no login for the Hub: run `hf auth login`, or set `HF_TOKEN`.")
    api = HfApi(token=True)
    if "@" in api.endpoint:
        raise ValueError(
            "`HF_ENDPOINT` holds a user name or a password, which would be read in messages: leave it out of the address."
        )
    try:
        user = call_hub(_whoami)
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise PermissionError(
                "The token for the Hub can only read: make one that can write at "
                "https://huggingface.co/settings/tokens, and run `hf auth login` or set `HF_TOKEN`."
            )
        if "/" not in repo_id:
            repo_id = f"{user['name']}/{repo_id}"
        try:
            remote: Any = call_hub(api.repo_info, repo_id, repo_type=repo_type)
            call_hub(api.auth_check, repo_id, repo_type=repo_type, write=True)
        except RepositoryNotFoundError:
            remote = None
    except HUB_ERRORS as error:
        raise explain(error, repo_id, repo_type) from error
    if private and remote is not None and not remote.private:
        raise ValueError(
            f"The {repo_type} repository '{repo_id}' exists and is public: make it private in its settings on the Hub, or "
            "push to another one."
        )
    if remote is None and role == "write":
        # Other kinds of tokens need not list the organisations they may write to
        namespaces = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
        if repo_id.split("/")[0].lower() not in (name.lower() for name in namespaces):
            raise PermissionError(_no_permission(repo_id, repo_type))
    return repo_id, remote


def _whoami() -> dict[str, Any]:
    for cache in (True, False):  # the client keeps whatever was answered
        user = whoami(cache=cache)
        if isinstance(user, dict) and "name" in user:
            return user
    raise MalformedAnswerError(_NOT_THE_HUBS)


def call_hub(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """
    Calls a function of the Hub client so that it ends, and repeats it where that can help.

    The client sets no limit of time, waits as long as an answer tells it to, and does not repeat most requests.

    Args:
        function (`Callable`):
            Function that may be called again wherever it was interrupted.
        args, kwargs:
            Its arguments.

    Returns:
        What the function returns.

    Raises:
        `HTTPError` or `RuntimeError`: What the last attempt raised, or the first that no repetition can mend.
        [`MalformedAnswerError`]: If the client does not understand the answer.
        [`LongWaitError`]: If the Hub asks to wait for longer than `MAX_RETRY_AFTER`.
    """
    waits, failing_since = iter(RETRY_WAITS), None
    while True:
        _limit_requests()
        pushing = _PUSHING.set(True)
        try:
            return function(*args, **kwargs)
        except Exception as raised:
            error = _as_malformed(raised)
            _redact_error(error)
            failing_since = time.monotonic() if failing_since is None else failing_since
            wait = next(waits, None)
            if wait is None or time.monotonic() - failing_since > MAX_RETRY_TIME or not is_transient(error):
                if error is raised:
                    raise
                raise error from raised
            answer = _http_error(error)
            asked = _seconds_to_wait(answer.response) if isinstance(answer, HfHubHTTPError) else None
            if asked is not None and asked > MAX_RETRY_AFTER:
                raise LongWaitError(_long_wait(asked)) from error
        finally:
            _PUSHING.reset(pushing)
        time.sleep(wait if asked is None else asked)


def is_transient(error: BaseException) -> bool:
    """
    Whether the same request may succeed later.

    Args:
        error (`BaseException`):
            What a function of the Hub client raised.

    Returns:
        `bool`: `True` for a busy Hub, a connection that broke and an answer that is not complete.
    """
    answer = _http_error(error)
    if isinstance(answer, HfHubHTTPError):
        # The address of an upload expires, and the next attempt is given another one
        expired = _is_upload(error) and answer.response.status_code in (400, 403, 404)
        return expired or answer.response.status_code in _TRANSIENT
    return isinstance(answer, (HTTPError, MalformedAnswerError, UnconfirmedError, json.JSONDecodeError))


def explain(error: BaseException, repo_id: str, repo_type: str = "model") -> OSError:
    """
    The error of a request as one that says what to do.

    Args:
        error (`BaseException`):
            What [`call_hub`] raised.
        repo_id (`str`):
            Id of the repository.
        repo_type (`str`, *optional*, defaults to `"model"`):
            Its type.

    Returns:
        `OSError`: A `PermissionError` or a `ConnectionError`.
    """
    answer = _http_error(error)
    if isinstance(answer, HfHubHTTPError):
        status, message = answer.response.status_code, answer.server_message or ""
        if status == 401:
            return PermissionError(
                "The Hub does not accept the token: it is mistyped, expired or revoked. Run `hf auth login`, or set "
                "`HF_TOKEN` (which is used first) to a valid one."
            )
        # The Hub says so too of storage that is used up
        if status == 402 or (status == 403 and re.search("storage|quota|billing", message, re.IGNORECASE)):
            return PermissionError(f"The Hub has no room for '{repo_id}': {redact(message) or 'payment required'}.")
        if _is_upload(error) and status in (400, 403, 404):
            return ConnectionError(f"The Hub does not take the file ({describe(error)}): try again later.")
        if status == 403:
            return PermissionError(_no_permission(repo_id, repo_type))
        if status == 404:
            return ConnectionError(
                f"The Hub does not find '{repo_id}' or a part of it, or not for this token ({describe(answer)}): check its "
                "name, and with `hf auth whoami` whose token it is."
            )
        if status == 413:
            return ConnectionError(
                f"A request is larger than the Hub takes ({describe(answer)}): save the weights in smaller files "
                "(`max_shard_size` of `save_pretrained`)."
            )
        later = ": try again later" if is_transient(error) else ""
        return ConnectionError(f"The Hub answers with an error ({describe(answer)}){later}.")
    if isinstance(answer, UnconfirmedError):
        return ConnectionError(f"{answer}: try again later.")
    # Without an answer, it is the HTTP library's error, which is no `OSError`
    if isinstance(answer, (HTTPError, MalformedAnswerError, json.JSONDecodeError)):
        return ConnectionError(
            f"The Hub at {HfApi().endpoint} cannot be reached ({describe(error)}): check the connection, and "
            "`HF_ENDPOINT` if it is set."
        )
    return ConnectionError(f"The Hub cannot be used now: {describe(error)}.")


def describe(error: BaseException) -> str:
    """
    An error in a few words, without tokens.

    Args:
        error (`BaseException`):
            Any error.

    Returns:
        `str`: The answer of the Hub, or the message of the error.
    """
    if isinstance(error, HfHubHTTPError):
        answer = f"{error.response.status_code} {error.response.reason_phrase}"
        return redact(f"{answer}: {error.server_message}" if error.server_message else answer)
    if isinstance(error, json.JSONDecodeError):
        return _NOT_THE_HUBS
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    # The client says which file it was, and leaves what happened to the cause
    if isinstance(error, RuntimeError) and error.__cause__:
        reason = f"{reason} ({describe(error.__cause__)})"
    return redact(reason)


def redact(text: str) -> str:
    """
    Leaves out of a text what nobody else may read: the token, and of an address the login and what follows its path.

    Args:
        text (`str`):
            Text.

    Returns:
        `str`: The text without them.
    """
    if token := get_token():
        text = text.replace(token, "[token]")
    # That of a proxy may hold a password
    text = re.sub(r"(https?://)[^\s/@'\"<>]+@", r"\1[…]@", text)
    # The address of an upload is signed: who reads it can write there
    return re.sub(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]+", r"\1?[…]", text)


def _http_error(error: BaseException) -> BaseException:
    """The error of the request: that of an upload is the cause of a `RuntimeError`."""
    return _http_error(error.__cause__) if isinstance(error, RuntimeError) and error.__cause__ else error


def _is_upload(error: BaseException) -> bool:
    """Whether the request was part of an upload, whose address need not be the Hub's."""
    return isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError)


def _as_malformed(error: Exception) -> Exception:
    """What the client raises where it reads an answer, as an error of the Hub; any other error as it is."""
    if not isinstance(error, (*_MISREADINGS, ValueError)) or isinstance(error, json.JSONDecodeError):
        return error
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    if module in _READERS_OF_UPLOADS or (isinstance(error, _MISREADINGS) and module.startswith("huggingface_hub.")):
        return MalformedAnswerError(_NOT_THE_HUBS)
    return error


def _redact_error(error: BaseException | None) -> None:
    """Redacts an error and all it comes from, so that its traceback can be shown: a proxy may quote the request."""
    while error is not None:
        error.args = tuple(redact(part) if isinstance(part, str) else part for part in error.args)
        if isinstance(error, HfHubHTTPError) and error.server_message:
            error.server_message = redact(error.server_message)
        error = error.__cause__ or error.__context__


def _no_permission(repo_id: str, repo_type: str) -> str:
    return (
        f"The token for the Hub may not write to the {repo_type} repository '{repo_id}': check the namespace, give the "
        "token write permission for it at https://huggingface.co/settings/tokens, or log in as somebody who has it with "
        "`hf auth login`."
    )


def _long_wait(seconds: int) -> str:
    return f"the Hub asks to wait for {seconds:,} seconds before the next request"


def _seconds_to_wait(response: Any) -> int | None:
    """What an answer says in its headers."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    seconds = response.headers.get("Retry-After", "").strip()
    return int(seconds) if seconds.isdigit() else None


def _limit_requests() -> None:
    """Sets the limits for the requests of this process, those of sessions that the client will open too."""
    with _INSTALLATION:
        # The client opens another session after a connection failed. That its factory can be set and not read, and
        # that setting it breaks off the requests of other threads, leaves the private name.
        factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
        if factory is not None and not isinstance(factory, _LimitedFactory):
            _http._GLOBAL_CLIENT_FACTORY = _LimitedFactory(factory)
        _limit(get_session())
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_redact_record)


class _LimitedFactory:
    def __init__(self, factory: Callable[[], Any]):
        self.factory = factory

    def __call__(self) -> Any:
        return _limit(self.factory())


def _limit(client: Any) -> Any:
    hooks = client.event_hooks
    if _limit_time not in hooks["request"]:
        client.event_hooks = {
            "request": [*hooks["request"], _limit_time],
            "response": [*hooks["response"], _refuse_long_wait],
        }
    return client


def _limit_time(request: Any) -> None:
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: TIME_LIMITS[name] if limits.get(name) is None else limits[name] for name in TIME_LIMITS
    }


def _refuse_long_wait(response: Any) -> None:
    # The client itself would wait for hours. What others read in this process is left alone; only pushes write, from
    # threads of the client too.
    pushing = _PUSHING.get() or response.request.method not in ("GET", "HEAD")
    if response.status_code in _TRANSIENT and pushing:
        seconds = _seconds_to_wait(response)
        if seconds is not None and seconds > MAX_RETRY_AFTER:
            raise LongWaitError(_long_wait(seconds))


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True
