"""The text checkpoints that a model can start from: each kind of T5 gives the outputs of transformers' own class; any
other model type is refused by name; a system with a byte-level tokenizer (ByT5) trains, saves, loads and answers."""

import json

import pytest
import torch
import yaml
from conftest import TINY_RECIPE, TINY_TEXT, run_isolated, run_script
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    GenerationConfig,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from mmcot.prediction.examples import tokenizer_state
from mmcot.recipes.recipe import parse_recipe
from mmcot.training.preparation import prepare
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# class, configuration, and whether the file contains a separate head
KINDS = {
    "t5, unifiedqa": (T5ForConditionalGeneration, T5Config(**TINY_TEXT), False),
    "t5 v1.1, flan-t5, flan-alpaca": (T5ForConditionalGeneration, T5Config(**TINY_TEXT, **GATED), True),
    "t5 v1.1 as 5.24 saves a tied one": (T5ForConditionalGeneration, T5Config(**TINY_TEXT, **GATED), False),
    "mt5": (MT5ForConditionalGeneration, MT5Config(**TINY_TEXT, **GATED), True),
    "mt5 as 5.24 saves a tied one": (MT5ForConditionalGeneration, MT5Config(**TINY_TEXT, **GATED), False),
}
SMALL = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SMALL_BERT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = {
    "bart": BartForConditionalGeneration(BartConfig(**SMALL, decoder_attention_heads=2)),
    "bert": BertModel(BertConfig(**SMALL_BERT)),
    "umt5": UMT5ForConditionalGeneration(UMT5Config(**TINY_TEXT)),
}


def save_checkpoint(folder, kind):
    model_class, config, has_head = KINDS[kind]
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    if has_head:
        weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        weights["lm_head.weight"] = torch.randn(64, 32)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((folder / "config.json").read_text())  # as on the Hub
        (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": False}))
    return model_class.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_t5_equals_transformers(kind, tmp_path, batch, labels):
    plain = save_checkpoint(tmp_path, kind)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model, info = MMCoTForConditionalGeneration.from_pretrained(
        tmp_path, vision_hidden_size=10, output_loading_info=True
    )
    assert {name.rsplit(".", 2)[0] for name in info["missing_keys"]} == {"encoder.fusion"}
    model.eval().save_pretrained(tmp_path / "ours")
    again = MMCoTForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        expected = plain(**texts, labels=labels).logits
        for ours in (model, again):
            assert torch.equal(ours.lm_head.weight, plain.lm_head.weight)
            # Approximately equal, because a gated activation is computed in one operation, which rounds differently.
            torch.testing.assert_close(ours(**texts, labels=labels).logits, expected, rtol=1e-5, atol=1e-4)
            assert torch.equal(ours.generate(**texts), plain.generate(**texts))


def test_head_tied_in_the_file_stays_tied(tmp_path):
    save_checkpoint(tmp_path, "t5 v1.1 as 5.24 saves a tied one")
    model = MMCoTForConditionalGeneration.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "ours")
    again = MMCoTForConditionalGeneration.from_pretrained(tmp_path / "ours")
    for one in (model, again):
        assert one.lm_head.weight is one.shared.weight and not one.config.scale_decoder_outputs
        one.resize_token_embeddings(70)
        assert one.lm_head.weight is one.shared.weight


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_another_model_type_by_name(name, tmp_path):
    OTHERS[name].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type is '{name}'.*expected a T5 text model"):
        MMCoTForConditionalGeneration.from_pretrained(tmp_path)


def test_training_refuses_another_model_type_before_it_reads_data(tmp_path):
    OTHERS["bart"].save_pretrained(tmp_path / "bart")
    recipe = one_stage_recipe(tmp_path, model_name_or_path=str(tmp_path / "bart"), dataset="is/not/there.jsonl")
    with pytest.raises(ValueError, match="model_type is 'bart'"):
        prepare(parse_recipe(["--config", str(recipe), "--output_dir", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_training_refuses_a_generation_setting_before_it_reads_data(tmp_path):
    save_checkpoint(tmp_path / "t5", "t5, unifiedqa")
    GenerationConfig(num_beam_groups=2).save_pretrained(tmp_path / "t5")
    recipe = one_stage_recipe(tmp_path, model_name_or_path=str(tmp_path / "t5"), dataset="is/not/there.jsonl")
    with pytest.raises(ValueError, match="generation_config.json.*num_beam_groups is 2"):
        prepare(parse_recipe(["--config", str(recipe), "--output_dir", str(tmp_path / "run")]))


def one_stage_recipe(folder, **values):
    recipe = yaml.safe_load(TINY_RECIPE.read_text())
    for name in ("text_config", "tokenizer_vocab_size", "vision_config", "image_processor"):
        del recipe[name]
    recipe["stages"] = [stage | {"reads": [c for c in stage["reads"] if c != "images"]} for stage in recipe["stages"]]
    recipe |= {"max_images": 0, "max_steps": 2, "save_steps": 1, "eval_strategy": "no", **values}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture(scope="module")
def byt5_run(tiny_dataset, tmp_path_factory):
    """A finished run from a byte-level checkpoint."""
    folder = tmp_path_factory.mktemp("byt5")
    torch.manual_seed(0)
    config = T5Config(**{**TINY_TEXT, "vocab_size": 384, "num_layers": 1}, **GATED)
    T5ForConditionalGeneration(config).save_pretrained(folder / "byt5")
    ByT5Tokenizer().save_pretrained(folder / "byt5")
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    kept = [row | {"images": []} for split in ("train", "val", "test") for row in of_split(rows, split)[:8]]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    recipe = one_stage_recipe(folder, model_name_or_path=str(folder / "byt5"), dataset=str(folder / "problems.jsonl"))
    run_script("train.py", "--config", recipe, "--output_dir", folder / "run")
    return folder


def of_split(rows, split):
    return [row for row in rows if row["split"] == split]


@pytest.mark.slow
def test_trains_and_predicts_with_a_byte_level_tokenizer(byt5_run):
    output = byt5_run / "test.json"
    run_script(*("-m", "mmcot.predict", byt5_run / "run", "--dataset", byt5_run / "problems.jsonl", "--output", output))
    written = json.loads((byt5_run / "run/predictions/test.json").read_text())
    predicted = json.loads(output.read_text())
    assert len(predicted) == 8 and predicted.keys() == written.keys()
    assert [row["answer"] for row in predicted.values()] == [written[name]["answer"] for name in predicted]


@pytest.mark.slow
def test_export_with_a_byte_level_tokenizer_answers(byt5_run, tmp_path):
    found = run_isolated(
        """
        repository = sys.argv[1]
        pipe = pipeline("multimodal-cot", model=repository, trust_remote_code=True)
        problem = {"question": "Which is red?", "choices": ["the sky", "blood"]}
        result = pipe(problem)
        stopped = pipe(problem, stop_strings=["e"], max_new_tokens=9)
        chat = [{"role": "user", "content": "Which is red?\\n(A) the sky\\n(B) blood"}]
        (reply,) = pipe(text=chat)
        inputs = pipe.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        tokens = pipe.model.generate(**inputs)
        pipe.save_pretrained("again")
        again = pipeline("multimodal-cot", model="again", trust_remote_code=True)(problem)
        print(json.dumps({"result": result, "reply": reply["generated_text"][-1]["content"], "again": again,
                          "tokenizer": type(pipe.processor.tokenizer).__name__, "answered": tokens.shape[1]}))
        """,
        tmp_path,
        byt5_run / "run" / "hub",
    )
    assert found["tokenizer"] == "ByT5Tokenizer" and found["result"] == found["again"]
    assert found["result"]["answer"] in ("the sky", "blood") and found["reply"] and found["answered"] > 40


def test_saves_and_identifies_a_tokenizer_without_backend(tmp_path):
    processor = MMCoTProcessor(ByT5Tokenizer(), None, [])
    processor.encode_texts(["a", "a longer text"], truncation=True, max_length=4)
    state = tokenizer_state(processor.tokenizer)
    processor.save_pretrained(tmp_path)
    again = MMCoTProcessor.from_pretrained(tmp_path)
    assert again(text="ab")["input_ids"].tolist() == [[100, 101, 1]]
    assert tokenizer_state(AutoTokenizer.from_pretrained(tmp_path)) == state == tokenizer_state(again.tokenizer)
    assert tokenizer_state(ByT5Tokenizer(extra_ids=7)) != state


@pytest.mark.parametrize(
    "absent", ["decoder.final_layer_norm.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"]
)
def test_refuses_a_missing_text_weight(absent, tmp_path):
    save_checkpoint(tmp_path, "t5, unifiedqa")
    weights = load_file(tmp_path / "model.safetensors")
    del weights[absent]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights, for example {absent}"):
        MMCoTForConditionalGeneration.from_pretrained(tmp_path, vision_hidden_size=10)
