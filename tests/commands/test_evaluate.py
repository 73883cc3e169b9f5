"""The command `python -m mmcot.evaluate`: scores file, table, and errors that keep an earlier scores file."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_script
from statsmodels.stats.contingency_tables import mcnemar
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mmcot.evaluate import default_scores_file, main
from mmcot.evaluation.metrics import score
from mmcot.evaluation.predictions import evaluate
from mmcot.evaluation.tables import format_table
from mmcot.storage.files import read_json, write_json


def make_problem(id_, **columns):
    return {
        "id": id_,
        "question": "Which colour is it?",
        "choices": ["red", "blue"],
        "context": "",
        "answer": 0,
        "lecture": "",
        "solution": "The ball is red.",
        "subject": "natural science",
        "grade": "grade2",
        "split": "test",
    } | columns


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(make_problem(id_)) + "\n" for id_ in ("1", "2")), encoding="utf-8")
    return str(path)


@pytest.fixture
def predictions():
    return {"1": {"answer": 0, "rationale": "The ball is red."}, "2": {"answer": 1, "rationale": "The ball is blue."}}


@pytest.fixture
def predictions_file(tmp_path, predictions):
    write_json(tmp_path / "run" / "predictions" / "test.json", predictions)
    return tmp_path / "run" / "predictions" / "test.json"


def run(*arguments):
    return run_script("-m", "mmcot.evaluate", *arguments, check=False)


def test_prints_table_and_writes_scores_file(dataset, predictions_file, tmp_path):
    done = run(predictions_file, "--dataset", dataset, "--split", "test", "--output", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    scores = read_json(tmp_path / "scores.json")
    measured = evaluate(predictions_file, dataset, "test")
    assert {name: scores[name] for name in measured} == measured
    assert (scores["dataset"], scores["split"], scores["evaluate_options"]) == (dataset, "test", {})
    assert (scores["accuracy"]["NAT"], scores["accuracy"]["IMG"], scores["n"]) == (50, None, 2)
    table = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert table[0] == "NAT NO G1-6 Avg", "classes without problems are not printed"
    assert table[1] == "problems 2 2 2 2"
    assert table[2] == "accuracy 50.00 50.00 50.00 50.00"
    assert table[-1] == f"scores: {tmp_path / 'scores.json'}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems.jsonl", "run", "scores.json"]


def test_error_is_one_line_and_keeps_the_earlier_scores_file(dataset, predictions_file, tmp_path):
    scores_file = tmp_path / "scores.json"
    scores_file.write_text("earlier", encoding="utf-8")
    predictions_file.write_text('{\n"1": {"answer" 0}\n}', encoding="utf-8")
    done = run(predictions_file, "--dataset", dataset, "--split", "test", "--output", scores_file)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {predictions_file}, line 2: not valid JSON (Expecting ':' delimiter)"]
    assert scores_file.read_text(encoding="utf-8") == "earlier"


def test_writes_scores_of_a_run_to_its_run_folder(dataset, predictions_file, capsys):
    main([str(predictions_file), "--dataset", dataset])
    scores_file = predictions_file.parents[1] / "scores" / "test.json"
    assert read_json(scores_file)["n"] == 2
    assert capsys.readouterr().out.endswith(f"scores: {scores_file}\n")


def test_default_scores_file_is_beside_predictions_outside_a_run(tmp_path):
    assert default_scores_file(tmp_path / "mine.json") == tmp_path / "mine.scores.json"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such predictions file"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"1": "A", "2": 1}', "prediction 1 is 'A', expected an object with the key 'answer', or the answer itself"),
        ('{"1": 0, "2": 1, "1": 1}', "1 ids occur more than once: 1"),
        ('{"1": {"answer": 0, "scores": [0.9, 0.3]}, "2": 1}', "prediction 1: 'scores' is .* add up to 1"),
        ('{"1": {"answer": 0, "scores": [1.0]}, "2": 1}', "prediction 1: 'scores' is .* expected 2 probabilities"),
        ('{"1": {"answer": 2}, "2": {"answer": 1}}', "prediction 1: 'answer' is 2, expected an integer from 0 to 1"),
        ('{"1": {"answer": 0}, "3": {"answer": 1}}', r"1 \(2\) without a prediction, 1 \(3\) without a problem"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_refuses_invalid_predictions(dataset, predictions_file, content, found):
    predictions_file.unlink()
    if content is not None:
        predictions_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=found):
        evaluate(predictions_file, dataset, "test")


def test_refuses_problems_without_known_answer(tmp_path, predictions_file):
    rows = [make_problem("1"), make_problem("2", answer=-1)]
    (tmp_path / "unknown.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match="answer"):
        evaluate(predictions_file, str(tmp_path / "unknown.jsonl"), "test")


def test_refuses_to_overwrite_predictions_file(dataset, predictions_file, predictions):
    with pytest.raises(SystemExit, match=r"error: .* is one of the predictions files"):
        main([str(predictions_file), "--dataset", dataset, "--output", str(predictions_file)])
    assert read_json(predictions_file) == predictions


def test_table_has_a_row_for_decoded_accuracy():
    problems = [make_problem(str(number), images=[]) for number in range(4)]
    predictions = {str(number): {"answer": 0, "decoded_answer": number // 2 - 1} for number in range(4)}
    table = [" ".join(line.split()) for line in format_table(score(problems, predictions)).splitlines()]
    assert table[2] == "accuracy 100.00 100.00 100.00 100.00"
    assert table[3] == "95 %, from 100.00 100.00 100.00 100.00"
    assert table[5] == "decoded accuracy 50.00 50.00 50.00 50.00"
    assert table[6] == "95 %, from 0.00 0.00 0.00 0.00" and table[7].startswith("to 100.00")
    assert table[8] == "rationale BLEU-1 - BLEU-4 - ROUGE-L -"


def test_scores_a_file_of_bare_answers(dataset, tmp_path):
    write_json(tmp_path / "answers.json", {"1": 0, "2": 1})
    assert evaluate(tmp_path / "answers.json", dataset, "test")["accuracy"]["Avg"] == 50


def test_allow_missing_counts_missing_predictions_as_wrong(dataset, tmp_path, capsys):
    write_json(tmp_path / "some.json", {"1": {"answer": 0, "scores": [0.75, 0.25], "decoded_answer": 0}})
    command = [str(tmp_path / "some.json"), "--dataset", dataset]
    with pytest.raises(SystemExit, match=r"1 \(2\) without a prediction"):
        main(command)
    main([*command, "--allow_missing"])
    scores = read_json(tmp_path / "some.scores.json")
    assert scores["accuracy"]["Avg"] == scores["decoded_accuracy"]["Avg"] == 50
    assert scores["calibration"]["brier"] == pytest.approx(2 * 0.25**2)


def test_error_names_the_split_of_the_predictions(tmp_path):
    rows = [make_problem("1"), make_problem("2", split="val")]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_json(tmp_path / "val.json", {"2": 0})
    with pytest.raises(SystemExit, match="1 predictions belong to the split 'val', not to 'test'"):
        main([str(tmp_path / "val.json"), "--dataset", str(tmp_path / "problems.jsonl")])


def test_compares_two_predictions_files(tmp_path, capsys):
    subjects = ["social science"] * 4 + ["natural science"] * 16
    rows = [make_problem(str(number), subject=subject) for number, subject in enumerate(subjects)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first = {str(number): int(number % 2) for number in range(20)}
    second = first | {"1": 0, "3": 0, "5": 0, "7": 0, "9": 0, "0": 1}
    write_json(tmp_path / "first.json", first)
    write_json(tmp_path / "second.json", second)
    command = [str(tmp_path / "first.json"), "--dataset", str(tmp_path / "problems.jsonl")]
    main([*command, "--compare", str(tmp_path / "second.json")])
    compared = read_json(tmp_path / "first.scores.json")["compared"]
    assert (compared["Avg"]["first"], compared["Avg"]["second"], compared["Avg"]["difference"]) == (50, 70, 20)
    assert compared["Avg"]["p"] == pytest.approx(statsmodels_mcnemar(5, 1))
    assert compared["SOC"]["n"] == 4 and compared["LAN"] is None
    low, high = compared["Avg"]["interval"]
    assert low < 20 < high
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "difference 18.75 25.00 20.00 20.00 20.00" in printed


def statsmodels_mcnemar(only_first, only_second):
    return mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue


def test_reports_mean_and_sd_over_seeds(tmp_path, dataset, capsys):
    for name, answers in (("a", (0, 0)), ("b", (0, 1)), ("c", (1, 1))):
        write_json(tmp_path / f"{name}.json", dict(zip("12", answers, strict=True)))
    others = [str(tmp_path / "b.json"), str(tmp_path / "c.json")]
    main([str(tmp_path / "a.json"), "--dataset", dataset, "--seeds", *others])
    seeds = read_json(tmp_path / "a.scores.json")["seeds"]
    assert seeds["n"] == 3 and seeds["accuracy"]["Avg"] == {"mean": 50, "sd": pytest.approx(50)}
    assert "mean accuracy      50.00" in capsys.readouterr().out


def test_scores_only_the_given_ids(tmp_path, dataset):
    write_json(tmp_path / "one.json", {"2": 0})
    main([str(tmp_path / "one.json"), "--dataset", dataset, "--ids", "2"])
    assert read_json(tmp_path / "one.scores.json")["accuracy"]["Avg"] == 100


def test_warns_about_rationales_close_to_gold(tmp_path, capsys):
    words = ["cats", "dogs", "newts", "owls", "pikes", "rats"]
    rows = [
        make_problem(
            word, solution=f"First, {word} are {word}, and so on and on. So {word} are right.", skill="animals"
        )
        for word in words
    ]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    printed = []
    for name, text in (("gold", "{solution}"), ("own", "I think that {id} are right, and so on.")):
        predictions = {row["id"]: {"answer": 0, "rationale": text.format(**row)} for row in rows}
        write_json(tmp_path / f"{name}.json", predictions)
        main([str(tmp_path / f"{name}.json"), "--dataset", str(tmp_path / "problems.jsonl")])
        printed.append(capsys.readouterr().out)
    assert "100 % of the words of their own gold rationales" in printed[0] and "--leak_check" in printed[0]
    assert "warning" not in printed[1]


def test_similarity_compares_rationales_with_an_encoder(tmp_path, dataset, predictions_file):
    """With random weights, the similarity of equal texts is 1, and of others the cosine of their sentence vectors."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "The": 2, "ball": 3, "red": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path / "encoder")
    size = {"vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(**size)).save_pretrained(tmp_path / "encoder")
    main([str(predictions_file), "--dataset", dataset, "--similarity", str(tmp_path / "encoder")])
    found = read_json(predictions_file.parents[1] / "scores" / "test.json")["rationale"]["similarity"]
    encoder = BertModel.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        texts = torch.tensor([[2, 3, 1, 4, 1], [2, 3, 1, 1, 1]])
        red, blue = encoder(texts).last_hidden_state.mean(dim=1)
    cosine = torch.nn.functional.cosine_similarity(red, blue, dim=0).item()
    assert found == pytest.approx(100 * (1 + cosine) / 2, abs=1e-3)


def test_write_json_is_atomic(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"text": "Größe"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "text": "Größe"\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"text": "new", "bad": object()})

    def full_disk(path, text, **_):
        path.write_bytes(text[:3].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"text": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"text": "Größe"}
