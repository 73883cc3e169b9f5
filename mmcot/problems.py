"""Sources of problems -> `datasets.Dataset` of the one schema, and the checks that a run makes before it starts.

Pictures stay on disk (`pictures.py` reads them). Nothing here knows the model, templates or stages.
"""

import difflib
import inspect
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from mmcot.files import read_json
from mmcot.progress_bars import without_dataset_bars

logger = logging.getLogger(__name__)

_TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": _TEXT,
        "question": _TEXT,
        "choices": datasets.List(_TEXT),
        "context": _TEXT,
        "images": datasets.List(datasets.Image(decode=False)),
        "caption": _TEXT,
        "answer": datasets.Value("int64"),  # index of the right choice, -1 = unknown
        "lecture": _TEXT,
        "solution": _TEXT,
        "rationales": datasets.List(_TEXT),  # where there is more than one solution, all of them
        "direct_answers": datasets.List(_TEXT),  # what people answered who were shown no choices
        "subject": _TEXT,
        "grade": _TEXT,
        "topic": _TEXT,
        "category": _TEXT,
        "skill": _TEXT,
        "split": _TEXT,
    }
)
GOLD_COLUMNS = ("answer", "lecture", "solution", "rationales", "direct_answers")
SPLITS = ("train", "val", "test")
SOURCES = "demo, a ScienceQA or A-OKVQA folder, a dataset of the Hub, or a .jsonl or .parquet file of problems"
SCIENCEQA_ID = "derek-thomas/ScienceQA"  # https://huggingface.co/datasets/derek-thomas/ScienceQA
HUB_COLUMNS = {"image", "question", "choices", "answer", "hint", "task", "grade", "subject", "topic", "category"}
HUB_COLUMNS |= {"skill", "lecture", "solution"}


def load_problems(source: str, split: str, max_images: int | None = None, pictures: bool = True) -> datasets.Dataset:
    """
    Args:
        source: one of
            - `demo`, or `demo:2` and so on for a harder one (`demo.generate`);
            - a ScienceQA folder: `problems.json`, `pid_splits.json`, `images/SPLIT/ID/image.png`, perhaps
              `captions.json`;
            - an A-OKVQA folder: `aokvqa_v1p0_SPLIT.json`, and COCO's `coco/SPLIT2017/IMAGE_ID.jpg` in it or beside it;
            - a dataset of the Hub with the columns of `derek-thomas/ScienceQA`, by its id or downloaded;
            - a `.jsonl` / `.parquet` file of rows.
        split: `train`, `val` or `test`.
        max_images: the most pictures of a problem. Of ScienceQA's (`image.png`, then its choices' `choice_0.png` and so
            on) the first so many are taken: with 1 what the original takes. More in a row of a file are an error.
        pictures: whether the pictures' files must be there.

    Raises:
        ValueError: what is wrong with the source, by file or id, field, what was found and what was expected.
    """
    check_split(split, source)
    if source == "demo" or source.startswith("demo:"):
        return demo_problems(source, split)
    path = Path(source)
    if is_hub_dataset(source):
        return hub_problems(source, split)
    if path.is_dir():
        is_aokvqa = any(path.glob("aokvqa_*.json"))
        rows = aokvqa_rows(path, split) if is_aokvqa else scienceqa_rows(path, split, max_images)
        folder = path
    elif path.suffix in TABLE_READERS:
        rows, folder = table_rows(path, split), path.parent
    else:
        raise ValueError(f"dataset is {source!r}; expected {SOURCES}.")
    complete = checked(rows, source, folder if pictures else None, max_images)
    # By column, because Dataset.from_list fails where a split has no rows.
    return datasets.Dataset.from_dict({name: [row[name] for row in complete] for name in FEATURES}, features=FEATURES)


def known_as(source: str) -> str | None:
    """By what name the field knows what a source holds: `demonstration`, `ScienceQA` or `A-OKVQA`; None of own rows."""
    path = Path(source)
    if source == "demo" or source.startswith("demo:"):
        return "demonstration"
    is_scienceqa = path.is_dir() and (is_hub_dataset(source) or (path / "pid_splits.json").is_file())
    if is_scienceqa or source == SCIENCEQA_ID:
        return "ScienceQA"
    return "A-OKVQA" if path.is_dir() and any(path.glob("aokvqa_*.json")) else None


def demo_problems(source: str, split: str) -> datasets.Dataset:
    from mmcot import demo

    difficulty = source.partition(":")[2] or "1"
    if difficulty not in map(str, range(1, 10)):
        raise ValueError(f"dataset is {source!r}; the difficulty of demo is a number from 1 to 9.")
    drawn = {"split": split, "difficulty": int(difficulty)}
    # datasets knows a generator by its name alone, and would serve what an older demo.py drew.
    version = datasets.fingerprint.Hasher.hash((inspect.getsource(demo), drawn))
    with without_dataset_bars():
        return datasets.Dataset.from_generator(demo.generate, gen_kwargs=drawn, features=FEATURES, fingerprint=version)


def scienceqa_rows(folder: Path, split: str, max_images: int | None) -> Iterator[dict[str, Any]]:
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
        check_split(problem.get("split", split), f"{folder}, problem {problem_id}")
        yield {
            **{name: problem[name] for name in problem.keys() & FEATURES.keys()},
            "id": problem_id,
            "context": problem.get("hint"),
            "images": scienceqa_pictures(folder, problem, f"images/{split}/{problem_id}")[:max_images],
            "caption": captions.get(problem_id),
            "split": split,
        }


def scienceqa_pictures(folder: Path, problem: dict[str, Any], pictures: str) -> list[str]:
    """The question's picture, if it has one, then those of its choices."""
    question = [f"{pictures}/image.png"] if problem.get("image") else []
    names = (f"{pictures}/choice_{number}.png" for number in range(len(problem.get("choices") or [])))
    return [*question, *(name for name in names if (folder / name).is_file())]


def aokvqa_rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The release's own files (https://github.com/allenai/aokvqa, load_aokvqa.py). Its test split has no answers."""
    file = folder / f"aokvqa_v1p0_{split}.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no {file.name}; expected an A-OKVQA folder.")
    pictures = "coco" if (folder / "coco").is_dir() else "../coco"
    for number, entry in enumerate(read_json(file, list)):
        for name, kind in (("question_id", str), ("image_id", int)):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise ValueError(f"{file}, entry {number + 1}: {shown(entry)} has no {name} of type {kind.__name__}.")
        rationales = entry.get("rationales") or []
        yield {
            **{name: entry[name] for name in ("question", "choices", "direct_answers") if name in entry},
            "id": entry["question_id"],
            "images": [f"{pictures}/{split}2017/{entry['image_id']:012}.jpg"],
            "answer": entry.get("correct_choice_idx"),
            "solution": rationales[0] if rationales else None,
            "rationales": rationales,
            "split": split,
        }


def is_hub_dataset(source: str) -> bool:
    """Whether it is the id of one, or a folder that one was downloaded to."""
    path = Path(source)
    if path.is_dir():
        return not (path / "problems.json").exists() and any(path.rglob("*.parquet"))
    return not path.exists() and path.suffix == "" and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) is not None


def hub_problems(source: str, split: str, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """
    A dataset with ScienceQA's columns, each row checked as it is brought into the schema. It stays on disk, or where it
    is with `streaming`. It has no ids: they are `SPLIT-ROW` (of a stream, the row of its file). Its `validation` is our
    `val`.
    """
    try:
        loaded = datasets.load_dataset(source, split={"val": "validation"}.get(split, split), streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset is {source!r}; expected {SOURCES}. As a dataset of the Hub its split {split!r} cannot be loaded "
            f"({error})."
        ) from error
    if loaded.column_names is None:
        raise ValueError(
            f"{source}: the columns of its split {split!r} are not known before it is read; expected Parquet."
        )
    for name in set(loaded.column_names) - HUB_COLUMNS:
        raise ValueError(f"{source}: unknown column {name!r}; expected those of derek-thomas/ScienceQA.")
    if "image" in loaded.column_names:
        loaded = loaded.cast_column("image", datasets.Image(decode=False))

    def problem(columns: dict[str, Any], row: int) -> dict[str, Any]:
        picture = columns.get("image")
        if picture and not picture.get("bytes"):
            # It would be opened on the machine that reads the dataset, whatever lies there.
            raise ValueError(
                f"{source}, row {row}: image is the path {shown(picture.get('path'))}; expected its bytes."
            )
        known = {name: columns[name] for name in columns.keys() & FEATURES.keys()}
        mapped = {"id": f"{split}-{row}", "context": columns.get("hint"), "images": [picture] if picture else []}
        (complete,) = checked([{**known, **mapped, "split": split}], source, folder=None, max_images=None)
        return complete

    named = {} if streaming else {"desc": f"reading {source}"}
    return loaded.map(problem, with_indices=True, remove_columns=loaded.column_names, features=FEATURES, **named)


def member(data: dict[str, Any], name: str, kind: type, file: Path) -> Any:
    value = data.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{file}: {name!r} is {shown(value)}; expected a {kind.__name__}.")
    return value


def table_rows(file: Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a file; one without `split` serves every split, one with it gives the rows of that split."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file.")
    for number, row in enumerate(TABLE_READERS[file.suffix](file)):
        where = f"{file}, row {number + 1}"
        for name in row.keys() - FEATURES.keys():
            near = difflib.get_close_matches(name, FEATURES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{where}: unknown column {name!r}{hint}; known: {', '.join(FEATURES)}.")
        row = {name: value for name, value in row.items() if value is not None}
        check_split(row.get("split", split), where)
        if row.get("split", split) == split:
            yield {"id": f"{split}-{number}", "split": split, **row}


def jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{file}, line {number}: not valid JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: found {shown(row)}; expected a problem as a JSON object.")
            yield row


def parquet_rows(file: Path) -> list[dict[str, Any]]:
    try:
        return pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a whole Parquet file ({error}).") from error


TABLE_READERS = {".jsonl": jsonl_rows, ".parquet": parquet_rows}


def checked(
    rows: Iterable[dict[str, Any]], source: str, folder: Path | None, max_images: int | None
) -> list[dict[str, Any]]:
    """
    The rows with every column of the schema; the first bad one is an error that says where and what. Pictures are
    looked for in `folder`, where there is one.
    """
    complete, ids = [], set()
    for row in rows:
        row = {name: empty(name) if row.get(name) is None else row[name] for name in FEATURES}
        row["id"] = str(row["id"])
        where = f"{source}, problem {row['id']}"
        if row["id"] in ids:
            raise ValueError(f"{where}: this id stands there twice; expected one problem per id.")
        ids.add(row["id"])
        check_fields(row, where)
        if max_images is not None and len(row["images"]) > max_images:
            raise ValueError(
                f"{where}: images holds {len(row['images'])} pictures; max_images is {max_images}. Raise it "
                f"(--max_images) or leave pictures out."
            )
        row["images"] = [stored(picture, folder, where) for picture in row["images"]]
        complete.append(row)
    return complete


def empty(column: str) -> Any:
    return {"answer": -1}.get(column, [] if isinstance(FEATURES[column], datasets.List) else "")


def check_split(split: Any, where: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{where}: split is {shown(split)}; expected one of {', '.join(SPLITS)}.")


def check_fields(row: dict[str, Any], where: str) -> None:
    choices, answer = row["choices"], row["answer"]
    for name in FEATURES:
        if FEATURES[name] == _TEXT and not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} is {shown(row[name])}; expected a text.")
    if not row["question"].strip():
        raise ValueError(f"{where}: question is {row['question']!r}; expected a text that is not empty.")
    for name in ("choices", "rationales", "direct_answers"):
        if not isinstance(row[name], list) or not all(isinstance(text, str) for text in row[name]):
            raise ValueError(f"{where}: {name} is {shown(row[name])}; expected a list of texts.")
    # bool is an int to Python, and an answer `true` is not choice 1.
    if type(answer) is not int or (answer != -1 and choices and not 0 <= answer < len(choices)):
        indices = f"an index from 0 to {len(choices) - 1}, or " if choices else ""
        raise ValueError(f"{where}: answer is {shown(answer)}; expected {indices}-1 for unknown.")
    if not isinstance(row["images"], list):
        raise ValueError(f"{where}: images is {shown(row['images'])}; expected a list of pictures.")


def stored(picture: Any, folder: Path | None, where: str) -> dict[str, Any]:
    """A picture as the schema holds it. A file must be there and not be empty (with a folder), and is not read."""
    picture = {"path": picture} if isinstance(picture, str) else picture
    if isinstance(picture, dict) and picture.get("bytes") and isinstance(picture["bytes"], bytes):
        # Without their path: datasets would take what lies there, seen from this process, instead of the bytes.
        return {"bytes": picture["bytes"], "path": None}
    if not isinstance(picture, dict) or picture.get("bytes") or not isinstance(picture.get("path"), str):
        raise ValueError(f'{where}: images holds {shown(picture)}; expected paths or {{"bytes", "path"}}.')
    if folder is None:
        return {"bytes": None, "path": picture["path"]}
    path = folder / picture["path"]
    check_file(path, where)
    return {"bytes": None, "path": str(path)}


def check_file(picture: Path, where: str) -> None:
    if not picture.is_file():
        raise ValueError(f"{where}: picture {picture} is missing.")
    if picture.stat().st_size == 0:
        raise ValueError(f"{where}: picture {picture} is an empty file.")


def shown(value: Any) -> str:
    """What was found, for an error: whole if it is short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def first_few(names: list[str]) -> str:
    """Of many names those that an error can show."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def without_gold(problems: datasets.Dataset) -> datasets.Dataset:
    """The problems as they may be shown to a model that answers them."""
    return problems.remove_columns([name for name in GOLD_COLUMNS if name in problems.column_names])


def is_answered(problems: datasets.Dataset) -> bool:
    """Whether the answer of any is known. Of A-OKVQA's test split none is."""
    return any(answer >= 0 for answer in problems["answer"])


def require_answers(problems: datasets.Dataset) -> None:
    """For training and scoring: every problem has choices and a known answer."""
    for problem in problems.select_columns(["id", "choices", "answer"]):
        require_answer(problem)


def require_answer(problem: dict[str, Any]) -> None:
    choices, answer = problem["choices"], problem["answer"]
    if not choices:
        raise ValueError(f"problem {problem['id']}: choices is empty; training and scoring need at least one choice.")
    if not 0 <= answer < len(choices):
        raise ValueError(
            f"problem {problem['id']}: answer is {answer}; training and scoring need an index from 0 to "
            f"{len(choices) - 1}."
        )


def join_captions(problems: datasets.Dataset, path: str) -> datasets.Dataset:
    """The problems with their captions from a `captions.json`; every problem with a picture must have one there."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; expected a captions.json.")
    captions = member(read_json(Path(path)), "captions", dict, Path(path))
    rows = problems.select_columns(["id", "images"])
    absent = [row["id"] for row in rows if row["images"] and not isinstance(captions.get(row["id"]), str)]
    if absent:
        raise ValueError(f"{path}: {len(absent)} problems with a picture have no caption there: {first_few(absent)}.")
    return with_column(problems, "caption", [captions.get(problem_id) or "" for problem_id in problems["id"]])


def join_column(problems: datasets.Dataset, column: str, path: str) -> datasets.Dataset:
    """The problems with a text column from a JSON file `{id: text}`, which must have every problem's id."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; expected JSON of the form {{id: text}}.")
    texts = read_json(path)
    absent = [problem_id for problem_id in problems["id"] if not isinstance(texts.get(problem_id), str)]
    if absent:
        raise ValueError(f"{path}: {len(absent)} of {len(problems)} problems have no text there: {first_few(absent)}.")
    return with_column(problems, column, [texts[problem_id] for problem_id in problems["id"]])


def with_column(problems: datasets.Dataset, column: str, texts: list[str]) -> datasets.Dataset:
    """The problems with these texts in that column, whether they have it or not."""
    if column in problems.column_names:
        problems = problems.remove_columns(column)
    with without_dataset_bars():
        return problems.add_column(column, texts, feature=_TEXT)
