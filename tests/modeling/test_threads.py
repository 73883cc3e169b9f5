"""Calls of one system from many threads: each answer equals that of a single call, and the system is unchanged."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_model
from test_pipeline import RED, answer, processor  # noqa: F401 (fixtures)
from torch import nn
from transformers import TextStreamer

from modeling_mmcot import MMCoTProcessor, MultimodalCoTPipeline
from modeling_mmcot.generation_mmcot import PACKED, packed_linears
from modeling_mmcot.loading_mmcot import StageAdapters

THREADS = 8
CALL_COUNTS = [48, pytest.param(500, marks=pytest.mark.slow)]


def state_of(pipe) -> list:
    """Everything that a call could change: the layers' own attributes, adapters, settings, the tokenizer's padding."""
    state = []
    models = pipe.models
    roots = [models.model.get_base_model()] if isinstance(models, StageAdapters) else list(models.values())
    for root in roots:
        state.append(root.generation_config.to_dict())
        for name, module in root.named_modules():
            state.append(
                (name, sorted(set(module.__dict__) - {"forward"}), "forward" in module.__dict__, module.training)
            )
            state.append([len(module._forward_pre_hooks), len(module._forward_hooks)])
            state.append(getattr(module, "active_adapter", None))
        state.append([parameter.requires_grad for parameter in root.parameters()])
    return state


class SilentStreamer(TextStreamer):
    def on_finalized_text(self, text, stream_end=False):
        pass


def calls_of(pipe):
    """Calls of every kind, with sources of many lengths, for one problem or a batch."""
    drawing = random.Random(0)
    words = [f"w{number}" for number in range(3, 50)]
    calls = []
    for number in range(24):
        problem = {
            "question": " ".join(drawing.choices(words, k=drawing.randint(1, 30))),
            "choices": [
                " ".join(drawing.choices(words, k=drawing.randint(1, 4))) for _ in range(drawing.randint(2, 5))
            ],
            "image": RED["image"] if number % 3 else None,
        }
        kwargs = {}
        if number % 4 == 1:
            kwargs["given"] = {"rationale": "w20 w21"}
        if number % 4 == 2:
            kwargs["streamer"] = SilentStreamer(pipe.processor.tokenizer)
        if number % 4 == 3:
            kwargs["decode_answer"] = True
        calls.append((problem if number % 5 else [problem, RED], kwargs))
    return calls


def same(found, expected) -> bool:
    """Exactly equal except for scores, because their rounding depends on the memory layout of the batch."""
    if isinstance(expected, list):
        return all(same(one, other) for one, other in zip(found, expected, strict=True))
    scores, others = found["scores"], expected["scores"]
    return scores == pytest.approx(others, abs=1e-5) and {**found, "scores": 0} == {**expected, "scores": 0}


def stress(pipe, calls):
    kinds = calls_of(pipe)
    expected = [pipe(problem, **kwargs) for problem, kwargs in kinds]
    assert len({str(result) for result in expected}) > 12, "the calls must differ to show a mix-up"
    before = state_of(pipe)

    def call(number):
        problem, kwargs = kinds[number % len(kinds)]
        return same(pipe(problem, **kwargs), expected[number % len(kinds)])

    with ThreadPoolExecutor(THREADS) as threads:
        right = list(threads.map(call, range(calls)))
    assert right.count(True) == calls
    assert state_of(pipe) == before and not PACKED


@pytest.fixture
def one_thread_of_torch():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("calls", CALL_COUNTS)
def test_whole_models_answer_concurrent_calls(calls, answer, one_thread_of_torch):  # noqa: F811
    stress(answer, calls)


@pytest.fixture
def adapted(request, processor, tmp_path):  # noqa: F811
    """The pipeline over a base with an adapter for each stage; the adapters have large random weights."""
    kind = getattr(request, "param", "LORA")
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    base = tiny_model(1, initializer_factor=3.0, stage_adapters=["rationale", "answer"])
    base.save_pretrained(tmp_path)
    for number, name in enumerate(("rationale", "answer")):
        root = type(base).from_pretrained(tmp_path)
        if kind == "LORA":
            config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"], modules_to_save=["fusion"])
        else:
            config_class = PrefixTuningConfig if kind == "PREFIX_TUNING" else PromptTuningConfig
            config = config_class(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
        torch.manual_seed(number + 5)
        adapter = get_peft_model(root, config)
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter.data, std=0.5)
        adapter.save_pretrained(tmp_path / name)
        root.generation_config.update(max_new_tokens=6 + 4 * number)
        root.generation_config.save_pretrained(tmp_path / name)
    root = type(base).from_pretrained(tmp_path).eval()
    return MultimodalCoTPipeline(model=root, processor=processor)


@pytest.mark.parametrize("calls", CALL_COUNTS)
@pytest.mark.parametrize("adapted", ["LORA", "PREFIX_TUNING", "PROMPT_TUNING"], indirect=True)
def test_adapters_and_virtual_tokens_answer_concurrent_calls(calls, adapted, one_thread_of_torch):
    stress(adapted, calls)


@pytest.mark.parametrize("adapted", ["LORA", "PREFIX_TUNING", "PROMPT_TUNING"], indirect=True)
def test_save_and_load_preserve_a_system_of_adapters(adapted, tmp_path):
    before = state_of(adapted)
    adapted.save_pretrained(tmp_path / "saved")
    assert state_of(adapted) == before
    root = type(adapted.model).from_pretrained(tmp_path / "saved")
    again = MultimodalCoTPipeline(model=root, processor=MMCoTProcessor.from_pretrained(tmp_path / "saved"))
    for problem, _ in calls_of(adapted)[:6]:
        assert same(again(problem), adapted(problem))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("system", ["answer", "adapted"])
def test_error_or_ctrl_c_leaves_the_system_unchanged(system, error, request, monkeypatch):
    pipe = request.getfixturevalue(system)
    expected, before = pipe(RED), state_of(pipe)
    for place in ("choose_answers", "generate_texts"):
        with monkeypatch.context() as patched:

            def fails(*_, **__):
                raise error("stopped")

            patched.setattr(f"modeling_mmcot.inference_mmcot.{place}", fails)
            with pytest.raises(error):
                pipe(RED)
        assert state_of(pipe) == before and not PACKED
    assert pipe(RED) == expected


def test_packs_changed_weights_again_in_a_nested_block():
    model = tiny_model()
    inputs = torch.randn(2, 32)
    with torch.no_grad(), packed_linears(model):
        before = model.lm_head(inputs)
        model.lm_head.weight.mul_(2)
        with packed_linears(model):
            torch.testing.assert_close(model.lm_head(inputs), before * 2)
    assert not PACKED and "forward" not in model.lm_head.__dict__


def test_concurrent_calls_do_not_change_tokenizer_settings_of_each_other(processor):  # noqa: F811
    problems = [{"question": " ".join(["w5"] * length), "choices": [], "images": []} for length in range(1, 20)]
    expected = [processor(problem, stage="rationale")["input_ids"].tolist() for problem in problems]
    stop = threading.Event()

    def switch():
        while not stop.is_set():
            processor(problems[:5], stage="rationale", padding="max_length", max_length=40)
            processor.tokenize_targets(["w5 w6 w7 w8"], truncation=True, max_length=2)

    others = [threading.Thread(target=switch) for _ in range(3)]
    for thread in others:
        thread.start()
    try:
        for _ in range(30):
            found = [processor(problem, stage="rationale")["input_ids"].tolist() for problem in problems]
            assert found == expected
    finally:
        stop.set()
        for thread in others:
            thread.join()
