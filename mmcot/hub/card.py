"""Writes the model card of a run from its recipe, its scores and its files. A card contains measured values only.

`card_template.md` contains the text. This file collects its values as huggingface_hub's `ModelCard` and `EvalResult`,
and writes the picture of the stages, the scores file and the Hub's result files beside the card.
"""

import math
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from safetensors import safe_open

from mmcot.hub.results import SCORES_FILE, eval_entries, eval_results, write_eval_results
from mmcot.prediction.provenance import training_name, weights_by_stage
from mmcot.problems.splits import parse_split_files
from mmcot.storage.digests import digest_of_digests, digest_of_file, sha256_of_file
from mmcot.storage.files import list_files, read_json, write_json
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.configuration_mmcot import __version__
from modeling_mmcot.retrieval_mmcot import read_manifest
from modeling_mmcot.stage_mmcot import RETRIEVE, Stage
from modeling_mmcot.versions_mmcot import REQUIRED, requirement
from modeling_mmcot.vision_mmcot import TOWERS

# Options of `mmcot.predict` and `mmcot.evaluate` that `mmcot.probes` has, too.
PROBE_OPTIONS = ("columns", "split_seed", "ids", "filter", "limit", "features", "captions")
PICTURE = "stages.png"


@dataclass(frozen=True)
class KnownDataset:
    """
    A dataset with a known licence.

    Args:
        id: its id on the Hub.
        license: the Hub's identifier of its licence, which is the default licence of weights trained on the dataset.
        shares_alike: whether such weights must have the same licence.
        url: a page with its licence and description.
    """

    license: str
    id: str | None = None
    url: str | None = None
    shares_alike: bool = False


# By the names of `mmcot.problems.known_datasets`. For any other dataset the user specifies the licence.
DATASETS = {
    "demonstration": KnownDataset("apache-2.0"),
    "study problems": KnownDataset("apache-2.0"),
    "ScienceQA": KnownDataset("cc-by-nc-sa-4.0", "derek-thomas/ScienceQA", "https://scienceqa.github.io", True),
}


@dataclass(frozen=True)
class Publication:
    """
    The settings of a publication that are not in the run folder.

    Args:
        repo_id: the repository on the Hub.
        base_model: the text model's id on the Hub, if the recipe names a local path.
        license: the licence of the weights, if the licence of their dataset is not known.
        merge: publish adapters merged into their base, as full models.
        license_name, license_link: name and link of the licence `other`, which the Hub shows.
    """

    repo_id: str = "USER/NAME"
    base_model: str | None = None
    license: str | None = None
    merge: bool = False
    license_name: str | None = None
    license_link: str | None = None


def write_card(folder: Path, run_folder: RunFolder, processor: MMCoTProcessor, publication: Publication) -> None:
    """Write README.md, its picture and the scores, if any, into a folder that contains all other files."""
    stages = processor.stages
    names = [training_name(run_folder, stage) for stage in stages.with_models]
    trainings = {name: read_training_results(run_folder, name) for name in names}
    dataset_name = trainings[training_name(run_folder, stages.answering)]["dataset_known_as"]
    dataset = DATASETS.get(dataset_name)
    if dataset and dataset.shares_alike and publication.license not in (None, dataset.license):
        raise ValueError(
            f"--license is {publication.license}; expected {dataset.license}, the licence of {dataset_name}, on which "
            f"this run was trained: it requires derived work to have the same licence."
        )
    scores = scores_of_run(run_folder, processor)
    recipe = published_recipe(run_folder)
    config = read_json(folder / "config.json")
    tower = config.get("vision_config")
    text_model, tower_model = initial_checkpoints(publication, recipe, tower)
    digests = code_digests(folder)
    code = digest_of_digests(digests)
    draw_stages(processor.stages, processor.image_processor is not None, folder / PICTURE)
    results = None if scores is None else publish_scores(scores, folder)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=publication.license or (dataset and dataset.license),
        license_name=publication.license_name,
        license_link=publication.license_link,
        base_model=[name for name in (text_model, tower_model) if name and is_repository_id(name)] or None,
        datasets=[dataset.id] if dataset and dataset.id else None,
        tags=["multimodal-cot", "custom_code"],
        model_name=publication.repo_id.split("/")[-1],
        eval_results=results,
        # A later push may replace or delete only the files in this list.
        mmcot={"version": __version__, "code": code, "files": sorted({*list_files(folder), "README.md"})},
    )
    card = ModelCard.from_template(
        data,
        template_str=resources.files("mmcot.hub").joinpath("card_template.md").read_text(encoding="utf-8"),
        repo_id=publication.repo_id,
        version=__version__,
        needs=[requirement(name) for name in REQUIRED],
        needs_peft=requirement("peft"),
        stages=stages,
        indexes={
            stage.name: {**read_manifest(run_folder.stage(stage.name)), "num_passages": stage.num_passages}
            for stage in stages
            if stage.kind == RETRIEVE
        },
        picture=PICTURE,
        sees_pictures=processor.stages.see_pictures,
        has_tower=processor.image_processor is not None,
        fusion=config["fusion"],
        has_adapters=run_folder.is_adapted and not publication.merge,
        is_merged=publication.merge,
        is_shared=run_folder.is_shared,
        parameters=num_parameters(folder),
        dataset=recipe["dataset"],
        dataset_name=dataset_name,
        known_dataset=dataset,
        tower=cited_tower(tower),
        text_model=text_model,
        tower_model=tower_model,
        trainings=trainings,
        splits=read_json(run_folder.splits) if run_folder.splits.is_file() else None,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        scores=scores,
        predict_options=scores and command_options(scores["predict_options"]),
        evaluate_options=scores and command_options(scores["evaluate_options"]),
        probe_options=scores and command_options(probe_options(scores)),
        probes=read_probes(run_folder, processor),
        code=code,
        code_digests=digests,
    )
    card.save(folder / "README.md")


def scores_of_run(run_folder: RunFolder, processor: MMCoTProcessor) -> dict[str, Any] | None:
    """
    Return the scores of a run without paths of this machine; None if there are no scores.

    Raises:
        ValueError: the scores do not belong to the run's weights, to the predictions file, or to the split in the name
            of the scores file; or they do not record their origin.
    """
    split = run_folder.judged_split()
    if split is None:
        return None
    file = run_folder.scores(split)
    scores = read_json(file)
    check_weights(scores, file, run_folder, processor)
    check_predictions(scores, file)
    if scores["split"] != split:
        raise ValueError(
            f"{file} has scores of the split {scores['split']!r}; expected {split!r}, the split in the file's name."
        )
    return without_paths(scores)


def check_weights(measured: dict[str, Any], file: Path, run_folder: RunFolder, processor: MMCoTProcessor) -> None:
    """Raise an error if a measurement was made with other weights than the run's, or does not record its weights."""
    weights, recorded = weights_by_stage(run_folder.path, processor), measured.get("weights")
    if recorded == weights:
        return
    differing = [name for name, digest in weights.items() if (recorded or {}).get(name) != digest]
    found = "does not record its weights" if recorded is None else "was measured with other weights than the run's"
    raise ValueError(
        f"{file} {found} ({', '.join(differing)}). Predict and measure again: python -m mmcot.predict {run_folder} …, "
        f"then python -m mmcot.evaluate FILE … --output {file} (for {run_folder.probes.name}: python -m mmcot.probes)."
    )


def check_predictions(scores: dict[str, Any], file: Path) -> None:
    """Raise an error if the predictions file exists and changed since the scores were computed."""
    if "predictions" not in scores:
        raise ValueError(
            f"{file} does not record its predictions: an older mmcot wrote it. Measure again: python -m "
            f"mmcot.evaluate FILE … --output {file}."
        )
    predictions_file = file.parent / scores["predictions_file"]
    if predictions_file.is_file() and digest_of_file(predictions_file) != scores["predictions"]:
        raise ValueError(
            f"{file} has scores of other predictions than {predictions_file} contains now. Measure again: python -m "
            f"mmcot.evaluate {predictions_file} … --output {file}."
        )


def read_probes(run_folder: RunFolder, processor: MMCoTProcessor) -> dict[str, Any] | None:
    """Read the results of probes, if there are any: how the answers depend on pictures and rationales."""
    if not run_folder.probes.is_file():
        return None
    probes = read_json(run_folder.probes)
    check_weights(probes, run_folder.probes, run_folder, processor)
    return without_paths(probes)


def publish_scores(scores: dict[str, Any], folder: Path) -> list[EvalResult]:
    """Write the scores file and, for a dataset on the Hub, its result file. Return results for the card's metadata."""
    write_json(folder / SCORES_FILE, scores)
    dataset = DATASETS.get(scores["dataset_known_as"])
    if dataset is None or dataset.id is None:
        return eval_results(scores, scores["dataset_known_as"] or "own-problems", scores["split"])
    notes = " ".join(
        [f"{scores['split']}, {scores['n']} problems", command_options(scores["evaluate_options"])]
    ).strip()
    entries = eval_entries(scores, dataset.id, notes)
    write_eval_results(folder / ".eval_results" / f"{dataset.id.replace('/', '--')}.yaml", entries)
    return eval_results(scores, dataset.id, scores["split"])


def probe_options(scores: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `mmcot.probes` for the problems, pictures and captions that were scored."""
    used = scores["predict_options"] | scores["evaluate_options"]
    return {name: used[name] for name in PROBE_OPTIONS if name in used}


def command_options(options: dict[str, Any]) -> str:
    """Format options as on a command line."""
    parts = []
    for name, value in without_paths(options).items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        parts += [f"--{name}", *(shlex.quote(str(item)) for item in values)]
    return " ".join(parts)


def initial_checkpoints(
    publication: Publication, recipe: dict[str, Any], tower: dict[str, Any] | None
) -> tuple[str | None, str | None]:
    """Return the initial checkpoints of text model and tower; None for random weights, or without a tower."""
    tower_model = recipe.get("vision_model_name_or_path")
    tower_model = TOWERS[tower_model].checkpoint if tower_model in TOWERS else tower_model
    return publication.base_model or recipe.get("model_name_or_path"), tower_model if tower else None


def is_repository_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def published_recipe(run_folder: RunFolder) -> dict[str, Any]:
    """Read the run's recipe without paths of the machine and settings of the author's Hub account."""
    recipe = yaml.safe_load(run_folder.recipe.read_text(encoding="utf-8"))
    return without_paths({name: value for name, value in recipe.items() if not name.startswith("hub_")})


def without_paths(value: Any) -> Any:
    """Replace each path outside of the working folder by its file name, also in `COLUMN=PATH`."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    parts = parse_split_files(value)
    if parts is not None:
        return ",".join(f"{split}={without_paths(file)}" for split, file in parts.items())
    if is_outside(value):
        return PureWindowsPath(value).name  # splits at both kinds of slashes
    column, equals, rest = value.partition("=")
    return column + equals + without_paths(rest) if equals else value


def is_outside(text: str) -> bool:
    """Whether a text is an absolute path, a path in a home folder, or a path that leaves the working folder."""
    is_absolute = Path(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return is_absolute or text.startswith(("~", "file://")) or ".." in Path(text).parts


def cited_tower(tower: dict[str, Any] | None) -> str | None:
    """Return the name by which the template selects the tower's citation."""
    if tower is None:
        return None
    is_clip = "clip" in str(tower.get("architecture", tower["model_type"])) and "siglip" not in tower["model_type"]
    return "clip" if is_clip else tower["model_type"]


def read_training_results(run_folder: RunFolder, stage: str) -> dict[str, Any]:
    """Read the results of a stage's training."""
    file = run_folder.train_results(stage)
    training = read_json(file)
    for name in ("hardware", "finished", "dataset_known_as"):
        if name not in training:
            raise ValueError(f"{file} has no {name!r}: an older mmcot trained the stage. Train it again.")
    return training


def num_parameters(folder: Path) -> dict[str, int]:
    """Count the parameters in the weight files of each folder of the repository; "" is the root."""
    counts: dict[str, int] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        name = file.parent.relative_to(folder).as_posix().replace(".", "")
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118 (not a dict)
        counts[name] = counts.get(name, 0) + sum(map(math.prod, shapes))
    return counts


def code_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256, in hex digits, of each Python file at a folder's root, by name."""
    return {file.name: sha256_of_file(file) for file in sorted(folder.glob("*.py"))}


def draw_stages(stages: Sequence[Stage], has_tower: bool, file: Path) -> None:
    """Draw each stage as a row: the columns that it reads, the model, its output, and an arrow to the next stage."""
    figure = Figure(figsize=(8, 1.5 * len(stages)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(-0.1, 1.5 * len(stages)))
    axes.axis("off")
    centred = {"ha": "center", "va": "center"}
    box = {"boxstyle": "round,pad=0.5", "edgecolor": "0.4"}
    arrow = {"arrowstyle": "->", "color": "0.4", "shrinkA": 0}
    for number, stage in enumerate(stages):
        height = 1.5 * (len(stages) - number) - 0.75
        written = {earlier.writes for earlier in stages[:number]}
        reads = [name for name in stage.reads if name != "images"]
        texts = ", ".join(f"its {name}" if name in written else name for name in reads)
        seen = "picture → tower" if has_tower else "a picture's features"
        sees = f"{seen} → fusion" if stage.sees_pictures else "no picture"
        does = f"{sees}\nT5" if stage.has_model else f"BM25 search\n{stage.num_passages} passages"
        writes = "a probability per choice" if stage.answers else stage.writes
        axes.text(1.6, height, textwrap.fill(texts, 24), **centred, bbox={**box, "facecolor": "#eef3f8"})
        axes.text(5.2, height, f"{does}, {stage.name} stage", **centred, bbox=box | {"facecolor": "w"})
        axes.text(8.7, height, textwrap.fill(writes, 24), **centred, bbox={**box, "facecolor": "#fdf3e7"})
        for start, end in ((3.1, 3.6), (6.8, 7.4)):
            axes.annotate("", (end, height), (start, height), arrowprops=arrow)
        if any(stage.writes in later.reads for later in stages[number + 1 : number + 2]):
            axes.plot((8.7, 8.7, 1.6), (height - 0.3, height - 0.75, height - 0.75), color="0.4", linewidth=1)
            axes.annotate("", (1.6, height - 1.15), (1.6, height - 0.75), arrowprops=arrow)
    figure.savefig(file, dpi=120, metadata={"Software": None})
