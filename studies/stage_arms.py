"""The arms of the study of stages (`studies/stages.py`): recipes that are derived from `configs/study/`.

An arm differs from `four_stages` by one change: fewer stages, other training inputs, another order of the texts in one
generation, other passages. All arms have the same model, batch size and schedule.
"""

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml
from datasets import Dataset

from mmcot.problems import study
from modeling_mmcot.retrieval_mmcot import Passage, to_dict

CONFIGS = Path("configs/study")
ONE_PASS = "one_pass"
LOOP = "{% for passage in passages %}{{ passage.text }} {% endfor %}"
# Shares of the training steps. With the budget "total", an arm's stages divide the steps of the study; with "stage",
# each stage has its share of the steps of `four_stages`, so that an arm with fewer stages has fewer steps.
SHARES = {"description": 6, "knowledge": 2, "rationale": 3, "answer": 2}
BUDGETS = {"total": "all stages of an arm together", "stage": "the four stages of `four_stages` together"}
ANSWER = "The answer is {{ choices[answer] }}."
# The texts of one generation; the last form is that of LLaVA-CoT (Xu et al. 2024, arXiv 2411.10440), with its order of
# summary, caption, reasoning and conclusion filled with our four texts.
ONE_PASS_TARGETS = {
    "LEA": "{{ lecture }} {{ solution }} " + ANSWER,
    "ALE": ANSWER + " BECAUSE: {{ lecture }} {{ solution }}",
    "tagged": "<CAPTION> {{ observation }} </CAPTION> <KNOWLEDGE> {{ lecture }} </KNOWLEDGE> "
    "<REASONING> {{ solution }} </REASONING> <CONCLUSION> " + ANSWER + " </CONCLUSION>",
}


@dataclass(frozen=True)
class Arm:
    """
    Args:
        meaning: a line for the table.
        stages: the names of the stages in `four_stages.yaml`, in order.
        later_stages: settings of all stages with a model except the first one.
        changes: settings of single stages, by name.
        settings: settings of the recipe.
        run_of: the arm whose trained stages are used, if this one trains nothing.
        passages: the origin of the passages in prediction, in place of the search: `gold` or `wrong`.
        searches: whether the texts are the best of several (`stage_prediction.predict_with_search`).
    """

    meaning: str
    stages: tuple[str, ...] = ("description", "retrieval", "knowledge", "rationale", "answer")
    later_stages: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    run_of: str | None = None
    passages: str | None = None
    searches: bool = False

    @property
    def is_one_pass(self) -> bool:
        return ONE_PASS in self.stages


def one_pass(form: str, meaning: str) -> Arm:
    return Arm(meaning, (ONE_PASS, "answer"), changes={ONE_PASS: {"target": ONE_PASS_TARGETS[form]}})


def sized(meaning: str, width: int) -> Arm:
    text = {"d_model": width, "d_ff": 2 * width, "num_heads": width // 32}
    vision = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 32}
    return Arm(meaning, settings={"text_config": text, "vision_config": vision})


ARMS: dict[str, Arm] = {
    "answer_only": Arm("question and picture → answer", ("answer",)),
    "one_pass_LEA": one_pass("LEA", "lecture, solution, answer in one generation"),
    "one_pass_ALE": one_pass("ALE", "answer, lecture, solution in one generation"),
    "one_pass_tagged": one_pass("tagged", "description, knowledge, rationale, answer in one tagged generation"),
    "two_stages": Arm("rationale → answer", ("rationale", "answer")),
    "three_stages": Arm("description → rationale → answer", ("description", "rationale", "answer")),
    "four_closed": Arm(
        "description → knowledge without passages → rationale → answer",
        ("description", "knowledge", "rationale", "answer"),
    ),
    "four_stages": Arm("description → BM25 → knowledge → rationale → answer"),
    "four_gold_passages": Arm("`four_stages`, predicted with the gold passage", run_of="four_stages", passages="gold"),
    "four_wrong_passages": Arm("`four_stages`, predicted with wrong passages", run_of="four_stages", passages="wrong"),
    "four_search": Arm("`four_stages`, predicted with a search by stage", run_of="four_stages", searches=True),
    "passages_to_rationale": Arm(
        "description → BM25 → rationale → answer",
        ("description", "retrieval", "rationale", "answer"),
        changes={"rationale": {"passages": True}},
    ),
    "four_anchor": Arm(
        "`four_stages`, whose description stage reads a caption", changes={"description": {"caption": True}}
    ),
    "four_generated": Arm("`four_stages` with generated inputs", later_stages={"inputs_from": "generated"}),
    "four_cross_fit": Arm(
        "`four_stages` with cross-fitted inputs", later_stages={"inputs_from": "cross_fit"}, settings={"num_folds": 2}
    ),
    "four_mixed": Arm("`four_stages` with mixed inputs", later_stages={"inputs_from": "mixed"}),
    "four_previous": Arm(
        "`four_stages`, each from the previous stage's weights", later_stages={"init_from": "previous_stage"}
    ),
    "four_shared": Arm("`four_stages` with one model for all stages", settings={"share_weights": True}),
    "four_small": sized("`four_stages`, half as wide", 64),
    "four_large": sized("`four_stages`, twice as wide", 256),
}


def recipe_of(arm: Arm, dataset: str, steps: int, budget: str, learning_rate: float) -> dict[str, Any]:
    """
    Return the recipe of an arm.

    Args:
        steps: the training steps of `budget`, a key of `BUDGETS`.
    """
    recipe = yaml.safe_load((CONFIGS / "four_stages.yaml").read_text())
    pieces = {stage["name"]: stage for stage in recipe["stages"]} | {ONE_PASS: one_pass_stage()}
    stages, written = [], set()
    for name in arm.stages:
        stages.append(change(only_reading(pieces[name], written), arm.changes.get(name, {})))
        written.add(stages[-1]["writes"])
    for name, value in arm.settings.items():
        recipe[name] = recipe[name] | value if isinstance(value, dict) else value
    trained = [stage for stage in stages if stage["name"] in ((ONE_PASS,) if arm.is_one_pass else SHARES)]
    for stage in trained[1:]:
        stage.update(arm.later_stages)
    set_epochs(recipe, trained, dataset, steps, budget)
    return recipe | {
        "dataset": dataset,
        "stages": stages,
        "learning_rate": learning_rate,
        "warmup_steps": 0.1,  # a share of the steps: stages have different numbers of steps
        "eval_strategy": "no",
        "save_strategy": "no",
    }


def set_epochs(recipe: dict, trained: list[dict], dataset: str, steps: int, budget: str) -> None:
    """Set the number of epochs of each stage, or of the recipe if one model is trained on all stages."""
    level = study.level_of(study.parse_source(dataset)[1])
    epochs = steps * recipe["per_device_train_batch_size"] / level.num_training_problems
    if recipe.get("share_weights"):
        recipe["num_train_epochs"] = epochs / len(trained)
    shares = {stage["name"]: SHARES.get(stage["name"], sum(SHARES.values())) for stage in trained}
    total = sum(shares.values()) if budget == "total" else sum(SHARES.values())
    for stage in trained:
        stage.pop("num_train_epochs", None)
        if not recipe.get("share_weights"):
            stage["num_train_epochs"] = round(epochs * shares[stage["name"]] / total, 4)


def one_pass_stage() -> dict[str, Any]:
    return {
        "name": ONE_PASS,
        "reads": ["question", "context", "choices", "images"],
        "writes": "one_pass_text",
        "template": "QCM-LEA",
        "max_source_length": 192,
        "max_target_length": 256,
    }


def only_reading(stage: dict[str, Any], written: set[str]) -> dict[str, Any]:
    """Return the stage without the columns that no stage of the arm writes."""
    stage = copy.deepcopy(stage)
    for column in {"description", "passages", "knowledge", "rationale"} & set(stage["reads"]) - written:
        stage["reads"].remove(column)
        if stage.get("template") == "QCMG-A":
            stage["template"] = "QCM-A"
            continue
        value = re.escape(LOOP if column == "passages" else f"{{{{ {column} }}}}")
        stage["source"], count = re.subn(rf"({column.capitalize()}: )?{value}\s*", "", stage["source"])
        if count != 1:
            raise ValueError(f"The source of {stage['name']} has no {column} to leave out: {stage['source']}")
    return stage


def change(stage: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the stage with other settings; `caption` and `passages` are texts that its source gets in addition."""
    stage = {**stage, **changes}
    for column, text in (("caption", "{{ caption }}"), ("passages", LOOP)):
        if stage.pop(column, False):
            before, cue = stage["source"].rsplit(" ", 1)
            stage["source"] = f"{before} {column.capitalize()}: {text} {cue}"
            stage["reads"] = [*stage["reads"], column]
    return stage


def answer_in(text: str, choices: list[str]) -> int:
    """Return the index of the choice in "The answer is CHOICE."; -1 if there is none."""
    answer = text.partition("The answer is ")[2]
    fitting = [index for index, choice in enumerate(choices) if answer.startswith(f"{choice}.")]
    return fitting[0] if fitting else -1


def passages_for(origin: str, problems: Dataset, dataset: str, number: int) -> dict[str, list[dict[str, Any]]]:
    """Return the gold passages of each problem, or as many passages of other subjects as a search returns, by id."""
    corpus = [Passage(*passage, score=0.0) for passage in study.corpus(study.parse_source(dataset)[1])]
    by_id = {passage.id: passage for passage in corpus}
    chosen = {}
    for row in problems.remove_columns("images"):
        gold = [by_id[name] for name in row["gold_passages"]]
        if origin == "wrong":
            titles = {passage.title.partition(":")[0] for passage in gold}
            others = [passage for passage in corpus if passage.title.partition(":")[0] not in titles]
            gold = Random(row["id"]).sample(others, number)
        chosen[row["id"]] = [to_dict(passage) for passage in gold]
    return chosen
