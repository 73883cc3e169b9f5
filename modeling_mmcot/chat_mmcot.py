"""Chat messages -> a problem, and its rationale and answer as one reply: how the Hub shows an image-text-to-text model.

A chat is one user message whose text is question, context and choices as people write them. This file only reads it:
`pipeline_mmcot.reply` runs the stages. It imports no other shipped file, because the processor, which is opened first,
imports this one, and loaders of older transformers copy only what an entry file imports itself.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

# "(A) red", "A. red", "A) red", "A: red", and in lower case.
LETTERED = re.compile(r"(?:\((?P<inner>[A-Za-z])\)\s*|(?P<outer>[A-Za-z])[.):]\s+)(?P<text>\S.*)")
LISTED = re.compile(r"(?:[-*•]|\d+[.)])\s+(?P<text>\S.*)")  # "- red", "* red", "1. red"
LABEL = re.compile(r"(?P<label>question|context|hint|caption|choices|options)\s*:\s*(?P<text>.*)", re.IGNORECASE)
CHOICE_LABELS = ("choices", "options")
IMAGE_KEYS = ("image", "url", "path", "base64")


def is_chat(inputs: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(inputs, Sequence) and bool(inputs) and isinstance(inputs[0], Mapping) and "role" in inputs[0]


def read_chat(messages: Sequence[Mapping]) -> dict[str, Any]:
    """
    The problem that a chat's one message asks: `question`, `context`, `choices` and `image` (a list).

    Raises:
        ValueError: it is not one user message, or has a part that is neither text nor picture, or no text.
    """
    roles = [message.get("role") for message in messages]
    if roles != ["user"]:
        raise ValueError(
            f"This model answers one question at a time, without earlier turns: expected one message of the role "
            f"'user', found {len(messages)} of the roles {roles}. Give what the question needs as its context."
        )
    content = messages[0].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [parts] if isinstance(parts, Mapping) else parts
    texts, images = [], []
    for part in parts or []:
        part = part if isinstance(part, Mapping) else {"type": None, "found": part}
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image" and any(part.get(key) is not None for key in IMAGE_KEYS):
            images.append(next(part[key] for key in IMAGE_KEYS if part.get(key) is not None))
        else:
            raise ValueError(
                f'A part of a message is {{"type": "text", "text": …}} or {{"type": "image", "image" or "url": …}}; '
                f"found {part.get('found', part)!r:.200}"
            )
    return {**read_text("\n".join(texts)), "image": images}


def read_text(text: str) -> dict[str, Any]:
    """
    Question, context and choices of a text. Choices are the last lines that follow each other as "(A) …" or "A. …"; or
    as "- …" or "1. …", where nothing but labelled lines comes after them; or one line "Options: (A) … (B) …". A line
    may say what it is ("Context: …"); else the last line that ends with "?" is the question (the first line where none
    does), and all others are the context.

    Raises:
        ValueError: there is no question, or the choices on one line cannot be separated.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start, end = find_choices(lines)
    choices = [(LETTERED.fullmatch(line) or LISTED.fullmatch(line))["text"] for line in lines[start:end]]
    labelled: dict[str, list[str]] = {"question": [], "context": [], "caption": []}
    plain = []
    for line in lines[:start] + lines[end:]:
        found = LABEL.fullmatch(line)
        label = found["label"].lower() if found else None
        if label is None:
            plain.append(line)
        elif label in CHOICE_LABELS and not found["text"]:
            continue  # the heading of the lines below it
        elif label in CHOICE_LABELS and choices:
            plain.append(line)
        elif label in CHOICE_LABELS:
            choices = choices_in_a_line(found["text"])
        else:
            labelled["context" if label == "hint" else label].append(found["text"])
    if not labelled["question"]:
        if not plain:
            raise ValueError("A message has no question: expected a text, found none beside choices and labels.")
        asks = [number for number, line in enumerate(plain) if line.endswith("?")]
        labelled["question"].append(plain.pop(asks[-1] if asks else 0))
    return {
        "question": " ".join(labelled["question"]),
        "context": " ".join(labelled["context"] + plain),
        "caption": " ".join(labelled["caption"]),
        "choices": choices,
    }


def find_choices(lines: list[str]) -> tuple[int, int]:
    """The first line of the choices and the one after their last; two or more, whose letters run from A."""
    for start, end in reversed(runs(lines, LETTERED)):
        found = [LETTERED.fullmatch(line) for line in lines[start:end]]
        letters = "".join(match["inner"] or match["outer"] for match in found)
        if end - start > 1 and string.ascii_uppercase.startswith(letters.upper()):
            return start, end
    for start, end in runs(lines, LISTED)[-1:]:
        if end - start > 1 and all(LABEL.fullmatch(line) for line in lines[end:]):
            return start, end
    return len(lines), len(lines)


def runs(lines: list[str], pattern: re.Pattern) -> list[tuple[int, int]]:
    """Where lines that follow each other match, from the first line to the one after the last."""
    found, start = [], None
    for number, line in enumerate([*lines, ""]):
        is_one = pattern.fullmatch(line) is not None
        if is_one and start is None:
            start = number
        elif not is_one and start is not None:
            found.append((start, number))
            start = None
    return found


def choices_in_a_line(text: str) -> list[str]:
    """
    Of "(A) red (B) blue", as this model's own prompts have them.

    Raises:
        ValueError: they are written otherwise.
    """
    empty, *parts = re.split(r"\(([A-Z])\)", text)
    letters, choices = parts[::2], [choice.strip() for choice in parts[1::2]]
    if empty.strip() or not all(choices) or not string.ascii_uppercase.startswith("".join(letters)):
        raise ValueError(f"Choices stand one to a line, or in one line as '(A) … (B) …'; found {text!r:.200}")
    return choices


class Conversation:
    """
    Problems on their way from `processor.apply_chat_template` to `model.generate`, which runs all stages for them.

    Args:
        processor (`MMCoTProcessor`)
        problems (`list[dict]`): of text columns.
        images (`list[list[PIL.Image.Image]]`): each problem's pictures.
    """

    def __init__(self, processor, problems: list[dict], images: list[list]):
        self.processor, self.problems, self.images = processor, problems, images
