"""Reads the known datasets in the form of their release: demonstration, study problems, ScienceQA and A-OKVQA.

Their columns, their splits and the places of their pictures are fixed. `sources.py` reads all other sources.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pyarrow.parquet

from mmcot.problems.progress_bars import without_dataset_bars
from mmcot.problems.schema import (
    FEATURES,
    PicturePaths,
    check_rows,
    member,
    normalize_split,
    short_repr,
    with_all_columns,
)
from mmcot.storage.caches import code_digest, load_or_compute, versions_of
from mmcot.storage.files import cache_folder, read_json

logger = logging.getLogger(__name__)

Rows = Iterator[tuple[str, dict[str, Any]]]  # each row with its place, for errors

SCIENCEQA_ID = "derek-thomas/ScienceQA"  # https://huggingface.co/datasets/derek-thomas/ScienceQA
SCIENCEQA_COLUMNS = {"image", "question", "choices", "answer", "hint", "task", "grade", "subject", "topic", "category"}
SCIENCEQA_COLUMNS |= {"skill", "lecture", "solution"}


def is_demo(source: str) -> bool:
    """Whether a source is the demonstration, with or without a difficulty or a skill."""
    return source == "demo" or source.startswith("demo:")


def is_study(source: str) -> bool:
    """Whether a source is the study problems, with or without families or a difficulty."""
    return source == "study" or source.startswith(("study:", "study@"))


def is_scienceqa(folder: Path) -> bool:
    """Whether a folder is the authors' ScienceQA. One of the two files is enough: an error names the other."""
    return any((folder / name).is_file() for name in ("problems.json", "pid_splits.json"))


def is_aokvqa(folder: Path) -> bool:
    """Whether a folder is a release of A-OKVQA."""
    return any(folder.glob("aokvqa_*.json"))


def is_known(source: str) -> bool:
    """Whether `load_known` reads a source."""
    return is_demo(source) or is_study(source) or is_scienceqa(Path(source)) or is_aokvqa(Path(source))


def load_known(source: str, split: str, max_images: int | None, pictures: bool) -> datasets.Dataset:
    """
    Load the problems of a known dataset.

    Args:
        source: a source for which `is_known` is true.
        max_images: the largest number of pictures of a problem. A ScienceQA problem is loaded with its first pictures.
        pictures: whether the files of the pictures must exist.
    """
    if is_demo(source):
        return demo_problems(source, split)
    if is_study(source):
        return study_problems(source, split)
    folder = Path(source)
    rows = aokvqa_rows(folder, split) if is_aokvqa(folder) else scienceqa_rows(folder, split, max_images)
    complete = check_rows(rows, source, PicturePaths(folder, must_exist=pictures), max_images)
    # By column, because Dataset.from_list fails for a split without rows.
    return datasets.Dataset.from_dict({name: [row[name] for row in complete] for name in FEATURES}, features=FEATURES)


def known_dataset_name(source: str) -> str | None:
    """
    Return the name of the dataset that a source contains: `demonstration`, `study problems`, `ScienceQA`, `A-OKVQA`, or
    None.
    """
    if is_demo(source):
        return "demonstration"
    if is_study(source):
        return "study problems"
    folder = Path(source)
    if source.removeprefix("hf://datasets/") == SCIENCEQA_ID or is_scienceqa(folder) or has_scienceqa_columns(folder):
        return "ScienceQA"
    return "A-OKVQA" if is_aokvqa(folder) else None


def has_scienceqa_columns(folder: Path) -> bool:
    """Whether a folder is a download of the Hub's ScienceQA, by the columns of its Parquet files."""
    file = next(folder.rglob("*.parquet"), None) if folder.is_dir() else None
    try:
        return file is not None and set(pyarrow.parquet.read_schema(file).names) == SCIENCEQA_COLUMNS
    except (pyarrow.ArrowException, OSError):  # reading the dataset reports the error
        return False


def demo_problems(source: str, split: str) -> datasets.Dataset:
    """
    Return the demonstration problems of a split, generated once and cached.

    Raises:
        ValueError: the source names neither a difficulty nor a skill.
    """
    from mmcot.problems import demo, drawing

    variant = source.partition(":")[2] or "1"
    if variant in map(str, range(1, 10)):
        options = {"split": split, "difficulty": int(variant)}
    elif variant in demo.SKILLS:
        options = {"split": split, "skill": variant}
    else:
        raise ValueError(
            f"dataset is {source!r}; expected demo: with a difficulty from 1 to 9, or a skill: "
            f"{', '.join(demo.SKILLS)}."
        )
    return drawn_problems("demo", demo.generate, options, (demo, drawing))


def study_problems(source: str, split: str) -> datasets.Dataset:
    """Return the study problems of a split, generated once and cached."""
    from mmcot.problems import study

    families, difficulty = study.parse_source(source)
    drawn = {"split": split, "difficulty": difficulty, "families": families}
    return drawn_problems("study", study.generate, drawn, study.MODULES)


def drawn_problems(
    name: str, generate: Callable[..., Iterator[dict]], drawn: dict[str, Any], modules: Iterable[ModuleType]
) -> datasets.Dataset:
    """
    Return the problems that `generate(**drawn)` yields, from the cache if it has them.

    Args:
        name: the folder in the cache.
        modules: the code that draws and writes the problems.
    """
    # `datasets` identifies a generator only by its name, and would load the problems of older code.
    key = datasets.fingerprint.Hasher.hash((code_digest(*modules), versions_of("pillow", "numpy"), drawn))
    folder = cache_folder() / name / key
    make = functools.partial(
        datasets.Dataset.from_generator,
        complete_rows,
        gen_kwargs={"generate": generate, "drawn": drawn},
        features=FEATURES,
        fingerprint=key,
        cache_dir=str(folder),
    )
    with without_dataset_bars():
        return load_or_compute(make, folder)


def complete_rows(generate: Callable[..., Iterator[dict]], drawn: dict[str, Any]) -> Iterator[dict]:
    """Yield generated rows with all columns of the schema: `datasets` would fill a missing list with None."""
    return map(with_all_columns, generate(**drawn))


def scienceqa_rows(folder: Path, split: str, max_images: int | None) -> Rows:
    """
    Yield the rows of the authors' ScienceQA folder.

    Raises:
        ValueError: a file is missing or has another form.
    """
    problems_file, splits_file = folder / "problems.json", folder / "pid_splits.json"
    captions_file = folder / "captions.json"
    for file in (problems_file, splits_file):
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}; expected a ScienceQA folder.")
    problems = read_json(problems_file)
    ids = member(read_json(splits_file), split, list, splits_file)
    captions = member(read_json(captions_file), "captions", dict, captions_file) if captions_file.is_file() else {}
    present = [problem_id for problem_id in ids if problem_id in problems]
    if len(present) < len(ids):
        absent = len(ids) - len(present)
        logger.warning("%s: %d of %d %s problems are not in problems.json", folder, absent, len(ids), split)
    for problem_id in present:
        problem = member(problems, problem_id, dict, problems_file)
        normalize_split(problem.get("split", split), f"{folder}, problem {problem_id}")
        yield (
            str(folder),
            {
                **{name: problem[name] for name in problem.keys() & FEATURES.keys()},
                "id": problem_id,
                "context": problem.get("hint"),
                "images": scienceqa_pictures(folder, problem, f"images/{split}/{problem_id}")[:max_images],
                "caption": captions.get(problem_id),
                "split": split,
            },
        )


def scienceqa_pictures(folder: Path, problem: dict[str, Any], pictures: str) -> list[str]:
    """Return the picture of the question, if it has one, and then the pictures of the choices."""
    question = [f"{pictures}/image.png"] if problem.get("image") else []
    names = (f"{pictures}/choice_{number}.png" for number in range(len(problem.get("choices") or [])))
    return [*question, *(name for name in names if (folder / name).is_file())]


def aokvqa_rows(folder: Path, split: str) -> Rows:
    """
    Yield the rows of the release (https://github.com/allenai/aokvqa, load_aokvqa.py). Its test split has no answers.

    Raises:
        ValueError: the file of the split is missing, or an entry has another form.
    """
    file = folder / f"aokvqa_v1p0_{split}.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no {file.name}; expected an A-OKVQA folder.")
    pictures = "coco" if (folder / "coco").is_dir() else "../coco"
    for number, entry in enumerate(read_json(file, list)):
        for name, kind in (("question_id", str), ("image_id", int)):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise ValueError(
                    f"{file}, entry {number + 1}: {short_repr(entry)} has no {name} of type {kind.__name__}."
                )
        rationales = entry.get("rationales") or []
        yield (
            str(folder),
            {
                **{name: entry[name] for name in ("question", "choices", "direct_answers") if name in entry},
                "id": entry["question_id"],
                "images": [f"{pictures}/{split}2017/{entry['image_id']:012}.jpg"],
                "answer": entry.get("correct_choice_idx"),
                "solution": rationales[0] if rationales else None,
                "rationales": rationales,
                "split": split,
            },
        )
