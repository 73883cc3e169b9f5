"""The Hub's code snippets for an image-text-to-text model: all stages answer a chat with one message."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import run_isolated
from transformers import GenerationConfig

from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.chat_mmcot import read_chat, read_text

QUESTION = {"question": "Which color is it?", "context": "", "caption": ""}


@pytest.mark.parametrize(
    "choices",
    [
        *("A. red\nB. blue", "(A) red\n(B) blue", "A) red\nB) blue", "A: red\nB: blue", "a. red\nb. blue"),
        *("(a) red\n(b) blue", "(A)red\n(B)blue", "- red\n- blue", "* red\n\n* blue", "1. red\n2. blue"),
    ],
)
def test_reads_choices_in_common_list_formats(choices):
    assert read_text(f"Which color is it?\n{choices}") == {**QUESTION, "choices": ["red", "blue"]}
    assert read_text(f"Which color is it?\nOptions:\n{choices}") == {**QUESTION, "choices": ["red", "blue"]}


def test_reads_choices_on_one_line_as_in_the_prompts():
    found = read_text("Question: Which color is it? Is it dark?\nOptions: (A) red (B) light blue")
    assert found == {**QUESTION, "question": "Which color is it? Is it dark?", "choices": ["red", "light blue"]}
    found = read_text("Which color is it?\nOptions: pick one\nA. red\nB. blue")
    assert found["choices"] == ["red", "blue"] and found["context"] == "Options: pick one"
    with pytest.raises(ValueError, match="Choices must be one per line, or"):
        read_text("Which color is it?\nChoices: red, blue")


def test_reads_other_lists_as_context():
    found = read_text("The picture shows:\n- a bar chart\n- three bars\nWhich bar is the tallest?")
    assert found["choices"] == [] and found["question"] == "Which bar is the tallest?"
    assert found["context"] == "The picture shows: - a bar chart - three bars"
    found = read_text("Which is it?\nA. red\nB. blue\nNotes:\n- n1\n- n2")
    assert found["choices"] == ["red", "blue"] and found["question"] == "Which is it?"
    assert found["context"] == "Notes: - n1 - n2"


def test_keeps_text_that_resembles_a_choice():
    assert read_text("Which color is it?") == {**QUESTION, "choices": []}
    assert read_text("Read this.\nB. Franklin wrote it.\nWho wrote it?") == {
        **{"question": "Who wrote it?", "context": "Read this. B. Franklin wrote it.", "caption": "", "choices": []}
    }


def test_reads_question_and_context_with_and_without_labels():
    expected = {
        "question": "Which is it?",
        "context": "Red is hot. Blue is cold.",
        "caption": "",
        "choices": ["a", "b"],
    }
    assert read_text("Red is hot.\nBlue is cold.\nWhich is it?\n- a\n- b") == expected
    assert read_text("Question: Which is it?\nContext: Red is hot. Blue is cold.\nChoices:\n- a\n- b") == expected
    assert read_text("Which is it?\n- a\n- b\nHint: Red is hot. Blue is cold.") == expected


def test_reads_pictures_from_every_image_key():
    for key in ("image", "url", "path", "base64"):
        content = [{"type": "image", key: "x.png"}, {"type": "text", "text": "Why?"}]
        assert read_chat([{"role": "user", "content": content}])["image"] == ["x.png"]
    assert read_chat([{"role": "user", "content": "Why?"}])["image"] == []


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (
            [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}],
            "earlier turns.*'assistant'",
        ),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "without earlier turns.*'system'"),
        ([{"role": "user", "content": []}], "has no question"),
        ([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "A message part must be .*'video'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "A message part must be"),
        ([{"role": "user", "content": ["Why?"]}], "A message part must be .*'Why\\?'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "A message part must be"),
    ],
)
def test_refuses_unsupported_chats(messages, error):
    with pytest.raises(ValueError, match=error):
        read_chat(messages)


def test_hub_snippets_return_the_answer_of_the_pipeline(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "hub", tmp_path / "model")
    found = run_isolated(
        """
        from PIL import Image
        Image.new("RGB", (50, 40), "red").save("red.png")
        messages = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": "red.png"},
                    {"type": "text", "text": "Which color is it?\\nA. red\\nB. blue"},
                ],
            },
        ]
        problem = {"question": "Which color is it?", "choices": ["red", "blue"], "image": "red.png"}
        results = [pipeline("multimodal-cot", model="model", trust_remote_code=True)(problem)]

        pipe = pipeline("image-text-to-text", model="model", trust_remote_code=True)
        results.append(pipe(text=messages))
        results.append(pipe(text=messages, return_full_text=False))
        results.append(pipe("red.png", text="Which color is it?\\nA. red\\nB. blue", return_full_text=False))
        results.append(pipe([messages, messages]))
        results.append(pipe(problem))
        results.append(pipe(text=messages, return_full_text=False, max_new_tokens=40)[0]["generated_text"])

        processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained("model", trust_remote_code=True)
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        outputs = model.generate(**inputs, max_new_tokens=40)
        text = processor.decode(outputs[0][inputs["input_ids"].shape[-1]:], skip_special_tokens=True)
        print(json.dumps([*results, text, processor.decode(outputs[0], skip_special_tokens=True)]))
        """,
        tmp_path,
    )
    plain, chat, reply, by_parts, two, again, longer, decoded, whole = found
    assert again == plain
    expected = reply[0]["generated_text"]
    assert expected.startswith(plain["rationale"])
    letter = "AB"[plain["answer_index"]]
    assert expected == " ".join(f"{plain['rationale']} The answer is ({letter}).".split())
    assert chat[0]["generated_text"] == [*chat[0]["input_text"], {"role": "assistant", "content": expected}]
    assert by_parts[0]["generated_text"] == expected and two == [chat, chat]
    assert decoded == longer and whole.endswith(longer) and "Which color is it?" in whole


def test_refuses_a_custom_chat_template(tiny_run):
    processor = MMCoTProcessor.from_pretrained(tiny_run / "hub")
    chat = [{"role": "user", "content": "Which color is it?\n- red\n- blue"}]
    assert "Which color is it?" in processor.apply_chat_template(chat)
    assert processor.apply_chat_template(chat, tokenize=True).shape[0] == 1
    batch = processor.apply_chat_template([chat, chat], tokenize=True, return_dict=True, padding=True)
    assert batch["input_ids"].shape[0] == 2 and len(batch["problems"].problems) == 2
    with pytest.raises(ValueError, match="chat_template, tools has no effect here"):
        processor.apply_chat_template(chat, chat_template="{{ x }}", tools=[json])


def test_answers_first_chats_from_several_threads_alike(tiny_run):
    """transformers supports loading in one thread at a time; a second thread got weights without data."""
    processor = MMCoTProcessor.from_pretrained(tiny_run / "hub")
    chat = [{"role": "user", "content": "Which color is it?\n- red\n- blue"}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    for _ in range(3):
        model = MMCoTForConditionalGeneration.from_pretrained(tiny_run / "hub")
        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(model.generate, **inputs) for _ in range(4)]
        replies = [call.result().tolist() for call in calls]
        assert replies == [replies[0]] * 4
    model = MMCoTForConditionalGeneration.from_pretrained(tiny_run / "hub").train()
    model.generate(**inputs)
    assert model.training


def test_refuses_to_chat_with_one_stage_or_unknown_settings(tiny_run):
    processor = MMCoTProcessor.from_pretrained(tiny_run / "hub")
    chat = [{"role": "user", "content": "Which color is it?\n- red\n- blue"}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    model = MMCoTForConditionalGeneration.from_pretrained(tiny_run / "hub", subfolder="rationale")
    with pytest.raises(ValueError, match="loaded from the subfolder 'rationale': load the repository without"):
        model.generate(**inputs)
    model = MMCoTForConditionalGeneration.from_pretrained(tiny_run / "hub")
    with pytest.raises(TypeError, match="'max_new_tokns': did you mean 'max_new_tokens'"):
        model.generate(**inputs, max_new_tokns=3)
    with pytest.raises(TypeError, match="unexpected keyword 'stopping_criteria'"):
        model.generate(**inputs, stopping_criteria=[])


def test_keeps_a_given_generation_config(tiny_run):
    given = GenerationConfig(max_new_tokens=7)
    for options in ({}, {"subfolder": "rationale"}):
        model = MMCoTForConditionalGeneration.from_pretrained(tiny_run / "hub", generation_config=given, **options)
        assert model.generation_config.max_new_tokens == 7
