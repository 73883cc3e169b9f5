"""The Space's page: driven in a real browser as a user does, and its parts where a browser adds nothing."""

import asyncio
import importlib.util
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import gradio as gr
import httpx
import pytest
import safehttpx
import torch
from conftest import REPOSITORY
from gradio.processing_utils import async_ssrf_protected_get
from PIL import EpsImagePlugin, Image
from transformers import pipeline

CHROMIUM = shutil.which("chromium")
CODE = REPOSITORY / "space" / "app.py"
PICTURE = REPOSITORY / "space" / "examples" / "bar_chart.png"

# What goes over the right side of the window, even where it is cut off there and nothing scrolls.
TOO_WIDE = """[...document.querySelectorAll("body *")]
  .filter((element) => element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 1)
  .map((element) => element.outerHTML.slice(0, 200))"""

# Choices that are equal, and one that would show as something else if it were not escaped.
PROBLEM = {"question": "Which bar is <i>it</i>?", "choices": ["red <b>bar</b> ${1+1} {{x}}", "blue", "blue"]}


@pytest.fixture(scope="module")
def app():
    specification = importlib.util.spec_from_file_location("space_app", CODE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def answer(tiny_run):
    return pipeline("multimodal-cot", model=str(tiny_run / "hub"), trust_remote_code=True)


@pytest.fixture(scope="module")
def address(tiny_run, tmp_path_factory):
    """Of the page, run as a user runs it, from a folder where nothing of ours can be imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, CODE, tiny_run / "hub", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (folder / "log").read_text()


def wait_until_it_answers(address, process, log):
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address)
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError(f"no answer after a minute:\n{log.read_text()}")


def bars_of(page, part):
    rows = page.locator(f"{part} .bars li").all()
    return [row.locator(".choice span").all_inner_texts() for row in rows]


def assert_bars(page, part, result, choices):
    from playwright.sync_api import expect

    expect(page.locator(f"{part} .answer strong")).to_have_text(result["answer"])
    expect(page.locator(f"{part} .chosen .choice span").first).to_have_text(
        f"({'ABC'[result['answer_index']]}) {result['answer']}"
    )
    texts, percentages = zip(*bars_of(page, part), strict=True)
    assert list(texts) == [f"({letter}) {choice}" for letter, choice in zip("ABC", choices, strict=True)]
    shown = [float(percentage.removesuffix("%")) for percentage in percentages]
    assert shown == pytest.approx([100 * score for score in result["scores"]], abs=0.06)


def ask(page, file, problem):
    page.set_input_files("#picture input[type=file]", file)
    page.wait_for_selector("#picture img")
    page.fill("#question textarea", problem["question"])
    page.fill("#choices textarea", "\n\n".join(problem["choices"]))  # blank lines are no choices
    page.click("#ask")


def drive(address, app, answer, folder):
    """What a visitor does, in headless Chromium; a request to anywhere else is an error."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium, and there is none on this machine")
    from playwright.sync_api import expect, sync_playwright

    problem = {**PROBLEM, "image": str(PICTURE)}
    result, unseen = answer(problem), answer({**problem, "image": None})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, said = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if is_elsewhere(request.url, address) else None)
        page.goto(address)

        ask(page, PICTURE, problem)
        expect(page.locator("#text-rationale textarea")).to_have_value(result["rationale"])
        expect(page.locator("#unseen-answered .written")).to_have_text(unseen["rationale"])
        assert_bars(page, "#answered", result, problem["choices"])
        assert_bars(page, "#unseen-answered", unseen, problem["choices"])
        expect(page.get_by_role("heading", name=problem["question"])).to_be_visible()

        maps = answer.token_maps(problem, "rationale")
        expect(page.locator("#tokens button")).to_have_text([app.shown_token(token).strip() for token in maps.tokens])
        peaks = [float(token_map.max()) for token_map in maps.maps[0]]
        pictures = [overlay_after(page, lambda: None, "")]
        for token in sorted(range(len(peaks)), key=peaks.__getitem__)[-2:]:
            pictures.append(overlay_after(page, page.locator("#tokens button").nth(token).click, pictures[-1]))
        assert len(set(pictures)) == 3, "the picture is the same for each token"
        page.screenshot(path=folder / "wide.png", full_page=True)

        for edited in ("", "The blue bar is the shortest."):
            page.fill("#text-rationale textarea", edited)
            page.click("#again")
            expected = answer(problem, given={"rationale": edited})
            assert expected["scores"] != result["scores"]
            expect(page.locator("#answered .bars li").first).to_contain_text(f"{expected['scores'][0]:.1%}")
            assert_bars(page, "#answered", expected, problem["choices"])
            assert_bars(page, "#unseen-answered", unseen, problem["choices"])
        page.check("#stage input[value=answer]")
        read = answer.token_maps(problem, "answer", given={"rationale": edited})
        expect(page.locator("#tokens button")).to_have_text([app.shown_token(token).strip() for token in read.tokens])

        page.fill("#question textarea", " ")
        page.click("#ask")
        expect(page.get_by_text("Write a question first.")).to_be_visible()
        page.get_by_label("Remove Image").click()
        ask(page, {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"}, problem)
        expect(page.get_by_text(app.NO_PICTURE)).to_be_visible()
        page.get_by_label("Remove Image").click()
        page.click("#ask")
        expect(page.locator("#text-rationale textarea")).to_have_value(unseen["rationale"])
        expect(page.locator("#unseen-answered")).to_be_hidden()
        expect(page.locator("#tokens")).to_be_hidden()

        page.set_viewport_size({"width": 390, "height": 800})
        example = json.loads((CODE.parent / "examples" / "examples.json").read_text())[0]
        page.get_by_role("button", name=example["question"]).click()
        expect(page.locator("#question textarea")).to_have_value(example["question"])
        expect(page.locator("#choices textarea")).to_have_value("\n".join(example["choices"]))
        page.wait_for_selector("#picture img")
        page.click("#ask")
        expect(page.locator("#tokens button").first).to_be_visible()
        page.locator("#tokens button").first.click()
        page.screenshot(path=folder / "phone.png", full_page=True)
        assert page.evaluate(TOO_WIDE) == []
        assert said == []
        browser.close()


def is_elsewhere(url, address):
    return url.startswith("http") and not url.startswith(address)


def overlay_after(page, action, before):
    """The bytes of the picture that is shown in place of another one, when it is there."""
    action()
    for _ in range(100):
        shown = page.locator("#overlay img")
        if shown.count() and (picture := page.request.get(shown.get_attribute("src")).body()) != before:
            return picture
        page.wait_for_timeout(50)
    raise AssertionError("the picture did not change")


def test_the_page_in_a_browser(address, app, answer, tmp_path):
    drive(address, app, answer, tmp_path)


@pytest.mark.parametrize("choices", [["red", "blue"], []])
def test_texts_are_streamed(app, answer, choices):
    problem = {"question": "Which bar is it?", "choices": choices, "context": "", "image": str(PICTURE)}
    *growing, last = app.stream(answer, problem, {})
    assert last == answer(problem)
    for column in ["rationale", *(["answer"] if not choices else [])]:
        texts = [result[column] for result in growing if column in result]
        assert len(set(texts)) > (2 if column == "rationale" else 1)  # an answer may be one word, which comes whole
        assert texts[-1] == last[column]
        assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


def test_a_pipelines_error_ends_the_stream(app, answer):
    with pytest.raises(ValueError, match="`question`"):
        list(app.stream(answer, {"choices": []}, {}))


def test_a_system_of_one_stage_has_a_page(app, tiny_run, tmp_path):
    """Neither a rationale nor pictures: nothing of the page that is of them is left."""
    shutil.copytree(tiny_run / "hub", tmp_path / "hub")
    settings = json.loads((tmp_path / "hub" / "processor_config.json").read_text())
    stage = settings["stages"][1]
    stage["reads"] = ["question", "context", "choices", "caption"]
    stage["source"] = "{{ question }} {{ caption }} Answer:"
    settings["stages"] = [stage]
    (tmp_path / "hub" / "processor_config.json").write_text(json.dumps(settings))
    answer = pipeline("multimodal-cot", model=str(tmp_path / "hub"), trust_remote_code=True, check=False)
    page = app.Page(answer, "name")
    assert page.boxes == [] and not page.again_button.visible
    assert [component.visible for component in page.form] == [False, True, True, True, True]
    *_, last = page.ask(None, "Which?", "red\nblue", "", "a bar")
    expected = answer({"question": "Which?", "choices": ["red", "blue"], "caption": "a bar"})
    assert last[page.answered] == app.answer_html(expected, ["red", "blue"])
    assert page.answer_without_picture(last[page.state]) == ""
    assert list(page.show_maps(last[page.state], None)) == [page.maps_part]


def test_maps_that_there_are_not_are_said(app, answer, monkeypatch):
    page = app.Page(answer, "name")

    def token_maps(*_, **__):
        raise ValueError("7 patches have no <places>")

    monkeypatch.setattr(answer, "token_maps", token_maps)
    shown = page.show_maps({"problem": {"image": str(PICTURE)}, "given": {}}, "answer")
    assert "7 patches have no &lt;places&gt;" in shown[page.tokens] and shown[page.token_maps] is None


def test_an_even_share_is_not_seen_and_a_full_one_is(app):
    token_map = torch.zeros(2, 4)
    token_map[1, 2], token_map[0, 0] = 0.5, 0.125  # four times an even share, and one
    shown = app.overlay(Image.new("RGB", (40, 20), "white"), token_map)
    assert shown.size == (480, 240)
    full = tuple(round(0.75 * color + 0.25 * 255) for color in (245, 60, 0))
    counts = {color: count for count, color in shown.getcolors()}
    assert max(abs(a - b) for a, b in zip(shown.getpixel((300, 180)), full, strict=True)) <= 1
    assert counts[(255, 255, 255)] == 480 * 240 * 7 // 8


def saved(file_format, mode="RGB", size=(60, 40), **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [saved("GIF", "P"), saved("WEBP", "RGBA"), saved("JPEG", "CMYK"), saved("PNG", "I;16"), saved("PNG", "RGBA")],
)
def test_pictures_of_all_kinds_are_read(app, answer, tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    picture = app.read_picture(answer, str(tmp_path / "x"))
    assert (picture.mode, picture.size) == ("RGB", (60, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved("PNG", size=(600, 400))[:300], "not supported"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not supported"),
        (saved("PNG", "1", (10_000, 5_001)), "more than 50 million pixels"),
        (saved("PNG", "1", (20_000, 10_000)), "more than 50 million pixels"),
    ],
)
def test_a_picture_that_cannot_be_read_is_refused_in_words(app, answer, tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(gr.Error, match=message):
        app.read_problem(answer, {"path": str(tmp_path / "x.png")}, "Which?", "", "", "")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("\n", "", "", ""), "Write a question first"),
        (("Which?", "x\n" * 27, "", ""), "There are 27 choices; at most 26"),
        (("Which?", "", "x" * 4_001, ""), "The context field has 4,001 characters; at most 4,000"),
        (("Which? " * 200, "", "", ""), "longer than the 128 tokens that the model reads"),
    ],
)
def test_texts_that_cannot_be_answered_are_refused_in_words(app, answer, texts, message):
    with pytest.raises(gr.Error, match=message):
        app.read_problem(answer, None, *texts)


@pytest.mark.parametrize("named", [{"path": str(PICTURE)}, {"path": None, "url": str(PICTURE)}, {"url": "x"}, "x", {}])
def test_only_what_was_uploaded_is_opened(app, answer, tmp_path, monkeypatch, named):
    """A client that speaks to the server directly could name any file of it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with pytest.raises(gr.Error, match="not supported"):
        app.read_problem(answer, named, "Which?", "", "", "")
    inside = shutil.copy(PICTURE, tmp_path)
    assert app.read_problem(answer, {"path": str(inside)}, "Which?", "", "", "")["image"] == str(inside)


def test_a_url_that_leads_into_the_servers_network_is_not_fetched(monkeypatch):
    """Gradio fetches what a client names by URL, before the page's own code sees it; each redirect is looked at."""
    fetched = []

    async def answer(transport, request):
        fetched.append(str(request.url))
        return httpx.Response(302, headers={"Location": "http://169.254.169.254/latest/meta-data"}, request=request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer)
    monkeypatch.setattr(safehttpx, "async_resolve_hostname_google", no_addresses)
    for url, count in (("http://93.184.216.34/x.png", 1), ("http://127.0.0.1/x.png", 0)):
        fetched.clear()
        with pytest.raises(ValueError, match="failed validation"):
            asyncio.run(async_ssrf_protected_get(url))
        assert len(fetched) == count and not any("169.254" in address for address in fetched)


async def no_addresses(_):
    return []


def test_a_postscript_upload_never_reaches_ghostscript(app, answer, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n%%EOF\n")
    with pytest.raises(gr.Error, match="not supported"):
        app.read_problem(answer, {"path": str(tmp_path / "x.png")}, "Which?", "", "", "")


def test_a_generation_ends_when_its_reader_leaves(app, answer):
    problem = {"question": "Which bar is it?", "choices": [], "context": "", "image": str(PICTURE)}
    tokens, put = [], app.QueueStreamer.put

    def counted(streamer, value):
        tokens.append(value)
        put(streamer, value)
        time.sleep(0.05)

    growing = app.stream(answer, problem, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.QueueStreamer, "put", counted)
        next(growing)
        growing.close()
    written = len(tokens)
    assert written < 8, "of twelve and more"
    time.sleep(0.3)
    assert len(tokens) == written


def test_the_published_model_is_named_beside_the_app(app, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MODEL_FILE", tmp_path / "model.json")
    with pytest.raises(SystemExit, match=r"(?s)python app.py MODEL.*model.json"):
        app.published_model()
    (tmp_path / "model.json").write_text(json.dumps({"repo_id": "user/name", "revision": "0" * 40}))
    assert app.published_model() == {"model": "user/name", "revision": "0" * 40}


@pytest.mark.parametrize(("crops", "expected"), [(None, False), (False, False), (True, True)])
def test_a_picture_is_said_to_be_cropped_where_it_is(app, answer, monkeypatch, crops, expected):
    """The demonstration's processor holds None, which is no crop."""
    monkeypatch.setattr(answer.processor.image_processor, "do_center_crop", crops, raising=False)
    assert app.Page(answer, "name").cropped.visible is expected
