"""The stages in one process: what they share is computed once, and sharing changes nothing."""

import pytest
import torch
from conftest import tiny_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.pipeline_mmcot import choose_answers, encode, rows_of_like_lengths, run_stages
from modeling_mmcot.stages_mmcot import share_tower

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(61))]
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
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return MMCoTProcessor(tokenizer, ViTImageProcessor(size={"height": 32, "width": 32}), STAGES)


@pytest.fixture
def problems():
    return [{"question": "w5 w6 w7", "choices": ["w8", "w9 w10"]}, {"question": "w11", "choices": ["w12", "w13"]}]


def times_seen(stages):
    calls = []
    for tower in {id(model.encoder.vision_tower): model.encoder.vision_tower for model in stages.values()}.values():
        tower.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_stages_with_one_tower_see_a_picture_once(processor, problems):
    images = [Image.new("RGB", (50, 40), "red"), None]
    stages = {"rationale": tiny_model(), "answer": tiny_model()}
    calls = times_seen(stages)
    apart = run_stages(lambda stage: stages[stage.name], processor, problems, images)
    assert len(calls) == 2
    share_tower(stages["rationale"], stages["answer"])
    assert stages["rationale"].encoder.vision_tower is stages["answer"].encoder.vision_tower
    calls.clear()
    assert run_stages(lambda stage: stages[stage.name], processor, problems, images) == apart
    assert len(calls) == 1


def test_towers_of_unlike_weights_stay_apart():
    model, other = tiny_model(), tiny_model(seed=1)
    share_tower(model, other)
    assert model.encoder.vision_tower is not other.encoder.vision_tower


@pytest.mark.parametrize("side", ["right", "left"])
def test_sources_of_unlike_lengths_are_encoded_as_each_alone(side):
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
    assert rows_of_like_lengths(lengths) == [[0, 2], [5], [3], [4, 1]]


def test_choices_over_unlike_sources_score_as_each_alone_and_no_padding_is_read(processor):
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
