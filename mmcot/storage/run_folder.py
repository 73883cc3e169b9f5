"""What lies where in a run's folder, as far as several modules know of it."""

from pathlib import Path

from accelerate import PartialState
from filelock import AcquireReturnProxy, FileLock, Timeout

from mmcot.storage.checkpoints import RunStopped

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
