"""What lies where in a run's folder, as far as several modules know of it."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import AcquireReturnProxy, FileLock, Timeout

from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.files import read_json, write_json

BASE = "base"  # the base that the stages adapt, where they are adapters
FINISHED = "train_results.json"  # written last in a stage's folder: the stage is trained


def lock_run(run_folder: Path, fold: int | None = None) -> AcquireReturnProxy | None:
    """
    The lock of a run, or of a fold, which can be trained beside others; taken by the main process. A context, at whose
    end it is given back. A killed process holds none.

    Raises:
        RunStopped: another command has it.
    """
    if not PartialState().is_main_process:
        return None
    lock = FileLock(run_folder / (".lock" if fold is None else f".lock-fold-{fold}"))
    try:
        return lock.acquire(timeout=0)
    except Timeout as error:
        what = run_folder if fold is None else f"{run_folder}, fold {fold},"
        raise RunStopped(f"{what} is being written by another command: wait for its end, or stop it.") from error


def is_adapted(run_folder: Path) -> bool:
    """Whether its stages are adapters of one base."""
    return (run_folder / BASE).is_dir()


def judged_split(run_folder: Path) -> str | None:
    """The split that a run is judged by: test, or val where test has no scores; None where nothing has."""
    return next((split for split in ("test", "val") if scores_file(run_folder, split).is_file()), None)


def scores_file(run_folder: Path, split: str) -> Path:
    return run_folder / "scores" / f"{split}.json"


SPLITS_FILE = "splits.json"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / SPLITS_FILE, record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """None of a run that was trained by an mmcot that kept none."""
    return read_json(folder / SPLITS_FILE) if (folder / SPLITS_FILE).is_file() else None


CROSS_FITTED = "train_cross_fit"  # beside the splits' predictions, those of the folds put together


def predictions_file(run_folder: Path, split: str) -> Path:
    return run_folder / "predictions" / f"{split}.json"


def read_predictions(run_folder: Path, split: str) -> dict[str, dict]:
    """What is written for a split so far, by problem id."""
    file = predictions_file(run_folder, split)
    return read_json(file) if file.exists() else {}


def fold_folder(run_folder: Path, fold: int) -> Path:
    """Where the stages lie that are trained without a fold, laid out as a run is."""
    return run_folder / "folds" / str(fold)


def reported_scores(run_folder: Path) -> tuple[str, dict[str, Any]]:
    """The split that a run is judged by, and its scores: test, or val where the answers of test are not known."""
    split = judged_split(run_folder) or "val"
    return split, read_json(scores_file(run_folder, split))
