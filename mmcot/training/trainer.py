"""A Seq2SeqTrainer with batches of similar lengths, a loss that computes no logits for padding, atomic checkpoints, and
graceful shutdown on SIGTERM.

`stage.py` selects the model, its training examples and the order of stages.
"""

import functools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import rotate_checkpoints

from mmcot.prediction.batching import LengthBatchSampler
from mmcot.prediction.examples import StageCollator, lengths_of
from mmcot.storage.checkpoints import UNFINISHED, RunStopped, finish_checkpoint
from mmcot.training.callbacks import STOP_SIGNALS, SamplerEpoch
from mmcot.training.progress import SharedReport, Speed, ValidationReport
from modeling_mmcot import MMCoTForConditionalGeneration


class StageTrainer(Seq2SeqTrainer):
    """
    Trains a stage. The loss is the mean over all target tokens.

    Raises:
        RunStopped: a loss is not finite, or a checkpoint cannot be written.
    """

    is_saving = False
    validation_report: ValidationReport | SharedReport | None = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.label_smoother = None  # the model's own loss smooths labels, without logits for padding

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of the batches of `batching.py` for `group_by_length`, else the Trainer's own loader."""
        loader = super().get_train_dataloader() if not self.groups_by_length() else self.length_dataloader()
        base_loader = getattr(loader, "base_dataloader", loader)
        base_loader.worker_init_fn = functools.partial(start_worker, initialize=base_loader.worker_init_fn)
        return loader

    def groups_by_length(self) -> bool:
        return self.args.train_sampling_strategy == "group_by_length"

    def length_dataloader(self) -> DataLoader:
        arguments = self.args
        batches_per_step = self.accelerator.num_processes * arguments.gradient_accumulation_steps
        step_size = arguments.train_batch_size * batches_per_step
        sampler = LengthBatchSampler(lengths_of(self.train_dataset), step_size, batches_per_step, arguments.seed)
        self.add_callback(SamplerEpoch(sampler))
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
        )
        return self.accelerator.prepare(loader)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of all parameters that decay: as in transformers, but without the gates of Flamingo."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("_gate")]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "skip_logits": True, "smoothing": self.args.label_smoothing_factor}
        ids = inputs.pop("ids")
        if model.training:
            self.speed.count(inputs)
        if not model.training:
            num_items_in_batch = self.evaluation_divisor(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if model.training and not torch.isfinite(loss).all():  # one loss per GPU if a process uses several
            raise RunStopped(
                f"The loss is {loss.mean().item()} at step {self.state.global_step + 1}, for the problems "
                f"{', '.join(ids)}. Checkpoints in {self.args.output_dir} are from earlier steps."
            )
        return result

    @functools.cached_property
    def speed(self) -> Speed:
        return Speed(self.accelerator.num_processes)

    def log(self, logs: dict[str, float], *arguments, **options) -> None:
        if "loss" in logs:
            logs = {**logs, **self.speed.report()}
        super().log(logs, *arguments, **options)

    def evaluate(self, *arguments, **options) -> dict[str, float]:
        metrics = super().evaluate(*arguments, **options)
        if self.validation_report is not None:
            model = self.accelerator.unwrap_model(self.model)
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            # A data loader draws a seed, which would change the dropout of later steps.
            with self.accelerator.autocast(), torch.random.fork_rng(devices):
                report = self.validation_report.report(
                    model.get_base_model() if isinstance(model, PeftModel) else model,
                    self.state.global_step,
                    self.is_world_process_zero(),
                )
            self.log(report)
            metrics.update(report)
        self.speed.reset()  # the time of an evaluation does not count as training
        return metrics

    def evaluation_divisor(self, inputs: dict[str, torch.Tensor]) -> float:
        """
        Return the divisor of a batch's summed loss. The Trainer averages the losses of batches, weighted by their
        numbers of problems; with this divisor, the average is the mean over all target tokens. (With several processes,
        the Trainer repeats problems to fill the last batches, and counts them twice.)
        """
        divisor = self.mean_target_length * len(inputs["labels"])
        # The Trainer multiplies the loss by the number of processes, to undo an average that is absent in evaluation.
        return divisor * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)

    @functools.cached_property
    def mean_target_length(self) -> float:
        return sum(target for _, target in lengths_of(self.eval_dataset)) / len(self.eval_dataset)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self.is_saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        """
        Let the Trainer write the checkpoint under a temporary name. When it is complete, write the list of its files
        and rename it.
        """
        folder = Path(self.args.output_dir)
        unfinished = folder / UNFINISHED
        written = unfinished / f"checkpoint-{self.state.global_step}"
        checkpoint = folder / written.name
        self.is_saving = True
        try:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()  # fails if the run folder was lost
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(checkpoint)
            if self.args.should_save:
                best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
                # Without the path of the best checkpoint, so that a run can be moved.
                self.state.save_to_json(str(written / "trainer_state.json"))
                self.state.best_model_checkpoint = best
                finish_checkpoint(written, checkpoint)
                unfinished.rmdir()
                rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, True)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises any of them
            shutil.rmtree(unfinished, ignore_errors=True)
            raise RunStopped(
                f"The checkpoint of step {self.state.global_step} could not be written to {folder}: {error}. Earlier "
                f"checkpoints are complete; the same command resumes from the last one."
            ) from error
        finally:
            self.is_saving = False

    def _load_best_model(self) -> None:
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(self.model, MMCoTForConditionalGeneration) and not is_sharded:
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def load_weights(model: MMCoTForConditionalGeneration, checkpoint: str) -> None:
    """
    Load the weights of a checkpoint into the model. The Trainer loads by parameter names, but a ViT is saved under
    older names than it has in memory: its weights would silently stay unchanged. `from_pretrained` maps the names.
    """
    # Copied: a run that resumed with the loaded tensors themselves differed from an uninterrupted one in the last bits.
    model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())


def start_worker(number: int, initialize: Callable[[int], None] | None) -> None:
    """
    Start a data loader's worker, which ignores the stop signals that a scheduler sends to all processes of a job,
    because the Trainer handles them.
    """
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    if initialize is not None:
        initialize(number)


class NamedCollator(StageCollator):
    """Adds problem ids to batches, for error messages."""

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor | list[str]]:
        return {**super().__call__(examples), "ids": [row["id"] for row in examples]}
