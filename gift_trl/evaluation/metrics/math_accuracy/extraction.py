"""Which part of a generated solution is its final answer."""

import re


# A longer answer is not examined: what it costs to check grows with it, and no reference is nearly as long.
LONGEST_ANSWER = 1_000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
# What may stand between two boxes that together are one answer, as in "\boxed{2}$ and $\boxed{3}"
_LIST_GLUE = re.compile(r"(?:\s|\$|\\[()\[\],;!]|[,;&]|\\(?:text|mbox|quad|qquad)\b|[{}]|\band\b|\bor\b)*")
_NUMBER = re.compile(r"-?\d[\d.,/]*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_STATED = re.compile(
    r"\banswers?[*_]*(?:\s+to\s+(?:this|the)\s+(?:question|problem))?[*_]*\s*(?:\bis\b|\bare\b|[:=])[\s*_:]*"
    r"(?:(?:therefore|thus|simply|indeed|then)\b[\s,:]*)?",
    re.IGNORECASE,
)
_DISPLAY = re.compile(r"(?:\$\$|\\\[)(.*?)(?:\$\$|\\\])", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|\*)")


def final_answer(text: str) -> str | None:
    r"""
    Returns the final answer that a text gives, as it is written there.

    The first of these that the text has:

    1. The last `\boxed{}` (or `\fbox{}`) or the rest of the line after the last `####` as in GSM8K, whichever comes later.
       Boxes with only "and", "or" or a comma between them are one answer, a list. Of nested boxes the outer one counts.
       Empty boxes are passed over. If the last box is not closed, the text was cut off in it and has no answer.
    2. The rest of the sentence after the last "answer is" or "answer:".
    3. The whole text, if it is a single line.

    Args:
        text (`str`):
            A generated text. However long it is, not more than about 4,000 characters of it are looked at closely.

    Returns:
        `str` or `None`: The answer, of at most `LONGEST_ANSWER` characters; `None` if there is none, or only a longer one.
    """
    boxed = _last_boxes(text)
    mark = text.rfind("####")
    if boxed is not None and boxed[0] > mark:
        answer = boxed[1]
    elif mark >= 0:
        answer = text[mark + 4 : mark + 4 * LONGEST_ANSWER].lstrip("#").strip().partition("\n")[0]
    else:
        answer = _unmarked_answer(text)
    answer = (answer or "").strip()
    return answer if 0 < len(answer) <= LONGEST_ANSWER else None


def reference_answer(text: str) -> str | None:
    r"""
    Returns the answer of a reference: a solution's, if it has a box or a `####`, else the text itself.

    Args:
        text (`str`):
            An answer or a solution.

    Returns:
        `str` or `None`: The answer, of at most `LONGEST_ANSWER` characters; `None` if there is none, or only a longer one.
    """
    if "\\boxed" in text or "\\fbox" in text or "####" in text:
        return final_answer(text)
    text = text.strip()
    return text if 0 < len(text) <= LONGEST_ANSWER else None


def _last_boxes(text: str) -> tuple[int, str | None] | None:
    """Where the last box that is not empty starts, and what it and its neighbours hold; `None` where it is not closed."""
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0:
        return None
    first = max(last - 3 * LONGEST_ANSWER, 0)
    window = text[first : last + LONGEST_ANSWER + 20]
    boxes, end = [], 0
    for match in _BOX.finditer(window):
        if match.start() < end:
            continue  # inside the box before
        content, stop = _box_content(window, match.end())
        if content is None:
            boxes.append((match.start(), None, len(window)))
        elif content.strip():
            boxes.append((match.start(), content, stop))
            end = stop
    if not boxes:
        return None
    start, content, _ = boxes.pop()
    if content is None:
        return first + start, None
    contents = [content]
    position = start
    while boxes and boxes[-1][1] is not None and _LIST_GLUE.fullmatch(window, boxes[-1][2], position):
        position, content, _ = boxes.pop()
        if content != contents[0]:
            contents.insert(0, content)
    return first + start, " , ".join(contents)


def _box_content(text: str, start: int) -> tuple[str | None, int]:
    """Content of the braces that open at `start` and where it ends, or of the number that stands there without them."""
    if text[start : start + 1] != "{":
        number = _NUMBER.match(text, start)
        return (number[0], number.end()) if number else (None, start)
    depth = 0
    for match in _BRACES.finditer(text, start, start + LONGEST_ANSWER + 2):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()], match.end()
    return None, start


def _unmarked_answer(text: str) -> str | None:
    """The answer of a text without box and mark."""
    tail = text[-4 * LONGEST_ANSWER :]
    statements = list(_STATED.finditer(tail))
    if statements:
        rest = tail[statements[-1].end() :]
        display = _DISPLAY.match(rest)
        return display[1] if display else _SENTENCE_END.split(rest.partition("\n")[0])[0]
    text = text.strip() if len(text) <= 2 * LONGEST_ANSWER else ""
    return text if "\n" not in text else None
