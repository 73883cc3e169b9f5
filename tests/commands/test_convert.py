"""Conversion of the authors' checkpoints: `gated_mha` reproduces the numbers of their code; bad folders are refused.

The numbers (`../shared/fixtures/reference_model`) come from the original's model.py under transformers 4.30.
"""

import json
import shutil

import pytest
import torch
from conftest import run_isolated, run_script, shared, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTModel,
    pipeline,
)
from trl import ModelConfig

from mmcot.hub import original as convert_module
from mmcot.hub.original import convert, read_tensors
from mmcot.recipes.arguments import RecipeArguments
from mmcot.recipes.recipe import Recipe
from mmcot.training.building import build_model
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.vision_mmcot import TOWERS

CASES = {"detr_t5v1_0": "detr", "vit_t5v1_1": "vit", "clip_t5v1_1": "clip"}
FORMATS = ["model.safetensors", "pytorch_model.bin", "shards of pytorch_model.bin", "shards of model.safetensors"]


def write_original(case, file_format, folder):
    """Write the checkpoint of one case in the authors' layout and in one file format."""
    source = shared(f"fixtures/reference_model/{case}")
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    if not file_format.startswith("shards of "):
        shutil.copyfile(source / file_format, folder / file_format)
        return folder
    whole = file_format.removeprefix("shards of ")
    tensors = read_tensors(source)
    names, (stem, suffix) = sorted(tensors), whole.split(".")
    halves = {f"{stem}-0000{n + 1}-of-00002.{suffix}": names[n::2] for n in range(2)}
    for file, part in halves.items():
        (torch.save if suffix == "bin" else save_file)({name: tensors[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load_converted(case, folder, file_format="model.safetensors"):
    convert(str(write_original(case, file_format, folder / "original")), folder / "ours", CASES[case])
    return MMCoTForConditionalGeneration.from_pretrained(folder / "ours").eval()


def find_differences(model, case):
    """Return the names of the reference values that the model does not reproduce within the agreed tolerances."""
    reference = load_file(shared(f"fixtures/reference_model/{case}/cases.safetensors"))
    inputs = {
        "input_ids": reference["input_ids"],
        "attention_mask": reference["attention_mask"],
        "vision_features": reference["image_ids"],
    }
    outputs = model(**inputs, labels=reference["labels"])
    outputs.loss.backward()
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if name.startswith("encoder.fusion.")
    }
    found = {
        "encoder_last_hidden_state": (outputs.encoder_last_hidden_state, reference["encoder_last_hidden_state"]),
        "logits": (outputs.logits, reference["logits"]),
        "loss": (outputs.loss, reference["loss"][0]),
    }
    wrong = {name for name, (ours, theirs) in found.items() if not torch.allclose(ours, theirs, rtol=0, atol=1e-4)}
    theirs = {name.removeprefix("grad."): value for name, value in reference.items() if name.startswith("grad.")}
    assert len(theirs) == len(gradients) == 8
    for name, gradient in theirs.items():
        ours = gradients[convert_module.renamed(name)]
        if (ours - gradient).norm() > 1e-4 * gradient.norm():
            wrong.add(name)
    if not torch.equal(model.generate(**inputs, max_length=12), reference["greedy"]):
        wrong.add("greedy")
    encoder_outputs = model.encoder(**inputs)
    beams = [beam_search_of_4_30(model, encoder_outputs[0], inputs["attention_mask"], row) for row in range(6)]
    if cut_at_end_token(beams) != cut_at_end_token(reference["beam4"].tolist()):
        wrong.add("beam4")
    return wrong


def cut_at_end_token(sequences):
    """Return each sequence up to its end token."""
    return [tokens[: tokens.index(1) + 1] if 1 in tokens else tokens for tokens in sequences]


@torch.no_grad()
def beam_search_of_4_30(model, states, attention_mask, row, num_beams=4, max_length=12):
    """
    Run the beam search of transformers 4.30, which produced the reference, over our model's logits. Later versions stop
    a step earlier, and no longer count the start token in the length by which they divide the score of an unfinished
    hypothesis.
    """
    beams, finished = [(0.0, [0])], []
    for length in range(1, max_length):
        output = model(
            encoder_outputs=(states[row : row + 1].expand(len(beams), -1, -1),),
            attention_mask=attention_mask[row : row + 1].expand(len(beams), -1),
            decoder_input_ids=torch.tensor([tokens for _, tokens in beams]),
        )
        scores = output.logits[:, -1].log_softmax(dim=-1) + torch.tensor([score for score, _ in beams])[:, None]
        best = scores.flatten().topk(2 * num_beams)
        candidates = [
            (score, beams[index // scores.shape[1]][1], index % scores.shape[1])
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        ended = [(score / length, [*tokens, 1]) for score, tokens, token in candidates[:num_beams] if token == 1]
        finished = sorted(finished + ended, reverse=True)[:num_beams]
        beams = [(score, [*tokens, token]) for score, tokens, token in candidates if token != 1][:num_beams]
        if len(finished) == num_beams and finished[-1][0] >= candidates[0][0] / (length + 1):
            return finished[0][1]
    return max(finished + [(score / max_length, tokens) for score, tokens in beams])[1]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_converted_model_matches_the_authors(case, file_format, tmp_path):
    assert find_differences(load_converted(case, tmp_path, file_format), case) == set()


@pytest.mark.parametrize("case", CASES)
def test_generate_finds_reference_beams_without_early_stopping(case, tmp_path):
    """The closest settings of transformers 5: `early_stopping="never"`, and one more token for the start token."""
    reference = load_file(shared(f"fixtures/reference_model/{case}/cases.safetensors"))
    text = {name: reference[name] for name in ("input_ids", "attention_mask")}
    tokens = load_converted(case, tmp_path).generate(
        **text, vision_features=reference["image_ids"], num_beams=4, early_stopping="never", max_length=13
    )
    assert cut_at_end_token(tokens[:, :12].tolist()) == cut_at_end_token(reference["beam4"].tolist())


@pytest.mark.parametrize(
    ("parameter", "differing"),
    [
        ("encoder.fusion.joint_gate.bias", {"encoder_last_hidden_state", "logits", "encoder.gate_dense.weight"}),
        ("encoder.fusion.attention.out_proj.weight", {"encoder_last_hidden_state", "encoder.mha_layer.in_proj_weight"}),
        ("decoder.final_layer_norm.weight", {"logits", "loss"}),
        ("shared.weight", {"greedy", "beam4"}),
    ],
)
def test_find_differences_detects_one_changed_weight(parameter, differing, tmp_path):
    """Every kind of reference value detects some changed weight."""
    model = load_converted("vit_t5v1_1", tmp_path)
    with torch.no_grad():
        changed = model.get_parameter(parameter)
        if parameter == "shared.weight":
            changed[:] = changed.roll(1, dims=0)
        else:
            changed.view(-1)[0] += 0.5
    assert differing <= find_differences(model, "vit_t5v1_1")


def test_missing_picture_equals_the_authors_zero_features(tmp_path):
    """The last row of each case has an all-zero picture."""
    model = load_converted("detr_t5v1_0", tmp_path)
    reference = load_file(shared("fixtures/reference_model/detr_t5v1_0/cases.safetensors"))
    text = {name: reference[name][-1:] for name in ("input_ids", "attention_mask")}
    assert not reference["image_ids"][-1].any()
    expected = reference["encoder_last_hidden_state"][-1:]
    torch.testing.assert_close(model.encoder(**text).last_hidden_state, expected, rtol=0, atol=1e-4)
    mask = torch.zeros(1, 7)
    states = model.encoder(**text, vision_features=torch.randn(1, 7, 256), vision_mask=mask).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-4)


def test_only_rows_without_picture_get_zeros_in_a_batch():
    model = tiny_model(vision_config=None, vision_hidden_size=10, zeros_for_missing_pictures=True)
    torch.manual_seed(1)
    text = {"input_ids": torch.randint(3, 60, (2, 5)), "attention_mask": torch.ones(2, 5)}
    features, mask = torch.randn(2, 3, 10), torch.tensor([[1, 1, 1], [0, 0, 0]])
    states = model.encoder(**text, vision_features=features, vision_mask=mask).last_hidden_state
    features[1] = 0
    expected = model.encoder(**text, vision_features=features).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_command_prints_mapped_tensors_and_output_loads_with_auto_classes(tmp_path):
    folder = write_original("detr_t5v1_0", "pytorch_model.bin", tmp_path / "original")
    output = run_script("-m", "mmcot.convert", folder, tmp_path / "ours", "--vision", "detr", is_fresh=True).stdout
    assert "encoder.image_dense.* -> encoder.fusion.vision_projection.* (2 tensors)" in output
    assert "encoder.mha_layer.* -> encoder.fusion.attention.* (4 tensors)" in output
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert (model.config.fusion, model.config.num_vision_tokens, model.config.vision_hidden_size) == (
        "gated_mha",
        100,
        256,
    )
    assert not list((tmp_path / "ours").glob("*.bin")) and (tmp_path / "ours" / "fusion_mmcot.py").exists()


# Systems of two stages with a tokenizer and a tower.


@pytest.fixture
def published(tmp_path):
    """Both stages in the authors' layout with a tokenizer, and a tower whose patches are as wide as their features."""
    for name in ("rationale", "answer"):
        folder = write_original("vit_t5v1_1", "pytorch_model.bin", tmp_path / name)
        words = [
            "<pad>",
            "</s>",
            "<unk>",
            *"Question Context Options Answer Solution N A B is it what red blue".split(),
        ]
        tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
    change_bin(tmp_path / "answer", lambda tensors: tensors["decoder.final_layer_norm.weight"].mul_(1.5))
    vision = {"image_size": 384, "patch_size": 32, "hidden_size": 1024, "num_hidden_layers": 1}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**vision, num_attention_heads=2, intermediate_size=8)).save_pretrained(tmp_path / "tower")
    return tmp_path


def change_bin(folder, change):
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.slow
def test_converts_two_stages_and_a_tower_to_a_system_that_answers_from_pixels(published):
    options = ["--vision", "vit", "--stage_folders", "rationale", "answer", "--attach_tower", published / "tower"]
    output = run_script("-m", "mmcot.convert", published, published / "ours", *options).stdout
    assert output.index("rationale: the rationale stage") < output.index("answer: the answer stage")
    ours = published / "ours"
    names = {file.relative_to(ours).as_posix() for file in ours.rglob("*") if file.is_file()}
    assert {"model.safetensors", "rationale/model.safetensors", "pipeline_mmcot.py", "README.md"} <= names
    processor = MMCoTProcessor.from_pretrained(ours)
    assert [stage.name for stage in processor.stages] == ["rationale", "answer"]
    paper = TOWERS["vit"].paper_image_processor["data_config"]
    assert json.loads(json.dumps(processor.image_processor.data_config)) == paper
    models = {"rationale": MMCoTForConditionalGeneration.from_pretrained(ours, subfolder="rationale")}
    models["answer"] = MMCoTForConditionalGeneration.from_pretrained(ours)
    for name, model in models.items():
        theirs = torch.load(published / name / "pytorch_model.bin", weights_only=True)
        assert torch.equal(model.decoder.final_layer_norm.weight, theirs["decoder.final_layer_norm.weight"])
        assert model.config.freeze_vision and model.config.vision_config.hidden_size == 1024
    tower = ViTModel.from_pretrained(published / "tower").state_dict()
    attached = models["answer"].encoder.vision_tower.state_dict()
    assert all(torch.equal(attached[name], tower[name]) for name in attached)
    (answer,) = run_isolated(
        """
        from PIL import Image
        answer = pipeline("multimodal-cot", model="ours", trust_remote_code=True)
        picture = Image.new("RGB", (50, 40), "red")
        print(json.dumps([answer({"question": "what is it", "choices": ["red", "blue"], "image": picture})]))
        """,
        published,
        needs="timm torchvision",
    )
    assert isinstance(answer["rationale"], str) and sum(answer["scores"]) == pytest.approx(1)


def test_attaches_a_timm_vit(published):
    config = TimmWrapperConfig(architecture="vit_large_patch32_384", model_args={"depth": 1})
    TimmWrapperModel(config).save_pretrained(published / "timm")
    convert(str(published / "answer"), published / "ours", "vit", attach_tower=str(published / "timm"))
    model = MMCoTForConditionalGeneration.from_pretrained(published / "ours").eval()
    inputs = MMCoTProcessor.from_pretrained(published / "ours")(text=["what"], images=[Image.new("RGB", (50, 40))])
    assert inputs["pixel_values"].shape == (1, 1, 3, 384, 384)
    patches, _ = model.encoder.picture_patches(inputs["pixel_values"], inputs["pixel_mask"], None, None)
    assert patches.shape == (1, 145, 1024) and model(**inputs, labels=inputs["input_ids"]).loss.isfinite()


def test_training_starts_from_the_converted_fusion(published):
    convert(str(published / "answer"), published / "ours", "vit")
    recipe = Recipe(RecipeArguments(), [], Seq2SeqTrainingArguments(), ModelConfig(str(published / "ours")), {})
    model = build_model(recipe, None, None)
    assert model.config.fusion == "gated_mha" and model.config.zeros_for_missing_pictures
    theirs = torch.load(published / "answer/pytorch_model.bin", weights_only=True)
    assert torch.equal(model.encoder.fusion.joint_gate.weight, theirs["encoder.gate_dense.weight"])


@pytest.mark.slow
def test_converts_a_subfolder_of_a_hub_repository(published):
    """The repository is in the cache, as a download leaves it."""
    snapshot = published / "hf_home/hub/models--user--mm-cot/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (published / "answer").rename(snapshot / "mm-cot-answer")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("a" * 40)
    command = ("-m", "mmcot.convert", "user/mm-cot/mm-cot-answer", published / "ours", "--vision", "vit")
    run_script(*command, HF_HUB_OFFLINE="1", HF_HOME=str(published / "hf_home"))
    ours = MMCoTForConditionalGeneration.from_pretrained(published / "ours")
    theirs = torch.load(snapshot / "mm-cot-answer/pytorch_model.bin", weights_only=True)
    assert torch.equal(ours.encoder.fusion.joint_gate.weight, theirs["encoder.gate_dense.weight"])


def test_converted_model_without_tower_refuses_pictures(published):
    convert(str(published), published / "ours", "vit", ["rationale", "answer"])
    answer = pipeline("multimodal-cot", model=str(published / "ours"), trust_remote_code=True)
    assert answer({"question": "what is it", "choices": ["red", "blue"]})["answer"] in ("red", "blue")
    with pytest.raises(ValueError, match="this model has no picture tower"):
        answer({"question": "what is it", "choices": ["red"], "image": Image.new("RGB", (50, 40))})


def test_refuses_tower_of_another_width(published):
    ViTModel(ViTConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1)).save_pretrained(
        published / "narrow"
    )
    with pytest.raises(ValueError, match="patches are 24 wide, but vision_hidden_size is 1024"):
        convert(str(published / "answer"), published / "ours", "vit", attach_tower=str(published / "narrow"))
    assert not (published / "ours").exists()


def test_refuses_stages_without_a_tokenizer(published):
    (published / "answer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="answer has no tokenizer"):
        convert(str(published), published / "ours", "vit", ["rationale", "answer"])


def test_single_checkpoint_gets_a_processor_without_stages(published):
    convert(str(published / "answer"), published / "ours", "vit")
    processor = MMCoTProcessor.from_pretrained(published / "ours")
    assert processor.stages == [] and processor(text="what is it")["input_ids"].shape == (1, 3)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: change_weights(f, lambda t: t.pop("encoder.gate_dense.bias")),
            "missing: encoder.fusion.joint_gate.bias",
        ),
        (lambda f: change_weights(f, lambda t: t.update(odd=torch.ones(1))), "surplus: odd"),
        (
            lambda f: change_weights(f, lambda t: t.update({"encoder.image_dense.weight": torch.ones(64, 99)})),
            r"encoder.fusion.vision_projection.weight \(64, 99\) instead of \(64, 256\)",
        ),
        (
            lambda f: change_weights(f, lambda t: t["lm_head.weight"].add_(1)),
            "lm_head.weight differs from shared.weight",
        ),
        (lambda f: change_config(f, d_model=32), r"shared.weight \(96, 64\) instead of \(96, 32\)"),
        (lambda f: change_config(f, num_layers=3), "missing: encoder.block.2"),
        (lambda f: change_config(f, num_layers=1), "surplus: encoder.block.1"),
        (lambda f: change_config(f, model_type="bart"), "model_type is 'bart'; expected 't5'"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights; expected"),
        (lambda f: (f / "model.safetensors").write_bytes(b"half"), "model.safetensors is damaged, or contains objects"),
    ],
)
def test_refuses_unusable_folder_and_writes_nothing(break_it, message, tmp_path):
    folder = write_original("detr_t5v1_0", "model.safetensors", tmp_path / "original")
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        convert(str(folder), tmp_path / "ours", "detr")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_refuses_vision_name_with_another_feature_width(tmp_path):
    folder = write_original("detr_t5v1_0", "model.safetensors", tmp_path / "original")
    with pytest.raises(ValueError, match=r"\(64, 256\) instead of \(64, 1024\)"):
        convert(str(folder), tmp_path / "ours", "vit")


class Planted:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("planted",)


def test_refuses_pickle_with_code(tmp_path, capsys):
    torch.save({"shared.weight": Planted()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged, or contains objects other than tensors"):
        read_tensors(tmp_path)
    assert "planted" not in capsys.readouterr().out


def test_refuses_shards_that_lack_an_indexed_tensor(tmp_path):
    folder = write_original("detr_t5v1_0", "shards of pytorch_model.bin", tmp_path / "original")
    torch.save({}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ValueError, match="index.json: the shards do not contain .* more"):
        convert(str(folder), tmp_path / "ours", "detr")


def test_refuses_existing_output_folder(tmp_path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert("anything", tmp_path / "ours", "detr")


def test_refuses_source_that_is_neither_a_folder_nor_on_the_hub(tmp_path):
    result = run_script(
        "-m", "mmcot.convert", "nobody/nothing", tmp_path / "ours", "--vision", "vit", check=False, HF_HUB_OFFLINE="1"
    )
    assert result.returncode == 1 and "nobody/nothing is neither a folder nor" in result.stderr
    assert "Traceback" not in result.stderr
