"""The study of stages: recipes of its arms, passages of its controls, measures, tables from result files."""

import json

import numpy as np
import pytest
import yaml

from mmcot.problems import study
from mmcot.problems.sources import load_problems
from mmcot.recipes.recipe import parse_recipe
from studies import stage_tables, stages
from studies.stage_arms import ARMS, BUDGETS, SHARES, answer_in, passages_for, recipe_of
from studies.stage_measures import measure, right_texts

TRAINED = [name for name, arm in ARMS.items() if arm.run_of is None]


def stages_of(name: str, budget: str = "total") -> dict[str, dict]:
    return {stage["name"]: stage for stage in recipe_of(ARMS[name], "study:fact@2", 1000, budget, 1e-3)["stages"]}


@pytest.mark.parametrize("name", TRAINED)
def test_recipe_of_arm_is_valid(name, tmp_path):
    config = tmp_path / "arm.yaml"
    config.write_text(yaml.safe_dump(recipe_of(ARMS[name], "study:fact@2", 1000, "total", 1e-3)))
    recipe = parse_recipe(["--config", str(config), "--output_dir", str(tmp_path / "run")])
    assert [stage.name for stage in recipe.stages] == list(ARMS[name].stages)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", [name for name in TRAINED if not ARMS[name].settings and not ARMS[name].is_one_pass])
def test_stages_share_the_steps_of_the_budget(name, budget):
    epochs = {stage: values.get("num_train_epochs", 0) for stage, values in stages_of(name, budget).items()}
    steps = {stage: epochs[stage] * 12_000 / 64 for stage in epochs if stage in SHARES}
    if budget == "total":
        assert sum(steps.values()) == pytest.approx(1000, abs=0.1)
    else:
        assert steps == {stage: pytest.approx(1000 * SHARES[stage] / 13, abs=0.1) for stage in steps}


def test_one_generation_has_all_steps():
    assert stages_of("one_pass_LEA")["one_pass"]["num_train_epochs"] * 12_000 / 64 == pytest.approx(1000, abs=0.1)


def test_arms_read_only_what_their_stages_write():
    assert "rationale" not in stages_of("answer_only")["answer"]["reads"]
    assert "knowledge" not in stages_of("three_stages")["rationale"]["source"]
    assert "passages" not in stages_of("four_closed")["knowledge"]["source"]
    assert "passage.text" in stages_of("passages_to_rationale")["rationale"]["source"]
    assert "caption" in stages_of("four_anchor")["description"]["reads"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("A fact. The answer is in caves.", 1), ("The answer is in caves. BECAUSE: x", 1), ("It is in caves.", -1)],
)
def test_reads_answer_in_text_of_one_generation(text, answer):
    assert answer_in(text, ["in", "in caves"]) == answer


def test_wrong_passages_are_about_other_animals_and_gold_ones_contain_the_fact():
    problems = load_problems("study:fact@2", "val").select(range(20))
    gold, wrong = (passages_for(origin, problems, "study:fact@2", 3) for origin in ("gold", "wrong"))
    for row in problems.remove_columns("images"):
        assert [passage["text"] for passage in gold[row["id"]]] == [row["lecture"]]
        name = row["observation"].removeprefix("The animal is the ").rstrip(".")
        assert len(wrong[row["id"]]) == 3
        assert not any(name in passage["text"] for passage in wrong[row["id"]])


def written_for(row: dict, is_right: bool) -> dict:
    """Return columns with right texts, and a right or a wrong answer."""
    return {
        "description": row["observation"],
        "passages": [{"id": name} for name in row["gold_passages"]],
        "knowledge": row["lecture"],
        "rationale": f"Solution: {row['solution']}",
        "answer": row["answer"] if is_right else (row["answer"] + 1) % len(row["choices"]),
    }


def test_measures_count_right_texts_answers_and_mistakes():
    problems = load_problems("study:fact@2", "val").select(range(10))
    rows = problems.remove_columns("images").to_list()
    predictions = {row["id"]: written_for(row, number < 7) for number, row in enumerate(rows)}
    predictions[rows[0]["id"]]["knowledge"] = "The Velor alvun eats moss."
    found = measure(problems, predictions)
    assert sum(flags.count("1") for flags in found["right"].values()) == 7
    assert found["columns"]["rationale"] == {"right text, right answer": 7, "right text, wrong answer": 3}
    assert found["columns"]["knowledge"]["wrong text, right answer"] == 1
    assert found["mistakes"] == {"fact": {"right_rationale": 3}}
    assert found["hallucination"]["names"] == 0


def test_no_passage_counts_as_right_for_a_problem_that_needs_none():
    (row,) = load_problems("study:text@2", "val").select([0]).remove_columns("images")
    assert "passages" not in right_texts(row, {"passages": []})


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two arms with results of two seeds, and a page with places for their tables."""
    folder = tmp_path / "results" / "fact@2-10-total"
    folder.mkdir(parents=True)
    for name, flags in (("two_stages", ["1100", "1000"]), ("four_stages", ["1111", "1110"])):
        for seed, right in enumerate(flags):
            test = {"right": {"fact/rare": right}, "columns": {"rationale": {"right text, right answer": 3}}}
            test["mistakes"] = {"fact": {"factual": right.count("0")}}
            test["hallucination"] = {"names": 12.5} if name == "four_stages" else None
            trained = {stage: {"steps": 10, "seconds": 2.0, "memory_gb": 1.0} for stage in ("rationale", "answer")}
            result = {"test": test, "stages": trained, "learning_rate": "0.001"}
            (folder / f"{name}-{seed}.json").write_text(json.dumps(result))
    marks = [f"{name} fact@2-10-total" for name in ("accuracy", "errors", "mistakes", "cost")]
    page = tmp_path / "page.md"
    page.write_text("".join(f"before\n<!-- {mark} -->\nold\n<!-- end of {mark} -->\n" for mark in marks))
    monkeypatch.setattr(stage_tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(stage_tables, "PAGE", page)
    monkeypatch.setattr(stage_tables, "PLOT", tmp_path / "plot.png")
    return page


def test_tables_replace_old_ones_and_show_mean_and_extremes(results):
    stage_tables.write_tables()
    text = results.read_text()
    assert "old" not in text and text.count("before") == 4
    assert "37.5 [" in text and "(25.0–50.0)" in text and "87.5 [" in text
    assert "| `two_stages` | 62.5 | no description |" in text and "| `four_stages` | 12.5 | 12.5 |" in text
    assert "| 0.001 | 20 | 4 | 2 | 1.0 |" in text, "the sum of both trainings, and the longest one"
    assert (results.parent / "plot.png").stat().st_size > 1000
    stage_tables.write_tables()
    assert results.read_text() == text


def test_refuses_page_without_place_for_a_table(results):
    results.write_text("nothing")
    with pytest.raises(ValueError, match="no place for the table 'accuracy fact@2-10-total'"):
        stage_tables.write_tables()


def test_page_contains_tables_of_committed_results():
    text = stage_tables.PAGE.read_text()
    for setting, arms in stage_tables.read_results().items():
        assert stage_tables.accuracy_table(arms) in text, setting
        assert stage_tables.errors_table(arms) in text, setting
        assert stage_tables.mistakes_table(arms) in text, setting
        assert stage_tables.cost_table(arms) in text, setting


def test_committed_results_name_their_arm_and_have_the_test_problems():
    for setting, arms in stage_tables.read_results().items():
        for name, found in arms.items():
            for result in found:
                assert result["arm"] == name and stages.slug(result["dataset"]) in setting
                number = sum(len(flags) for flags in result["test"]["right"].values())
                assert (
                    number
                    == study.SPLIT_SIZES["test"]
                    == np.size(stage_tables.right_by_problem(result, list(result["test"]["right"])))
                )
