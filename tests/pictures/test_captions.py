"""Captions: from image-text-to-text checkpoints, over datasets with resuming, in recipes and in the pipeline."""

import json

import pytest
import torch
from conftest import TINY_VISION, run_script, tiny_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from mmcot import features, train
from mmcot.problems.schema import join_captions
from mmcot.problems.sources import load_problems
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.files import read_json
from mmcot.training import preparation
from modeling_mmcot import MMCoTProcessor, MultimodalCoTPipeline
from modeling_mmcot.captioning_mmcot import CAPTIONERS, Captioner
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES, Stage

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "blue", "square", "circle", "."]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
SPECIAL = {"bos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}


def tokenizer(folder):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A captioner with random weights, large enough to write different captions for different pictures."""
    folder = tmp_path_factory.mktemp("captioners") / "blip"
    text = {"vocab_size": len(WORDS), **SMALL, **SPECIAL, "encoder_hidden_size": 16, "projection_dim": 8}
    torch.manual_seed(1)
    model = BlipForConditionalGeneration(
        BlipConfig(text_config={**text, "initializer_range": 2.0}, vision_config={**VISION, "initializer_range": 2.0})
    )
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer(folder)).save_pretrained(folder)
    return folder


PICTURES = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")] + [
    Image.effect_noise((30, 30), 90).convert("RGB")
]


def test_captions_match_generate(blip):
    captioner = Captioner(str(blip))
    model, processor = BlipForConditionalGeneration.from_pretrained(blip).eval(), BlipProcessor.from_pretrained(blip)
    for picture, caption in zip(PICTURES, captioner(PICTURES), strict=True):
        expected = model.generate(**processor(images=picture, return_tensors="pt"), max_new_tokens=256)
        assert caption == processor.decode(expected[0], skip_special_tokens=True) != ""


def test_passes_prompt_to_the_model(blip):
    captions = Captioner(str(blip), prompt="a picture of")(PICTURES)
    assert all(caption.startswith("a picture of") for caption in captions), "a BLIP continues its prompt"
    assert captions != Captioner(str(blip))(PICTURES)


def test_instructblip_preset_matches_the_authors_settings():
    preset = CAPTIONERS["instructblip"]
    assert (preset.checkpoint, preset.prompt) == ("Salesforce/instructblip-vicuna-7b", "Write a detailed description.")
    assert preset.generation["num_beams"] == 5, "the default of LAVIS, which the authors used"


def test_captions_with_a_vision_encoder_decoder_model(tmp_path):
    """Such a checkpoint has an image processor and a tokenizer, but no processor."""
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION), BertConfig(vocab_size=len(WORDS), **SMALL, is_decoder=True, add_cross_attention=True)
    )
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=2, pad_token_id=0, eos_token_id=3)
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    captions = Captioner(str(tmp_path))(PICTURES)
    assert len(captions) == 3 and all(set(caption.split()) <= set(WORDS) for caption in captions) and any(captions)


def test_chat_model_gets_its_template_and_caption_excludes_the_prompt(tmp_path):
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<image>",
        "USER:",
        "ASSISTANT:",
        "Describe",
        "the",
        "picture.",
        "red",
        "a",
    ]
    vocabulary = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = (
        "USER: {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image> {% else %}"
        "{{ part['text'] }} {% endif %}{% endfor %}ASSISTANT:"
    )
    text = LlamaConfig(**SMALL, vocab_size=len(words), num_key_value_heads=2)
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=4)
    ).eval()
    special_ids = [0, 1, 3, 4]  # suppressed, because random weights would write them in some versions
    model.generation_config.update(eos_token_id=2, pad_token_id=0, suppress_tokens=special_ids, min_new_tokens=2)
    model.save_pretrained(tmp_path)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special, additional_special_tokens=["<image>"]),
        **{"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        chat_template=template,
    ).save_pretrained(tmp_path)
    captioner = Captioner(str(tmp_path))
    asked = captioner.prepare(PICTURES)
    question = [5, 4, 4, 4, 4, 7, 8, 9, 6]  # a picture is four patches
    assert asked["input_ids"].tolist() == [question] * 3
    tokens = model.generate(**asked, do_sample=False, max_new_tokens=256)[:, len(question) :]
    assert captioner(PICTURES) == captioner.processor.batch_decode(tokens, skip_special_tokens=True)
    assert any(captioner(PICTURES))


def test_refuses_checkpoint_that_generates_no_text(tmp_path):
    ViTModel(ViTConfig(**VISION)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'vit', which does not generate text from pictures"):
        Captioner(str(tmp_path))


# Captions of a dataset.


@pytest.mark.slow
def test_captions_every_problem_with_a_picture(blip, tiny_dataset, tmp_path):
    run_script("-m", "mmcot.features", tiny_dataset, "--captions", blip, "--output", tmp_path / "captions")
    written = read_json(tmp_path / "captions/captions.json")
    assert written["model"] == str(blip)
    captioner = Captioner(str(blip))
    for split in ("train", "val", "test"):
        problems = load_problems(str(tiny_dataset), split)
        joined = join_captions(problems, str(tmp_path / "captions/captions.json"))
        assert joined.column_names.count("caption") == 1 and joined["id"] == problems["id"]
        shown = [row for row in joined if row["images"]]
        captions = captioner([Image.open(row["images"][0]["path"]).convert("RGB") for row in shown])
        assert [row["caption"] for row in shown] == captions
        assert {row["caption"] for row in joined if not row["images"]} == {""}


def write_captions(problems_file, blip, output, *options):
    features.main([str(problems_file), "--captions", str(blip), "--output", str(output), *options])


@pytest.fixture
def colors(tmp_path):
    """Six problems with five pictures; the last two share one."""
    for number in range(5):
        Image.effect_noise((30, 30), 20 * number + 5).convert("RGB").save(tmp_path / f"{number}.png")
    rows = [{"question": "?", "images": [f"{min(number, 4)}.png"], "split": "test"} for number in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "p.jsonl"


def test_resumes_after_a_kill(colors, blip, tmp_path, monkeypatch):
    write_captions(colors, blip, tmp_path / "whole", "--batch_size", "2")
    log = (tmp_path / "whole/captions.jsonl").read_text()
    assert log.count("\n") == 1 + 5, "one line for the settings, and one for each picture"
    captioned = []
    original = Captioner.__call__
    monkeypatch.setattr(Captioner, "__call__", lambda self, batch: captioned.extend(batch) or original(self, batch))
    lines = log.splitlines(keepends=True)
    for kept, cut in ((3, 10), (0, 5), (1, 0), (6, 0)):
        (tmp_path / "killed").mkdir(exist_ok=True)
        (tmp_path / "killed/captions.jsonl").write_text("".join(lines[:kept]) + "".join(lines[kept : kept + 1])[:cut])
        captioned.clear()
        write_captions(colors, blip, tmp_path / "killed", "--batch_size", "2")
        assert (tmp_path / "killed/captions.json").read_bytes() == (tmp_path / "whole/captions.json").read_bytes()
        assert len(captioned) == 6 - max(kept, 1)


def test_adds_captions_of_another_split(tiny_dataset, blip, tmp_path):
    for split in ("val", "test"):
        write_captions(tiny_dataset, blip, tmp_path / "out", "--splits", split)
    write_captions(tiny_dataset, blip, tmp_path / "both", "--splits", "val", "test")
    together = read_json(tmp_path / "both/captions.json")["captions"]
    assert read_json(tmp_path / "out/captions.json")["captions"] == together


def test_refuses_to_overwrite_captions_of_another_origin(colors, blip, tmp_path):
    (tmp_path / "out").mkdir()
    for name, content in (("captions.json", '{"captions": {"1": "theirs"}}'), ("captions.jsonl", '{"1": "theirs"}')):
        file = tmp_path / "out" / name
        file.write_text(content)
        with pytest.raises(SystemExit, match=f"{name}.* Choose another --output"):
            write_captions(colors, blip, tmp_path / "out")
        assert file.read_text() == content
        file.unlink()


def test_refuses_to_mix_captions_of_other_settings(colors, blip, tmp_path):
    write_captions(colors, blip, tmp_path / "out")
    with pytest.raises(SystemExit, match="contains captions of .*'prompt': ''.*not of .*'a picture of'"):
        write_captions(colors, blip, tmp_path / "out", "--prompt", "a picture of")


def test_skips_and_names_undecodable_picture(colors, blip, tmp_path):
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[:200])
    with pytest.raises(SystemExit, match="(?s)2.png .*1 pictures were left out"):
        write_captions(colors, blip, tmp_path / "out")
    captions = read_json(tmp_path / "out/captions.json")["captions"]
    assert len(captions) == 5 and "test-2" not in captions
    with pytest.raises(ValueError, match="captions.json: 1 problems with a picture have no caption there: test-2"):
        join_captions(load_problems(str(colors), "test"), str(tmp_path / "out/captions.json"))


def test_recipe_reads_captions(tiny_dataset, blip, tmp_path, monkeypatch):
    from conftest import TINY_RECIPE

    write_captions(tiny_dataset, blip, tmp_path / "captions")
    recipe = TINY_RECIPE.read_text().replace("reads: [question, context,", "reads: [question, context, caption,")
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ["--config", str(tmp_path / "recipe.yaml"), "--dataset", str(tiny_dataset), "--max_steps", "1"]
    captions = str(tmp_path / "captions/captions.json")
    train.main([*command, "--output_dir", str(tmp_path / "run"), "--captions", captions])
    prepared = preparation.prepare(
        parse_recipe([*command, "--output_dir", str(tmp_path / "run"), "--captions", captions])
    )
    row = next(row for row in prepared.problems["train"] if row["images"])
    caption = read_json(captions)["captions"][row["id"]]
    assert row["caption"] == caption != "" and caption in prepared.stages[0].render_source(row)


# The pipeline.


def test_pipeline_captions_pictures_without_a_caption(blip, tmp_path):
    columns = ["question", "context", "choices", "caption", "images"]
    stage = Stage("answer", columns, "answer_text", **PAPER_TEMPLATES["QCM-A"])
    words = tokenizer(tmp_path / "words")
    processor = MMCoTProcessor(
        PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, pad_token="[PAD]", eos_token="[SEP]"),
        ViTImageProcessor(size={"height": 32, "width": 32}),
        [stage],
    )
    parts = {"model": tiny_model(initializer_factor=2.0, vision_config=TINY_VISION), "processor": processor}
    problem = {"question": "a picture of", "choices": ["red", "blue"], "image": PICTURES[2]}
    plain = MultimodalCoTPipeline(**parts)
    captioned = MultimodalCoTPipeline(**parts, caption_model=str(blip))
    (caption,) = Captioner(str(blip))([problem["image"]])
    assert captioned(problem) == plain({**problem, "caption": caption}) != plain(problem)
    own = {**problem, "caption": "a red square"}
    assert captioned(own) == plain(own), "a given caption is kept"
    without = {**problem, "image": None}
    assert captioned(without) == plain(without)
    with pytest.raises(ValueError, match="`image` of a problem contains 2 pictures; this model accepts at most 1"):
        plain({**problem, "image": PICTURES[:2]})
    together = captioned([problem, own, without], batch_size=3)
    for result, alone in zip(together, [captioned(p) for p in (problem, own, without)], strict=True):
        assert result["scores"] == pytest.approx(alone["scores"], abs=1e-5)
