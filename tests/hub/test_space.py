"""The Space: its page in a real browser, and its functions, tested directly where a browser is not needed."""

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

# The visible elements that extend beyond the right side of the window, because overflow may be hidden and not scroll.
TOO_WIDE = """[...document.querySelectorAll("body *")]
  .filter((element) => element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 1)
  .map((element) => element.outerHTML.slice(0, 200))"""

# Two choices are equal. The other one and the question contain text that HTML or a template would change.
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
    """The address of the page. The app runs in a folder from where our packages cannot be imported."""
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
        wait_for_server(f"http://127.0.0.1:{port}", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (folder / "log").read_text()


def wait_for_server(address, process, log):
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
    page.fill("#choices textarea", "\n\n".join(problem["choices"]))  # because the page must skip blank lines
    page.click("#ask")


def drive(address, app, answer, folder):
    """Use the page in headless Chromium. A request to another host is an error."""
    if CHROMIUM is None:
        pytest.skip("chromium is not on this machine: Debian's package is needed")
    from playwright.sync_api import expect, sync_playwright

    problem = {**PROBLEM, "image": str(PICTURE)}
    result, without_picture = answer(problem), answer({**problem, "image": None})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, unexpected = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("pageerror", lambda error: unexpected.append(str(error)))
        page.on("request", lambda sent: unexpected.append(sent.url) if is_external(sent.url, address) else None)
        page.goto(address)

        ask(page, PICTURE, problem)
        expect(page.locator("#text-rationale textarea")).to_have_value(result["rationale"])
        expect(page.locator("#unseen-answered .written")).to_have_text(without_picture["rationale"])
        assert_bars(page, "#answered", result, problem["choices"])
        assert_bars(page, "#unseen-answered", without_picture, problem["choices"])
        expect(page.get_by_role("heading", name=problem["question"])).to_be_visible()

        maps = answer.token_maps(problem, "rationale")
        expect(page.locator("#tokens button")).to_have_text([app.shown_token(token).strip() for token in maps.tokens])
        peaks = [float(token_map.max()) for token_map in maps.maps[0]]
        pictures = [overlay_after(page, lambda: None, "")]
        for token in sorted(range(len(peaks)), key=peaks.__getitem__)[-2:]:
            pictures.append(overlay_after(page, page.locator("#tokens button").nth(token).click, pictures[-1]))
        assert len(set(pictures)) == 3, "the overlay is the same for several tokens"
        page.screenshot(path=folder / "wide.png", full_page=True)

        for edited in ("", "The blue bar is the shortest."):
            page.fill("#text-rationale textarea", edited)
            page.click("#again")
            expected = answer(problem, given={"rationale": edited})
            assert expected["scores"] != result["scores"]
            expect(page.locator("#answered .bars li").first).to_contain_text(f"{expected['scores'][0]:.1%}")
            assert_bars(page, "#answered", expected, problem["choices"])
            assert_bars(page, "#unseen-answered", without_picture, problem["choices"])
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
        expect(page.locator("#text-rationale textarea")).to_have_value(without_picture["rationale"])
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
        assert unexpected == []
        browser.close()


def is_external(url, address):
    return url.startswith("http") and not url.startswith(address)


def overlay_after(page, action, before):
    """Run `action`, wait until the overlay differs from `before`, and return its bytes."""
    action()
    for _ in range(100):
        shown = page.locator("#overlay img")
        if shown.count() and (picture := page.request.get(shown.get_attribute("src")).body()) != before:
            return picture
        page.wait_for_timeout(50)
    raise AssertionError("the overlay did not change")


def test_page_works_in_browser(address, app, answer, tmp_path):
    drive(address, app, answer, tmp_path)


@pytest.mark.parametrize("choices", [["red", "blue"], []])
def test_streams_texts(app, answer, choices):
    problem = {"question": "Which bar is it?", "choices": choices, "context": "", "image": str(PICTURE)}
    *growing, last = app.stream(answer, problem, {})
    assert last == answer(problem)
    for column in ["rationale", *(["answer"] if not choices else [])]:
        texts = [result[column] for result in growing if column in result]
        # An answer may be one word, which is streamed at once.
        assert len(set(texts)) > (2 if column == "rationale" else 1)
        assert texts[-1] == last[column]
        assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


def test_stream_raises_error_of_pipeline(app, answer):
    with pytest.raises(ValueError, match="`question`"):
        list(app.stream(answer, {"choices": []}, {}))


def test_page_of_system_with_one_stage(app, tiny_run, tmp_path):
    """The page of a stage without rationale and pictures shows no controls for them."""
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


def test_page_shows_error_of_missing_maps(app, answer, monkeypatch):
    page = app.Page(answer, "name")

    def token_maps(*_, **__):
        raise ValueError("7 patches have no <places>")

    monkeypatch.setattr(answer, "token_maps", token_maps)
    shown = page.show_maps({"problem": {"image": str(PICTURE)}, "given": {}, "passages": {}}, "answer")
    assert "7 patches have no &lt;places&gt;" in shown[page.tokens] and shown[page.token_maps] is None


def test_overlay_colors_only_more_than_even_share(app):
    token_map = torch.zeros(2, 4)
    token_map[1, 2], token_map[0, 0] = 0.5, 0.125  # four times an even share, and an even share
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
def test_reads_pictures_of_every_format(app, answer, tmp_path, content):
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
def test_unreadable_picture_shows_error(app, answer, tmp_path, monkeypatch, content, message):
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
def test_invalid_texts_show_error(app, answer, texts, message):
    with pytest.raises(gr.Error, match=message):
        app.read_problem(answer, None, *texts)


@pytest.mark.parametrize("named", [{"path": str(PICTURE)}, {"path": None, "url": str(PICTURE)}, {"url": "x"}, "x", {}])
def test_space_opens_only_uploaded_pictures(app, answer, tmp_path, monkeypatch, named):
    """A client can call the server's API directly and name any file of the server."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with pytest.raises(gr.Error, match="not supported"):
        app.read_problem(answer, named, "Which?", "", "", "")
    inside = shutil.copy(PICTURE, tmp_path)
    assert app.read_problem(answer, {"path": str(inside)}, "Which?", "", "", "")["image"] == str(inside)


def test_space_refuses_url_in_private_network(monkeypatch):
    """Gradio downloads a URL from a client before the page's code runs, and must check every redirect."""
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


def test_space_refuses_postscript_upload(app, answer, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n%%EOF\n")
    with pytest.raises(gr.Error, match="not supported"):
        app.read_problem(answer, {"path": str(tmp_path / "x.png")}, "Which?", "", "", "")


def test_generation_stops_when_stream_is_closed(app, answer):
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
    assert written < 8, "the whole text has at least 12 tokens"
    time.sleep(0.3)
    assert len(tokens) == written


def test_reads_published_model_from_file_beside_app(app, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MODEL_FILE", tmp_path / "model.json")
    with pytest.raises(SystemExit, match=r"(?s)python app.py MODEL.*model.json"):
        app.published_model()
    (tmp_path / "model.json").write_text(json.dumps({"repo_id": "user/name", "revision": "0" * 40}))
    assert app.published_model() == {"model": "user/name", "revision": "0" * 40}


@pytest.mark.parametrize(("crops", "expected"), [(None, False), (False, False), (True, True)])
def test_page_mentions_crop_only_if_processor_crops(app, answer, monkeypatch, crops, expected):
    """`do_center_crop` of the demonstration's processor is None, which means no crop."""
    monkeypatch.setattr(answer.processor.image_processor, "do_center_crop", crops, raising=False)
    assert app.Page(answer, "name").cropped.visible is expected
