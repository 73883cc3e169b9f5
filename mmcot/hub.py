"""Run folder -> Hub folder: one repository that holds the whole system, loadable with `trust_remote_code`.

At the root the last stage with the processor and the code, in a subfolder each earlier stage; or at the root the base
that all stages adapt, in a subfolder each stage's adapter. `upload` alone talks to the network.
"""

import shutil
from importlib import resources
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import HfApi

import modeling_mmcot
from mmcot.evaluate import reported_scores
from modeling_mmcot import MMCoTProcessor

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)

BASE = "base"  # folder in a run: the base that its stages adapt, where they are adapters


def shipped_code() -> list[Path]:
    """The flat code that goes to the Hub, every file of the folder but its `__init__.py`."""
    folder = Path(modeling_mmcot.__file__).parent
    return sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")


def export(run_folder: Path, processor: MMCoTProcessor) -> Path:
    """Write `RUN_FOLDER/hub/` from the trained stages, whole or not at all. Returns it."""
    stages = {stage.name: run_folder / stage.name for stage in processor.stages}
    base = run_folder / BASE
    return write_hub_folder(
        run_folder / "hub", processor, stages, render_card(run_folder), base if base.is_dir() else None
    )


def write_hub_folder(
    hub_folder: Path, processor: MMCoTProcessor, stages: dict[str, Path], card: str, base: Path | None = None
) -> Path:
    """
    A folder as it stands on the Hub, whole or not at all; one that is there is replaced.

    Args:
        stages: each stage's name and the folder that its model was saved to, in their order. The last becomes the root.
        card: what its README.md says.
        base: the folder of the base that they adapt, where they are adapters. It becomes the root.
    """
    unfinished = hub_folder.with_name(f"{hub_folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    processor.save_pretrained(unfinished)
    copy_model(base or stages[list(stages)[-1]], unfinished)
    for name in stages if base else list(stages)[:-1]:
        copy_model(stages[name], unfinished / name)
    for file in shipped_code():
        shutil.copyfile(file, unfinished / file.name)
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(hub_folder, ignore_errors=True)
    unfinished.rename(hub_folder)
    return hub_folder


def copy_model(stage_folder: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for pattern in MODEL_FILES:
        for file in stage_folder.glob(pattern):
            shutil.copyfile(file, target / file.name)


def render_card(run_folder: Path) -> str:
    template = resources.files("mmcot").joinpath("card_template.md").read_text(encoding="utf-8")
    recipe = (run_folder / "recipe.yaml").read_text(encoding="utf-8")
    split, scores = reported_scores(run_folder)
    return jinja2.Template(template, keep_trailing_newline=True).render(
        split={"test": "test", "val": "validation"}[split],
        scores=scores,
        dataset=yaml.safe_load(recipe)["dataset"],
        stages=[stage["name"] for stage in yaml.safe_load(recipe)["stages"]],
        recipe=recipe,
    )


def files_to_upload(run_folder: str | Path) -> list[tuple[str, int]]:
    """Each file of the Hub folder with its size in bytes. An unfinished run is a `ValueError`."""
    hub_folder = finished_hub_folder(run_folder)
    files = sorted(file for file in hub_folder.rglob("*") if file.is_file())
    return [(file.relative_to(hub_folder).as_posix(), file.stat().st_size) for file in files]


def upload(run_folder: str | Path, repo_id: str, private: bool) -> str:
    """Upload the Hub folder in one commit, into a repository made where it is missing. Returns the commit's address."""
    hub_folder = finished_hub_folder(run_folder)
    repo = HfApi().create_repo(repo_id, private=private or None, exist_ok=True)
    commit = HfApi().upload_folder(
        repo_id=repo.repo_id, folder_path=hub_folder, commit_message="Upload a multimodal chain-of-thought model"
    )
    return commit.commit_url


def finished_hub_folder(run_folder: str | Path) -> Path:
    hub_folder = Path(run_folder) / "hub"
    if not hub_folder.is_dir():
        raise ValueError(
            f"{run_folder} is not a finished run: it has no hub/, which train.py writes last. Run it to its end."
        )
    return hub_folder
