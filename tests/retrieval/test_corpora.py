"""The passages of a corpus, and the errors for an invalid one."""

import json
import logging

import pytest
from conftest import shared
from passage_files import scienceqa, write_jsonl

from mmcot.problems import study
from mmcot.retrieval.corpora import read_corpora, read_corpus, read_lectures
from modeling_mmcot.retrieval_mmcot import Passage

ROW = {"id": "p0", "title": "Magnets", "text": "Poles attract.", "source": "a book (CC BY 4.0)"}


def test_reads_passages_of_json_lines_file(tmp_path):
    file = write_jsonl(tmp_path / "passages.jsonl", ROW, {"id": "p1", "text": "Poles repel."})
    assert read_corpus(file) == [Passage(**ROW), Passage("p1", "", "Poles repel.", "passages.jsonl")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "line 2: text is ''; expected a text that is not empty"),
        ({"text": " \n"}, r"line 2: text is ' \\n'; expected a text that is not empty"),
        ({"text": None}, "line 2: text is None; expected a text that is not empty"),
        ({"id": 7}, "line 2: id is 7; expected a text that is not empty"),
        ({"title": ["a"]}, r"line 2: title is \['a'\]; expected a text\."),
        ({"text": "half \ud800"}, "line 2: text is .* which has half of a surrogate pair"),
        ({"problem_ids": "1"}, "line 2: problem_ids is '1'; expected a list of texts"),
        ({"split": "test"}, "line 2: split is 'test'; nothing of validation or test may be in a corpus"),
        ({"split": "validation"}, "line 2: split is 'validation'; nothing of validation"),
    ],
)
def test_names_invalid_line_and_its_fault(tmp_path, row, message):
    file = write_jsonl(tmp_path / "passages.jsonl", ROW, {**ROW, "id": "p1", **row})
    with pytest.raises(ValueError, match=f"passages.jsonl, {message}"):
        read_corpus(file)


def test_names_line_without_text(tmp_path):
    file = write_jsonl(tmp_path / "problems.jsonl", {"id": "1", "question": "Which poles attract?"})
    with pytest.raises(ValueError, match="problems.jsonl, line 1: text is None"):
        read_corpus(file)


def test_warns_about_unread_columns(tmp_path, caplog):
    file = write_jsonl(tmp_path / "passages.jsonl", {**ROW, "topic": "physics"})
    with caplog.at_level(logging.WARNING):
        read_corpus(file)
    assert "columns that are not read: topic" in caplog.text


def test_splits_texts_of_folder_at_empty_lines(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "magnets.txt").write_text("# no heading\nin a text\n\n\nSecond\nparagraph.\n")
    (tmp_path / "cells.md").write_text(
        "Before.\n\n# Cell walls\nPlants have them.\n\n## Animals ##\n\nNone.\n\nNone!\n"
    )
    (tmp_path / "table.csv").write_text("not read")
    assert [(passage.id, passage.title, passage.text, passage.source) for passage in read_corpus(tmp_path)] == [
        ("cells.md#1", "cells", "Before.", "cells.md"),
        ("cells.md#2", "Cell walls", "Plants have them.", "cells.md"),
        ("cells.md#3", "Animals", "None.", "cells.md"),
        ("cells.md#4", "Animals", "None!", "cells.md"),
        ("notes/magnets.txt#1", "magnets", "# no heading\nin a text", "notes/magnets.txt"),
        ("notes/magnets.txt#2", "magnets", "Second\nparagraph.", "notes/magnets.txt"),
    ]


def test_names_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a.txt: not UTF-8 text \(.* at byte 3\)"):
        read_corpus(tmp_path)


def test_refuses_empty_or_missing_corpus(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    for name, message in [
        ("empty.jsonl", "is empty; expected a passage in each line"),
        ("folder", "is empty; expected paragraphs in .txt and .md files"),
        ("picture.png", "is another kind of file; expected a .jsonl file, a folder of texts, or study"),
        ("absent", "does not exist; expected a .jsonl file, a folder of texts, or study"),
    ]:
        with pytest.raises(ValueError, match=f"{name} {message}"):
            read_corpus(tmp_path / name)
    with pytest.raises(ValueError, match="no corpus is given"):
        read_corpora()


def test_joins_corpora_and_refuses_repeated_ids(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", ROW)
    second = write_jsonl(tmp_path / "second.jsonl", {**ROW, "id": "p1", "source": "another book"})
    lectures = scienceqa(tmp_path / "problems", a=("train", "A lecture."))
    names = [passage.id for passage in read_corpora([first, second], str(lectures))]
    assert names[:2] == ["p0", "p1"] and names[2].startswith("lecture-") and len(names) == 3
    with pytest.raises(ValueError, match=r"'p0' occurs twice, in a book \(CC BY 4.0\) and in a book"):
        read_corpora([first, first])


def test_reads_one_passage_for_each_distinct_training_lecture(tmp_path):
    folder = scienceqa(
        tmp_path / "private",
        t1=("train", "Poles attract.\nOr repel."),
        t2=("train", "Poles attract. Or repel. "),
        t3=("train", "Cells have walls."),
        t4=("train", " "),
    )
    first, second = read_lectures(str(folder))
    assert (first.text, first.problem_ids, first.title) == ("Poles attract.\nOr repel.", ("t1", "t2"), "a skill")
    assert (second.text, second.problem_ids) == ("Cells have walls.", ("t3",))
    assert first.id != second.id and first.id.startswith("lecture-")
    assert first.source == "ScienceQA, lectures of the training split"  # without the path, which would be published


def test_reads_no_lecture_of_validation_or_test(tmp_path):
    lectures = {"train": "A magnet.", "val": "Validation only.", "test": "Test only."}
    folder = scienceqa(tmp_path / "problems", **{f"x{split}": (split, text) for split, text in lectures.items()})
    passages = read_lectures(str(folder))
    assert [passage.text for passage in passages] == ["A magnet."]
    assert "xval" not in str(passages) and "xtest" not in str(passages) and "gold" not in str(passages)


def test_reads_exactly_training_lectures_of_scienceqa():
    folder = shared("scienceqa")
    rows = json.loads((folder / "problems.json").read_text())
    by_split = {
        split: {" ".join(row["lecture"].split()) for row in rows.values() if row["split"] == split} - {""}
        for split in ("train", "val", "test")
    }
    read = {" ".join(passage.text.split()) for passage in read_lectures(str(folder))}
    assert read == by_split["train"]
    assert not read & ((by_split["val"] | by_split["test"]) - by_split["train"])
    assert {name for passage in read_lectures(str(folder)) for name in passage.problem_ids} == {
        name for name, row in rows.items() if row["split"] == "train" and row["lecture"].strip()
    }


def test_refuses_source_without_training_lectures(tmp_path):
    folder = scienceqa(tmp_path / "problems", t1=("train", ""), v1=("val", "A lecture."))
    with pytest.raises(ValueError, match="problems: no training problem has a lecture"):
        read_lectures(str(folder))


def test_reads_corpus_of_study_problems():
    passages = {passage.id: passage.text for passage in read_corpus("study@1")}
    assert len(passages) == len(study.corpus(1)) and passages["velor-alvun-home"].startswith("The Velor alvun lives ")
    with pytest.raises(ValueError, match="with the difficulty '9'"):
        read_corpus("study@9")
