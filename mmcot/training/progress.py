"""What a training tells while it runs, beside its loss: speed and memory, how well the stage writes by now, how much of
the picture it takes, examples to read, and at its end its curves.

Figures go through the Trainer's own log, and so to TensorBoard or whatever `report_to` names. Nothing here changes what
is trained.
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

from mmcot.evaluation.metrics import accuracy, checked_answers, rationale_scores
from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.pixel_store import PixelStore
from mmcot.pictures.reading import read_pictures
from mmcot.prediction.columns import with_columns
from mmcot.prediction.examples import StageCollator, tokenized
from mmcot.prediction.predictor import PredictOptions, predict_stage
from mmcot.problems.schema import without_gold
from mmcot.storage.files import write_text
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.pictures_mmcot import as_rgb
from modeling_mmcot.stage_mmcot import LETTERS, Stage

NUM_EXAMPLES = 8


class Speed:
    """Real tokens and problems a second of the steps since it was last asked, of all processes together."""

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        self.start_anew()

    def start_anew(self) -> None:
        self.tokens: list[torch.Tensor] = []  # counted when they are asked for: a device is not waited for at each step
        self.problems = 0
        self.begin = time.perf_counter()

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        self.tokens.append(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum())
        self.problems += len(inputs["labels"])

    def tell(self) -> dict[str, float]:
        seconds = (time.perf_counter() - self.begin) / self.num_processes
        tokens = sum(count.item() for count in self.tokens)
        told = {"tokens_per_second": round(tokens / seconds), "problems_per_second": round(self.problems / seconds, 2)}
        self.start_anew()
        return {**told, "memory_gb": round(memory() / 1e9, 2)}


def memory() -> int:
    """The most bytes that were taken on the GPU, or those that are resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


class ValidationReport:
    """
    At each evaluation the stage writes, free-running, for some validation problems.

    Args:
        problems: validation problems with their gold columns, which are taken away before anything is written.
        predictions: what the earlier stages wrote for them, by problem id.
        folder: each evaluation leaves `step-N.md` there: examples with their pictures, and the gate by token position.
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

    def tell(self, model: MMCoTForConditionalGeneration, step: int, is_main_process: bool) -> dict[str, float]:
        """`eval_accuracy_CLASS` of a stage that answers, else `eval_bleu4` and so on; and `eval_gate`."""
        predictions = {problem_id: dict(self.predictions.get(problem_id, {})) for problem_id in self.problems["id"]}
        options = PredictOptions(batch_size=self.batch_size)
        predict_stage(model, self.processor, self.stage, self.problems, predictions, options, self.pictures)
        told = {f"eval_{name}": value for name, value in self.scores(predictions).items() if value is not None}
        gate = self.gate_by_position(model, predictions)
        if gate is not None:
            told["eval_gate"] = gate.nanmean().item()
        if is_main_process:
            self.write_examples(predictions, told, gate, step)
        return told

    def scores(self, predictions: dict[str, dict]) -> dict[str, float | None]:
        if self.stage.answers:
            answers = checked_answers(self.problems, predictions)
            return {f"accuracy_{name}": value for name, value in accuracy(self.problems, answers).items()}
        if self.stage.writes != "rationale":
            return {}
        return rationale_scores(self.problems, {name: row["rationale"] for name, row in predictions.items()})

    @torch.no_grad()
    def gate_by_position(
        self, model: MMCoTForConditionalGeneration, predictions: dict[str, dict]
    ) -> torch.Tensor | None:
        """How much of the picture each token takes on average over hidden units and problems; None without pictures."""
        seeing = [index for index, images in enumerate(self.problems["images"]) if images][: self.batch_size]
        if model.get_encoder().fusion is None or not self.stage.sees_pictures or not seeing:
            return None
        earlier = self.processor.stages.before(self.stage)
        rows = with_columns(without_gold(self.problems.select(seeing)), predictions, earlier)
        examples = tokenized(rows, self.stage, self.processor, with_targets=False)
        batch = StageCollator(self.processor, self.stage, self.pictures)(list(examples))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        mask = batch["attention_mask"].bool()
        if model.virtual_tokens is not None:
            batch = model.virtual_tokens.before_source(batch)
        gate = model.get_encoder()(**batch, output_fusion_attentions=True).fusion_gate
        shares = gate.float().mean(dim=-1)[:, -mask.shape[1] :]  # without those of virtual tokens
        return shares.masked_fill(~mask, float("nan")).nanmean(dim=0).cpu()

    @staticmethod
    def shown(problem: dict) -> list[Image.Image]:
        """Its pictures; none where features stand in for files that are not at hand."""
        paths = [picture["path"] for picture in problem["images"] if not picture["bytes"]]
        if not all(Path(path).is_file() for path in paths):
            return []
        return [as_rgb(picture) for picture in read_pictures(problem)]

    def write_examples(
        self, predictions: dict[str, dict], told: dict[str, float], gate: torch.Tensor | None, step: int
    ) -> None:
        """`step-N.md`, with the pictures beside it."""
        lines = [f"# {self.stage.name} stage, step {step}", "", *(f"- {name}: {told[name]:.4g}" for name in told), ""]
        if gate is not None:
            lines += ["Share of the picture by token position:", " ".join(f"{share:.3f}" for share in gate), ""]
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        for number, problem in enumerate(self.problems.select(range(min(NUM_EXAMPLES, len(self.problems))))):
            lines += [f"## {problem['id']}", ""]
            for picture_number, picture in enumerate(self.shown(problem)):
                name = f"pictures/{number}-{picture_number}.png"
                picture.save(self.folder / name)
                lines += [f"![{problem['id']}]({name})", ""]
            choices = " ".join(
                f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)
            )
            lines += [f"{problem['question']} {choices}", "", f"- gold: {self.stage.render_target(problem)}"]
            lines += [f"- written: {predictions[problem['id']][self.stage.writes]}", ""]
        write_text(self.folder / f"step-{step}.md", "\n".join(lines))


def plot_curves(log_history: list[dict[str, float]], file: Path) -> None:
    """Losses, and accuracy and gate where they were told, by step."""
    panels = {"loss": ("loss", "eval_loss"), "accuracy, %": ("eval_accuracy_Avg", "eval_accuracy_IMG")}
    panels |= {"BLEU-4, ROUGE-L, %": ("eval_bleu4", "eval_rougeL"), "share of the picture": ("eval_gate",)}
    told = {
        title: [name for name in names if any(name in entry for entry in log_history)]
        for title, names in panels.items()
    }
    told = {title: names for title, names in told.items() if names}
    if not told:
        return
    figure = Figure(figsize=(5 * len(told), 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(told), squeeze=False)[0], told.items(), strict=True):
        for name in names:
            entries = [entry for entry in log_history if name in entry]
            axes.plot([entry["step"] for entry in entries], [entry[name] for entry in entries], label=name, marker=".")
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(file)


def hardware() -> str:
    """What a process trains on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
