"""Reads corpora: JSON lines of passages, folders of texts, the lectures of training problems, the study corpus.

No row of validation or test is read: lectures come from the training split, and a line that names another split is an
error. `index.py` writes a corpus to disk as an index.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmcot.problems import study
from mmcot.problems.columns import log_once, logger
from mmcot.problems.known_datasets import is_study, known_dataset_name
from mmcot.problems.opening import Given
from mmcot.problems.row_files import jsonl_rows
from mmcot.problems.schema import check_characters, short_repr
from mmcot.problems.sources import load_problems, name_of
from mmcot.storage.digests import sha256_of_text
from modeling_mmcot.retrieval_mmcot import Passage
from modeling_mmcot.stage_mmcot import fold

LECTURES = "lectures"  # as a corpus of a stage: the lectures of the run's training problems
TEXT_FILES = (".txt", ".md")
COLUMNS = ("id", "title", "text", "source", "problem_ids", "split")


def read_corpora(
    corpora: Sequence[str | Path] = (), lectures: str | Given | None = None, **reading: Any
) -> list[Passage]:
    """
    Return the passages of several corpora in one list.

    Args:
        corpora: `.jsonl` files of passages, and folders of `.txt` and `.md` files.
        lectures: a source of problems; the lectures of its training split become passages.
        reading: further keywords of `load_problems`.

    Raises:
        ValueError: a corpus is empty or cannot be read, or an id occurs twice.
    """
    if not corpora and lectures is None:
        raise ValueError(
            "no corpus is given; expected a .jsonl file, a folder of texts, study, or a source of lectures."
        )
    passages = [passage for corpus in corpora for passage in read_corpus(corpus)]
    if lectures is not None:
        passages += read_lectures(lectures, **reading)
    check_ids(passages)
    return passages


def read_corpus(corpus: str | Path) -> list[Passage]:
    """
    Return the passages of a `.jsonl` file or a folder of texts, or the corpus of the study problems (`study[@LEVEL]`).

    Raises:
        ValueError: there is no such file or folder, or it has no passage.
    """
    if is_study(str(corpus)):
        _, difficulty = study.parse_source(str(corpus))
        return [Passage(*passage) for passage in study.corpus(difficulty)]
    path = Path(corpus)
    if path.is_dir():
        passages = list(read_texts(path))
        expected = f"paragraphs in {' and '.join(TEXT_FILES)} files"
    elif path.is_file() and path.suffix == ".jsonl":
        passages = list(read_jsonl(path))
        expected = "a passage in each line"
    else:
        found = "is another kind of file" if path.exists() else "does not exist"
        raise ValueError(f"corpus {path} {found}; expected a .jsonl file, a folder of texts, or study.")
    if not passages:
        raise ValueError(f"corpus {path} is empty; expected {expected}.")
    return passages


def read_jsonl(file: Path) -> Iterator[Passage]:
    """
    Yield the passages of a file with `id`, `text` and optionally `title` and `source` in each line.

    Raises:
        ValueError: a line is not a passage, or belongs to another split than train. The message names file, line and
            field.
    """
    for where, row in jsonl_rows(file):
        if row.get("split") not in (None, "", "train"):
            raise ValueError(f"{where}: split is {row['split']!r}; nothing of validation or test may be in a corpus.")
        for name, default in (("id", None), ("text", None), ("title", ""), ("source", file.name)):
            value = row.setdefault(name, default)
            if not isinstance(value, str) or (default is None and not value.strip()):
                expected = "a text that is not empty" if default is None else "a text"
                raise ValueError(f"{where}: {name} is {short_repr(value)}; expected {expected}.")
            check_characters(value, name, where)
        ignored = sorted(row.keys() - set(COLUMNS))
        if ignored:
            log_once(logger, f"{file}: columns that are not read: {', '.join(ignored)}")
        yield Passage(row["id"], row["title"], row["text"], row["source"], problem_ids=problem_ids_of(row, where))


def problem_ids_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """
    Return the ids of the training problems that have a lecture.

    Raises:
        ValueError: `problem_ids` is not a list of texts.
    """
    ids = row.get("problem_ids", [])
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ValueError(f"{where}: problem_ids is {short_repr(ids)}; expected a list of texts.")
    return tuple(ids)


def read_texts(folder: Path) -> Iterator[Passage]:
    """
    Yield the paragraphs of the `.txt` and `.md` files in a folder. The title of a paragraph is the last Markdown
    heading before it, or the name of its file.

    Raises:
        ValueError: a file is not UTF-8 text.
    """
    for file in sorted(path for path in folder.rglob("*") if path.suffix in TEXT_FILES and path.is_file()):
        name = file.relative_to(folder).as_posix()
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
        sections = markdown_sections(text, file.stem) if file.suffix == ".md" else [(file.stem, text)]
        paragraphs = [
            (title, paragraph.strip())
            for title, section in sections
            for paragraph in re.split(r"\n\s*\n", section)
            if paragraph.strip()
        ]
        for number, (title, paragraph) in enumerate(paragraphs, start=1):
            yield Passage(f"{name}#{number}", title, paragraph, name)


def markdown_sections(text: str, title: str) -> list[tuple[str, str]]:
    """Return each heading of a Markdown text with the text below it; the text before all headings gets `title`."""
    before, *rest = re.split(r"^#+[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$", text, flags=re.MULTILINE)
    return [(title, before), *((heading, below) for heading, below in zip(rest[::2], rest[1::2], strict=True))]


def read_lectures(source: str | Path | Given, **reading: Any) -> list[Passage]:
    """
    Return one passage for each distinct lecture of the training split, with the ids of the problems that have it. Two
    lectures are equal if they differ only by white space.

    Args:
        source: a source of problems.
        reading: further keywords of `load_problems`.

    Raises:
        ValueError: the source cannot be read, or its training split has no lecture.
    """
    problems = load_problems(source, "train", pictures=False, **reading)
    return lecture_passages(problems.select_columns(["id", "skill", "lecture"]), source)


def lecture_passages(problems: Iterable[dict[str, str]], source: str | Path | Given) -> list[Passage]:
    """Return one passage for each distinct lecture of training problems, as `read_lectures` does."""
    lectures: dict[str, list[dict[str, str]]] = {}
    for problem in problems:
        if problem["lecture"].strip():
            lectures.setdefault(fold(problem["lecture"]), []).append(problem)
    if not lectures:
        raise ValueError(f"{name_of(source)}: no training problem has a lecture.")
    # Without the folder of the source, because an index may be published.
    origin = f"{known_dataset_name(str(source)) or Path(name_of(source)).name}, lectures of the training split"
    return [
        Passage(
            f"lecture-{sha256_of_text(text)[:12]}",
            problems[0]["skill"],
            problems[0]["lecture"],
            origin,
            problem_ids=tuple(problem["id"] for problem in problems),
        )
        for text, problems in lectures.items()
    ]


def check_ids(passages: list[Passage]) -> None:
    """
    Raises:
        ValueError: two passages have the same id.
    """
    sources: dict[str, str] = {}
    for passage in passages:
        if passage.id in sources:
            raise ValueError(
                f"passage {passage.id!r} occurs twice, in {sources[passage.id]} and in {passage.source}; expected one "
                f"passage per id."
            )
        sources[passage.id] = passage.source
