"""The pipeline and its stages: inputs, settings and errors; stages share work without a change of the results."""

import copy
import io
import pickle

import datasets
import pytest
import torch
from conftest import tiny_model, word_tokenizer
from PIL import Image
from transformers import TextStreamer, ViTImageProcessor

from modeling_mmcot import MMCoTProcessor, MultimodalCoTPipeline
from modeling_mmcot.inference_mmcot import choose_answers, encode, generate_texts, group_by_length, run_stages
from modeling_mmcot.loading_mmcot import load_stages, share_tower

COLUMNS = ["question", "choices", "images"]
STAGES = [
    {"name": "rationale", "reads": COLUMNS, "writes": "rationale", "source": "{{ question }}", "target": ""},
    {
        **{"name": "answer", "reads": [*COLUMNS, "rationale"], "writes": "answer_text"},
        **{"source": "{{ question }} {{ rationale }}", "target": "{{ choices[answer] }}"},
    },
]


@pytest.fixture
def processor():
    return MMCoTProcessor(word_tokenizer(), ViTImageProcessor(size={"height": 32, "width": 32}), STAGES)


@pytest.fixture
def problems():
    return [{"question": "w5 w6 w7", "choices": ["w8", "w9 w10"]}, {"question": "w11", "choices": ["w12", "w13"]}]


def record_tower_calls(stages):
    calls = []
    for tower in {id(model.encoder.vision_tower): model.encoder.vision_tower for model in stages.values()}.values():
        tower.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_stages_with_a_shared_tower_encode_a_picture_once(processor, problems):
    images = [Image.new("RGB", (50, 40), "red"), None]
    stages = {"rationale": tiny_model(), "answer": tiny_model()}
    calls = record_tower_calls(stages)
    apart = run_stages(stages, processor, problems, images)
    assert len(calls) == 2
    share_tower(stages["rationale"], stages["answer"])
    assert stages["rationale"].encoder.vision_tower is stages["answer"].encoder.vision_tower
    calls.clear()
    assert run_stages(stages, processor, problems, images) == apart
    assert len(calls) == 1


def test_does_not_share_towers_with_different_weights():
    model, other = tiny_model(), tiny_model(seed=1)
    share_tower(model, other)
    assert model.encoder.vision_tower is not other.encoder.vision_tower


@pytest.mark.parametrize("side", ["right", "left"])
def test_encodes_sources_of_different_lengths_like_each_alone(side):
    model = tiny_model()
    torch.manual_seed(0)
    lengths = [3, 40, 4, 12, 38, 5]
    input_ids, mask = torch.zeros(6, 40, dtype=torch.long), torch.zeros(6, 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(40 - length, 40)
        input_ids[row, place], mask[row, place] = torch.randint(3, 60, (length,)), 1
    pixel_values, pixel_mask = torch.randn(6, 1, 3, 32, 32), torch.ones(6, 1, 32, 32)
    pixel_mask[2] = 0
    inputs = {"input_ids": input_ids, "attention_mask": mask, "pixel_values": pixel_values, "pixel_mask": pixel_mask}
    states = encode(model, inputs)["encoder_outputs"].last_hidden_state
    with torch.no_grad():
        for row in range(6):
            alone = model.encoder(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}).last_hidden_state
            real = mask[row].bool()
            torch.testing.assert_close(states[row, real], alone[0, real], rtol=0, atol=1e-5)
    assert group_by_length(lengths) == [[0, 2], [5], [3], [4, 1]]


def test_scores_choices_like_each_problem_alone_without_reading_padding(processor):
    model = tiny_model(vision_config=None, initializer_factor=2.0)
    problems = [
        {"question": " ".join(f"w{word}" for word in range(length)), "choices": choices, "rationale": ""}
        for length, choices in [(40, ["w8", "w9 w10"]), (3, []), (38, ["w11"])]
    ]
    read = []
    model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["encoder_hidden_states"].shape[:2]), with_kwargs=True
    )

    def scores(rows):
        encoded = encode(model, processor(rows, stage="answer"))
        return choose_answers(model, processor, processor.stages[1], rows, encoded)

    together = scores(problems)
    assert sorted(read) == [(1, 3), (2, 40)]
    for problem, columns in zip(problems, together, strict=True):
        (alone,) = scores([problem])
        assert columns["answer"] == alone["answer"]
        torch.testing.assert_close(columns["scores"], alone["scores"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def answer(processor, monkeypatch):
    """The pipeline, with both stages' models in memory."""
    stages = {"rationale": tiny_model(1, initializer_factor=3.0), "answer": tiny_model(2, initializer_factor=3.0)}
    monkeypatch.setattr("modeling_mmcot.pipeline_mmcot.load_stages", lambda *_: stages)
    return MultimodalCoTPipeline(model=stages["answer"], processor=processor)


def alike(results, expected):
    """Compare scores approximately, because their rounding depends on the batch size."""
    for result, other in zip(results, expected, strict=True):
        assert result["scores"] == pytest.approx(other["scores"], abs=1e-4)
        assert {**result, "scores": 0} == {**other, "scores": 0}
    return True


RED = {"question": "w5 w6 w7", "choices": ["w8", "w9 w10"], "image": Image.new("RGB", (50, 40), "red")}


def test_given_text_replaces_the_text_of_a_stage(answer):
    free = answer(RED)
    assert answer(RED, given={"rationale": free["rationale"]}) == free
    assert answer({**RED, "rationale": "w20"}) == free, "a rationale in the problem may be gold, so it is not read"
    edited, empty = (answer(RED, given={"rationale": text}) for text in ("w20 w21 w22", ""))
    assert (edited["rationale"], empty["rationale"]) == ("w20 w21 w22", "")
    assert free["scores"] != edited["scores"] != empty["scores"]
    for given in ({"solution": "w20"}, {"rationale": None}, {"rationale": ["w20"]}, ["rationale"], "rationale"):
        with pytest.raises(ValueError, match=r"a dict of texts for generated columns .rationale.; found"):
            answer(RED, given=given)


def test_options_of_the_constructor_apply_to_each_call(answer):
    always = MultimodalCoTPipeline(
        model=answer.model, processor=answer.processor, decode_answer=True, given={"rationale": "w20"}
    )
    assert always(RED) == answer(RED, decode_answer=True, given={"rationale": "w20"})
    assert always(RED, given={"rationale": "w21"})["rationale"] == "w21"
    assert always(RED) == always([RED])[0]


class RecordingStreamer(TextStreamer):
    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.texts = [[]]

    def on_finalized_text(self, text, stream_end=False):
        self.texts[-1].append(text)
        if stream_end:
            self.texts.append([])


def test_streamer_receives_each_text_while_it_is_written(answer, processor):
    streamer = RecordingStreamer(processor.tokenizer)
    assert alike([answer(RED, streamer=streamer)], [answer(RED)])
    rationale, nothing_more = streamer.texts
    assert len(rationale) > 2 and "".join(rationale).strip() == answer(RED)["rationale"] and not nothing_more
    streamer = RecordingStreamer(processor.tokenizer)
    open_ended = answer({**RED, "choices": []}, streamer=streamer)
    assert ["".join(text).strip() for text in streamer.texts] == [open_ended["rationale"], open_ended["answer"], ""]


def test_streamer_receives_the_whole_text_with_beams(answer, processor):
    for model in answer.models.values():
        model.generation_config.num_beams = 2
    streamer = RecordingStreamer(processor.tokenizer)
    assert alike([answer(RED, streamer=streamer)], [answer(RED)])
    assert "".join(streamer.texts[0]).strip() == answer(RED)["rationale"] and streamer.texts[1:] == [[]]


class Computed(torch.utils.data.Dataset):
    """Computes a row for any index, also beyond its length."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {**RED, "question": f"w{index + 3}"}


def test_torch_dataset_ends_at_its_length(answer):
    assert alike(answer(Computed(), batch_size=2), answer([Computed()[index] for index in range(3)]))
    assert answer([]) == [] and list(answer(row for row in ())) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        answer([RED], batch_size=0)


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"choices": ["w8"] * 27}, "at most 26; found 27"),
        ({"image": {}}, "a picture must be .*; found {}"),
        ({"image": [None]}, "a picture must be .*; found None"),
        ({"image": {"bytes": None, "path": None}}, "a picture must be"),
        ({"image": 5}, "a picture must be .*; found 5"),
    ],
)
def test_refuses_invalid_choices_and_pictures(answer, columns, error):
    with pytest.raises(ValueError, match=error):
        answer({**RED, **columns})


def test_reads_problems_lazily(answer):
    rows = [{**RED, "question": f"w{number}"} for number in range(3, 10)]
    expected = answer(rows)
    read = []
    results = answer((read.append(row) or row for row in rows), batch_size=2)
    first = next(results)
    assert len(read) <= 3  # transformers reads the first problem in advance
    assert alike([first, *results], expected)


def test_answers_a_dataset_with_and_without_decoded_pictures(answer):
    file = io.BytesIO()
    RED["image"].save(file, "PNG")
    rows = [
        {
            "question": f"w{number}",
            "choices": RED["choices"],
            "images": [{"bytes": file.getvalue(), "path": None}] * has,
        }
        for number, has in ((3, 1), (4, 0), (5, 1))
    ]
    plain = [{**row, "image": RED["image"] if row["images"] else None, "images": None} for row in rows]
    expected = answer(plain)
    for decode in (False, True):
        features = datasets.Features(
            {
                "question": datasets.Value("string"),
                "choices": datasets.List(datasets.Value("string")),
                "images": datasets.List(datasets.Image(decode=decode)),
            }
        )
        dataset = datasets.Dataset.from_list(rows, features=features)
        seen = [[picture.size for picture in answer.preprocess(row)["images"]] for row in dataset]
        assert seen == [[(50, 40)], [], [(50, 40)]]
        for source in (dataset, dataset.to_iterable_dataset()):
            assert alike(answer(source, batch_size=2), expected)


def test_token_maps_show_attention_over_patches(answer):
    found = answer.token_maps(RED, "answer", {"rationale": "w20 w21"})
    assert found.tokens[:3] == ["w5", "w6", "w7"] and {"w20", "w21"} <= set(found.tokens)
    assert [maps.shape for maps in found.maps] == [(len(found.tokens), 2, 2)]
    with pytest.raises(ValueError, match="The answer stage reads rationale: pass the written text as given"):
        answer.token_maps(RED, "answer")
    with pytest.raises(ValueError, match="saw no picture"):
        answer.token_maps({**RED, "image": None}, "answer", {"rationale": ""})


def test_refuses_an_unknown_key_with_a_suggestion(answer):
    with pytest.raises(ValueError, match="unknown key 'qestion': did you mean 'question'"):
        answer({**RED, "qestion": "w5"})
    columns = {"id": "1", "answer": 0, "solution": "w3", "grade": "grade2", "hint": "", "split": "test"}
    assert answer({**RED, **columns}) == answer(RED)


def test_accepts_generate_settings_like_transformers_pipelines(answer):
    short = answer(RED, max_new_tokens=2)["rationale"]
    assert len(short.split()) <= 2 < len(answer(RED)["rationale"].split())
    assert answer(RED, generate_kwargs={"max_new_tokens": 2})["rationale"] == short
    assert answer(RED, num_beams=3, max_new_tokens=5)
    with pytest.raises(ValueError, match="max_new_tokens given twice"):
        answer(RED, max_new_tokens=2, generate_kwargs={"max_new_tokens": 2})
    with pytest.raises(TypeError, match="unexpected keyword 'max_new_token': did you mean 'max_new_tokens'"):
        answer(RED, max_new_token=2)


def test_returns_the_answer_that_several_rationales_agree_on(answer):
    torch.manual_seed(0)
    result = answer(RED, num_rationales=5, temperature=50.0)
    assert len(result["rationales"]) == 5 > 1 < len(set(result["rationales"]))
    assert result["agreement"] in (0, 0.2, 0.4, 0.6, 0.8, 1) and sum(result["scores"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="do_sample=False always yields the same"):
        answer(RED, num_rationales=2, do_sample=False)
    with pytest.raises(ValueError, match="num_rationales is 0"):
        answer(RED, num_rationales=0)


def test_stage_reads_any_text_column_except_gold(processor):
    stages = [{**STAGES[1], "reads": [*COLUMNS, "grade", "topic"], "source": "{{ question }} {{ grade }} {{ topic }}"}]
    processor = MMCoTProcessor(processor.tokenizer, processor.image_processor, stages)
    pipe = MultimodalCoTPipeline(model=tiny_model(1, initializer_factor=3.0), processor=processor)
    scores = [pipe({**RED, "grade": grade})["scores"] for grade in ("w20", "w21", "")]
    assert scores[0] != scores[1] != scores[2] and pipe(RED)["scores"] == scores[2]


def test_answers_a_chat_without_a_column_that_a_stage_reads(processor, tmp_path):
    stages = [{**STAGES[1], "reads": [*COLUMNS, "grade"], "source": "{{ question }} {{ grade }}"}]
    processor = MMCoTProcessor(processor.tokenizer, processor.image_processor, stages)
    model = tiny_model(1, initializer_factor=3.0)
    chat = [{"role": "user", "content": "w5 w6 w7\n- w8\n- w9"}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    reply = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    pipe = MultimodalCoTPipeline(model=model, processor=processor)
    (expected,) = pipe(text=chat, return_full_text=False)
    assert processor.decode(reply, skip_special_tokens=True) == expected["generated_text"]


@pytest.mark.parametrize("place", ["encoder.final_layer_norm", "decoder.final_layer_norm"])
@pytest.mark.parametrize("stage", ["rationale", "answer"])
def test_names_problem_and_stage_of_nan_or_infinity(answer, place, stage):
    answer.models[stage].get_submodule(place).weight.data.fill_(torch.nan)
    message = f"The {stage} stage computes NaN or infinity for the problem 'w5 w6 w7'"
    with pytest.raises(ValueError, match=message):
        answer(RED)
    if stage == "rationale":
        with pytest.raises(ValueError, match=message):
            answer(RED, num_beams=2)


def test_names_the_problem_with_nan_or_infinity_in_a_batch(answer, monkeypatch):
    def overflow(model, processor, encoded, **generation):
        if (encoded["attention_mask"].sum(dim=1) > 40).any():
            raise FloatingPointError
        rows = len(encoded["attention_mask"])
        return [""] * rows, [False] * rows

    monkeypatch.setattr("modeling_mmcot.inference_mmcot.generate_texts", overflow)
    long = {**RED, "question": " ".join(["w7"] * 41)}
    with pytest.raises(ValueError, match="The rationale stage computes NaN or infinity for the problem 'w7 w7"):
        answer([RED, long, RED], batch_size=3)


def test_refuses_settings_that_do_not_apply_to_one_text(answer):
    with pytest.raises(ValueError, match="num_return_sequences is 2.*a problem has one rationale"):
        answer(RED, num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        answer(RED, return_dict_in_generate=True)


def test_max_length_of_the_call_limits_the_text(answer):
    texts = [answer(RED, **settings)["rationale"].split() for settings in ({}, {"max_length": 4})]
    assert texts[0][:3] == texts[1] and len(texts[0]) > 3


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"choices": {"text": ["w8", "w9"], "label": ["A", "B"]}}, "`choices` of a problem must be a list of str"),
        ({"choices": "w8"}, "`choices` of a problem must be a list of str"),
        ({"choices": 5}, "`choices` of a problem must be a list of str; found 5"),
        ({"choices": ["w8"] * 27}, "at most 26; found 27"),
        ({"context": ["w8"]}, "`context` of a problem must be a str; found"),
        ({"question": None}, "with a `question`"),
        ({"contxt": "w8"}, "unknown key 'contxt': did you mean 'context'"),
        ({"picture": "x.png"}, "unknown key 'picture'"),
        ({"images": [RED["image"]]}, "pictures twice, as `image` and as `images`"),
    ],
)
def test_pipeline_and_processor_refuse_the_same_problems(answer, processor, columns, error):
    problem = {**RED, **columns}
    with pytest.raises(ValueError, match=error):
        answer(problem)
    with pytest.raises(ValueError, match=error):
        processor(problem, stage="rationale")


def test_treats_empty_cells_of_a_table_as_absent(answer, processor):
    pandas = pytest.importorskip("pandas")
    (row,) = pandas.DataFrame([{**RED, "context": pandas.NA, "caption": float("nan")}]).to_dict("records")
    assert answer(row) == answer(RED)
    assert torch.equal(processor(row, stage="rationale")["input_ids"], processor(RED, stage="rationale")["input_ids"])
    assert answer.preprocess({**RED, "choices": float("nan")})["problem"]["choices"] == []
    assert answer.preprocess({**RED, "image": None, "images": [RED["image"]]})["images"]
    assert answer.preprocess({**RED, "image": [], "images": [RED["image"]]})["images"]


def test_reads_a_hint_as_context(answer):
    assert answer.preprocess({**RED, "hint": "w20 w21"})["problem"]["context"] == "w20 w21"
    assert answer.preprocess({**RED, "context": "w20", "hint": "w21"})["problem"]["context"] == "w20"


def test_processor_names_the_stage_that_writes_a_missing_column(processor):
    with pytest.raises(ValueError, match="The answer stage reads `rationale`, which the rationale stage writes"):
        processor([{**RED, "rationale": "w5"}, RED], stage="answer")
    with pytest.raises(ValueError, match="problems is empty"):
        processor([], stage="rationale")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_saves_a_processor_loaded_with_a_dtype(answer, tmp_path, dtype):
    answer.save_pretrained(tmp_path)
    found = MMCoTProcessor.from_pretrained(tmp_path, dtype=dtype)
    found.save_pretrained(tmp_path)
    assert MMCoTProcessor.from_pretrained(tmp_path).stages == found.stages


def test_beam_search_does_not_change_the_encoded_inputs(processor, problems):
    model = tiny_model(1, initializer_factor=3.0)
    encoded = encode(model, processor(problems, stage="rationale"))
    twice = [generate_texts(model, processor, encoded, num_beams=3)[0] for _ in range(2)]
    assert twice[0] == twice[1] and len(encoded["encoder_outputs"].last_hidden_state) == 2


def test_passes_hub_options_to_every_stage(answer, tmp_path, monkeypatch):
    given = []
    root = answer.models["answer"]
    root.save_pretrained(tmp_path)
    options = {"token": "secret", "cache_dir": str(tmp_path / "cache"), "device_map": "cpu"}
    loaded = type(root).from_pretrained(tmp_path, **options)
    assert loaded.loading_options == options
    assert b"secret" not in pickle.dumps(loaded) and not pickle.loads(pickle.dumps(loaded)).loading_options
    assert copy.deepcopy(loaded).loading_options == options
    loaded.config._commit_hash = "a" * 40
    monkeypatch.setattr(type(root), "from_pretrained", lambda *args, **kwargs: given.append((args, kwargs)) or root)
    load_stages(loaded, "user/model", answer.processor)
    (((repository,), kwargs),) = given
    assert repository == "user/model" and kwargs["subfolder"] == "rationale"
    assert {name: kwargs[name] for name in options} == options
    assert kwargs["revision"] == "a" * 40 and kwargs["dtype"] == loaded.dtype
