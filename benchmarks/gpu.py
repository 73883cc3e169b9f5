"""Benchmark the model on a GPU: against plain T5, the CPU's results, and the limits of the hardware.

    python -m benchmarks.gpu [--demo runs/demo/hub] [--output FILE.json]     # one GPU, bfloat16, about 6 minutes
    python -m benchmarks.gpu --device cpu --small                            # the same code at tiny sizes, 2 minutes

Needs torch, transformers, peft and timm; from this repository modeling_mmcot and mmcot/problems/demo.py, but not the
rest of mmcot. Weights and texts are random (except with `--demo`), so the speeds do not depend on the quality of a
model. Prints a table and writes a JSON file. A case that fails becomes a row with its error; the other cases still run,
and the exit status is 1. README.md in this folder explains the rows.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
    ViTImageProcessor,
)

from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor, MultimodalCoTPipeline
from modeling_mmcot.generation_mmcot import greedy_search, pack_choices
from modeling_mmcot.inference_mmcot import encode, split_by_length
from modeling_mmcot.stage_mmcot import PAPER_TEMPLATES, Stage
from modeling_mmcot.vision_mmcot import build_vision_tower, encode_pictures

# Device name -> dense bfloat16 matrix peak (FLOP/s; NVIDIA prints twice that, with sparsity, for Hopper and Ada) and
# memory bandwidth (bytes/s), from NVIDIA's data sheets:
# H100 https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
# H200 https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446
# A100 https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
# L40S https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
# Other devices, including MIG slices, have no limits.
PEAKS = {
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": (312e12, 1.935e12),
    "NVIDIA A100-PCIE-40GB": (312e12, 1.555e12),
    "NVIDIA L40S": (362e12, 0.864e12),
}

# google/flan-t5-*: https://huggingface.co/google/flan-t5-small/blob/main/config.json and so on.
FLAN_T5 = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "decoder_start_token_id": 0}
SHAPES = {
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32},
    "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
}
SHAPES = {name: {**FLAN_T5, **shape} for name, shape in SHAPES.items()}
SHAPES["tiny"]["vocab_size"] = 512
LORA_TARGETS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]

# Number and width of a picture's patches.
FEATURES = {"DETR": (100, 256), "ViT": (145, 1024)}
# The towers of the paper's checkpoints and SigLIP's, and the picture size in pixels (height, width).
TOWERS = {
    "DETR-ResNet-101-DC5": (
        {"model_type": "detr", "backbone": "resnet101", "dilation": True, "use_timm_backbone": True, "num_labels": 91},
        (224, 336),
    ),
    "ViT-L/32-384": (
        {"model_type": "vit", "image_size": 384, "patch_size": 32, "hidden_size": 1024, "num_hidden_layers": 24,
         "num_attention_heads": 16, "intermediate_size": 4096},
        (384, 384),
    ),
    "SigLIP-B/16-224": ({"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16}, (224, 224)),
}  # fmt: skip
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TINY_TOWERS = {
    "DETR-ResNet-101-DC5": (TOWERS["DETR-ResNet-101-DC5"][0], (64, 96)),
    "ViT-L/32-384": ({"model_type": "vit", **TINY, "image_size": 64, "patch_size": 32}, (64, 64)),
    "SigLIP-B/16-224": ({"model_type": "siglip_vision_model", **TINY, "image_size": 32, "patch_size": 16}, (32, 32)),
}

ANSWER_LENGTH = 8  # tokens of "The answer is (A).", with eos
NUM_CHOICES = 4
BFLOAT16 = torch.bfloat16


@dataclass
class Row:
    """
    One measured figure.

    Args:
        baseline (`float`, *optional*): the same figure of the system that `note` names, usually plain T5.
        limit (`float`, *optional*): the hardware limit or the perfect score, in the same unit.
        gap (`float`, *optional*): the ratio between limit and figure; 1.0 is at the limit.
        error (`str`, *optional*): why the case has no figure, or why its figure is wrong.
    """

    section: str
    name: str
    figure: float | None
    unit: str
    baseline: float | None = None
    limit: float | None = None
    gap: float | None = None
    note: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Setting:
    """The device and the sizes of the run."""

    device: torch.device
    small: bool
    demo: str | None
    peak: float | None = None  # FLOP/s
    bandwidth: float | None = None  # bytes/s

    @property
    def full_shapes(self) -> list[str]:
        """The shapes of the models that are trained in full."""
        return ["tiny"] if self.small else ["small", "base", "large"]

    @property
    def lora_shapes(self) -> list[str]:
        return ["tiny"] if self.small else ["xl"]

    @property
    def shapes(self) -> list[str]:
        return list(dict.fromkeys(self.full_shapes + self.lora_shapes))

    @property
    def methods(self) -> list[tuple[str, str]]:
        """Each shape with its training method."""
        return [(shape, "full") for shape in self.full_shapes] + [(shape, "LoRA") for shape in self.lora_shapes]

    @property
    def repeats(self) -> int:
        return 2 if self.small else 3

    @property
    def batch_size(self) -> int:
        return 4 if self.small else 16

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


Case = Callable[[], list[Row]]


def rate_row(section: str, name: str, figure: float, limit: float | None, unit="problems a second", **fields) -> Row:
    """Return a row for a figure that is better if it is higher."""
    return Row(section, name, figure, unit, limit=limit, gap=None if limit is None else limit / figure, **fields)


# Time and memory


def measure(setting: Setting, run: Callable[[], None], warm_up: int = 2, repeats: int | None = None):
    """Return median seconds and, on a GPU, the peak of allocated memory in GB."""
    seconds = []
    if setting.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    for number in range(warm_up + (repeats or setting.repeats)):
        synchronize(setting)
        start = time.perf_counter()
        run()
        synchronize(setting)
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 1e9 if setting.is_gpu else None
    return statistics.median(seconds), memory


def synchronize(setting: Setting) -> None:
    if setting.is_gpu:
        torch.cuda.synchronize()


def free_memory(setting: Setting) -> None:
    torch.compiler.reset()
    gc.collect()
    if setting.is_gpu:
        torch.cuda.empty_cache()


# Problems


@dataclass
class Batch:
    """Problems of random tokens, with lengths similar to ScienceQA's sources and rationales."""

    inputs: dict[str, torch.Tensor]
    labels: torch.LongTensor
    source_lengths: list[int]
    target_lengths: list[int]

    @property
    def text(self) -> dict[str, torch.Tensor]:
        return {name: self.inputs[name] for name in ("input_ids", "attention_mask")}


def make_batch(
    setting: Setting, shape: str, sources: tuple[int, int], targets: tuple[int, int], count: int, features: str
) -> Batch:
    """Make problems with one picture each and random lengths between the given bounds."""
    random_lengths, generator = random.Random(0), torch.Generator().manual_seed(0)
    if setting.small:
        sources, targets = ((low // 8, high // 8) for low, high in (sources, targets))
    source_lengths = sorted(random_lengths.randint(*sources) for _ in range(count))
    target_lengths = [random_lengths.randint(*targets) for _ in range(count)]

    def tokens(lengths: list[int], padding: int) -> torch.LongTensor:
        ids = torch.randint(3, SHAPES[shape]["vocab_size"], (count, max(lengths)), generator=generator)
        is_padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        return ids.masked_fill(is_padding, padding)

    input_ids = tokens(source_lengths, 0)
    patches = torch.randn(count, *FEATURES[features], generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long(), "vision_features": patches}
    return Batch(
        {name: tensor.to(setting.device) for name, tensor in inputs.items()},
        tokens(target_lengths, -100).to(setting.device),
        source_lengths,
        target_lengths,
    )


def rationale_batch(setting: Setting, shape: str, features: str = "DETR", count: int | None = None) -> Batch:
    return make_batch(setting, shape, (64, 320), (16, 160), count or setting.batch_size, features)


# Models


def build_model(setting: Setting, shape: str, features: str | None, dtype: torch.dtype = torch.float32):
    """Build our model with a fusion for these features, or plain T5 without features; weights are random."""
    torch.manual_seed(0)
    with setting.device:
        if features is None:
            model = T5ForConditionalGeneration(T5Config(**SHAPES[shape]))
        else:
            config = MMCoTConfig(**SHAPES[shape], fusion="gated", vision_hidden_size=FEATURES[features][1])
            model = MMCoTForConditionalGeneration(config)
    model = model.to(setting.device, dtype)
    model.generation_config.eos_token_id = None  # random weights do not end texts; `EndsAt` does
    return model


# Floating-point operations (two for each multiplication and addition), over real tokens only


def encoder_flops(shape: dict, sources: list[int]) -> float:
    d, inner, ff = shape["d_model"], shape["num_heads"] * shape["d_kv"], shape["d_ff"]
    return 2 * shape["num_layers"] * sum(n * (4 * d * inner + 3 * d * ff) + 2 * n * n * inner for n in sources)


def decoder_flops(shape: dict, sources: list[int], targets: list[int]) -> float:
    """Return FLOPs of the decoder, including the keys and values of the source, and the output head."""
    d, inner, ff = shape["d_model"], shape["num_heads"] * shape["d_kv"], shape["d_ff"]
    layers = shape["num_decoder_layers"] * sum(
        target * (6 * d * inner + 3 * d * ff)
        + source * 2 * d * inner
        + target * target * inner  # causal: half of the square
        + 2 * target * source * inner
        for source, target in zip(sources, targets, strict=True)
    )
    return 2 * (layers + sum(targets) * d * shape["vocab_size"])


def fusion_flops(shape: dict, sources: list[int], features: str | None) -> float:
    if features is None:
        return 0.0
    (patches, width), d = FEATURES[features], shape["d_model"]
    return 2 * (len(sources) * patches * width * d + sum(sources) * (2 * d * d + 2 * patches * d))


def generation_limit(setting: Setting, shape: dict, batch: Batch) -> float | None:
    """
    Return the minimum seconds of a batch: the encoder and the keys and values of the sources run at the matrix peak;
    then each step reads the decoder's bfloat16 weights once, and the keys and values of the unfinished problems.
    """
    if setting.peak is None:
        return None
    d, inner, layers = shape["d_model"], shape["num_heads"] * shape["d_kv"], shape["num_decoder_layers"]
    flops = encoder_flops(shape, batch.source_lengths) + fusion_flops(shape, batch.source_lengths, "DETR")
    flops += 2 * layers * sum(batch.source_lengths) * 2 * d * inner
    weights = 2 * (layers * (6 * d * inner + 3 * d * shape["d_ff"]) + d * shape["vocab_size"])
    cached_tokens = sum(
        target * source + target * (target + 1) / 2
        for source, target in zip(batch.source_lengths, batch.target_lengths, strict=True)
    )
    bytes_read = max(batch.target_lengths) * weights + cached_tokens * layers * 2 * inner * 2
    return flops / setting.peak + bytes_read / setting.bandwidth


# Training


def trainable_model(setting: Setting, shape: str, method: str, features: str | None):
    """Full: float32 weights, run under autocast as with the Trainer's bf16. LoRA: a bfloat16 base, float32 adapters."""
    if method == "full":
        return build_model(setting, shape, features)
    base = build_model(setting, shape, features, BFLOAT16)
    saved = None if features is None else ["fusion"]
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=16, lora_alpha=32, target_modules=LORA_TARGETS, modules_to_save=saved)
    return get_peft_model(base, lora)


@functools.cache
def training_step(setting: Setting, shape: str, method: str, features: str | None, variant: str):
    """Return median seconds, peak memory, and GB of weights, gradients and moments; plain T5 if `features` is None."""
    batch = rationale_batch(setting, shape, features or "DETR")
    inputs = {**(batch.text if features is None else batch.inputs), "labels": batch.labels, "use_cache": False}
    if features is not None:
        inputs.update(skip_logits=True)
    model = trainable_model(setting, shape, method, features)
    text_model = model.get_base_model() if method == "LoRA" else model
    if variant == "checkpointing":
        text_model.gradient_checkpointing_enable({"use_reentrant": False})
    elif variant == "compiled":
        # Compiled by layer, because equal layers share code; compiling the whole model takes minutes.
        for block in [*text_model.encoder.block, *text_model.decoder.block]:
            block.compile(dynamic=False)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(setting.device.type, BFLOAT16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds, memory = measure(setting, step)
    state_gb = sum(parameter.nbytes for parameter in model.parameters()) + 3 * sum(p.nbytes for p in trained)
    return seconds, memory, state_gb / 1e9


def step_flops(shape: dict, method: str, batch: Batch, features: str | None) -> float:
    """Return FLOPs of a step: backward costs two forward passes, with LoRA one, without gradients of frozen weights."""
    forward = encoder_flops(shape, batch.source_lengths) + fusion_flops(shape, batch.source_lengths, features)
    forward += decoder_flops(shape, batch.source_lengths, batch.target_lengths)
    return forward * (3 if method == "full" else 2)


def training_rows(setting: Setting, section: str, shape: str, method: str, features: str, variant: str) -> list[Row]:
    # Plain T5 is not compiled, because that would double the time.
    plain_variant = "eager" if variant == "compiled" else variant
    plain_seconds, plain_memory, _ = training_step(setting, shape, method, None, plain_variant)
    free_memory(setting)
    seconds, memory, state_gb = training_step(setting, shape, method, features, variant)
    batch = rationale_batch(setting, shape, features)
    flops, count = step_flops(SHAPES[shape], method, batch, features), setting.batch_size
    plain_flops = step_flops(SHAPES[shape], method, batch, None)
    name, note = f"{shape} {method}, {features} features, {variant}", f"baseline: plain T5, {plain_variant}"
    limit = None if setting.peak is None else count * setting.peak / flops
    rows = [rate_row(section, f"{name}: step", count / seconds, limit, baseline=count / plain_seconds, note=note)]
    peak = None if setting.peak is None else setting.peak / 1e12
    achieved, plain_achieved = flops / seconds / 1e12, plain_flops / plain_seconds / 1e12
    rows.append(
        rate_row(section, f"{name}: speed", achieved, peak, "model TFLOP/s", baseline=plain_achieved, note=note)
    )
    if peak is not None:
        rows.append(
            rate_row(section, f"{name}: MFU", achieved / peak, 1.0, "share", baseline=plain_achieved / peak, note=note)
        )
    if memory is not None:
        memory_note = f"{note}; limit: weights, gradients and AdamW's moments"
        row = Row(
            section,
            f"{name}: peak memory",
            memory,
            "GB",
            plain_memory,
            state_gb,
            memory / state_gb,
            memory_note,
        )
        rows.append(row)
    return rows


def training_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    for shape, method in setting.methods:
        for features, variant in (("DETR", "eager"), ("ViT", "eager"), ("DETR", "checkpointing")):
            case = functools.partial(training_rows, setting, "training", shape, method, features, variant)
            yield f"{shape} {method}, {features} features, {variant}", case


# Generation and scoring


class EndsAt(StoppingCriteria):
    """Each row ends at its own length, in tokens without the start token."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = torch.tensor(lengths, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return input_ids.shape[1] - 1 >= self.lengths


def ending(setting: Setting, batch: Batch) -> dict:
    """Return arguments of `generate` that end each text at its own length."""
    lengths = batch.target_lengths
    return {"stopping_criteria": [EndsAt(lengths, setting.device)], "max_new_tokens": max(lengths), "do_sample": False}


def choice_labels(shape: str, count: int, device: torch.device) -> torch.LongTensor:
    """Return four choices per problem that differ in one token, like "The answer is (A)."."""
    labels = torch.arange(3, 3 + ANSWER_LENGTH).repeat(count, NUM_CHOICES, 1)
    labels[:, :, ANSWER_LENGTH - 3] = torch.arange(20, 20 + NUM_CHOICES)
    return labels.to(device)


def score(model: MMCoTForConditionalGeneration, batch: Batch, labels: torch.LongTensor) -> None:
    """Score the choices as `inference_mmcot.choose_answers` does."""
    encoded = encode(model, batch.inputs)
    mask, states = encoded["attention_mask"], encoded["encoder_outputs"].last_hidden_state
    for rows, places in split_by_length(mask.bool()):
        part = type(encoded["encoder_outputs"])(last_hidden_state=states[rows[:, None], places])
        model.score_choices(labels[rows], mask[rows[:, None], places], part)


def generate_plainly(setting: Setting, model: T5ForConditionalGeneration, batch: Batch) -> None:
    model.generate(**batch.text, **ending(setting, batch))


def decoding_rows(setting: Setting, shape: str) -> list[Row]:
    """Compare our generation of rationales and scoring of choices with plain T5's generation of both."""
    count = 2 * setting.batch_size
    rationale = rationale_batch(setting, shape, count=count)
    answer = make_batch(setting, shape, (96, 480), (ANSWER_LENGTH * (8 if setting.small else 1),) * 2, count, "DETR")
    labels = choice_labels(shape, count, setting.device)

    def timed(run: Callable[[], None]) -> float:
        return measure(setting, run, warm_up=1)[0]

    with torch.no_grad():
        plain = build_model(setting, shape, None, BFLOAT16).eval()
        plain_seconds = [timed(functools.partial(generate_plainly, setting, plain, b)) for b in (rationale, answer)]
        plain = None
        free_memory(setting)
        model = build_model(setting, shape, "DETR", BFLOAT16).eval()
        generated = timed(
            lambda: model.generate(
                **encode(model, rationale.inputs), custom_generate=greedy_search, **ending(setting, rationale)
            )
        )
        scored = timed(lambda: score(model, answer, labels))
    limits = (generation_limit(setting, SHAPES[shape], rationale), scoring_limit(setting, shape, answer, labels))
    rows = []
    for name, seconds, baseline, limit in (
        ("rationale generated", generated, plain_seconds[0], limits[0]),
        ("answer scored", scored, plain_seconds[1], limits[1]),
        ("both stages", generated + scored, sum(plain_seconds), None if limits[0] is None else sum(limits)),
    ):
        note = "baseline: plain T5's generate, which generates the answer too; limit: matrix peak and bandwidth"
        rate = {"limit": None if limit is None else count / limit, "baseline": count / baseline}
        rows.append(rate_row("decoding", f"{shape}: {name}", count / seconds, note=note, **rate))
    return rows


def scoring_limit(setting: Setting, shape: str, batch: Batch, labels: torch.LongTensor) -> float | None:
    """Return the minimum seconds to score a batch: matrix products at the peak, or reading the weights once."""
    if setting.peak is None:
        return None
    packed = pack_choices(labels, start_token_id=0).input_ids.shape[1]
    sizes, sources = SHAPES[shape], batch.source_lengths
    flops = encoder_flops(sizes, sources) + fusion_flops(sizes, sources, "DETR")
    flops += decoder_flops(sizes, sources, [packed] * len(sources))
    d, inner, ff = sizes["d_model"], sizes["num_heads"] * sizes["d_kv"], sizes["d_ff"]
    weights = sizes["num_layers"] * (4 * d * inner + 3 * d * ff) + d * sizes["vocab_size"]
    weights += sizes["num_decoder_layers"] * (8 * d * inner + 3 * d * ff)
    return max(flops / setting.peak, 2 * weights / setting.bandwidth)


def decoding_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    for shape in setting.shapes:
        yield shape, functools.partial(decoding_rows, setting, shape)


# Rows that leave the batch


def leaving_rows(setting: Setting, section: str, shape: str, kinds: list[str]) -> list[Row]:
    """Compare our greedy search, which removes finished rows, with transformers' for a dynamic or static cache."""
    batch = make_batch(setting, shape, (64, 320), (16, 160), 4 * setting.batch_size, "DETR")
    options = {
        "rows leave": {"custom_generate": greedy_search},
        "dynamic cache": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "static cache, compiled": {"cache_implementation": "static"},
    }
    with torch.no_grad():
        model = build_model(setting, shape, "DETR", BFLOAT16).eval()
        encoded = encode(model, batch.inputs)
        # `generate` keeps one static cache per model; texts of equal length need only one size.
        seconds = {
            kind: measure(
                setting,
                lambda kind=kind: model.generate(**encoded, **options[kind], **ending(setting, batch)),
                warm_up=2 if kind.endswith("compiled") else 1,
            )[0]
            for kind in ["rows leave", *kinds]
        }
    count = len(batch.source_lengths)
    limit = generation_limit(setting, SHAPES[shape], batch)
    if limit is not None:  # the measurement excludes the encoder
        encoder_work = encoder_flops(SHAPES[shape], batch.source_lengths)
        encoder_work += fusion_flops(SHAPES[shape], batch.source_lengths, "DETR")
        limit = count / (limit - encoder_work / setting.peak)
    ours, rows = count / seconds.pop("rows leave"), []
    for kind, baseline_seconds in seconds.items():
        note = f"baseline: transformers' greedy decoding with a {kind}; limit: matrix peak and bandwidth"
        rows.append(
            rate_row(section, f"{shape}: rows leave, {kind}", ours, limit, baseline=count / baseline_seconds, note=note)
        )
    return rows


def leaving_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    for shape in setting.shapes[:2]:
        yield shape, functools.partial(leaving_rows, setting, "leaving", shape, ["dynamic cache", "static cache"])


# Effect of torch.compile


def compile_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    """Yield the cases with torch.compile; they run last, because compiling takes most of the time."""
    for shape, method in setting.methods[: 1 if setting.small else None]:
        case = functools.partial(training_rows, setting, "compile", shape, method, "DETR", "compiled")
        yield f"{shape} {method}, DETR features, compiled", case
    if setting.is_gpu:  # transformers compiles decoding with a static cache on accelerators only
        shape = setting.shapes[0]
        yield f"{shape}: static", functools.partial(leaving_rows, setting, "compile", shape, ["static cache, compiled"])


# Pictures


def picture_rows(setting: Setting, name: str) -> list[Row]:
    config, size = (TINY_TOWERS if setting.small else TOWERS)[name]
    config = dict(config)
    torch.manual_seed(0)
    tower = build_vision_tower(AutoConfig.for_model(config.pop("model_type"), **config)).to(setting.device).eval()
    count = 2 if setting.small else 32
    pixels = torch.randn(count, 3, *size, device=setting.device)
    with torch.no_grad():
        one_by_one = measure(
            setting, lambda: [encode_pictures(tower, None, picture[None], None) for picture in pixels], warm_up=1
        )[0]
        tower = tower.to(BFLOAT16).to(memory_format=torch.channels_last)
        together = measure(setting, lambda: encode_pictures(tower, None, pixels, None))[0]
        with FlopCounterMode(display=False) as counter:
            encode_pictures(tower, None, pixels, None)
    limit = None if setting.peak is None else count * setting.peak / counter.get_total_flops()
    note = f"pictures of {size[0]} x {size[1]} pixels; baseline: one at a time in float32; limit: matrix peak"
    rate = {"limit": limit, "baseline": count / one_by_one}
    return [rate_row("pictures", name, count / together, unit="pictures a second", note=note, **rate)]


def picture_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    for name in TOWERS:
        yield name, functools.partial(picture_rows, setting, name)


# The demonstration


def demonstration_problems(count: int) -> list[dict]:
    """Return test problems without gold columns. Only the file is loaded, because the package mmcot needs much more."""
    file = Path(__file__).parent.parent / "mmcot" / "problems" / "demo.py"
    spec = importlib.util.spec_from_file_location("demonstration", file)
    sys.modules["demonstration"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    columns = ("question", "context", "choices", "images")
    rows = itertools.islice(module.generate("test"), count)
    return [{name: row[name] for name in columns} for row in rows]


def save_random_demonstration(folder: Path, problems: list[dict]) -> None:
    """Save a model with the demonstration's stages and random weights, for runs without `--demo`."""
    columns = ["question", "context", "choices", "images"]
    stages = [
        Stage("rationale", columns, "rationale", **PAPER_TEMPLATES["QCM-E"], max_target_length=16),
        Stage("answer", [*columns, "rationale"], "answer_text", **PAPER_TEMPLATES["QCMG-A"], max_target_length=16),
    ]
    words = " ".join(stages[0].render_source(problem) for problem in problems) + " The answer is (A). (B). (C). (D)."
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(words.split()))])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    processor = MMCoTProcessor(tokenizer, ViTImageProcessor(size={"height": 32, "width": 32}), stages)
    vision_config = {"model_type": "vit", **TINY, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = MMCoTConfig(**{**SHAPES["tiny"], "vocab_size": len(tokenizer)}, vision_config=vision_config)
    for place in (folder / "rationale", folder):
        model = MMCoTForConditionalGeneration(config)
        model.generation_config.max_new_tokens = 16
        model.save_pretrained(place)
    processor.save_pretrained(folder)


def answer_all(folder: str, problems: list[dict], device: torch.device, dtype: torch.dtype) -> list[dict]:
    model = MMCoTForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    processor = MMCoTProcessor.from_pretrained(folder)
    return MultimodalCoTPipeline(model=model, processor=processor, device=device)(problems, batch_size=50)


def demonstration_rows(setting: Setting) -> list[Row]:
    problems = demonstration_problems(8 if setting.small else 200)
    with tempfile.TemporaryDirectory() as temporary:
        if setting.demo is None:
            save_random_demonstration(Path(temporary), problems)
        folder = setting.demo or temporary
        expected = answer_all(folder, problems, torch.device("cpu"), torch.float32)
        found = {
            name: answer_all(folder, problems, setting.device, dtype)
            for name, dtype in (("float32", torch.float32), ("bfloat16", BFLOAT16))
        }
    rows, total = [], len(problems)
    source = f"{setting.demo or 'random weights, no --demo'}; baseline: the CPU in float32"
    for dtype, results in found.items():
        for column in ("rationale", "answer"):
            equal = sum(one[column] == other[column] for one, other in zip(expected, results, strict=True))
            name, note = f"{dtype}: {column}s equal to the CPU's", f"{total - equal} differ; {source}"
            gap = total / equal if equal else None
            row = Row("demonstration", name, equal, f"of {total} problems", total, total, gap, note)
            if dtype == "float32" and equal < total:
                row.error = f"{total - equal} {column}s differ from the CPU's in float32"
            rows.append(row)
        difference = max(
            abs(one - other)
            for old, new in zip(expected, results, strict=True)
            for one, other in zip(old["scores"], new["scores"], strict=True)
        )
        rows.append(
            Row("demonstration", f"{dtype}: largest difference of a score", difference, "probability", note=source)
        )
    return rows


def demonstration_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    yield "equal to the CPU", functools.partial(demonstration_rows, setting)


# In order of execution.
SECTIONS: dict[str, Callable[[Setting], Iterator[tuple[str, Case]]]] = {
    "demonstration": demonstration_cases,
    "pictures": picture_cases,
    "training": training_cases,
    "decoding": decoding_cases,
    "leaving": leaving_cases,
    "compile": compile_cases,
}


def run_case(setting: Setting, section: str, name: str, case: Case) -> list[Row]:
    try:
        rows = case()
    except Exception as error:  # out of memory, no compiler, …: reported, and the next case runs
        message = f"{type(error).__name__}: {str(error).strip()}"[:500]
        rows = [Row(section, name, None, "", error=message)]
    free_memory(setting)
    return rows


def print_row(row: Row) -> None:
    values = (row.figure, row.baseline, row.limit, row.gap)
    figure, *others = ["" if value is None else f"{value:.4g}" for value in values]
    print(
        f"{row.section:14}{row.name:52}{figure:>10} {row.unit:18}", *(f"{cell:>9}" for cell in others), row.error or ""
    )


def describe_run(setting: Setting) -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "timm")}
    return {
        "benchmark": "gpu",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if setting.is_gpu else "cpu",
        "form": "small" if setting.small else "full",
        "matrix_peak_flops": setting.peak,
        "bandwidth_bytes": setting.bandwidth,
        "demo": setting.demo,
        "command": sys.argv[1:],
        **versions,
    }


def write(file: str, result: dict) -> None:
    """Write the JSON atomically."""
    temporary = Path(f"{file}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="by default the GPU, if available")
    parser.add_argument("--small", action="store_true", help="tiny sizes; always used on a CPU")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--demo", metavar="DIR", help="the exported demonstration, e.g. runs/demo/hub")
    parser.add_argument("--minutes", type=float, default=6, help="no case starts after this time")
    parser.add_argument("--output", metavar="FILE", help="write the JSON to this file after each case")
    arguments = parser.parse_args()
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    peak, bandwidth = PEAKS.get(torch.cuda.get_device_name(), (None, None)) if kind == "cuda" else (None, None)
    setting = Setting(torch.device(kind), arguments.small or kind == "cpu", arguments.demo, peak, bandwidth)
    torch.backends.cudnn.allow_tf32 = False  # keep float32 exact
    if kind == "cpu":
        torch.set_num_threads(1)  # at tiny sizes, threads spend more time waiting than working
    start, rows = time.perf_counter(), []
    print(f"{'section':14}{'name':52}{'figure':>10} {'unit':18} {'baseline':>9} {'limit':>9} {'gap':>9}")
    for section in (name for name in SECTIONS if name in arguments.sections):
        for name, case in SECTIONS[section](setting):
            if time.perf_counter() - start > 60 * arguments.minutes:
                new = [Row(section, name, None, "", error=f"not run: {arguments.minutes:g} minutes had passed")]
            else:
                new = run_case(setting, section, name, case)
            for row in new:
                print_row(row)
            rows.extend(new)
            result = {**describe_run(setting), "seconds": round(time.perf_counter() - start, 1)}
            result["rows"] = [dataclasses.asdict(row) for row in rows]
            if arguments.output is not None:
                write(arguments.output, result)
    failed = sum(row.error is not None for row in rows)
    seconds, device = time.perf_counter() - start, describe_run(setting)["device"]
    print(f"{len(rows)} rows, {failed} with errors, {seconds:.0f} s on {device}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
