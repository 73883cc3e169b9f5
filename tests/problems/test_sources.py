"""Sources of problems: each source gives the same problems, and a run trains and scores from each.

test_problems.py and test_columns.py test the form of rows, test_splits.py their division into splits, and
test_known_datasets.py the built-in dataset formats.
"""

import io
import itertools
import json
import os
import shutil
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest
import yaml
from conftest import HUB_FEATURES, REPOSITORY, TINY_RECIPE, content, hub_rows, run_script
from loopback_hub import LoopbackHub, client_environment
from PIL import Image
from preloaded import run_python
from problem_files import ROW, error_of, has_all, png

from mmcot import evaluate, features, predict, train
from mmcot.pictures.reading import read_pictures
from mmcot.problems.demo import generate
from mmcot.problems.row_files import READERS
from mmcot.problems.schema import FEATURES
from mmcot.problems.sources import load_problems, splits_of
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json
from mmcot.training.preparation import prepare

SPLITS = ("train", "val", "test")
COLUMNS = {"question": "query", "image": "img"}  # ours = theirs, of the sources with other names


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """24 problems, some with a picture as bytes."""
    found = []
    for number, row in enumerate(itertools.islice(generate("val"), 24)):
        picture = row["images"][0]["bytes"] if row["images"] else None
        kept = {name: row[name] for name in ("id", "question", "choices", "answer", "context", "solution", "skill")}
        found.append({**kept, "picture": picture, "split": SPLITS[0 if number < 16 else 1 if number < 20 else 2]})
    return found


def with_paths(rows: list[dict], folder: Path, column: str = "image") -> list[dict]:
    """The rows with their pictures as files in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows:
        name = f"{row['id']}.png" if row["picture"] else None
        if name:
            (folder / name).write_bytes(row["picture"])
        found.append({**{key: value for key, value in row.items() if key != "picture"}, column: name})
    return found


def without(row: dict, *names: str) -> dict:
    return {key: value for key, value in row.items() if key not in names}


def as_table(rows: list[dict], file: Path) -> None:
    frame = pandas.DataFrame(rows)
    frame["choices"] = frame["choices"].map(json.dumps)
    frame.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")


def as_dataset(rows: list[dict]) -> datasets.Dataset:
    found = []
    for row in rows:
        picture = row["picture"] and {"bytes": row["picture"], "path": None}
        found.append({**without(row, "question", "picture"), "query": row["question"], "img": picture})
    return datasets.Dataset.from_list(found).cast_column("img", datasets.Image())


def as_dict(rows: list[dict]) -> datasets.DatasetDict:
    names = {"train": "train", "val": "validation", "test": "test"}
    parts = {name: [without(row, "split") for row in rows if row["split"] == split] for split, name in names.items()}
    return datasets.DatasetDict({name: as_dataset(part) for name, part in parts.items()})


def write_jsonl(rows, folder):
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in with_paths(rows, folder)))
    return str(folder / "problems.jsonl"), None


def write_csv(rows, folder):
    as_table(with_paths(rows, folder), folder / "problems.csv")
    return str(folder / "problems.csv"), None


def write_tsv(rows, folder):
    as_table(with_paths(rows, folder), folder / "problems.tsv")
    return str(folder / "problems.tsv"), None


def write_file_per_split(rows, folder):
    for split in SPLITS:
        part = [without(row, "split") for row in rows if row["split"] == split]
        as_table(with_paths(part, folder), folder / f"{split}.csv")
    return ",".join(f"{split}={folder / split}.csv" for split in SPLITS), None


def write_picture_folder(rows, folder):
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in with_paths(rows, folder, "file_name"))
    )
    return str(folder), None


def write_picture_folders(rows, folder):
    """The layout of `imagefolder`: a folder per split, each with its table."""
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        part = [without(row, "split") for row in rows if row["split"] == split]
        paths = with_paths(part, folder / name, "file_name")
        as_table(paths, folder / name / "metadata.csv")
    return str(folder), None


def write_parquet(rows, folder):
    as_dataset(rows).to_parquet(folder / "problems.parquet")
    return str(folder / "problems.parquet"), COLUMNS


def write_parquet_folder(rows, folder):
    for name, part in as_dict(rows).items():
        part.to_parquet(folder / f"data/{name}-00000-of-00001.parquet")
    return str(folder), COLUMNS


def write_parquet_with_paths(rows, folder):
    """A pandas table with the pictures beside it."""
    part = [{**without(row, "split"), "split": row["split"]} for row in with_paths(rows, folder, "image")]
    pandas.DataFrame(part).to_parquet(folder / "problems.parquet")
    return str(folder), None


def write_arrow(rows, folder):
    table = as_dataset(rows).data.table
    with pyarrow.OSFile(str(folder / "problems.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    return str(folder / "problems.arrow"), COLUMNS


def write_saved_dataset(rows, folder):
    as_dataset(rows).save_to_disk(folder / "saved")
    return str(folder / "saved"), COLUMNS


def write_saved_dict(rows, folder):
    as_dict(rows).save_to_disk(folder / "saved")
    return str(folder / "saved"), COLUMNS


def dataset_of_python(rows, folder):
    """The dataset decodes its pictures into PIL images."""
    dataset = as_dataset(rows)
    assert any(isinstance(picture, Image.Image) for picture in dataset["img"])
    return dataset, COLUMNS


def dict_of_python(rows, folder):
    return as_dict(rows), COLUMNS


SOURCES = [
    write_jsonl,
    write_csv,
    write_tsv,
    write_file_per_split,
    write_picture_folder,
    write_picture_folders,
    write_parquet,
    write_parquet_folder,
    write_parquet_with_paths,
    write_arrow,
    write_saved_dataset,
    write_saved_dict,
    dataset_of_python,
    dict_of_python,
]


@pytest.mark.parametrize("write", SOURCES)
def test_each_source_gives_the_same_problems(rows, tmp_path, write, monkeypatch):
    source, columns = write(rows, tmp_path)
    monkeypatch.chdir("/")  # because paths are relative to the source, not to the working directory
    for split in SPLITS:
        problems = load_problems(source, split, columns=columns)
        expected = [row for row in rows if row["split"] == split]
        assert problems.features == FEATURES
        for name in ("id", "question", "choices", "answer", "context", "solution", "skill", "split"):
            assert problems[name] == [row[name] for row in expected], name
        for problem, row in zip(problems, expected, strict=True):
            pictures = [Image.open(io.BytesIO(row["picture"])).tobytes()] if row["picture"] else []
            assert [picture.tobytes() for picture in read_pictures(problem)] == pictures
        assert load_problems(source, split, columns=columns, pictures=False)["id"] == problems["id"]
    assert splits_of(source) == list(SPLITS)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe with one stage and one step."""
    values = yaml.safe_load(TINY_RECIPE.read_text())
    values["stages"] = [{**values["stages"][1], "template": "QCM-A"}]
    values["stages"][0]["reads"] = ["question", "context", "choices", "images"]
    values |= {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "decode_answer": False}
    file = tmp_path_factory.mktemp("recipe") / "one_step.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def train_predict_and_score(recipe, source, columns, folder) -> dict:
    """Train, predict and evaluate from `--dataset` or from a dataset in Python; return the scores of the run."""
    given = {} if isinstance(source, str) else {"dataset": source}
    options = ["--dataset", source] if isinstance(source, str) else []
    options += ["--columns", ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())] if columns else []
    train.main(["--config", str(recipe), "--output_dir", str(folder / "run"), *options], **given)
    predict.main([str(folder / "run"), "--output", str(folder / "again.json"), *options], **given)
    evaluate.main([str(folder / "again.json"), "--by", "skill", *options], **given)
    assert read_json(folder / "again.json") == read_json(folder / "run/predictions/test.json")
    scores, again = read_json(folder / "run/scores/test.json"), read_json(folder / "again.scores.json")
    assert again["accuracy"] == scores["accuracy"] and again["n"] == scores["n"]
    assert sum(one["n"] for one in again["by"]["skill"].values()) == scores["n"]
    expected = ",".join(f"{ours}={theirs}" for ours, theirs in (columns or {}).items())
    for options in (scores["predict_options"], scores["evaluate_options"], again["predict_options"]):
        assert options.get("columns", "") == expected
    assert again["dataset"] == scores["dataset"] == (source if isinstance(source, str) else "dataset-given-in-python")
    return scores


@pytest.mark.parametrize("write", SOURCES)
def test_trains_and_scores_from_each_source(rows, recipe, tmp_path, write):
    (tmp_path / "data").mkdir()
    source, columns = write(rows, tmp_path / "data")
    assert train_predict_and_score(recipe, source, columns, tmp_path)["n"] == 4


@pytest.mark.parametrize("write", SOURCES)
def test_prepares_a_run_from_each_source(rows, recipe, tmp_path, write):
    (tmp_path / "data").mkdir()
    source, columns = write(rows, tmp_path / "data")
    options = ["--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    if columns:
        options += ["--columns", ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())]
    if isinstance(source, str):
        run = prepare(parse_recipe([*options, "--dataset", source]))
    else:
        run = prepare(parse_recipe(options).with_dataset(source))
    assert {split: len(problems) for split, problems in run.problems.items()} == {"train": 16, "val": 4, "test": 4}


@pytest.mark.slow
def test_commands_train_predict_and_evaluate(rows, recipe, tmp_path):
    (tmp_path / "data").mkdir()
    source, _ = write_tsv(rows, tmp_path / "data")
    run_script("train.py", "--config", recipe, "--output_dir", tmp_path / "run", "--dataset", source)
    run_script("-m", "mmcot.predict", tmp_path / "run", "--dataset", source, "--output", tmp_path / "p.json")
    printed = run_script("-m", "mmcot.evaluate", tmp_path / "p.json", "--dataset", source, "--by", "skill").stdout
    assert has_all(printed, "by skill", "scores:")


def test_computes_features_from_a_file_or_python(rows, vit, tmp_path):
    options = ["--vision", str(vit), "--columns", "question=query,image=img", "--output"]
    features.main([*options, str(tmp_path / "python")], dataset=as_dict(rows))
    source, _ = write_parquet(rows, tmp_path)
    features.main([source, *options, str(tmp_path / "file")])
    assert content(tmp_path / "python") == content(tmp_path / "file")


def test_refuses_a_dataset_both_by_name_and_in_python(tmp_path, rows):
    with pytest.raises(SystemExit, match="give one of them"):
        train.main(["--config", str(TINY_RECIPE), "--dataset", "demo"], dataset=as_dataset(rows))
    with pytest.raises(SystemExit, match="give one of them"):
        evaluate.main(["p.json", "--dataset", "demo"], dataset=as_dataset(rows))
    with pytest.raises(SystemExit, match="--dataset is missing"):
        evaluate.main(["p.json"])
    with pytest.raises(ValueError, match="dataset is a list; expected a datasets.Dataset"):
        load_problems([{"question": "Why?"}], "test")


# Folders.


def test_loads_new_rows_of_a_file_with_the_same_time(tmp_path):
    """As after a copy that preserves times. `datasets` identifies a file by its name and time."""
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    for question in ("First version?", "Other version?"):
        datasets.Dataset.from_list([{**without(ROW, "split"), "question": question}]).to_parquet(file)
        os.utime(file, (1_000_000_000, 1_000_000_000))
        assert load_problems(str(tmp_path / "data"), "test")["question"] == [question]
    single = tmp_path / "one.parquet"
    for question in ("First version?", "Other version?"):
        datasets.Dataset.from_list([{**ROW, "question": question}]).to_parquet(single)
        os.utime(single, (1_000_000_000, 1_000_000_000))
        assert load_problems(str(single), "test")["question"] == [question]


def paths_parquet(folder: Path, *paths: str) -> str:
    """A folder with a table of picture paths alone, as if `datasets` had not embedded the pictures."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features({**{name: FEATURES[name] for name in ROW}, "image": datasets.Image(decode=False)})
    rows = [{**ROW, "id": str(n), "image": {"bytes": None, "path": path}} for n, path in enumerate(paths)]
    table = datasets.Dataset.from_list(rows, features=features).data.table
    pyarrow.parquet.write_table(table, folder / "test.parquet")
    return str(folder)


def test_reads_pictures_by_path_in_a_folder_of_parquet(tmp_path, monkeypatch):
    folder = Path(paths_parquet(tmp_path / "data", "red.png", "./sub/../red.png"))
    (folder / "sub").mkdir()
    (folder / "red.png").write_bytes(png())
    monkeypatch.chdir("/")
    problems = load_problems(str(folder), "test")
    assert [read_pictures(row)[0].getpixel((0, 0)) for row in problems] == [(255, 0, 0)] * 2
    (folder / "red.png").unlink()
    for source in (str(folder), str(shutil.copytree(folder, tmp_path / "copy"))):
        if source != str(folder):
            assert has_all(error_of(load_problems, source, "test"), "row 1", "problem 0", "red.png is missing")
        else:
            assert has_all(
                error_of(lambda s=source: [read_pictures(row) for row in load_problems(s, "test")]), "missing"
            )


@pytest.mark.parametrize("path", ["../private.png", "{}/private.png", "sub/../../private.png", "link.png"])
def test_refuses_a_path_outside_of_a_folder_of_parquet(tmp_path, path):
    (tmp_path / "private.png").write_bytes(png())
    folder = paths_parquet(tmp_path / "data", path.format(tmp_path))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "private.png")
    assert has_all(error_of(load_problems, folder, "test"), "row 1", "is outside of", "expected a file in it")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"notes.txt": ""}, ["without known files", "expected demo"]),
        ({"metadata.csv": "question\nWhy?\n", "metadata.jsonl": "{}"}, ["both metadata.jsonl and metadata.csv"]),
        ({"metadata.csv": "question\nWhy?\n", "test/metadata.csv": "question\nWhy?\n"}, ["metadata of its own and of"]),
        ({"val/metadata.csv": "question\nA?\n", "dev/metadata.csv": "question\nB?\n"}, ["two folders of one split"]),
        ({"train.parquet": "no table"}, ["not a complete Parquet file"]),
        ({"state.json": "{}"}, ["not a complete dataset of save_to_disk"]),
    ],
)
def test_explains_why_a_folder_is_refused(tmp_path, files, found):
    for name, text in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(text)
    assert has_all(error_of(load_problems, str(tmp_path / "data"), "test"), str(tmp_path / "data"), *found)


def test_refuses_a_path_outside_of_a_folder_of_pictures(tmp_path):
    (tmp_path / "private.png").write_bytes(png())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({**ROW, "file_name": "../private.png"}))
    assert has_all(error_of(load_problems, str(tmp_path / "data"), "test"), "line 1", "problem p1", "is outside of")


def test_folders_of_pictures_define_the_splits_of_one_table(tmp_path):
    lines = "file_name,question\n" + "".join(f"{name}/a.png,Which?\n" for name in ("train", "validation", "test"))
    for name in ("train", "validation", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text(lines)
    assert [len(load_problems(str(tmp_path), split)) for split in SPLITS] == [1, 1, 1]


def test_reads_typed_rows_of_a_new_file_format(tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, ".foo", lambda file: [(f"{file}, row 1", {**ROW, "choices": ["left", "right"]})])
    (tmp_path / "problems.foo").touch()
    assert load_problems(tmp_path / "problems.foo", "test")[0]["choices"] == ["left", "right"]


def test_names_unknown_and_missing_splits(tmp_path):
    dataset = datasets.Dataset.from_list([ROW])
    assert has_all(
        error_of(load_problems, datasets.DatasetDict(a=dataset, b=dataset), "test"), "the splits a, b; expected train"
    )
    message = error_of(load_problems, datasets.DatasetDict(train=dataset, test=dataset), "val")
    assert has_all(message, "no split 'val'; found train, test")


# A dataset of the Hub.


def test_converts_a_dataset_of_the_hub_to_the_schema(hub_dataset):
    problems = load_problems(str(hub_dataset), "val")
    assert problems.features == FEATURES and problems["id"] == [f"val-{row}" for row in range(5)]
    row, expected = problems[3], hub_rows(4)[3]
    assert row["context"] == "hint 3" and row["images"][0]["bytes"] == expected["image"]["bytes"]
    for name in ("question", "choices", "answer", "grade", "subject", "solution"):
        assert row[name] == expected[name]
    assert problems[2]["images"] == []


@pytest.mark.slow
def test_run_on_a_dataset_of_the_hub_finishes(hub_dataset, tmp_path):
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dataset": str(hub_dataset), "max_steps": 2}))
    train.main(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")])
    assert read_json(tmp_path / "run/scores/test.json")["n"] == 5


def test_refuses_a_missing_dataset_and_unknown_columns(hub_dataset, tmp_path):
    with pytest.raises(
        ValueError, match="dataset is 'nobody/nothing'; expected .* As a dataset of the Hub it cannot be loaded"
    ):
        load_problems("nobody/nothing", "val")
    dataset = datasets.Dataset.from_list(hub_rows(2), features=HUB_FEATURES).rename_column("hint", "hints")
    dataset.to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="unknown column 'hints' .did you mean 'hint'"):
        load_problems(str(tmp_path), "test")
    assert load_problems(str(tmp_path), "test", columns="context=hints")["context"] == ["hint 0", "hint 1"]


def test_refuses_an_address_of_the_hub_in_another_form():
    for address in ("hf://models/a/b", "hf://datasets/a", "hf://datasets/a/b/pictures.zip"):
        assert has_all(error_of(load_problems, address, "test"), repr(address), "expected")


LOAD = """
import json, sys
import huggingface_hub
from mmcot.problems.sources import load_problems

api = huggingface_hub.HfApi()
api.create_repo("someone/problems", repo_type="dataset", exist_ok=True)
api.upload_folder(repo_id="someone/problems", repo_type="dataset", folder_path=sys.argv[1])
columns = "question=query,image=img"
found = {}
for source, mapping in (
    ("someone/problems", columns),
    ("hf://datasets/someone/problems", columns),
    ("hf://datasets/someone/problems@main", columns),
    ("test=hf://datasets/someone/problems/data/test-00000-of-00001.parquet", columns),
    ("hf://datasets/someone/problems@main/texts.jsonl", None),
):
    rows = load_problems(source, "test", columns=mapping)
    found[source] = [[row["question"], row["answer"], len(row["images"])] for row in rows]
try:
    load_problems("hf://datasets/someone/problems/paths.jsonl", "test")
except ValueError as error:
    found["paths"] = str(error)
print(json.dumps(found))
"""


def test_loads_problems_from_addresses_of_the_hub(rows, tmp_path):
    """With the Hub's protocol, from a local server."""
    asked = [row for row in rows if row["split"] == "test"]
    write_parquet_folder(rows, tmp_path / "repository")
    texts, paths = ([without(row, "picture") for row in rows], [{**ROW, "images": ["private.png"]}])
    for name, written in (("texts", texts), ("paths", paths)):
        (tmp_path / f"repository/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (tmp_path / "repository/README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in ("train", "validation", "test"))
        + "---\n"
    )
    with LoopbackHub() as hub:
        environment = client_environment(hub, tmp_path / "home", hub.add_user("someone"))
        result = run_python("-c", LOAD, tmp_path / "repository", cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert has_all(found.pop("paths"), "image is the path 'private.png'; expected its bytes")
    for source, problems in found.items():
        pictures = "texts" not in source
        assert problems == [[row["question"], row["answer"], int(pictures and bool(row["picture"]))] for row in asked]
