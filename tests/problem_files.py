"""Writes files of problems in the forms that users have, and checks the parts of an error message."""

import io
import json

import datasets
import pytest
from PIL import Image

from mmcot.pictures.reading import read_pictures

ROW = {"id": "p1", "question": "Which color is it?", "choices": ["red", "blue"], "answer": 1, "split": "test"}


def png(color: str = "red", mode: str = "RGB") -> bytes:
    """A picture of one color, or of "noise", which does not compress: half of such a file contains half of its rows."""
    size, file = (64, 64), io.BytesIO()
    picture = Image.effect_noise(size, 90) if color == "noise" else Image.new("RGB", size, color)
    picture.convert(mode).save(file, "PNG")
    return file.getvalue()


def jsonl(folder, *rows) -> str:
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def parquet(folder, *rows) -> str:
    file = folder / "problems.parquet"
    datasets.Dataset.from_list(list(rows)).to_parquet(file)
    return str(file)


def error_of(call, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments)
    return str(error.value)


def has_all(message: str, *parts) -> bool:
    missing = [str(part) for part in parts if str(part) not in message]
    assert not missing, f"{missing} not in: {message}"
    return True


def check_pictures(problems) -> None:
    for problem in problems:
        read_pictures(problem)


def scienceqa(folder, splits=None, **fields) -> str:
    """A ScienceQA folder with two test problems, the first with a picture. `fields` replace fields of the first."""
    first = {"question": "What is it?", "choices": ["a", "b"], "answer": 0, "hint": "Look.", "image": "image.png"}
    first |= {"grade": "grade3", "subject": "natural science", "task": "closed choice", "split": "test"}
    second = {**first, "question": "Why?", "hint": "", "image": None}
    (folder / "problems.json").write_text(json.dumps({"1": {**first, **fields}, "2": second}))
    (folder / "pid_splits.json").write_text(json.dumps(splits or {"test": ["1", "2"], "train": [], "val": []}))
    picture = folder / "images" / "test" / "1" / "image.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(png())
    return str(folder)
