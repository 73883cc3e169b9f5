"""The towers: each at its real size and exported, its patches, freezing, preprocessing."""

import glob
import json
import shutil

import pytest
import timm
import torch
import torchvision.transforms as T
from conftest import SHARED, run_isolated, tiny_model
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
)

from mmcot.pictures.featurizer import load_image_processor
from modeling_mmcot import MMCoTConfig, MMCoTProcessor
from modeling_mmcot.processing_mmcot import build_image_processor
from modeling_mmcot.vision_mmcot import (
    TOWERS,
    build_vision_tower,
    checkpoint_of,
    encode_pictures,
    find_tower,
    load_vision_tower,
    resolved_name,
    tower_width,
)

RESNET_101 = {"depths": [3, 4, 23, 3], "layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]}
# The configurations of the named checkpoints, without their weights, and DETR with transformers' own ResNet as its
# backbone.
CONFIGS = {
    "detr": {
        "model_type": "detr",
        "backbone": "resnet101",
        "dilation": True,
        "use_timm_backbone": True,
        "num_labels": 91,
    },
    "detr_hf": {
        "model_type": "detr",
        "backbone_config": {"model_type": "resnet", **RESNET_101, "out_features": ["stage4"]},
    },
    "vit": {
        "model_type": "vit",
        "image_size": 384,
        "patch_size": 32,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "clip": {"model_type": "timm_wrapper", "architecture": "resnet50_clip"},
    "clip_vit": {"model_type": "clip_vision_model"},
    "siglip": {"model_type": "siglip_vision_model"},
    "resnet": {"model_type": "resnet", "depths": [3, 4, 6, 3]},
    "resnet_pooled": {"model_type": "resnet", "depths": [3, 4, 6, 3]},
}
SIZES = {"detr": (224, 300), "detr_hf": (224, 300), "vit": (384, 384)}
PREPROCESSING = {
    "detr": TOWERS["detr"].paper_image_processor,
    "detr_hf": TOWERS["detr"].paper_image_processor,
    "vit": TOWERS["vit"].paper_image_processor,
    "clip": {
        "image_processor_type": "TimmWrapperImageProcessor",
        "data_config": {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 1.0},
    },
    "clip_vit": {"image_processor_type": "CLIPImageProcessor"},
    "siglip": {"image_processor_type": "SiglipImageProcessor"},
    "resnet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
    "resnet_pooled": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
}


def model_with(name, **fields):
    """A tiny text model with the real tower, with random weights."""
    row = name.removesuffix("_hf")
    fields = {"vision_hidden_size": TOWERS[row].hidden_size, **fields}
    return tiny_model(vision_config=dict(CONFIGS[name]), vision_tower=row, **fields)


def as_config(name):
    return MMCoTConfig(
        vision_config=dict(CONFIGS[name]), vision_hidden_size=TOWERS[name.removesuffix("_hf")].hidden_size
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_tower_returns_its_patches_at_its_real_size(name):
    row = TOWERS[name.removesuffix("_hf")]
    tower = build_vision_tower(as_config(name).vision_config).eval()
    with torch.no_grad():
        patches, mask = encode_pictures(
            tower, name.removesuffix("_hf"), torch.randn(1, 3, *SIZES.get(name, (224, 224))), None
        )
    assert patches.shape == (1, row.num_patches, row.hidden_size) and mask.all() and patches.isfinite().all()
    assert tower_width(tower) == row.hidden_size


@pytest.mark.slow
@pytest.mark.parametrize("needs", ["", "timm torchvision"])
def test_saved_model_loads_from_its_folder_alone(needs, tmp_path):
    """In another process, a picture file gives the same states."""
    names = [name for name in CONFIGS if (name in ("detr", "vit", "clip")) == bool(needs)]
    vocabulary = WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "what": 3}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), pad_token="<pad>", eos_token="</s>")
    picture = Image.effect_noise((90, 70), 80)
    picture.save(tmp_path / "picture.png")
    expected = {}
    for name in names:
        model, processor = model_with(name), MMCoTProcessor(tokenizer, build_image_processor(PREPROCESSING[name]))
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected[name] = model.encoder(**processor(text=["what"], images=[picture])).last_hidden_state
    states = run_isolated(
        """
        from PIL import Image
        states = {}
        for name in sys.argv[1:]:
            model = AutoModel.from_pretrained(name, trust_remote_code=True)
            inputs = AutoProcessor.from_pretrained(name, trust_remote_code=True)(
                text=["what"], images=[Image.open("picture.png")]
            )
            with torch.no_grad():
                states[name] = model.encoder(**inputs).last_hidden_state.tolist()
        print(json.dumps(states))
        """,
        tmp_path,
        *names,
        needs=needs,
    )
    for name in names:
        torch.testing.assert_close(torch.tensor(states[name]), expected[name], rtol=1e-4, atol=1e-5, msg=name)
        shutil.rmtree(tmp_path / name)  # gigabytes


def test_repeats_the_pooled_vector_512_times():
    model = model_with("resnet_pooled")
    pixels = torch.randn(2, 3, 64, 64)
    patches, mask = model.encoder.picture_patches(pixels, None, None, None)
    pooled = model.encoder.vision_tower(pixel_values=pixels).pooler_output.flatten(1)
    assert patches.shape == (2, 512, 2048) and mask.all()
    assert torch.equal(patches, pooled[:, None].expand(-1, 512, -1))


def test_flattens_a_grid_into_patches_row_by_row():
    tower = build_vision_tower(as_config("resnet").vision_config).eval()
    pixels = torch.randn(1, 3, 64, 96)
    grid = tower(pixel_values=pixels).last_hidden_state
    patches, _ = encode_pictures(tower, "resnet", pixels, None)
    assert grid.shape == (1, 2048, 2, 3)
    assert torch.equal(patches[0, 4], grid[0, :, 1, 1])


def test_clip_vit_returns_patches_without_the_class_token():
    config = {**CONFIGS["clip_vit"], "num_hidden_layers": 1}
    tower = build_vision_tower(MMCoTConfig(vision_config=config).vision_config).eval()
    pixels = torch.randn(1, 3, 224, 224)
    states = tower(pixel_values=pixels).last_hidden_state
    assert torch.equal(encode_pictures(tower, None, pixels, None)[0], states[:, 1:]) and states.shape[1] == 50


SMALL = {
    "detr": {
        "model_type": "detr",
        "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5},
    },
    "clip": CONFIGS["clip"],
    "clip_vit": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "hidden_size": 16,
                 "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "siglip": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16, "hidden_size": 16,
               "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "resnet": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_trains_the_whole_tower_unless_frozen(name, batch, labels):
    """Except for the layers that transformers itself freezes, the first ones of DETR's backbone."""
    model = tiny_model(vision_config=SMALL[name], vision_hidden_size=2048 if name == "clip" else 16).train()
    model(**batch, labels=labels).loss.backward()
    parameters = dict(model.encoder.vision_tower.named_parameters())
    frozen = {key for key, parameter in parameters.items() if not parameter.requires_grad}
    assert all("backbone" in key for key in frozen) and (name == "detr") == bool(frozen)
    assert [key for key, parameter in parameters.items() if parameter.grad is None and key not in frozen] == []


@pytest.mark.parametrize("freeze", [True, False])
def test_updates_batch_norm_statistics_unless_frozen(freeze, batch, labels):
    model = tiny_model(vision_config=SMALL["resnet"], freeze_vision=freeze).train()
    tower = model.encoder.vision_tower
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    weights = {name: parameter.clone() for name, parameter in tower.named_parameters()}
    model(**batch, labels=labels).loss.backward()
    optimizer.step()
    statistics = [torch.equal(before[name], buffer) for name, buffer in tower.named_buffers()]
    kept = [torch.equal(weights[name], parameter) for name, parameter in tower.named_parameters()]
    assert tower.training is not freeze
    assert all(statistics + kept) if freeze else not any(statistics + kept)


@pytest.mark.parametrize("freeze", [True, False])
def test_optimizer_of_the_trainer_excludes_a_frozen_tower(freeze, tmp_path):
    model = tiny_model(freeze_vision=freeze)
    arguments = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    groups = Seq2SeqTrainer(model, arguments).create_optimizer().param_groups
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert {id(parameter) in trained for parameter in model.encoder.vision_tower.parameters()} == {not freeze}
    assert all(id(parameter) in trained for parameter in model.encoder.fusion.parameters())


def test_patches_of_a_picture_do_not_depend_on_the_batch():
    """Because DETR's pictures have different sizes, and padding one to the size of another would change its patches."""
    tower = build_vision_tower(MMCoTConfig(vision_config=SMALL["detr"]).vision_config).eval()
    small, large = torch.randn(3, 40, 48), torch.randn(3, 64, 32)
    pixels, mask = torch.zeros(2, 3, 64, 48), torch.zeros(2, 64, 48)
    for index, picture in enumerate((small, large)):
        pixels[index, :, : picture.shape[1], : picture.shape[2]] = picture
        mask[index, : picture.shape[1], : picture.shape[2]] = 1
    together, _ = encode_pictures(tower, None, pixels, mask)
    for index, picture in enumerate((small, large)):
        alone = tower(pixel_values=picture[None]).last_hidden_state
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-6)


def test_patches_keep_the_order_of_several_pictures():
    model = tiny_model(max_images=3)
    pixels, mask = torch.randn(1, 3, 3, 32, 32), torch.ones(1, 3, 32, 32)
    mask[:, 1] = 0
    patches, real = model.encoder.picture_patches(pixels, mask, None, None)
    first, third = (model.encoder.vision_tower(pixel_values=pixels[:, n]).last_hidden_state for n in (0, 2))
    assert torch.allclose(patches[:, :5], first, atol=1e-6) and torch.allclose(patches[:, 10:], third, atol=1e-6)
    assert real[0].tolist() == [True] * 5 + [False] * 5 + [True] * 5


# Loading a tower into the model.


def test_loads_the_vision_model_of_clip_and_siglip(tmp_path):
    part = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**part, "image_size": 32, "patch_size": 16}
    for model_class, config_class, name in ((CLIPModel, CLIPConfig, "clip_vit"), (SiglipModel, SiglipConfig, "siglip")):
        whole = model_class(config_class(text_config={**part, "vocab_size": 99}, vision_config=vision)).eval()
        whole.save_pretrained(tmp_path / name)
        tower = load_vision_tower(str(tmp_path / name)).eval()
        pixels = torch.randn(1, 3, 32, 32)
        expected = whole.vision_model(pixel_values=pixels).last_hidden_state
        assert torch.equal(tower(pixel_values=pixels).last_hidden_state, expected)
        assert find_tower(tower.config) is TOWERS[name] and tower_width(tower) == 16


def test_refuses_a_folder_without_the_towers_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="does not contain a picture tower of model_type 'vit': .* tensors are missing"
    ):
        load_vision_tower(str(tmp_path))


def test_refuses_a_pixel_mask_that_is_not_an_upper_left_rectangle(batch):
    batch["pixel_mask"][0, 0, :9, :9] = False
    with pytest.raises(ValueError, match="not a rectangle in its upper left corner"):
        tiny_model().encoder(**batch)


def test_resolves_an_unnamed_tower_to_the_first_name_of_its_model_type():
    config = MMCoTConfig(vision_config=SMALL["resnet"]).vision_config
    assert resolved_name(config) == "resnet" and resolved_name(config, "resnet_pooled") == "resnet_pooled"
    assert find_tower(config) is TOWERS["resnet"]


def test_resolves_a_name_to_its_checkpoint():
    assert checkpoint_of("detr") == "facebook/detr-resnet-101-dc5" and checkpoint_of("some/model") == "some/model"


def test_uses_the_last_hidden_state_of_an_unlisted_tower():
    config = {"model_type": "dinov2", "image_size": 28, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2}  # fmt: skip
    model = tiny_model(vision_config=config)
    patches, _ = model.encoder.picture_patches(torch.randn(1, 3, 28, 28), None, None, None)
    assert patches.shape == (1, 5, 16)


def test_refuses_a_tower_with_channels_last():
    """timm's Swin returns its channels last."""
    config = {
        "model_type": "timm_wrapper",
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": {"depths": [1] * 4},
    }
    tower = build_vision_tower(MMCoTConfig(vision_config=config, vision_hidden_size=768).vision_config).eval()
    with pytest.raises(ValueError, match="patches 7 wide, but its width is 768"):
        encode_pictures(tower, None, torch.randn(1, 3, 224, 224), None)


def test_refuses_a_tower_of_another_width_with_both_numbers():
    with pytest.raises(ValueError, match="patches are 2048 wide, but vision_hidden_size is 1024"):
        tiny_model(vision_config=SMALL["clip"], vision_hidden_size=1024)
    with pytest.raises(ValueError, match="'timm_wrapper'.*does not contain the width.*set vision_hidden_size"):
        MMCoTConfig(vision_config=SMALL["clip"])
    with pytest.raises(ValueError, match="patches are 16 wide, but vision_hidden_size is 24"):
        tiny_model().attach_tower(AutoModel.from_config(MMCoTConfig(vision_config=SMALL["resnet"]).vision_config))


def test_refuses_a_name_of_another_tower(batch):
    with pytest.raises(
        ValueError, match="'detr', a tower with model_type 'detr', but vision_config has model_type 'vit'"
    ):
        tiny_model(vision_tower="detr").encoder(**batch)
    with pytest.raises(ValueError, match="'dtr'; known towers: detr, vit, clip"):
        tiny_model(vision_tower="dtr").encoder(**batch)


# Preprocessing as in the paper: the authors' extract_features.py uses these transforms of torchvision and timm.


def real_pictures():
    files = sorted(glob.glob(str(SHARED / "scienceqa/images/*/*/*.png")))
    if not files:
        pytest.skip("needs the pictures beside the repository (../shared/scienceqa)")
    return [Image.open(file).convert("RGB") for file in files[::30]]


def test_paper_preprocessing_of_detr_equals_torchvision():
    transform = T.Compose([T.Resize(224), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    processor = build_image_processor(TOWERS["detr"].paper_image_processor)
    for picture in real_pictures():
        pixels = processor(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, transform(picture), rtol=0, atol=1e-6)


def test_paper_preprocessing_of_vit_equals_timm():
    pretrained = timm.get_pretrained_cfg("vit_large_patch32_384").to_dict()
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=pretrained))
    processor = build_image_processor(TOWERS["vit"].paper_image_processor)
    for picture in real_pictures():
        pixels = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, transform(picture)) and pixels.shape == (3, 384, 384)


def test_refuses_paper_preprocessing_that_the_authors_did_not_publish(tmp_path):
    AutoModel.from_config(MMCoTConfig(vision_config=SMALL["resnet"]).vision_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'paper' exists for detr and vit.*'resnet'"):
        load_image_processor(str(tmp_path), "paper")


def test_selects_paper_preprocessing_by_model_type(tmp_path):
    ViTConfig(hidden_size=24).save_pretrained(tmp_path)
    settings = load_image_processor(str(tmp_path), "paper").to_dict()
    assert json.loads(json.dumps(settings)) == TOWERS["vit"].paper_image_processor
