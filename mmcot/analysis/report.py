"""Write a report folder for browsing predictions: `index.html` opens from the disk, without a network.

The page shows scores with intervals, plots, and every problem with its picture, prompts, rationale, probabilities, kind
of mistake and attention maps. `report_template.html` contains the page; this module writes its data.
"""

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from mmcot.evaluation.metrics import CLASSES, checked_answers, percentage, right_by_class
from mmcot.evaluation.mistakes import KINDS, sort_mistake
from mmcot.evaluation.uncertainty import mean_interval
from mmcot.pictures.reading import read_pictures
from mmcot.prediction.columns import rejected_by
from mmcot.storage.digests import sha256_of_json
from mmcot.storage.folders import replaced_folder
from mmcot.storage.predictions import read_meta
from modeling_mmcot.attention_mmcot import TokenMaps
from modeling_mmcot.pictures_mmcot import as_rgb
from modeling_mmcot.stage_mmcot import GOLD_COLUMNS, REJECTED, Stage

MARKER = "mmcot-report.json"  # marks a folder as a report, which may be replaced
PICTURE_SIDE = 480  # maximum length of the longer side, px
NUM_SKILLS = 30
FULL = 4  # the overlay has its full colour from this multiple of uniform attention

Predictions = Mapping[str, Mapping[str, Any]]


def write_report(
    folder: Path,
    problems: Dataset,
    predictions: Predictions,
    scores: Mapping[str, Any],
    predictions_file: Path,
    stages: Sequence[Stage] = (),
    without_picture: Predictions | None = None,
    attention: Iterable[tuple[str, TokenMaps]] = (),
) -> None:
    """
    Write the report folder.

    Args:
        folder: created, or replaced if it contains a report.
        problems: rows with their gold columns.
        scores: the scores of the predictions (`metrics.score`).
        predictions_file: the file that the predictions were read from.
        stages: the stages that wrote the predictions; the page shows their prompts.
        without_picture: predictions for the problems without pictures.
        attention: attention maps by problem id, for any of the problems.

    Raises:
        ValueError: the folder contains something other than a report.
    """
    if folder.exists() and not (folder / MARKER).is_file() and any(folder.iterdir()):
        raise ValueError(f"--report {folder} exists and contains something other than a report: choose another folder.")
    with replaced_folder(folder) as new_folder:
        (new_folder / "pictures").mkdir()
        rows = list(problem_rows(problems, predictions, stages, without_picture, new_folder))
        attended = write_maps(new_folder / "attention", problems["id"], attention)
        for number, row in enumerate(rows):
            row["attended"] = number in attended
        write_script(new_folder / "problems.js", "PROBLEMS", rows)
        page = jinja2.Environment(autoescape=True).from_string(
            resources.files("mmcot.analysis").joinpath("report_template.html").read_text(encoding="utf-8")
        )
        html = page.render(
            title="/".join(predictions_file.absolute().parts[-3:]),
            full=FULL,
            scores=scores,
            classes=[name for name in CLASSES if scores["class_n"][name]],
            kinds=KINDS,
            plots=plots(problems, predictions, scores, without_picture),
            report=sha256_of_json(predictions)[:16],
        )
        (new_folder / "index.html").write_text(html, encoding="utf-8")
        (new_folder / MARKER).write_text(json.dumps({"of": str(predictions_file), "n": len(rows)}), encoding="utf-8")


def write_maps(folder: Path, problem_ids: Sequence[str], attention: Iterable[tuple[str, TokenMaps]]) -> set[int]:
    """Write a file with the maps of each problem. Return the numbers of the problems that have maps."""
    folder.mkdir()
    numbers = {problem_id: number for number, problem_id in enumerate(problem_ids)}
    written = set()
    for problem_id, maps in attention:
        number = numbers[problem_id]
        written.add(number)
        write_attention(folder / f"{number}.js", number, maps)
    return written


@dataclass
class Origin:
    """The origin of predictions, in the fields that the page needs; an unknown field is None or empty."""

    stages: list[Stage] = field(default_factory=list)
    max_images: int | None = None
    captions: str | None = None
    weights: dict[str, str] | None = None


def origin_of(predictions_file: Path) -> Origin:
    """Read the origin from the meta file that `mmcot.predict` or the run wrote beside the predictions."""
    meta = read_meta(predictions_file)
    if meta is None:
        return Origin()
    return Origin([Stage(**stage) for stage in meta["stages"]], meta["max_images"], meta["captions"], meta["weights"])


def problem_rows(
    problems: Dataset,
    predictions: Predictions,
    stages: Sequence[Stage],
    without_picture: Predictions | None,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Yield the page's data of each problem, and write its pictures into the folder."""
    classes = {name: belongs for name, belongs in CLASSES.items() if name != "Avg"}
    for number, problem in enumerate(tqdm(problems, desc="report", leave=False)):
        prediction = predictions[problem["id"]]
        blind_prediction = None if without_picture is None else without_picture[problem["id"]]
        verdict = sort_mistake(problem, prediction, blind_prediction)
        shown = ("id", "question", "choices", "context", "answer", "lecture", "solution", "subject", "grade", "skill")
        yield {
            **{name: problem[name] for name in shown},
            "classes": [name for name, belongs in classes.items() if belongs(problem)],
            "pictures": write_pictures(problem, number, folder),
            "given": prediction["answer"],
            "given_text": prediction.get("answer_text", ""),
            "scores": prediction.get("scores"),
            "texts": written_texts(prediction),
            "passages": [passage for value in prediction.values() if is_passages(value) for passage in value],
            "prompts": prompts(problem, prediction, stages),
            "verdict": None if verdict is None else vars(verdict),
        }


def written_texts(prediction: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that stages wrote, also rejected ones; except the answer, which the page shows as a choice."""
    texts = {name: text for name, text in prediction.items() if name != "answer_text" and isinstance(text, str)}
    rejected = {f"{REJECTED} {name}": text for name, text in prediction.get(REJECTED, {}).items()}
    return texts | {name: text for name, text in rejected.items() if isinstance(text, str)}


def is_passages(value: Any) -> bool:
    """Whether a column of a prediction contains retrieved passages."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "text" in one for one in value)


def prompts(problem: Mapping[str, Any], prediction: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, str]:
    """Return the source text of each stage, before truncation to the stage's maximum length."""
    row = {name: value for name, value in problem.items() if name not in GOLD_COLUMNS}
    shown = {}
    for stage in stages:
        shown[stage.name] = stage.render_source({**row, **rejected_by(stage, prediction)})
        row[stage.writes] = prediction.get(stage.writes, "" if stage.has_model else [])
    return shown


def write_pictures(problem: Mapping[str, Any], number: int, folder: Path) -> list[str]:
    names = []
    if not all(picture["bytes"] or Path(picture["path"]).is_file() for picture in problem["images"]):
        return names  # the predictions used features, and the picture files are absent
    for place, picture in enumerate(read_pictures(problem)):
        picture = as_rgb(picture)
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        names.append(f"pictures/{number}-{place}.jpg")
        picture.save(folder / names[-1], quality=85)
    return names


def write_attention(file: Path, number: int, token_maps: TokenMaps) -> None:
    """
    Write attention maps as a script, because a page opened from the disk can load scripts but not read files.

    Values are scaled linearly: 0 for half of uniform attention or less, 255 for `FULL` times uniform attention or more.
    Uniform attention is therefore nearly invisible.
    """
    uniform = 1 / sum(maps[0].numel() for maps in token_maps.maps)
    data: dict[str, Any] = {"tokens": token_maps.tokens, "pictures": []}
    for maps in token_maps.maps:
        scaled = ((maps / uniform - 0.5) / (FULL - 0.5) * 255).clamp(0, 255).round().byte()
        encoded = base64.b64encode(scaled.cpu().numpy().tobytes()).decode()
        data["pictures"].append({"rows": maps.shape[1], "columns": maps.shape[2], "maps": encoded})
    file.write_text(f"attention({number}, {json.dumps(data)});\n", encoding="utf-8")


def write_script(file: Path, name: str, data: Any) -> None:
    file.write_text(f"const {name} = {json.dumps(data, ensure_ascii=False)};\n", encoding="utf-8")


# Plots.


def plots(
    problems: Dataset, predictions: Predictions, scores: Mapping[str, Any], without_picture: Predictions | None
) -> dict[str, str]:
    """Return SVG plots by title; they are legible in light and dark mode."""
    answers = checked_answers(problems, predictions)
    figures = {"Accuracy by class, 95 % intervals": bars(right_by_class(problems, answers))}
    by_skill: dict[str, list[bool]] = defaultdict(list)
    for problem in problems.select_columns(["id", "skill", "answer"]):
        by_skill[problem["skill"] or "no skill"].append(answers[problem["id"]] == problem["answer"])
    largest = dict(sorted(by_skill.items(), key=lambda item: -len(item[1]))[:NUM_SKILLS])
    if by_skill.keys() != {"no skill"}:
        figures[f"Accuracy by skill, the {len(largest)} largest of {len(by_skill)}"] = bars(largest)
    if scores["calibration"] is not None:
        figures["Reliability of the probabilities"] = reliability(scores["calibration"]["curve"])
    lengths = by_length(problems, predictions, answers)
    if len(lengths) > 1:
        figures["Accuracy by number of words in the rationale"] = bars(lengths)
    if without_picture is not None:
        blind_right = right_by_class(problems, checked_answers(problems, without_picture))
        figures["With and without picture"] = bars(right_by_class(problems, answers), blind_right)
    return figures


def by_length(problems: Dataset, predictions: Predictions, answers: Mapping[str, int]) -> dict[str, list[bool]]:
    """Split the answers into five groups of about equal size by the number of words in the rationale."""
    lengths = sorted(
        (len(predictions[name].get("rationale", "").split()), answers[name] == answer)
        for name, answer in zip(problems["id"], problems["answer"], strict=True)
    )
    bounds = sorted({lengths[len(lengths) * part // 5][0] for part in range(1, 5)})
    parts: dict[int, list] = defaultdict(list)
    for length, is_right in lengths:
        parts[sum(length >= bound for bound in bounds)].append((length, is_right))
    return {f"{part[0][0]}–{part[-1][0]}": [is_right for _, is_right in part] for part in parts.values()}


def bars(right: Mapping[str, list[bool]], beside: Mapping[str, list[bool]] | None = None) -> str:
    """Plot percentages as horizontal bars, the first name at the top; `beside` adds a grey bar for each name."""
    names = [name for name, values in right.items() if values]
    figure = Figure(figsize=(5.2, 0.5 + 0.27 * len(names)))
    axes = figure.subplots()
    for number, name in enumerate(names):
        middle, interval = percentage(right[name]), mean_interval(right[name], num_resamples=999)
        axes.barh(number, middle, color="#4c78a8", height=0.7 if beside is None else 0.35)
        if interval is not None and beside is None:
            axes.plot([100 * bound for bound in interval], [number, number], color="#f58518", linewidth=2)
        if beside is not None:
            axes.barh(number + 0.35, percentage(beside[name]), color="#bab0ac", height=0.35)
    # Dollar signs in a skill's name would be parsed as mathematics.
    axes.set_yticks(range(len(names)), [f"{name} ({len(right[name])})" for name in names], parse_math=False)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    return svg(figure)


def reliability(curve: list[dict[str, Any]]) -> str:
    figure = Figure(figsize=(3.4, 3.2))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#bab0ac", linewidth=1)
    axes.plot([entry["confidence"] for entry in curve], [entry["accuracy"] for entry in curve], "o-", color="#4c78a8")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("probability of the answer")
    axes.set_ylabel("share that is right")
    return svg(figure)


def svg(figure: Figure) -> str:
    """Render a figure as SVG with lines and text in the colour of the page's text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmcot"}):
        for axes in figure.axes:
            axes.patch.set_visible(False)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    drawn = text.getvalue()
    return (
        drawn[drawn.index("<svg") :].replace("#000000", "currentColor").replace("<svg ", '<svg fill="currentColor" ', 1)
    )
