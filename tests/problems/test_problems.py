"""Tests of the schema of problems: the problems from a file of rows, and one clear error for each bad row.

test_demo.py tests the content of the demonstration problems; test_training.py tests how a run reports an error.
"""

import json
import subprocess
import sys

import datasets
import pytest
from conftest import REPOSITORY
from PIL import Image, ImageFile
from problem_files import ROW, check_pictures, error_of, has_all, jsonl, parquet, png, scienceqa

from mmcot.pictures.reading import read_pictures
from mmcot.problems.schema import FEATURES, GOLD_COLUMNS, join_column, require_answers, without_gold
from mmcot.problems.sources import load_problems
from modeling_mmcot.pictures_mmcot import as_pictures

# Files of rows.


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_accepts_a_question_alone(tmp_path, write):
    problems = load_problems(f"test={write(tmp_path, {'question': 'Why?'}, {'question': 'How?'})}", "test")
    assert problems.features == FEATURES
    texts = {name: "" for name, feature in FEATURES.items() if feature == datasets.Value("string")}
    lists = {name: [] for name in ("choices", "images", "rationales", "direct_answers", "gold_passages")}
    defaults = {**texts, **lists, "answer": -1, "split": "test"}
    assert problems[0] == {**defaults, "id": "test-0", "question": "Why?"}
    assert problems[1] == {**defaults, "id": "test-1", "question": "How?"}


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_returns_only_rows_of_the_requested_split(tmp_path, write):
    rows = [{**ROW, "id": name, "split": split} for name, split in [("a", "test"), ("b", "val"), ("c", "test")]]
    file = write(tmp_path, *rows)
    assert load_problems(file, "test")["id"] == ["a", "c"]
    assert load_problems(file, "val")["id"] == ["b"]
    assert len(load_problems(file, "train")) == 0


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_fills_an_empty_cell_with_the_default(tmp_path, write):
    rows = [{**ROW, "id": None, "answer": None, "lecture": None}, {**ROW, "lecture": "Colors."}]
    first, second = load_problems(write(tmp_path, *rows), "test")
    assert (first["id"], first["answer"], first["lecture"], first["split"]) == ("test-0", -1, "", "test")
    assert (second["id"], second["answer"], second["lecture"]) == ("p1", 1, "Colors.")


def test_converts_numeric_ids_to_texts(tmp_path):
    assert load_problems(jsonl(tmp_path, {**ROW, "id": 7}), "test")["id"] == ["7"]


def test_reads_pictures_by_relative_and_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for name in ("pictures/red.png", "blue.png", "green.png"):
        (tmp_path / "data" / name).write_bytes(png(name.removeprefix("pictures/").removesuffix(".png")))
    absolute = str(tmp_path / "data" / "blue.png")
    images = ["pictures/red.png", absolute, {"bytes": None, "path": "green.png"}]
    file = jsonl(tmp_path / "data", {**ROW, "images": images})
    monkeypatch.chdir("/")  # because paths are relative to the file, not to the working directory
    problem = load_problems(file, "test")[0]
    assert [picture["bytes"] for picture in problem["images"]] == [None] * 3
    assert problem["images"][1]["path"] == absolute
    colors = [picture.getpixel((0, 0)) for picture in read_pictures(problem)]
    assert colors == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]


def test_reads_bytes_rather_than_the_file_at_their_path(tmp_path, monkeypatch):
    (tmp_path / "image.png").write_bytes(png("green"))
    monkeypatch.chdir(tmp_path)
    stored = [{"bytes": png("blue"), "path": "image.png"}, {"bytes": png("red"), "path": None}]
    problem = load_problems(parquet(tmp_path, {**ROW, "images": stored}), "test")[0]
    assert [picture.getpixel((0, 0)) for picture in read_pictures(problem)] == [(0, 0, 255), (255, 0, 0)]


def test_reads_problems_that_to_parquet_wrote(tmp_path):
    (tmp_path / "red.png").write_bytes(png())
    problems = load_problems(jsonl(tmp_path, {**ROW, "images": ["red.png"]}), "test")
    problems.to_parquet(tmp_path / "again.parquet")
    again = load_problems(str(tmp_path / "again.parquet"), "test")
    assert again.features == FEATURES
    assert again.remove_columns("images").to_list() == problems.remove_columns("images").to_list()
    assert read_pictures(again[0])[0].tobytes() == read_pictures(problems[0])[0].tobytes()


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"answer": 2}, ["problem p1", "answer is 2", "from 0 to 1", "-1"]),
        ({"answer": -2}, ["problem p1", "answer is -2", "from 0 to 1", "-1"]),
        ({"answer": "1"}, ["problem p1", "answer is '1'"]),
        ({"answer": True}, ["problem p1", "answer is True"]),
        ({"choices": "red"}, ["problem p1", "choices is 'red'", "list of texts"]),
        ({"choices": ["red", 3]}, ["problem p1", "choices is ['red', 3]", "list of texts"]),
        ({"question": " "}, ["problem p1", "question is ' '"]),
        ({"question": None}, ["problem p1", "question is ''"]),
        ({"lecture": ["a", "b"]}, ["problem p1", "lecture is ['a', 'b']", "expected a text"]),
        ({"lecture": list("a" * 999)}, ["problem p1", "lecture is ['a', 'a'", "…; expected a text"]),
        ({"split": "minitest"}, ["line 1", "split is 'minitest'", "train, val, test"]),
        ({"quesion": "Why?"}, ["line 1", "unknown column 'quesion'", "'question'"]),
        ({"images": "red.png"}, ["problem p1", "images is 'red.png'", "list"]),
        ({"images": [3]}, ["problem p1", "images contains 3", "paths"]),
        ({"images": [{"bytes": "iVBORw0K", "path": None}]}, ["problem p1", "images contains {'bytes'"]),
        ({"images": [{"bytes": None, "path": None}]}, ["problem p1", "images contains {'bytes'"]),
    ],
)
def test_names_a_bad_row(tmp_path, fields, found):
    file = jsonl(tmp_path, {**ROW, **fields})
    assert has_all(error_of(load_problems, file, "test"), file, *found)


def test_finds_an_unknown_split_in_any_row(tmp_path):
    file = jsonl(tmp_path, ROW, {**ROW, "id": "p2", "split": "minitest"})
    assert has_all(error_of(load_problems, file, "test"), f"{file}, line 2", "split is 'minitest'")


def test_refuses_an_id_that_occurs_in_two_rows(tmp_path):
    file = jsonl(tmp_path, ROW, {**ROW, "question": "Another?"})
    assert has_all(error_of(load_problems, file, "test"), file, "problem p1", "twice")


@pytest.mark.parametrize("line", [b"{oops}", b'{"question": "\xff"}', b'["a"]', b"3"])
def test_names_a_malformed_line_of_jsonl(tmp_path, line):
    file = tmp_path / "problems.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    assert has_all(error_of(load_problems, str(file), "test"), f"{file}, line 2", "JSON")


def test_refuses_a_file_that_is_not_parquet(tmp_path):
    file = tmp_path / "problems.parquet"
    file.write_text("id,question")
    assert has_all(error_of(load_problems, str(file), "test"), file, "not a complete Parquet file")


# Sources and splits.


@pytest.mark.parametrize("source", ["nothing", "problems.txt", "some/scienceqa"])
def test_lists_accepted_sources_for_an_unknown_source(source):
    assert has_all(
        error_of(load_problems, source, "test"), repr(source), "demo", "ScienceQA or A-OKVQA folder", ".jsonl"
    )


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet"])
def test_refuses_a_missing_file(tmp_path, name):
    assert has_all(error_of(load_problems, str(tmp_path / name), "test"), tmp_path / name, "no such file")


@pytest.mark.parametrize("split", ["minitest", "trainval", ""])
def test_lists_known_splits_for_an_unknown_split(tmp_path, split):
    folder = scienceqa(tmp_path, splits={"test": ["1"], "minitest": ["1"], "trainval": ["1"]})
    for source in ("demo", folder):
        assert has_all(error_of(load_problems, source, split), repr(split), "train, val, test")


def test_problems_import_neither_torch_nor_the_model():
    code = "import sys, mmcot.problems.sources; print({'torch', 'modeling_mmcot'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# Pictures.


def broken(kind: str) -> bytes | None:
    whole = png("noise")
    return {"missing": None, "an empty file": b"", "truncated": whole[: len(whole) // 2], "not an image": b"hi"}[kind]


@pytest.mark.parametrize("kind", ["missing", "an empty file"])
@pytest.mark.parametrize("source", ["jsonl", "scienceqa"])
def test_names_a_missing_or_empty_picture_at_load(tmp_path, kind, source):
    if source == "scienceqa":
        file, problem_id, picture = scienceqa(tmp_path), "1", tmp_path / "images/test/1/image.png"
    else:
        file, problem_id, picture = jsonl(tmp_path, {**ROW, "images": ["red.png"]}), "p1", tmp_path / "red.png"
    picture.unlink(missing_ok=True)
    if kind == "an empty file":
        picture.touch()
    where = file if source == "scienceqa" else f"{file}, line 1"
    assert has_all(error_of(load_problems, file, "test"), f"{where}, problem {problem_id}: picture {picture} is {kind}")


@pytest.mark.parametrize("kind", ["missing", "an empty file", "truncated", "not an image"])
def test_names_a_bad_picture_when_it_is_read(tmp_path, kind):
    (tmp_path / "red.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(png())
    rows = [{**ROW, "images": ["red.png"]}, {**ROW, "id": "p2", "images": ["red.png", "bad.png"]}]
    problems = load_problems(jsonl(tmp_path, *rows), "test")
    check_pictures(problems)
    (tmp_path / "bad.png").unlink()
    if broken(kind) is not None:
        (tmp_path / "bad.png").write_bytes(broken(kind))
    for message in (error_of(read_pictures, problems[1]), error_of(check_pictures, problems)):
        assert has_all(message, f"problem p2: picture {tmp_path / 'bad.png'} is {kind}")
    assert read_pictures(problems[0])


@pytest.mark.parametrize("kind", ["truncated", "not an image"])
def test_names_bad_bytes(tmp_path, kind):
    file = parquet(tmp_path, {**ROW, "images": [{"bytes": broken(kind), "path": None}]})
    assert has_all(error_of(check_pictures, load_problems(file, "test")), "problem p1", "given as bytes", kind)


def test_names_a_picture_with_a_damaged_chunk(tmp_path):
    whole = bytearray(png("noise"))
    whole[60] ^= 0xFF  # within the compressed rows
    (tmp_path / "bad.png").write_bytes(whole)
    problems = load_problems(jsonl(tmp_path, {**ROW, "images": ["bad.png"]}), "test")
    assert has_all(error_of(check_pictures, problems), "problem p1", tmp_path / "bad.png", "damaged")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_names_a_picture_too_large_to_decode(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(png())
    problems = load_problems(jsonl(tmp_path, {**ROW, "images": ["large.png"]}), "test")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert has_all(error_of(check_pictures, problems), "problem p1", tmp_path / "large.png", "too large")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_reads_pictures_of_any_mode_as_rgb(tmp_path, mode):
    (tmp_path / "red.png").write_bytes(png("white", mode=mode))
    (picture,) = as_pictures(read_pictures(load_problems(jsonl(tmp_path, {**ROW, "images": ["red.png"]}), "test")[0]))
    assert (picture.mode, picture.size, picture.getpixel((3, 3))) == ("RGB", (64, 64), (255, 255, 255))


def test_refuses_more_pictures_than_max_images(tmp_path):
    (tmp_path / "red.png").write_bytes(png())
    file = jsonl(tmp_path, {**ROW, "images": ["red.png"] * 3})
    assert len(load_problems(file, "test", max_images=3)[0]["images"]) == 3
    assert has_all(error_of(load_problems, file, "test", 2), "problem p1", "3 pictures", "max_images is 2")


def test_does_not_look_for_files_without_pictures(tmp_path):
    file = jsonl(tmp_path, {**ROW, "images": ["nowhere.png"]})
    assert has_all(error_of(load_problems, file, "test"), "nowhere.png is missing")
    assert load_problems(file, "test", pictures=False)[0]["images"] == [{"bytes": None, "path": "nowhere.png"}]


def test_reads_no_pictures_of_a_problem_without_picture(tmp_path):
    assert read_pictures(load_problems(jsonl(tmp_path, ROW), "test")[0]) == []


# Gold.


def test_without_gold_removes_only_the_gold_columns(tmp_path):
    problems = load_problems(jsonl(tmp_path, {**ROW, "lecture": "Colors.", "solution": "It is."}), "test")
    assert set(problems.column_names) - set(without_gold(problems).column_names) == set(GOLD_COLUMNS)
    assert without_gold(without_gold(problems)).column_names == without_gold(problems).column_names


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"choices": [], "answer": -1}, ["choices is empty", "at least one choice"]),
        ({"choices": [], "answer": 0}, ["choices is empty", "at least one choice"]),
        ({"answer": -1}, ["answer is -1", "index from 0 to 1"]),
    ],
)
def test_loads_a_problem_without_answer_unless_answers_are_required(tmp_path, fields, found):
    problems = load_problems(jsonl(tmp_path, {**ROW, "id": "p0"}, {**ROW, **fields}), "test")
    assert has_all(error_of(require_answers, problems), "problem p1", *found)


def test_accepts_one_choice(tmp_path):
    require_answers(load_problems(jsonl(tmp_path, {**ROW, "choices": ["red"], "answer": 0}), "test"))


# A column joined by id.


def texts_file(folder, texts) -> str:
    (folder / "texts.json").write_text(texts if isinstance(texts, str) else json.dumps(texts))
    return str(folder / "texts.json")


@pytest.mark.parametrize("column", ["rationale", "solution"])
def test_join_adds_or_replaces_a_column(tmp_path, column):
    problems = load_problems(jsonl(tmp_path, ROW, {**ROW, "id": "p2"}), "test")
    joined = join_column(problems, column, texts_file(tmp_path, {"p2": "Two.", "p1": "One.", "other": "Unused."}))
    assert joined.to_list() == [{**row, column: text} for row, text in zip(problems, ("One.", "Two."), strict=True)]


@pytest.mark.parametrize("absent, shown", [(3, "p0, p1, p2."), (7, "p0, p1, p2, p3, p4 and 2 more.")])
def test_join_counts_and_names_missing_ids(tmp_path, absent, shown):
    problems = load_problems(jsonl(tmp_path, *({**ROW, "id": f"p{number}"} for number in range(9))), "test")
    file = texts_file(tmp_path, {f"p{number}": "Text." for number in range(absent, 9)})
    assert has_all(error_of(join_column, problems, "rationale", file), file, f"{absent} of 9", shown)


@pytest.mark.parametrize(
    "texts, found",
    [('{\n"p1": oops}', "line 2"), ('["One."]', "JSON object"), ({"p1": 3}, "1 of 1 problems have no text")],
)
def test_join_names_a_malformed_file(tmp_path, texts, found):
    problems = load_problems(jsonl(tmp_path, ROW), "test")
    file = texts_file(tmp_path, texts)
    assert has_all(error_of(join_column, problems, "rationale", file), file, found)


def test_join_refuses_a_missing_file(tmp_path):
    problems = load_problems(jsonl(tmp_path, ROW), "test")
    assert has_all(error_of(join_column, problems, "rationale", "gone.json"), "gone.json", "no such file")
