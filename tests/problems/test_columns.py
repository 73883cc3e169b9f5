"""Columns of users' files: other names, empty cells, integers that pandas made floats, columns that are not read."""

import json
import logging

import datasets
import numpy as np
import pandas
import pytest
from problem_files import ROW, error_of, has_all, jsonl, parquet, png

from mmcot.pictures.reading import read_pictures
from mmcot.problems.columns import is_absent, is_near, parse_columns
from mmcot.problems.schema import FEATURES
from mmcot.problems.sources import load_problems


def table(folder, text, suffix=".csv"):
    file = folder / f"problems{suffix}"
    file.write_text(text, encoding="utf-8")
    return f"test={file}"


# Names.


def test_reads_one_picture_from_image(tmp_path):
    (tmp_path / "red.png").write_bytes(png())
    rows = [{**ROW, "image": "red.png"}, {**ROW, "id": "p2", "image": None, "images": ["red.png"]}]
    rows += [{**ROW, "id": "p3", "image": ""}, {**ROW, "id": "p4", "image": "red.png", "images": []}]
    problems = load_problems(jsonl(tmp_path, *rows), "test")
    assert [len(images) for images in problems["images"]] == [1, 1, 0, 1]
    assert read_pictures(problems[0])[0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"image": "a.png", "images": ["b.png"]}, ["both image and images"]),
        ({"image": ["a.png"]}, ["image is ['a.png']", "one picture"]),
        ({"hint": "Look up.", "context": "Look down."}, ["context is 'Look down.'", "hint is 'Look up.'"]),
    ],
)
def test_refuses_a_column_given_twice_or_in_another_form(tmp_path, fields, found):
    file = jsonl(tmp_path, {**ROW, **fields})
    assert has_all(error_of(load_problems, file, "test"), f"{file}, line 1", *found)


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_reads_a_hint_as_context(tmp_path, write):
    pairs = [("Look.", ""), ("Same.", "Same."), ("", "Only here."), (None, None)]
    rows = [{**ROW, "id": str(number), "hint": pair[0], "context": pair[1]} for number, pair in enumerate(pairs)]
    assert load_problems(write(tmp_path, *rows), "test")["context"] == ["Look.", "Same.", "Only here.", ""]


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_names_unread_columns_in_one_warning(tmp_path, caplog, write):
    rows = [{**ROW, "source": "web", "image_id": 3}, {**ROW, "id": "p2", "source": "book", "image_id": 4}]
    file = write(tmp_path, *rows)
    with caplog.at_level(logging.WARNING, logger="mmcot"):
        for split in ("train", "val", "test"):
            problems = load_problems(file, split)
    assert problems.features == FEATURES and len(problems) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: columns that are not read: source, image_id"
    ]


@pytest.mark.parametrize(
    "name", ["quesion", "Question", "qeustion", "questions", "choice", "answers", "contxt", "hints"]
)
def test_refuses_a_near_miss_of_a_known_name(tmp_path, name):
    file = jsonl(tmp_path, ROW, {**ROW, "id": "p2", name: "x"})
    assert has_all(error_of(load_problems, file, "test"), f"{file}, line 2", f"unknown column {name!r}", "did you mean")


def test_does_not_treat_other_names_as_near_misses():
    names = ("image_id", "question_id", "category_id", "source", "pid", "task", "answer_text", "caption_model", "note")
    assert not [name for name in names if any(is_near(name, known) for known in (*FEATURES, "hint", "image"))]


def test_does_not_read_a_rationale_of_the_file(tmp_path, caplog):
    """A stage's prompt would read it as if an earlier stage had written it."""
    with caplog.at_level(logging.WARNING, logger="mmcot"):
        problems = load_problems(jsonl(tmp_path, {**ROW, "rationale": "Because gold."}), "test")
    assert "rationale" not in problems.column_names and "Because gold." not in json.dumps(problems[0])
    assert has_all(caplog.text, "columns that are not read: rationale", "`solution`")
    for columns in ({"rationale": "rationale"}, "rationale=rationale"):
        with pytest.raises(ValueError, match="columns names 'rationale'"):
            load_problems(jsonl(tmp_path, {**ROW, "rationale": "Because gold."}), "test", columns=columns)


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(
    "columns", ["question=query,image=img,answer=label", {"question": "query", "image": "img", "answer": "label"}]
)
def test_reads_renamed_columns(tmp_path, write, columns):
    (tmp_path / "red.png").write_bytes(png())
    row = {
        "query": "Which?",
        "img": "red.png",
        "label": 1,
        "choices": ["a", "b"],
        "split": "test",
        "question": "Not me",
    }
    (problem,) = load_problems(write(tmp_path, row), "test", columns=columns)
    assert (problem["question"], problem["answer"], len(problem["images"])) == ("Which?", 1, 1)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ("question", "expected OURS=THEIRS"),
        ("question=", "expected OURS=THEIRS"),
        ("qestion=query", "columns names 'qestion'"),
        ("question=gone", "there is no column 'gone'; found id, question"),
    ],
)
def test_refuses_a_wrong_columns_option(tmp_path, columns, found):
    assert has_all(error_of(load_problems, jsonl(tmp_path, ROW), "test", None, True, columns), found)


def test_refuses_the_columns_option_for_the_demonstration():
    assert has_all(error_of(load_problems, "demo", "test", None, True, "question=query"), "demo", "'query'")
    assert parse_columns(None) == {}


# Values.


@pytest.mark.parametrize("nothing", [None, float("nan"), np.float32("nan"), pandas.NA, pandas.NaT])
def test_treats_null_values_as_absent(nothing):
    assert is_absent(nothing)


@pytest.mark.parametrize("something", ["", 0, False, "nan", [], [None]])
def test_treats_other_values_as_present(something):
    assert not is_absent(something)


def test_treats_nan_in_a_file_as_absent(tmp_path):
    """`json` writes NaN, and reads it."""
    nothing = dict.fromkeys(("context", "answer", "images", "caption", "image", "hint", "lecture"), float("nan"))
    (problem,) = load_problems(jsonl(tmp_path, {**ROW, **nothing}), "test")
    assert (problem["context"], problem["answer"], problem["images"], problem["caption"]) == ("", -1, [], "")


def test_reads_a_pandas_table(tmp_path):
    """pandas makes integers floats if one is missing, and it writes a column for its index."""
    frame = pandas.DataFrame(
        {
            "question": ["Why?", "How?"],
            "choices": [["a", "b", "c"], ["d", "e"]],
            "answer": [2, None],
            "context": [None, "Look."],
            "grade": pandas.array([pandas.NA, "grade2"], dtype="string"),
        },
        index=[5, 7],
    )
    frame.to_parquet(tmp_path / "frame.parquet")
    for source in (str(tmp_path / "frame.parquet"), datasets.Dataset.from_pandas(frame)):
        source = f"test={source}" if isinstance(source, str) else datasets.DatasetDict(test=source)
        problems = load_problems(source, "test")
        assert problems["answer"] == [2, -1]
        assert problems["context"] == ["", "Look."] and problems["grade"] == ["", "grade2"]


def test_accepts_a_whole_float_as_answer(tmp_path):
    assert load_problems(jsonl(tmp_path, {**ROW, "answer": 1.0}), "test")["answer"] == [1]
    message = error_of(load_problems, jsonl(tmp_path, {**ROW, "answer": 0.5}), "test")
    assert has_all(message, "line 1", "problem p1", "answer is 0.5", "index from 0 to 1")


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("name", ["context", "grade", "caption", "question"])
@pytest.mark.parametrize("value", [3, 2.5, True, ["a", "b"]])
def test_refuses_a_number_or_a_list_in_a_text_column(tmp_path, write, name, value):
    file = write(tmp_path, {**ROW, name: value})
    place = "line 1" if write is jsonl else "row 1"
    assert has_all(error_of(load_problems, file, "test"), f"{file}, {place}, problem p1: {name} is {value!r}", "a text")


@pytest.mark.parametrize("name", ["question", "context", "choices", "images", "rationales"])
def test_refuses_half_a_surrogate_pair(tmp_path, name):
    broken = "\ud83d and so on"
    value = [broken, "b"] if name in ("choices", "images", "rationales") else broken
    file = jsonl(tmp_path, {**ROW, "id": "p0"}, {**ROW, name: value})
    assert has_all(error_of(load_problems, file, "test"), f"{file}, line 2", "problem p1", name, "surrogate")
    assert load_problems(jsonl(tmp_path, {**ROW, "context": "a whole one: 😀"}), "test")["context"][0].endswith("😀")


def test_refuses_more_choices_than_letters(tmp_path):
    file = jsonl(tmp_path, {**ROW, "choices": [str(number) for number in range(27)]})
    assert has_all(error_of(load_problems, file, "test"), "line 1", "problem p1", "choices has 27 texts", "26 at most")
    assert len(load_problems(jsonl(tmp_path, {**ROW, "choices": [str(n) for n in range(26)]}), "test")) == 1


def test_reads_class_labels_of_text_columns_as_names(tmp_path):
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=["no", "yes"]),
            "topic": datasets.ClassLabel(names=["cats", "dogs"]),
        }
    )
    rows = {"question": ["Is it?"], "choices": [["no", "yes"]], "answer": [1], "topic": [1]}
    (problem,) = load_problems(datasets.DatasetDict(test=datasets.Dataset.from_dict(rows, features)), "test")
    assert (problem["answer"], problem["topic"]) == (1, "dogs")


# Text files.


def test_skips_blank_lines_but_counts_them(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf\n" + json.dumps(ROW).encode() + b"\r\n  \n\n" + json.dumps({**ROW, "id": 2}).encode()
    )
    assert load_problems(str(file), "test")["id"] == ["p1", "2"]
    file.write_text(json.dumps(ROW) + "\n\n{oops}\n\n")
    assert has_all(error_of(load_problems, str(file), "test"), f"{file}, line 3", "JSON")


CSV = """id,question,choices,answer,image,context
a,"Which, then?","[""red"", ""blue""]",1,red.png,nan
b,Why?,"[""x"", ""y""]",,,"two
lines"
c,How?,,NaN,,
"""


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_reads_csv_and_tsv_tables(tmp_path, suffix):
    (tmp_path / "red.png").write_bytes(png())
    frame = pandas.read_csv(table(tmp_path, CSV).removeprefix("test="), keep_default_na=False, dtype=str)
    frame.to_csv(tmp_path / f"problems{suffix}", sep="\t" if suffix == ".tsv" else ",", index=False)
    first, second, third = load_problems(f"test={tmp_path / f'problems{suffix}'}", "test")
    assert (first["question"], first["choices"], first["answer"]) == ("Which, then?", ["red", "blue"], 1)
    assert (first["context"], len(first["images"])) == ("", 1)
    assert (second["answer"], second["context"], second["images"]) == (-1, "two\nlines", [])
    assert (third["choices"], third["answer"]) == ([], -1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("question,choices\nWhy?,red or blue\n", ["line 2", "choices is 'red or blue'", '["red", "blue"]']),
        ("question,images\nWhy?,a.png\n", ["line 2", "images is 'a.png'", "JSON list"]),
        ("question,answer\nWhy?,B\n", ["line 2", "answer is 'B'", "number of a choice"]),
        ("question,context\nWhy?,a,b\n", ["line 2", "3 cells; expected 2"]),
        ("question,context\nWhy?\n", ["line 2", "1 cells; expected 2"]),
        ('question,context\nWhy?,"open\n', ["line", "not a table"]),
        ("question,contexts\nWhy?,a\n", ["line 2", "unknown column 'contexts'", "'context'"]),
    ],
)
def test_names_a_bad_line_of_a_table(tmp_path, text, found):
    assert has_all(error_of(load_problems, table(tmp_path, text), "test"), tmp_path / "problems.csv", *found)


def test_refuses_a_table_in_another_encoding(tmp_path):
    (tmp_path / "problems.csv").write_bytes("question\nWo ist der Bär?\n".encode("latin-1"))
    assert has_all(error_of(load_problems, f"test={tmp_path / 'problems.csv'}", "test"), "problems.csv", "UTF-8")
