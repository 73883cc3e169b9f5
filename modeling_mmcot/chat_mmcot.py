"""Chat messages -> a problem: the input format that the Hub's snippets use for image-text-to-text models.

A chat is one user message whose text contains the question, the context and the choices in free form. This file only
parses it: `inference_mmcot.reply` runs the stages and returns rationale and answer as one reply. It imports no other
shipped file, because `processing_mmcot.py`, the file that a loader reads first, imports it, and older versions of
transformers copy only those files that the first file imports directly.
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
    """Return whether the inputs are a list of messages."""
    return isinstance(inputs, Sequence) and bool(inputs) and isinstance(inputs[0], Mapping) and "role" in inputs[0]


def read_chat(messages: Sequence[Mapping]) -> dict[str, Any]:
    """
    Read the problem in a chat of one message: `question`, `context`, `caption`, `choices` and `image` (a list).

    Raises:
        ValueError: If the chat is not one user message, or the message has a part that is neither a text nor a
            picture, or no text.
    """
    roles = [message.get("role") for message in messages]
    if roles != ["user"]:
        raise ValueError(
            f"This model answers one question at a time, without earlier turns: expected one message with the role "
            f"'user', found {len(messages)} with the roles {roles}. Put earlier turns into the question's context."
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
                f'A message part must be {{"type": "text", "text": …}} or {{"type": "image", "image" or "url": …}}; '
                f"found {part.get('found', part)!r:.200}"
            )
    return {**read_text("\n".join(texts)), "image": images}


def read_text(text: str) -> dict[str, Any]:
    """
    Split a text into question, context, caption and choices.

    The choices are the last block of consecutive lines "(A) …" or "A. …"; or of lines "- …" or "1. …", if only labelled
    lines follow it; or one line "Options: (A) … (B) …". A line may begin with a label ("Context: …"). Without a
    labelled question, the question is the last line that ends with "?", or else the first line. All other lines are
    the context.

    Raises:
        ValueError: If the text has no question, or choices on one line cannot be separated.
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
            continue  # a heading of the lines below
        elif label in CHOICE_LABELS and choices:
            plain.append(line)
        elif label in CHOICE_LABELS:
            choices = split_choices(found["text"])
        else:
            labelled["context" if label == "hint" else label].append(found["text"])
    if not labelled["question"]:
        if not plain:
            raise ValueError("The message has no question: expected a text besides choices and labels.")
        asks = [number for number, line in enumerate(plain) if line.endswith("?")]
        labelled["question"].append(plain.pop(asks[-1] if asks else 0))
    return {
        "question": " ".join(labelled["question"]),
        "context": " ".join(labelled["context"] + plain),
        "caption": " ".join(labelled["caption"]),
        "choices": choices,
    }


def find_choices(lines: list[str]) -> tuple[int, int]:
    """Return the start and end of the block of choices: two or more lines, whose letters (if any) run from A."""
    for start, end in reversed(find_blocks(lines, LETTERED)):
        found = [LETTERED.fullmatch(line) for line in lines[start:end]]
        letters = "".join(match["inner"] or match["outer"] for match in found)
        if end - start > 1 and string.ascii_uppercase.startswith(letters.upper()):
            return start, end
    for start, end in find_blocks(lines, LISTED)[-1:]:
        if end - start > 1 and all(LABEL.fullmatch(line) for line in lines[end:]):
            return start, end
    return len(lines), len(lines)


def find_blocks(lines: list[str], pattern: re.Pattern) -> list[tuple[int, int]]:
    """Return the start and end of each block of consecutive lines that match the pattern."""
    found, start = [], None
    for number, line in enumerate([*lines, ""]):
        is_match = pattern.fullmatch(line) is not None
        if is_match and start is None:
            start = number
        elif not is_match and start is not None:
            found.append((start, number))
            start = None
    return found


def split_choices(text: str) -> list[str]:
    """
    Split one line of choices, "(A) red (B) blue", the format of this model's own prompts.

    Raises:
        ValueError: If the line has another format.
    """
    empty, *parts = re.split(r"\(([A-Z])\)", text)
    letters, choices = parts[::2], [choice.strip() for choice in parts[1::2]]
    if empty.strip() or not all(choices) or not string.ascii_uppercase.startswith("".join(letters)):
        raise ValueError(f"Choices must be one per line, or '(A) … (B) …' on one line; found {text!r:.200}")
    return choices


class Conversation:
    """
    The problems of a chat, which `processor.apply_chat_template` passes to `model.generate` to run all stages.

    Args:
        processor (`MMCoTProcessor`):
            The processor, with all stages.
        problems (`list[dict]`):
            The text columns and choices of each problem.
        images (`list[list[PIL.Image.Image]]`):
            The pictures of each problem.
    """

    def __init__(self, processor, problems: list[dict], images: list[list]):
        self.processor, self.problems, self.images = processor, problems, images
