"""Builds the index of each stage that retrieves, in the stage's folder, from the corpora that the recipe names.

The corpus `lectures` contains the lectures of the run's own training problems. No row of validation or test is
ever read.
"""

from datetime import UTC, datetime

from accelerate import PartialState
from filelock import FileLock

from mmcot.recipes.arguments import StageArguments
from mmcot.retrieval.corpora import LECTURES, check_ids, lecture_passages, read_corpus
from mmcot.retrieval.index import build_index
from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.files import write_json
from mmcot.training.preparation import Run
from mmcot.training.progress import hardware
from modeling_mmcot.retrieval_mmcot import BM25Searcher, Passage
from modeling_mmcot.stage_mmcot import Stage


def open_searchers(prepared: Run) -> None:
    """
    Give the processor a searcher for each stage that retrieves, and build the stage's index if it is absent. Folds
    search the index of their run.

    Raises:
        RunStopped: a corpus cannot be read, or the stage's folder contains the index of another corpus.
    """
    for stage in prepared.stages.retrieving:
        folder = prepared.folder.run.stage(stage.name)
        with PartialState().main_process_first(), FileLock(prepared.folder.run.stage_lock(stage.name)):
            try:
                if not prepared.folder.run.is_trained(stage.name):
                    build_stage_index(prepared, stage)
                prepared.processor.searchers[stage.name] = BM25Searcher(folder)
            except (ImportError, ValueError) as error:
                raise RunStopped(f"{stage.name} stage: {error}") from error


def build_stage_index(prepared: Run, stage: Stage) -> None:
    folder = prepared.folder.run
    manifest = build_index(stage_passages(prepared, prepared.arguments_of(stage)), folder.stage(stage.name))
    results = {
        "num_passages": manifest["num_passages"],
        "sources": manifest["sources"],
        "hardware": hardware(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(folder.train_results(stage.name), results)


def stage_passages(prepared: Run, arguments: StageArguments) -> list[Passage]:
    """Return the passages of all corpora of a stage."""
    passages: list[Passage] = []
    for corpus in arguments.corpora or []:
        if corpus == LECTURES:
            passages += lecture_passages(prepared.problems["train"], prepared.recipe.arguments.dataset)
        else:
            passages += read_corpus(corpus)
    check_ids(passages)
    return passages
