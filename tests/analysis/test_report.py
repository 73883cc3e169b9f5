"""The report of predictions: the page's data, its attention maps, and its controls in a browser."""

import base64
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, DetrConfig
from trl import ModelConfig

from mmcot.analysis.attention import maps_of_problems
from mmcot.analysis.page import token_maps_of
from mmcot.analysis.report import FULL, bars, origin_of
from mmcot.evaluate import main
from mmcot.evaluation.mistakes import KINDS
from mmcot.predict import main as predict
from mmcot.prediction.provenance import stage_weights
from mmcot.prediction.system import load_system
from mmcot.problems.schema import FEATURES, with_column
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json, write_json
from mmcot.training.adapters import adapt
from modeling_mmcot.attention_mmcot import locate_patches
from modeling_mmcot.stage_mmcot import Stage

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def report(tiny_run, tiny_dataset, tmp_path_factory):
    """The tiny run's report, with predictions without pictures, whose answer is always 0."""
    folder = tmp_path_factory.mktemp("reports")
    predictions = read_json(tiny_run / "predictions" / "test.json")
    withheld = {name: {**columns, "answer": 0} for name, columns in predictions.items()}
    write_json(folder / "withheld.json", withheld)
    options = ["--dataset", str(tiny_dataset), "--report", str(folder / "report"), "--attention", str(tiny_run)]
    options += ["--output", str(folder / "scores.json"), "--without_picture", str(folder / "withheld.json")]
    main([str(tiny_run / "predictions" / "test.json"), *options])
    return folder / "report"


def problems_of(report):
    text = (report / "problems.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("const PROBLEMS = ").rstrip().removesuffix(";"))


def test_page_contains_every_problem_with_its_prediction(report, tiny_run, tiny_dataset):
    rows, predictions = problems_of(report), read_json(tiny_run / "predictions" / "test.json")
    problems = load_problems(str(tiny_dataset), "test")
    processor, _ = load_system(str(tiny_run))
    assert [row["id"] for row in rows] == problems["id"]
    for row, problem in zip(rows, problems, strict=True):
        columns = predictions[row["id"]]
        assert (row["given"], row["answer"]) == (columns["answer"], problem["answer"])
        assert row["scores"] == columns["scores"] and row["texts"] == {"rationale": columns["rationale"]}
        assert len(row["pictures"]) == len(problem["images"])
        assert all((report / name).is_file() for name in row["pictures"])
        assert row["attended"] == bool(problem["images"])
        shown = {**{name: problem[name] for name in ("question", "choices", "context", "caption")}, **columns}
        assert row["prompts"]["answer"] == processor.stages[1].render_source(shown)
        assert problem["solution"] not in row["prompts"]["rationale"]
        if columns["answer"] != problem["answer"]:
            assert row["verdict"]["kind"] in KINDS
            unused = columns["answer"] == 0 if problem["images"] else None
            assert row["verdict"]["picture_not_used"] == unused


def test_overlay_shows_fusion_attention(report, tiny_run, tiny_dataset):
    number, row = next((number, row) for number, row in enumerate(problems_of(report)) if row["pictures"])
    script = (report / "attention" / f"{number}.js").read_text()
    data = json.loads(re.fullmatch(rf"attention\({number}, (.*)\);\n", script)[1])
    processor, models = load_system(str(tiny_run))
    problem = next(other for other in load_problems(str(tiny_dataset), "test") if other["id"] == row["id"])
    problem = {**{name: problem[name] for name in ("question", "choices", "context", "caption", "images")}}
    problem["rationale"] = row["texts"].get("rationale", "")
    inputs = processor(
        [{**problem, "images": []}], stage="answer", images=[[picture["path"] for picture in problem["images"]]]
    )
    with torch.no_grad():
        encoder = models["answer"].get_encoder()
        weights = encoder(**inputs, output_attentions=True).fusion_attentions[0]
    side = math.isqrt(weights.shape[1])
    (picture,) = data["pictures"]
    assert (picture["rows"], picture["columns"], len(data["tokens"])) == (side, side, len(weights))
    shares = weights[:, weights.shape[1] - side**2 :] * side**2
    expected = ((shares - 0.5) / (FULL - 0.5) * 255).clamp(0, 255)
    stored = np.frombuffer(base64.b64decode(picture["maps"]), dtype=np.uint8).reshape(len(weights), -1)
    assert np.abs(stored.astype(float) - expected.numpy()).max() <= 0.51


def test_detr_patches_are_located_by_decoder_attention(detr):
    tower = AutoModel.from_config(DetrConfig.from_pretrained(detr)).eval()
    pixels = torch.randn(3, 96, 160)
    with torch.no_grad():
        maps = locate_patches(tower, pixels, 5)
        tower.set_attn_implementation("eager")  # because only eager attention returns weights
        attentions = tower(pixel_values=pixels[None], output_attentions=True).cross_attentions[-1]
    assert maps.shape[0] == 5 and maps.shape[1] / maps.shape[2] == 96 / 160
    assert torch.allclose(maps.flatten(1), attentions[0].mean(dim=0))
    assert torch.allclose(maps.sum(dim=(1, 2)), torch.ones(5))


def problem_with_picture(tiny_dataset):
    problems = load_problems(str(tiny_dataset), "test")
    rows = [row for row, images in enumerate(problems["images"]) if images]
    return with_column(problems.select(rows[:1]), "rationale", ["So it is."])


def test_pictures_of_different_sizes_have_separate_maps(detr, tiny_run, tiny_dataset):
    """Each map has the shape of its own picture without padding, and both maps together sum to 1."""
    processor, _ = load_system(str(tiny_run))
    processor.image_processor = AutoImageProcessor.from_pretrained(detr)
    tower = AutoModel.from_config(DetrConfig.from_pretrained(detr))
    model = tiny_model(vision_config=None, vision_hidden_size=24, vocab_size=len(processor.tokenizer), max_images=2)
    model.attach_tower(tower)
    files = [io.BytesIO(), io.BytesIO()]
    for file, size in zip(files, ((160, 80), (60, 120)), strict=True):
        Image.new("RGB", size, "red").save(file, "PNG")
    images = [[{"bytes": file.getvalue(), "path": None} for file in files]]
    problem = (
        problem_with_picture(tiny_dataset)
        .remove_columns("images")
        .add_column("images", images, feature=FEATURES["images"])
    )
    ((_, found),) = maps_of_problems(model.eval(), processor, processor.stages[1], problem)
    shapes = [maps.shape[1:] for maps in found.maps]
    assert shapes[0][1] > shapes[0][0] and shapes[1][0] > shapes[1][1]
    sums = sum(maps.sum(dim=(1, 2)) for maps in found.maps)
    assert torch.allclose(sums, torch.ones(len(found.tokens)), atol=1e-5)


def test_maps_of_prompt_tuned_stage_cover_source_tokens(tiny_run, tiny_dataset):
    """Virtual tokens before the source change the attention of the source's tokens, and have no map themselves."""
    processor, models = load_system(str(tiny_run))
    model, problem, stage = models["answer"], problem_with_picture(tiny_dataset), processor.stages[1]
    ((_, plain),) = maps_of_problems(model, processor, stage, problem)
    adapted = adapt(model, ModelConfig(use_peft=True), peft_type="PROMPT_TUNING", num_virtual_tokens=4).eval()
    with torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight.mul_(20)
    ((_, found),) = maps_of_problems(model, processor, stage, problem)
    assert found.tokens == plain.tokens and found.maps[0].shape == plain.maps[0].shape
    assert not torch.allclose(found.maps[0], plain.maps[0], atol=1e-4)
    images = [[picture["path"] for picture in problem[0]["images"]]]
    row = {name: value for name, value in problem[0].items() if name not in ("answer", "lecture", "solution")}
    inputs = processor([{**row, "images": []}], stage="answer", images=images)
    seen = []
    handle = model.encoder.fusion.register_forward_hook(lambda module, given, out: seen.append(out[1]))
    labels = torch.tensor([[5, 1]])
    with torch.no_grad():
        adapted(**inputs, labels=labels)  # PEFT's own pass
    handle.remove()
    side = found.maps[0].shape[1]
    expected = seen[0][0, 4:, -(side**2) :].view(-1, side, side)
    assert torch.allclose(found.maps[0], expected, atol=1e-6)


def test_class_token_has_no_location():
    tower = tiny_model().encoder.vision_tower
    found = locate_patches(tower, torch.zeros(3, 32, 32), 5)
    assert found.shape == (5, 2, 2) and found[0].sum() == 0 and torch.equal(found[1:].flatten(1), torch.eye(4))
    for size, count in (((32, 32), 7), ((32, 48), 9)):
        with pytest.raises(ValueError, match=f"{count} patches of a picture of .*: expected a square picture"):
            locate_patches(tower, torch.zeros(3, *size), count)


def test_refuses_maps_of_stages_without_pictures(tiny_run, tiny_dataset, tmp_path, monkeypatch):
    processor, models = load_system(str(tiny_run))
    for stage in processor.stages:
        stage.reads.remove("images")
    monkeypatch.setattr("mmcot.prediction.system.load_system", lambda model: (processor, models))
    options = ["--dataset", str(tiny_dataset), "--output", str(tmp_path / "scores.json")]
    options += ["--report", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match="no stage of that model sees pictures"):
        main([str(tiny_run / "predictions/test.json"), *options, "--attention", str(tiny_run)])
    assert not (tmp_path / "report").exists()


def test_shows_maps_of_system_that_retrieves(tiny_run, tiny_dataset, tmp_path, monkeypatch):
    """The predictions have no meta file, so that the number of pictures comes from the models."""
    processor, models = load_system(str(tiny_run))
    processor.stages.insert(0, Stage("search", ["question"], "passages", "{{ question }}", kind="retrieve"))
    monkeypatch.setattr("mmcot.prediction.system.load_system", lambda model: (processor, models))
    predictions = read_json(tiny_run / "predictions/test.json")
    file = tmp_path / "predictions.json"
    write_json(file, {name: {**columns, "passages": []} for name, columns in predictions.items()})
    options = ["--dataset", str(tiny_dataset), "--report", str(tmp_path / "report"), "--attention", str(tiny_run)]
    main([str(file), *options])
    assert list((tmp_path / "report/attention").iterdir())


def test_maps_of_stage_that_checks_are_those_of_rejected_answer(tiny_run, tiny_dataset, monkeypatch):
    processor, models = load_system(str(tiny_run))
    check = Stage("check", ["rationale", "answer_text", "images"], "verdict", "{{ rationale }}", kind="check")
    processor.stages.append(check)
    problems = load_problems(str(tiny_dataset), "test").select([0, 1])
    old, new = ({"rationale": text, "answer_text": text} for text in ("old", "new"))
    columns = ({**new, "verdict": "wrong", "rejected": old}, {**new, "verdict": "right"})
    predictions = dict(zip(problems["id"], columns, strict=True))
    monkeypatch.setattr("mmcot.analysis.attention.maps_of_problems", lambda *given: given[-1])
    read = token_maps_of(processor, {**models, "check": models["answer"]}, problems, predictions)
    assert read["rationale"] == read["answer_text"] == ["old", "new"]


def test_refuses_maps_without_rationales_that_stage_reads(tiny_run, tiny_dataset, tmp_path):
    answers = dict.fromkeys(load_problems(str(tiny_dataset), "test")["id"], 0)
    write_json(tmp_path / "answers.json", answers)
    options = ["--dataset", str(tiny_dataset), "--report", str(tmp_path / "report"), "--attention", str(tiny_run)]
    with pytest.raises(SystemExit, match="20 predictions have no 'rationale', which the answer stage reads"):
        main([str(tmp_path / "answers.json"), *options])
    assert (tmp_path / "answers.scores.json").is_file(), "the failed report prevents the scores"
    main([str(tmp_path / "answers.json"), *options[:4]])
    assert problems_of(tmp_path / "report")[0]["prompts"] == {}


def test_page_shows_captions_of_predictions(tiny_run, tiny_dataset, tmp_path):
    """The page shows the captions, and at most as many pictures as the model reads."""
    rows = [json.loads(line) for line in tiny_dataset.read_text().splitlines()]
    rows = [{**row, "images": [str(tiny_dataset.parent / name) for name in row["images"]]} for row in rows]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = {row["id"]: f"a picture of {row['id']}" for row in rows}
    write_json(tmp_path / "captions.json", {"captions": captions})
    shutil.copytree(tiny_run / "hub", tmp_path / "hub")
    settings = read_json(tmp_path / "hub" / "processor_config.json")
    settings["stages"][0]["reads"].append("caption")
    write_json(tmp_path / "hub" / "processor_config.json", settings)
    options = ["--dataset", str(tmp_path / "problems.jsonl"), "--limit", "5"]
    files = ["--captions", str(tmp_path / "captions.json"), "--output", str(tmp_path / "p.json")]
    predict([str(tmp_path / "hub"), *options, *files])
    main([str(tmp_path / "p.json"), *options, "--report", str(tmp_path / "report")])
    for row in problems_of(tmp_path / "report"):
        assert captions[row["id"]] in row["prompts"]["rationale"]
    assert origin_of(tmp_path / "p.json").max_images == 1


def test_run_records_origin_of_predictions(tiny_run):
    origin = origin_of(tiny_run / "predictions" / "test.json")
    assert [stage.name for stage in origin.stages] == ["rationale", "answer"] and origin.max_images == 1
    scores = read_json(tiny_run / "scores" / "test.json")
    for folder in (tiny_run, tiny_run / "hub"):
        assert scores["weights"] == {name: stage_weights(folder, name) for name in ("rationale", "answer")}


def test_warns_about_missing_picture_files(tiny_run, tiny_dataset, tmp_path, caplog):
    shutil.copy(tiny_dataset, tmp_path / "problems.jsonl")
    shutil.copy(tiny_run / "predictions/test.json", tmp_path / "p.json")
    options = ["--dataset", str(tmp_path / "problems.jsonl"), "--report", str(tmp_path / "report")]
    main([str(tmp_path / "p.json"), *options])
    assert "the report shows no pictures" in caplog.text
    assert not any(row["pictures"] for row in problems_of(tmp_path / "report"))


def test_draws_skill_with_dollar_signs():
    assert "$5 and $10 (2)" in bars({"$5 and $10": [True, False], r"a $\foo$": [True, True]})


def test_replaces_report_but_keeps_folder_with_other_content(report, tiny_run, tiny_dataset, tmp_path):
    command = [str(tiny_run / "predictions/test.json"), "--dataset", str(tiny_dataset)]
    command += ["--output", str(tmp_path / "scores.json")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists and contains something other than a report"):
        main([*command, "--report", str(tmp_path / "mine")])
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    shutil.copytree(report, tmp_path / "old")
    (tmp_path / "old" / "stale.js").write_text("")
    main([*command, "--report", str(tmp_path / "old")])
    assert not (tmp_path / "old" / "stale.js").exists() and (tmp_path / "old" / "index.html").is_file()
    assert not list((tmp_path / "old" / "attention").iterdir())


def drive(report, downloads):
    """Use every control of the page in headless Chromium, loaded from disk. Any console message is an error."""
    if CHROMIUM is None:
        pytest.skip("chromium is not on this machine: Debian's package is needed")
    from playwright.sync_api import expect, sync_playwright

    rows = problems_of(report)
    wrong = [row for row in rows if row["given"] != row["answer"]]
    pictured = next(row for row in rows if row["attended"])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(accept_downloads=True)
        page, unexpected = context.new_page(), []
        page.on("console", lambda message: unexpected.append(message.text))
        page.on("pageerror", lambda error: unexpected.append(str(error)))
        page.on("request", lambda request: unexpected.append(request.url) if request.url.startswith("http") else None)
        page.goto((report / "index.html").as_uri())
        expect(page.locator("#count")).to_have_text(f"{len(rows)} of {len(rows)}")
        page.select_option("#answer", "wrong")
        expect(page.locator("#count")).to_have_text(f"{len(wrong)} of {len(rows)}")
        kind = wrong[0]["verdict"]["kind"]
        page.select_option("#kind", kind)
        count = sum(row["verdict"]["kind"] == kind for row in wrong)
        expect(page.locator("#count")).to_have_text(f"{count} of {len(rows)}")
        page.select_option("#kind", "")
        page.select_option("#answer", "")
        page.fill("#search", pictured["id"])
        shown = ("id", "question", "context", "skill")
        columns = [[*(row[name] for name in shown), *row["choices"], *row["texts"].values()] for row in rows]
        texts = ["\n".join(values).lower() for values in columns]
        found = sum(pictured["id"].lower() in text for text in texts)
        expect(page.locator("#count")).to_have_text(f"{found} of {len(rows)}")
        page.click(f'[data-id="{pictured["id"]}"]')
        expect(page.locator("#rationale")).to_have_text(pictured["texts"]["rationale"] or "none")
        tokens = page.locator(".tokens span")
        drawn = []
        for number in (0, tokens.count() - 2):
            tokens.nth(number).hover()
            drawn.append(page.evaluate("document.querySelector('.picture canvas').toDataURL()"))
        assert drawn[0] != drawn[1], "the overlay did not change"
        page.click("#close")
        page.fill("#search", "")
        page.select_option("#answer", "wrong")
        for row, label in zip(wrong[:3], ("factual", "logical", "logical"), strict=True):
            page.click(f'[data-id="{row["id"]}"]')
            page.check(f'input[name=label][value="{label}"]')
            page.click("#close")
        agreement = page.inner_text("#agreement")
        assert "3 labelled" in agreement and "kappa" in agreement
        with page.expect_download() as download:
            page.click("#export")
        download.value.save_as(downloads / "labels.jsonl")
        lines = (downloads / "labels.jsonl").read_text().splitlines()
        expected = zip(wrong[:3], ("factual", "logical", "logical"), strict=True)
        assert [json.loads(line) for line in lines] == [{"id": row["id"], "label": label} for row, label in expected]
        page.reload()
        expect(page.locator("#agreement")).to_have_text(agreement)
        page.evaluate("localStorage.clear()")
        page.reload()
        expect(page.locator("#agreement")).to_contain_text("No label")
        page.set_input_files("#import", downloads / "labels.jsonl")
        expect(page.locator("#imported")).to_have_text("3 labels imported.")
        expect(page.locator("#agreement")).to_have_text(agreement)
        (downloads / "unknown.jsonl").write_text('{"id": "nobody", "label": "factual"}\n')
        page.set_input_files("#import", downloads / "unknown.jsonl")
        expect(page.locator("#imported")).to_contain_text(
            "1 labels have problem ids that are not in this report: nobody"
        )
        expect(page.locator("#agreement")).to_have_text(agreement)
        assert unexpected == []
        browser.close()


def test_page_works_in_browser(report, tmp_path):
    drive(report, tmp_path)
