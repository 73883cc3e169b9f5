"""The paths inside a run folder, in one class."""

from dataclasses import dataclass
from pathlib import Path

from mmcot.storage.files import read_json

# The name, in place of a split's, of the predictions that all folds write for the training problems.
CROSS_FITTED = "train_cross_fit"
# The name, in place of a stage's, of the training of one model for all stages.
SHARED = "shared"


@dataclass(frozen=True)
class RunFolder:
    """
    The folder of a run:

        recipe.yaml  inputs.json  splits.json  .lock  .lock-stage-STAGE  .lock-fold-N
        STAGE/       checkpoints, weights, curves.png, reports/, and train_results.json, which is written last
        base/        the base model, if the stages are adapters
        shared/      in place of the stages' folders, the model of all stages, if they share their weights
        predictions/ SPLIT.json, SPLIT.meta.json, and SPLIT.STAGE.partial-PROCESS.jsonl while a stage writes
        scores/      SPLIT.json, probes.json
        hub/         the exported system; hub_merged/ with its adapters merged
        folds/N/     stages that are trained without fold N, in the layout of a run

    Args:
        path: the folder itself.
        fold_of: the run that a fold belongs to; None for a run itself.
    """

    path: Path
    fold_of: "RunFolder | None" = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs.json"

    @property
    def splits(self) -> Path:
        return self.path / "splits.json"

    @property
    def lock(self) -> Path:
        """The lock file of a run. The lock file of a fold is in the folder of its run."""
        return self.path / ".lock" if self.fold_of is None else self.fold_of.path / f".lock-fold-{self.path.name}"

    def stage_lock(self, stage: str) -> Path:
        """The lock file of a stage's training: stages can be trained by separate commands."""
        return self.path / f".lock-stage-{stage}"

    @property
    def run(self) -> "RunFolder":
        """The run that a fold belongs to; the folder itself for a run."""
        return self.fold_of or self

    @property
    def base(self) -> Path:
        """The base model that the stages adapt. Folds adapt the base model of their run."""
        return self.run.path / "base"

    @property
    def is_adapted(self) -> bool:
        """Whether the stages are adapters of one base model."""
        return self.base.is_dir()

    @property
    def is_shared(self) -> bool:
        """Whether all stages share one model."""
        return self.stage(SHARED).is_dir()

    def stage(self, stage: str) -> Path:
        return self.path / stage

    def train_results(self, stage: str) -> Path:
        return self.stage(stage) / "train_results.json"

    def is_trained(self, stage: str) -> bool:
        """Whether the training of the stage is finished."""
        return self.train_results(stage).is_file()

    def trained_stages(self) -> list[str]:
        return [file.parent.name for file in self.path.glob("*/train_results.json")]

    def curves(self, stage: str) -> Path:
        return self.stage(stage) / "curves.png"

    def reports(self, stage: str) -> Path:
        return self.stage(stage) / "reports"

    def predictions(self, split: str) -> Path:
        return self.path / "predictions" / f"{split}.json"

    def predictions_so_far(self, split: str) -> dict[str, dict]:
        """Return the columns that the stages have written for a split, by problem id."""
        file = self.predictions(split)
        return read_json(file) if file.exists() else {}

    def unfinished_predictions(self, split: str, stage: str) -> Path:
        """Return the `output` of a stage's `Journal`: the logs of an unfinished stage have this name as a prefix."""
        return self.path / "predictions" / f"{split}.{stage}"

    def scores(self, split: str) -> Path:
        return self.path / "scores" / f"{split}.json"

    def judged_split(self) -> str | None:
        """Return the split with the reported scores: test, or val if test has no scores; None if neither has scores."""
        return next((split for split in ("test", "val") if self.scores(split).is_file()), None)

    @property
    def probes(self) -> Path:
        return self.path / "scores" / "probes.json"

    @property
    def hub(self) -> Path:
        return self.path / "hub"

    @property
    def hub_merged(self) -> Path:
        return self.path / "hub_merged"

    @property
    def folds(self) -> Path:
        return self.path / "folds"

    def fold(self, fold: int) -> "RunFolder":
        return RunFolder(self.folds / str(fold), fold_of=self)
