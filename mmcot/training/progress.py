"""Reports the progress of a training besides its loss: speed and memory, validation scores of generated texts, the
fusion's gate, examples to read, and plots of the curves at the end.

Metrics go through the Trainer's log, and so to TensorBoard or any other service in `report_to`. Nothing here changes
the trained weights.
"""

import os
import platform
import time
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image

from mmcot.evaluation.metrics import accuracy, checked_answers, percentage, rationale_scores
from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.pixel_store import PixelStore
from mmcot.pictures.reading import read_pictures
from mmcot.prediction.columns import with_columns
from mmcot.prediction.examples import StageCollator, tokenized
from mmcot.prediction.passages import add_passages
from mmcot.prediction.predictor import PredictOptions, predict_stage
from mmcot.problems.schema import without_gold
from mmcot.storage.files import write_text
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.loading_mmcot import share_model
from modeling_mmcot.pictures_mmcot import as_rgb
from modeling_mmcot.stage_mmcot import KINDS, LETTERS, RETRIEVE, Stage

NUM_EXAMPLES = 8


class Speed:
    """Tokens (without padding) and problems per second since the last report, over all processes."""

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        self.reset()

    def reset(self) -> None:
        self.tokens: list[torch.Tensor] = []  # summed in `report` only, to avoid a device synchronization at each step
        self.problems = 0
        self.begin = time.perf_counter()

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        self.tokens.append(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum())
        self.problems += len(inputs["labels"])

    def report(self) -> dict[str, float]:
        """Return the metrics since the last report, and start the next interval."""
        seconds = (time.perf_counter() - self.begin) / self.num_processes
        tokens = sum(count.item() for count in self.tokens)
        metrics = {
            "tokens_per_second": round(tokens / seconds),
            "problems_per_second": round(self.problems / seconds, 2),
        }
        self.reset()
        return {**metrics, "memory_gb": round(used_memory() / 1e9, 2)}


def used_memory() -> int:
    """Return the peak memory allocated on the GPU or, without a GPU, the resident memory of the process, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


class ValidationReport:
    """
    At each evaluation, scores the stage's free-running generation for some validation problems.

    Args:
        problems: validation problems with their gold columns, which are removed before generation.
        predictions: the columns that earlier stages wrote for these problems, by problem id.
        folder: each evaluation writes `step-N.md` to it: examples with their pictures, and the gate by token position.
    """

    def __init__(
        self,
        processor: MMCoTProcessor,
        stage: Stage,
        problems: Dataset,
        predictions: dict[str, dict],
        pictures: FeatureStore | PixelStore | None,
        folder: Path,
        batch_size: int,
    ):
        self.processor, self.stage, self.problems = processor, stage, problems
        self.predictions, self.pictures = predictions, pictures
        self.folder, self.batch_size = folder, batch_size

    def report(self, model: MMCoTForConditionalGeneration, step: int, is_main_process: bool) -> dict[str, float]:
        """
        Return `eval_accuracy_CLASS` for a stage that answers, `eval_accuracy_COLUMN` for one that checks, `eval_bleu4`
        etc. for rationales; and `eval_gate`.
        """
        predictions = {problem_id: dict(self.predictions.get(problem_id, {})) for problem_id in self.problems["id"]}
        return self.report_column(model, predictions, step, is_main_process)

    def report_column(
        self, model: MMCoTForConditionalGeneration, predictions: dict[str, dict], step: int, is_main_process: bool
    ) -> dict[str, float]:
        """Apply `report` to given columns of earlier stages, and add the stage's column to them."""
        options = PredictOptions(batch_size=self.batch_size)
        predict_stage(model, self.processor, self.stage, self.problems, predictions, options, self.pictures)
        metrics = {f"eval_{name}": value for name, value in self.scores(predictions).items() if value is not None}
        gate = self.gate_by_position(model, predictions)
        if gate is not None:
            metrics["eval_gate"] = gate.nanmean().item()
        if is_main_process:
            self.write_examples(predictions, metrics, gate, step)
        return metrics

    def scores(self, predictions: dict[str, dict]) -> dict[str, float | None]:
        if self.stage.answers:
            answers = checked_answers(self.problems, predictions)
            return {f"accuracy_{name}": value for name, value in accuracy(self.problems, answers).items()}
        if KINDS[self.stage.kind].make_target is not None:
            rows = self.problems.remove_columns("images")
            right = [predictions[row["id"]][self.stage.writes] == self.gold_target(row, predictions) for row in rows]
            return {f"accuracy_{self.stage.writes}": percentage(right)}
        if self.stage.writes != "rationale":
            return {}
        return rationale_scores(self.problems, {name: row["rationale"] for name, row in predictions.items()})

    def gold_target(self, problem: dict, predictions: dict[str, dict]) -> str:
        """Render the stage's target for a problem, from its gold columns and the columns that earlier stages wrote."""
        columns, earlier = predictions[problem["id"]], self.processor.stages.before(self.stage)
        written = {stage.writes: columns[stage.writes] for stage in earlier if stage.writes in columns}
        return self.stage.render_target({**written, **problem})

    @torch.no_grad()
    def gate_by_position(
        self, model: MMCoTForConditionalGeneration, predictions: dict[str, dict]
    ) -> torch.Tensor | None:
        """Return the gate of each token, averaged over hidden units and problems; None without pictures or gate."""
        with_pictures = [index for index, images in enumerate(self.problems["images"]) if images][: self.batch_size]
        if model.get_encoder().fusion is None or not self.stage.sees_pictures or not with_pictures:
            return None
        earlier = self.processor.stages.before(self.stage)
        rows = with_columns(without_gold(self.problems.select(with_pictures)), predictions, earlier)
        examples = tokenized(rows, self.stage, self.processor, with_targets=False)
        batch = StageCollator(self.processor, self.stage, self.pictures)(list(examples))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        mask = batch["attention_mask"].bool()
        if model.virtual_tokens is not None:
            batch = model.virtual_tokens.before_source(batch)
        gate = model.get_encoder()(**batch, output_fusion_attentions=True).fusion_gate
        if gate is None:  # the fusion has no gate for each token
            return None
        gates = gate.float().mean(dim=-1)[:, -mask.shape[1] :]  # virtual tokens are left out
        return gates.masked_fill(~mask, float("nan")).nanmean(dim=0).cpu()

    @staticmethod
    def load_pictures(problem: dict) -> list[Image.Image]:
        """Load a problem's pictures; none if a file is missing, because a run with stored features may lack them."""
        paths = [picture["path"] for picture in problem["images"] if not picture["bytes"]]
        if not all(Path(path).is_file() for path in paths):
            return []
        return [as_rgb(picture) for picture in read_pictures(problem)]

    def write_examples(
        self, predictions: dict[str, dict], metrics: dict[str, float], gate: torch.Tensor | None, step: int
    ) -> None:
        """Write `step-N.md`, and its pictures into a subfolder."""
        lines = [
            f"# {self.stage.name} stage, step {step}",
            "",
            *(f"- {name}: {metrics[name]:.4g}" for name in metrics),
            "",
        ]
        if gate is not None:
            weights = " ".join(f"{weight:.3f}" for weight in gate)
            lines += ["Gate (weight of the picture, 0 to 1) by token position:", weights, ""]
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        for number, problem in enumerate(self.problems.select(range(min(NUM_EXAMPLES, len(self.problems))))):
            lines += [f"## {problem['id']}", ""]
            for picture_number, picture in enumerate(self.load_pictures(problem)):
                name = f"pictures/{number}-{picture_number}.png"
                picture.save(self.folder / name)
                lines += [f"![{problem['id']}]({name})", ""]
            choices = " ".join(
                f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)
            )
            lines += [f"{problem['question']} {choices}", "", f"- gold: {self.gold_target(problem, predictions)}"]
            lines += [f"- written: {predictions[problem['id']][self.stage.writes]}", ""]
        write_text(self.folder / f"step-{step}.md", "\n".join(lines))


class SharedReport:
    """
    At each evaluation of a model that all stages share, runs all stages, and reports each of them.

    Args:
        reports: the report of each stage that has a model, by its name. Their problems are the same.
    """

    def __init__(self, reports: dict[str, ValidationReport]):
        self.reports = reports

    def report(self, model: MMCoTForConditionalGeneration, step: int, is_main_process: bool) -> dict[str, float]:
        """Return the metrics of all stages; `eval_gate` is the mean over the stages that read pictures."""
        models, metrics, gates = share_model(model, list(self.reports)), {}, []
        any_report = next(iter(self.reports.values()))
        predictions: dict[str, dict] = {problem_id: {} for problem_id in any_report.problems["id"]}
        for stage in any_report.processor.stages:
            if stage.kind == RETRIEVE:
                add_passages(predictions, any_report.processor, stage, any_report.problems)
                continue
            found = self.reports[stage.name].report_column(models[stage.name], predictions, step, is_main_process)
            gates += [found.pop("eval_gate")] if "eval_gate" in found else []
            metrics |= found
        return {**metrics, "eval_gate": sum(gates) / len(gates)} if gates else metrics


def plot_curves(log_history: list[dict[str, float]], file: Path) -> None:
    """Plot the losses by step, and scores and gate if they were logged."""
    panels = {"loss": ("loss", "eval_loss"), "accuracy, %": ("eval_accuracy_Avg", "eval_accuracy_IMG")}
    panels |= {"BLEU-4, ROUGE-L, %": ("eval_bleu4", "eval_rougeL"), "gate": ("eval_gate",)}
    logged = {
        title: [name for name in names if any(name in entry for entry in log_history)]
        for title, names in panels.items()
    }
    logged = {title: names for title, names in logged.items() if names}
    if not logged:
        return
    figure = Figure(figsize=(5 * len(logged), 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(logged), squeeze=False)[0], logged.items(), strict=True):
        for name in names:
            entries = [entry for entry in log_history if name in entry]
            axes.plot([entry["step"] for entry in entries], [entry[name] for entry in entries], label=name, marker=".")
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(file)


def hardware() -> str:
    """Describe the device that this process trains on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
