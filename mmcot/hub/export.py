"""Run folder -> Hub folder: one repository with the whole system, loadable with `trust_remote_code`.

The root contains the stage that answers, with the processor, the code and the card; each other stage has a subfolder.
If the stages are adapters, the root contains their base, and each stage's adapter has a subfolder. A model that all
stages share is at the root. `card.py` writes the card, `checks.py` checks the folder, `repository.py` uploads it.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from peft import PeftConfig

import modeling_mmcot
from mmcot.hub.card import Publication, write_card
from mmcot.hub.merging import check_not_adapted, shared_modules
from mmcot.prediction.provenance import training_name
from mmcot.storage.folders import replaced_folder
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.known_answer_mmcot import write_known_answer
from modeling_mmcot.loading_mmcot import StageAdapters, load_stages
from modeling_mmcot.retrieval_mmcot import INDEX_FILES, MANIFEST

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    MANIFEST,
    *INDEX_FILES,
)


def shipped_code() -> list[Path]:
    """Return the code files that ship to the Hub: all files of `modeling_mmcot` except `__init__.py`."""
    folder = Path(modeling_mmcot.__file__).parent
    return sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")


def export(run_folder: RunFolder, processor: MMCoTProcessor, publication: Publication | None = None) -> Path:
    """Write `RUN_FOLDER/hub/` (or `hub_merged/`) atomically from the trained stages. Return the folder."""
    publication = publication or Publication()
    stages = {stage.name: run_folder.stage(training_name(run_folder, stage)) for stage in processor.stages}
    base = run_folder.base if run_folder.is_adapted else None
    with tempfile.TemporaryDirectory(dir=run_folder.path, prefix=".merged-") as merged:
        if publication.merge:
            stages, base = merge(run_folder.base, processor, Path(merged)), None
        return write_hub_folder(
            run_folder.hub_merged if publication.merge else run_folder.hub,
            processor,
            stages,
            lambda folder: write_card(folder, run_folder, processor, publication),
            base,
        )


def write_hub_folder(
    hub_folder: Path,
    processor: MMCoTProcessor,
    stages: dict[str, Path],
    write_readme: Callable[[Path], None],
    base: Path | None = None,
) -> Path:
    """
    Write a folder in the Hub's layout atomically, and return it. An existing folder is replaced.

    Args:
        stages: the folder of each stage's saved model, or index, by name. The model of the stage that answers becomes
            the root.
        write_readme: writes the card and its files into the folder; called when all other files are written.
        base: the folder of the base, if the stages are adapters. It becomes the root.
    """
    with replaced_folder(hub_folder) as folder:
        processor.save_pretrained(folder)
        root = processor.stages.answering.name
        copy_model(base or stages[root], folder)
        for stage in processor.stages:
            if base is not None or stages[stage.name] != stages[root]:
                copy_model(stages[stage.name], folder / stage.name)
        for file in shipped_code():
            shutil.copyfile(file, folder / file.name)
        model = MMCoTForConditionalGeneration.from_pretrained(folder, dtype="auto")
        models = load_stages(model, str(folder), processor)
        write_known_answer(folder, models, processor)
        write_readme(folder)
    return hub_folder


def copy_model(stage_folder: Path, target: Path) -> None:
    """Copy the files of a saved model or adapter."""
    target.mkdir(exist_ok=True)
    for pattern in MODEL_FILES:
        for file in stage_folder.glob(pattern):
            shutil.copyfile(file, target / file.name)


def merge(base: Path, processor: MMCoTProcessor, folder: Path) -> dict[str, Path]:
    """Merge each stage's adapter into the base, and save it into the folder. Return the stages' folders by name."""
    merged_folders = {stage.name: base.parent / stage.name for stage in processor.stages}
    for stage in processor.stages.with_models:
        peft_config = PeftConfig.from_pretrained(base.parent / stage.name)
        if peft_config.is_prompt_learning:
            raise ValueError(
                f"--merge: the {stage.name} stage's adapter is {peft_config.peft_type.value}, which cannot be merged."
            )
        # Loaded again for each stage, because merging changes the base.
        root = MMCoTForConditionalGeneration.from_pretrained(base, dtype="auto")
        shared = shared_modules(root)
        adapters = StageAdapters(root, str(base.parent), [stage.name])
        check_not_adapted(adapters.model, shared)
        generation_config = adapters[stage.name].generation_config
        merged = adapters.model.merge_and_unload()
        merged.config.stage_adapters = None
        merged.generation_config = generation_config
        merged.to(merged.dtype).save_pretrained(folder / stage.name)
        merged_folders[stage.name] = folder / stage.name
    return merged_folders
