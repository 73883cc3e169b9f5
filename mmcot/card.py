"""The model card of a run: rendered from its recipe, its scores and its files; nothing in it that was not measured.

The text stands in `card_template.md`; this file gathers what it says, as huggingface_hub's `ModelCard` and
`EvalResult`, with the picture of the stages, the scores file and the Hub's own results beside it.
"""

import hashlib
import math
import re
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from safetensors import safe_open

from mmcot.files import read_json
from mmcot.provenance import meta_file, weights_of
from mmcot.results import SCORES_FILE, eval_entries, eval_results, write_eval_results
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.configuration_mmcot import __version__
from modeling_mmcot.processing_mmcot import Stage
from modeling_mmcot.vision_mmcot import TOWERS

PICTURE = "stages.png"
PROBES_FILE = "probes.json"  # in a run's scores/, as mmcot.probes --output writes it


@dataclass(frozen=True)
class KnownDataset:
    """
    Args:
        id: on the Hub.
        license: by the Hub's name for it. What is trained on the dataset is published under it, if not said otherwise.
        shares_alike: whether it may not be said otherwise.
        url: where its licence and its makers' words about it stand.
    """

    license: str
    id: str | None = None
    url: str | None = None
    shares_alike: bool = False


# By the names of `problems.known_as`. Of any other dataset its user says the licence.
DATASETS = {
    "demonstration": KnownDataset("apache-2.0"),
    "ScienceQA": KnownDataset("cc-by-nc-sa-4.0", "derek-thomas/ScienceQA", "https://scienceqa.github.io", True),
}


@dataclass(frozen=True)
class Publication:
    """
    What a run's folder does not say of its own publication.

    Args:
        repo_id: where it will stand.
        base_model: the text model's id on the Hub, where the recipe names it otherwise.
        license: of the weights, where their dataset's is not known.
        merge: publish the stages that adapt a base as whole models.
    """

    repo_id: str = "USER/NAME"
    base_model: str | None = None
    license: str | None = None
    merge: bool = False


def write_card(folder: Path, run_folder: Path, processor: MMCoTProcessor, publication: Publication) -> None:
    """README.md, the picture that it shows, and the scores where there are any, into a folder that holds all else."""
    split, scores = judged(run_folder, processor)
    dataset_name = meta_of(run_folder).get("dataset_known_as")
    dataset = DATASETS.get(dataset_name)
    if dataset and dataset.shares_alike and publication.license not in (None, dataset.license):
        raise ValueError(
            f"{dataset_name}, on which this run was trained, is {dataset.license}; --license {publication.license} is "
            f"another, and what is made of it has to be shared alike."
        )
    draw_stages(processor.stages, folder / PICTURE)
    results = None
    if scores is not None:
        shutil.copyfile(run_folder / "scores" / f"{split}.json", folder / SCORES_FILE)
        dataset_type = (dataset and dataset.id) or dataset_name or "own problems"
        results = eval_results(scores, dataset_type, split)
        if dataset is not None and dataset.id is not None:
            entries = eval_entries(scores, dataset.id, notes=f"{split}, {scores['n']} problems")
            write_eval_results(folder / ".eval_results" / f"{dataset.id.replace('/', '--')}.yaml", entries)
    recipe = published_recipe(run_folder)
    tower = read_json(folder / "config.json").get("vision_config") or {}
    card = ModelCard.from_template(
        metadata(publication, recipe, dataset, results, folder),
        template_str=resources.files("mmcot").joinpath("card_template.md").read_text(encoding="utf-8"),
        repo_id=publication.repo_id,
        version=__version__,
        stages=processor.stages,
        picture=PICTURE,
        sees_pictures=any("images" in stage.reads for stage in processor.stages),
        has_tower=processor.image_processor is not None,
        has_adapters=not publication.merge and is_adapted(run_folder),
        is_merged=publication.merge,
        parameters=num_parameters(folder),
        dataset=recipe["dataset"],
        dataset_name=dataset_name,
        known_dataset=dataset,
        tower=tower.get("model_type"),
        base_models=base_models(publication, recipe),
        started_from=recipe.get("model_name_or_path", "random weights"),
        trainings={stage.name: training_of(run_folder / stage.name) for stage in processor.stages},
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        split=split,
        scores=scores,
        probes=probes_of(run_folder, processor),
        code=code_digest(folder),
    )
    card.save(folder / "README.md")


def judged(run_folder: Path, processor: MMCoTProcessor) -> tuple[str, dict[str, Any] | None]:
    """
    The split that a run is judged by, and its scores: test, or val where test has none. None where there are none.

    Raises:
        ValueError: they are of other weights than the run's, or do not say of which.
    """
    for split in ("test", "val"):
        file = run_folder / "scores" / f"{split}.json"
        if file.is_file():
            scores = read_json(file)
            check_weights(scores, file, run_folder, processor)
            return split, scores
    return "test", None


def check_weights(measured: dict[str, Any], file: Path, run_folder: Path, processor: MMCoTProcessor) -> None:
    weights = weights_of(str(run_folder), processor) or {}
    if measured.get("weights") == weights:
        return
    said = measured.get("weights")
    differing = [name for name, digest in weights.items() if (said or {}).get(name) != digest]
    found = "does not say of which weights it is" if said is None else "is of other weights than the run's"
    raise ValueError(
        f"{file} {found} ({', '.join(differing)}). Predict and score again: python -m mmcot.predict {run_folder} …, "
        f"then python -m mmcot.evaluate FILE … --output {file}"
    )


def probes_of(run_folder: Path, processor: MMCoTProcessor) -> dict[str, Any] | None:
    """What the answers hang on, where that was measured."""
    file = run_folder / "scores" / PROBES_FILE
    if not file.is_file():
        return None
    probes = read_json(file)
    check_weights(probes, file, run_folder, processor)
    return probes


def meta_of(run_folder: Path) -> dict[str, Any]:
    """What a run says beside its predictions of where they come from."""
    file = meta_file(run_folder / "predictions" / "test.json")
    return read_json(file) if file.is_file() else {}


def metadata(
    publication: Publication,
    recipe: dict[str, Any],
    dataset: KnownDataset | None,
    results: list[EvalResult] | None,
    folder: Path,
) -> ModelCardData:
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=publication.license or (dataset and dataset.license),
        base_model=base_models(publication, recipe) or None,
        datasets=[dataset.id] if dataset and dataset.id else None,
        tags=["multimodal-cot", "custom_code"],
        model_name=publication.repo_id.split("/")[-1],
        eval_results=results,
        mmcot={"version": __version__, "code": code_digest(folder)},
    )


def base_models(publication: Publication, recipe: dict[str, Any]) -> list[str]:
    """The Hub's ids of the text model and the tower that a run started from."""
    tower = recipe.get("vision_model_name_or_path")
    named = [publication.base_model or recipe.get("model_name_or_path"), tower in TOWERS and TOWERS[tower].checkpoint]
    named[1] = named[1] or tower
    return [name for name in named if name and is_repository_id(name)]


def is_repository_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def published_recipe(run_folder: Path) -> dict[str, Any]:
    """The run's recipe, of paths on the machine that it ran on only their names."""
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in recipe.items()
    }


def is_adapted(run_folder: Path) -> bool:
    return (run_folder / "base").is_dir()


def training_of(stage_folder: Path) -> dict[str, Any]:
    """What the Trainer said of a stage's training."""
    return read_json(stage_folder / "train_results.json")


def num_parameters(folder: Path) -> dict[str, int]:
    """Of each model of the repository, by its folder ("" is the root), as its weights' files say it."""
    counts: dict[str, int] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.parent.relative_to(folder).as_posix().replace(".", "")
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]
        counts[place] = counts.get(place, 0) + sum(map(math.prod, shapes))
    return counts


def code_digest(folder: Path) -> str:
    """Of the code that lies at a folder's root, by the files' names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def draw_stages(stages: Iterable[Stage], file: Path) -> None:
    """Each pass as a row: what it reads, the model, what it writes."""
    stages = list(stages)
    figure = Figure(figsize=(8, 1.5 * len(stages)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(-0.1, 1.5 * len(stages)))
    axes.axis("off")
    centred = {"ha": "center", "va": "center"}
    box = {"boxstyle": "round,pad=0.5", "edgecolor": "0.4"}
    for number, stage in enumerate(stages):
        height = 1.5 * (len(stages) - number) - 0.75
        written = {earlier.writes for earlier in stages[:number]}
        reads = [name for name in stage.reads if name != "images"]
        texts = ", ".join(f"its {name}" if name in written else name for name in reads)
        sees = "picture → tower → gated fusion" if "images" in stage.reads else "no picture"
        writes = "a probability per choice" if stage.answers else stage.writes
        axes.text(1.6, height, textwrap.fill(texts, 24), **centred, bbox={**box, "facecolor": "#eef3f8"})
        axes.text(5.2, height, f"{sees}\nT5, {stage.name} stage", **centred, bbox=box | {"facecolor": "w"})
        axes.text(8.7, height, textwrap.fill(writes, 24), **centred, bbox={**box, "facecolor": "#fdf3e7"})
        for start, end in ((3.1, 3.6), (6.8, 7.4)):
            axes.annotate("", (end, height), (start, height), arrowprops={"arrowstyle": "->", "color": "0.4"})
    figure.savefig(file, dpi=120, metadata={"Software": None})
