"""The stages of a system: their order, kinds and saved form."""

import json

import pytest

from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.inference_mmcot import WRITERS
from modeling_mmcot.stage_mmcot import CHOOSE, GENERATE, KINDS, Stage, Stages

STAGES = Stages(
    [
        Stage("description", ["question", "images"], "description", "{{ question }}", "{{ caption }}"),
        Stage("rationale", ["question", "description"], "rationale", "{{ question }}", "{{ solution }}"),
        Stage("answer", ["question", "choices", "rationale"], "answer_text", "{{ question }}", "{{ letters[answer] }}"),
    ]
)


def test_stages_return_earlier_and_later_stages():
    description, rationale, answer = STAGES
    assert STAGES.names == ["description", "rationale", "answer"]
    assert STAGES.before(description) == [] and STAGES.before(answer) == [description, rationale]
    assert STAGES.after(description) == [rationale, answer] and STAGES.after(answer) == []
    assert STAGES.named("rationale") is rationale
    assert STAGES.see_pictures and description.sees_pictures and not STAGES.after(description).see_pictures
    assert STAGES.read("rationale") and not STAGES.read("caption")
    with pytest.raises(ValueError, match="stage is 'why'; this processor's stages: description, rationale, answer"):
        STAGES.named("why")


def test_each_kind_has_a_function():
    assert WRITERS.keys() == {name for name, kind in KINDS.items() if kind.has_model}


def test_stage_that_writes_answer_text_chooses():
    assert [stage.kind for stage in STAGES] == [GENERATE, GENERATE, CHOOSE]
    for kind, writes in (("guess", "rationale"), (CHOOSE, "rationale"), (GENERATE, "answer_text")):
        with pytest.raises(ValueError, match=f"kind of a stage is '{kind}'; expected one of generate, choose"):
            Stage("one", [], writes, "", "", kind=kind)


def test_loads_a_processor_saved_without_kinds(tiny_run, tmp_path):
    processor = MMCoTProcessor.from_pretrained(tiny_run / "hub", trust_remote_code=False)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    config = json.loads(file.read_text())
    assert [stage.pop("kind") for stage in config["stages"]] == [GENERATE, CHOOSE]
    file.write_text(json.dumps(config))
    assert MMCoTProcessor.from_pretrained(tmp_path, trust_remote_code=False).stages == processor.stages
