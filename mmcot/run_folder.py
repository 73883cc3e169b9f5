"""What lies where in a run's folder, as far as several modules know of it."""

from pathlib import Path

BASE = "base"  # the base that the stages adapt, where they are adapters
FINISHED = "train_results.json"  # written last in a stage's folder: the stage is trained


def is_adapted(run_folder: Path) -> bool:
    """Whether its stages are adapters of one base."""
    return (run_folder / BASE).is_dir()


def judged_split(run_folder: Path) -> str | None:
    """The split that a run is judged by: test, or val where test has no scores; None where nothing has."""
    return next((split for split in ("test", "val") if scores_file(run_folder, split).is_file()), None)


def scores_file(run_folder: Path, split: str) -> Path:
    return run_folder / "scores" / f"{split}.json"
