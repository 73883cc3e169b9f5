"""The stages of a recipe: their order, their kinds, and settings that have no effect."""

import pytest
import yaml
from conftest import TINY_RECIPE

from mmcot.recipes.recipe import parse_recipe
from mmcot.training.building import build_stages

ANSWER = {
    "name": "answer",
    "reads": ["question", "choices", "rationale"],
    "writes": "answer_text",
    "template": "QCMG-A",
}
DESCRIPTION = {"name": "description", "reads": ["question"], "writes": "description", "source": "x", "target": "y"}
RETRIEVAL = {
    "name": "retrieval",
    "kind": "retrieve",
    "reads": ["question", "choices", "description"],
    "writes": "passages",
    "corpora": ["lectures"],
}
RATIONALE = {
    "name": "rationale",
    "reads": ["question", "passages"],
    "writes": "rationale",
    "source": "{{ question }}{% for passage in passages %} {{ passage.text }}{% endfor %}",
    "target": "{{ solution }}",
}
CHECK = {
    "name": "check",
    "kind": "check",
    "reads": ["question", "rationale", "answer_text"],
    "writes": "verdict",
    "source": "{{ question }} {{ rationale }} {{ answer_text }}",
    "inputs_from": "cross_fit",
}
WRITTEN = {**DESCRIPTION, "name": "rationale", "writes": "rationale"}
ONLY_ANSWER = {**ANSWER, "reads": ["question", "choices"]}


def parse(folder, *stages):
    recipe = {**yaml.safe_load(TINY_RECIPE.read_text()), "stages": list(stages)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return parse_recipe(["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "run")])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)])
def test_orders_stages_by_columns_they_read(tmp_path, order):
    given = [DESCRIPTION, RETRIEVAL, RATIONALE, ANSWER]
    recipe = parse(tmp_path, *(given[number] for number in order))
    assert [stage.name for stage in recipe.stages] == ["description", "retrieval", "rationale", "answer"]


def test_keeps_given_order_of_independent_stages(tmp_path):
    other = {**DESCRIPTION, "name": "other", "writes": "other"}
    for pair in ((DESCRIPTION, other), (other, DESCRIPTION)):
        recipe = parse(tmp_path, *pair, ONLY_ANSWER)
        assert [stage.name for stage in recipe.stages] == [pair[0]["name"], pair[1]["name"], "answer"]


def test_accepts_stage_that_reads_answer(tmp_path):
    explanation = {**DESCRIPTION, "name": "explanation", "writes": "explanation", "reads": ["question", "answer_text"]}
    recipe = parse(tmp_path, explanation, ONLY_ANSWER)
    assert [stage.name for stage in recipe.stages] == ["answer", "explanation"]


def changed(stage, **settings):
    """Return valid stages and a stage with changed settings, which no other stage reads."""
    return [DESCRIPTION, {**stage, **settings, "name": "changed"}, ONLY_ANSWER]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [RATIONALE, {**RETRIEVAL, "reads": ["question", "rationale"]}, ANSWER],
            "no stage can run first.*: rationale reads passages; retrieval reads rationale; answer reads rationale",
        ),
        ([RATIONALE, ANSWER], "'rationale' reads 'passages', which no stage writes and no problem has"),
        (changed(DESCRIPTION), "two stages write 'description'"),
        ([DESCRIPTION, RETRIEVAL], "exactly one stage writes `answer_text`; found description writes description"),
        (changed(DESCRIPTION, writes="rejected"), "'changed' writes 'rejected', a key that predictions have"),
        (changed(RATIONALE, kind="think"), "'changed' has kind 'think'; expected one of generate, choose, retrieve"),
        (changed(RATIONALE, kind="choose"), "kind 'choose' and writes 'rationale'; expected 'answer_text'"),
        (changed(RATIONALE, num_passages=3), "num_passages 3, which has no effect on a stage of kind 'generate'"),
        (changed(RATIONALE, corpora=["lectures"]), "corpora .*, which has no effect on a stage of kind 'generate'"),
        (changed(RETRIEVAL, target="{{ lecture }}"), "target .*, which has no effect on a stage of kind 'retrieve'"),
        (changed(RETRIEVAL, learning_rate=1e-3), "learning_rate .*, which has no effect on a stage of kind 'retrieve'"),
        (changed(RETRIEVAL, reads=["question", "images"]), "reads images, which have no effect"),
        (changed(RETRIEVAL, corpora=[]), "'changed' retrieves, and has corpora .*; expected a list"),
        (
            [{**RETRIEVAL, "reads": ["question"]}, {**RATIONALE, "init_from": "previous_stage"}, ANSWER],
            "'rationale' has init_from 'previous_stage', but no stage before it",
        ),
        ([WRITTEN, ANSWER, {**CHECK, "inputs_from": "gold"}], "'check' has inputs_from 'gold'.*; expected cross_fit"),
        ([WRITTEN, ANSWER, {**CHECK, "target": "right"}], "target 'right', which has no effect .* kind 'check'"),
        ([WRITTEN, ANSWER, {**CHECK, "num_beams": 2}], "num_beams 2, which has no effect .* kind 'check'"),
        ([WRITTEN, ANSWER, {**CHECK, "score": "mean"}], "score 'mean', which has no effect .* kind 'check'"),
        (
            [{**WRITTEN, "name": "other", "writes": "verdict_score"}, WRITTEN, ANSWER, CHECK],
            "'other' writes 'verdict_score', a key that predictions have",
        ),
        ([WRITTEN, ANSWER, {**CHECK, "source": None}], "'check' needs a `source`"),
        (
            [WRITTEN, ANSWER, CHECK, {**CHECK, "name": "second", "writes": "second"}],
            "check, second send problems back; expected at most one",
        ),
        (changed(RETRIEVAL, num_passages=0), "'changed' has num_passages 0; expected 1 or more"),
    ],
)
def test_refuses_stages_that_cannot_run_and_settings_without_effect(tmp_path, stages, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *stages)


def test_refuses_check_without_text_to_send_back_to(tmp_path):
    answer = {**ANSWER, "reads": ["question", "context", "choices", "rationale"]}
    stages = build_stages(parse(tmp_path, WRITTEN, answer, CHECK).stages)
    assert stages.repeated_by(stages[2]) == stages[:2]
    unread = {**answer, "source": "{{ question }}", "reads": ["question"]}
    for given in ([WRITTEN, unread, CHECK], [WRITTEN, answer, {**CHECK, "reads": ["answer_text"], "source": "x"}]):
        with pytest.raises(ValueError, match="'check' .*expected `answer_text`, and a column that an earlier stage"):
            build_stages(parse(tmp_path, *given).stages)
