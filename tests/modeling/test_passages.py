"""A stage that retrieves, in the pipeline: its searcher, a problem's own passages, and sources that are too long."""

import copy
import json
import pickle

import pytest
from conftest import tiny_model, word_tokenizer

from modeling_mmcot import MMCoTProcessor, MultimodalCoTPipeline
from modeling_mmcot.inference_mmcot import run_stages
from modeling_mmcot.loading_mmcot import load_stages
from modeling_mmcot.retrieval_mmcot import Passage
from modeling_mmcot.stage_mmcot import Stage

RETRIEVAL = {
    "name": "retrieval",
    "kind": "retrieve",
    "reads": ["question"],
    "writes": "passages",
    "source": "{{ question }}",
    "num_passages": 2,
}
ANSWER = {
    "name": "answer",
    "reads": ["question", "choices", "passages"],
    "writes": "answer_text",
    "source": "{% for passage in passages %}{{ passage.text }} {% endfor %}{{ question }}",
    "target": "{{ choices[answer] }}",
}
PROBLEM = {"question": "w5 w6", "choices": ["w8", "w9"]}


class FixedSearcher:
    def __init__(self):
        self.queries = []

    def search(self, queries, k):
        self.queries += queries
        return [[Passage(str(n), f"w{n}", f"w{n} w{n + 20}", "book", 9.0 - n) for n in range(k)] for _ in queries]


@pytest.fixture
def processor():
    processor = MMCoTProcessor(word_tokenizer(), None, [RETRIEVAL, ANSWER])
    processor.searchers["retrieval"] = FixedSearcher()
    return processor


def test_renders_passages_in_source_of_next_stage(processor):
    (columns,) = run_stages({"answer": tiny_model()}, processor, [PROBLEM], [None])
    assert processor.searchers["retrieval"].queries == ["w5 w6"]
    assert columns["passages"] == [
        {"id": "0", "title": "w0", "text": "w0 w20", "source": "book", "score": 9.0},
        {"id": "1", "title": "w1", "text": "w1 w21", "source": "book", "score": 8.0},
    ]
    assert processor.stage("answer").render_source({**PROBLEM, **columns}) == "w0 w20 w1 w21 w5 w6"


def test_uses_passages_of_problem_instead_of_search(processor):
    answer = MultimodalCoTPipeline(model=tiny_model(), processor=processor)
    result = answer({**PROBLEM, "passages": ["w30", {"text": "w31", "source": "notes"}]})
    assert processor.searchers["retrieval"].queries == []
    assert [(one["text"], one["source"]) for one in result["passages"]] == [("w30", ""), ("w31", "notes")]
    assert len(answer(PROBLEM)["passages"]) == 2 and len(processor.searchers["retrieval"].queries) == 1


@pytest.mark.parametrize(
    "passages",
    ["w3", [3], [{"title": "w3"}], [""], {"text": "w3"}, [{"text": "w3", "title": 3}], [{"text": "w3", "url": "x"}]],
)
def test_refuses_malformed_passages(processor, passages):
    answer = MultimodalCoTPipeline(model=tiny_model(), processor=processor)
    with pytest.raises(ValueError, match="`passages` of a problem must be a list of passages"):
        answer({**PROBLEM, "passages": passages})


def test_pipeline_uses_given_searcher(processor):
    processor.searchers.clear()
    searcher = FixedSearcher()
    answer = MultimodalCoTPipeline(model=tiny_model(), processor=processor, searcher=searcher)
    assert len(answer(PROBLEM)["passages"]) == 2 and searcher.queries == ["w5 w6"]


def test_refuses_searcher_if_no_stage_retrieves():
    stages = [{**ANSWER, "reads": ["question", "choices"], "source": "{{ question }}"}]
    with pytest.raises(ValueError, match="searcher was given, but no stage retrieves: answer"):
        MultimodalCoTPipeline(
            model=tiny_model(), processor=MMCoTProcessor(word_tokenizer(), None, stages), searcher=FixedSearcher()
        )


def test_error_names_remedy_if_repository_has_no_index(tmp_path):
    processor = MMCoTProcessor(word_tokenizer(), None, [RETRIEVAL, ANSWER])
    models = load_stages(tiny_model(), str(tmp_path), processor)
    with pytest.raises(OSError, match="^The retrieval stage has no index to search: .*Pass searcher="):
        run_stages(models, processor, [PROBLEM], [None])


def test_shortens_last_passages_of_too_long_source():
    stage = Stage(**{**ANSWER, "max_source_length": 5})
    processor = MMCoTProcessor(word_tokenizer(), None, [RETRIEVAL, stage])
    passages = [{"text": "w1 w2"}, {"text": "w3 w4"}, {"text": "w7"}]
    assert processor.fit_source({**PROBLEM, "passages": passages}, stage) == "w1 w2 w3 w5 w6"
    assert processor.fit_source({**PROBLEM, "passages": passages[:1]}, stage) == "w1 w2 w5 w6"


def test_shortens_context_before_columns_of_earlier_stages():
    stage = Stage(
        name="answer",
        reads=["question", "context", "description", "choices"],
        writes="answer_text",
        source="{{ context }} {{ description }} {{ question }}",
        target="{{ choices[answer] }}",
        max_source_length=3,
    )
    processor = MMCoTProcessor(word_tokenizer(), None, [stage])
    assert processor.fit_source({**PROBLEM, "context": "w1 w2", "description": "w3"}, stage) == "w3 w5 w6"
    assert processor.fit_source({**PROBLEM, "context": "w1", "description": "w3 w4"}, stage) == "w4 w5 w6"


def test_searches_if_passages_of_problem_are_none(processor):
    answer = MultimodalCoTPipeline(model=tiny_model(), processor=processor)
    assert len(answer({**PROBLEM, "passages": None})["passages"]) == 2


def test_given_searcher_does_not_reach_other_pipelines(processor):
    other = FixedSearcher()
    MultimodalCoTPipeline(model=tiny_model(), processor=processor, searcher=other)
    MultimodalCoTPipeline(model=tiny_model(), processor=processor)(PROBLEM)
    assert other.queries == [] and processor.searchers["retrieval"].queries == ["w5 w6"]


def test_later_stage_reads_answer():
    explanation = {**RETRIEVAL, "name": "explanation", "kind": "generate", "writes": "explanation", "target": "w3"}
    explanation |= {"reads": ["question", "answer_text"], "source": "{{ question }} {{ answer_text }}"}
    answer = {**ANSWER, "reads": ["question", "choices"], "source": "{{ question }}"}
    processor = MMCoTProcessor(word_tokenizer(), None, [answer, explanation])
    (columns,) = run_stages({"answer": tiny_model(), "explanation": tiny_model()}, processor, [PROBLEM], [None])
    assert columns["answer_text"] in PROBLEM["choices"] and isinstance(columns["explanation"], str)


def test_error_names_stage_without_searcher(processor):
    processor.searchers.clear()
    with pytest.raises(ValueError, match="The retrieval stage has no searcher"):
        run_stages({"answer": tiny_model()}, processor, [PROBLEM], [None])


def test_processor_is_saved_and_copied_without_searchers(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert "searchers" not in json.loads((tmp_path / "processor_config.json").read_text())
    assert copy.deepcopy(processor).searchers == processor.searchers
    assert pickle.loads(pickle.dumps(processor)).searchers == {}
    assert MMCoTProcessor.from_pretrained(tmp_path, trust_remote_code=False).stages == processor.stages


def test_shortens_source_of_problem_with_list_of_pictures():
    stage = Stage(**{**ANSWER, "reads": ["question", "context", "images"], "source": "{{ context }} {{ question }}"})
    stage.max_source_length = 3
    processor = MMCoTProcessor(word_tokenizer(), None, [stage])
    problem = {**PROBLEM, "context": "w1 w2 w3", "images": [object()]}
    assert processor.fit_source(problem, stage) == "w1 w5 w6"


def test_accepts_passages_with_absent_fields(processor):
    (passage,) = processor.complete_problem({**PROBLEM, "passages": [{"text": "w3", "title": None, "query": None}]})[
        "passages"
    ]
    assert (passage["text"], passage["title"]) == ("w3", "") and "query" not in passage
