"""transformers' Seq2SeqTrainer with what is ours: batches by length, the loss without logits of padding, checkpoints
that are whole or not there, and an end in good order when it is told to stop.

What is trained, on what and when, is `training.py`'s.
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
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import rotate_checkpoints

from mmcot.prediction.batching import LengthBatchSampler
from mmcot.prediction.examples import StageCollator, lengths_of
from mmcot.storage.checkpoints import UNFINISHED, RunStopped, finish_checkpoint
from mmcot.training.callbacks import STOPPING, EpochOf
from mmcot.training.progress import Speed, ValidationReport
from modeling_mmcot import MMCoTForConditionalGeneration


class StageTrainer(Seq2SeqTrainer):
    """
    The Trainer of a stage. The loss is the mean over all target tokens.

    Raises:
        RunStopped: a loss is not finite, or a checkpoint cannot be written.
    """

    is_saving = False
    validation_report: ValidationReport | None = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.label_smoother = None  # the model's own loss smooths, which needs no logits of padding

    def get_train_dataloader(self) -> DataLoader:
        """With `train_sampling_strategy: group_by_length` ours (`batching.py`), else the Trainer's own."""
        loader = super().get_train_dataloader() if not self.groups_by_length() else self.length_dataloader()
        workers = getattr(loader, "base_dataloader", loader)
        workers.worker_init_fn = functools.partial(start_worker, then=workers.worker_init_fn)
        return loader

    def groups_by_length(self) -> bool:
        return self.args.train_sampling_strategy == "group_by_length"

    def length_dataloader(self) -> DataLoader:
        arguments = self.args
        batches_per_step = self.accelerator.num_processes * arguments.gradient_accumulation_steps
        step_size = arguments.train_batch_size * batches_per_step
        sampler = LengthBatchSampler(lengths_of(self.train_dataset), step_size, batches_per_step, arguments.seed)
        self.add_callback(EpochOf(sampler))
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "skip_logits": True, "smoothing": self.args.label_smoothing_factor}
        ids = inputs.pop("ids")
        if model.training:
            self.speed.count(inputs)
        if not model.training:
            num_items_in_batch = self.evaluation_weight(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if model.training and not torch.isfinite(loss).all():  # of several GPUs of one process, a loss each
            raise RunStopped(
                f"The loss is {loss.mean().item()} at step {self.state.global_step + 1}, for the problems "
                f"{', '.join(ids)}. Checkpoints in {self.args.output_dir} are those of earlier steps."
            )
        return result

    @functools.cached_property
    def speed(self) -> Speed:
        return Speed(self.accelerator.num_processes)

    def log(self, logs: dict[str, float], *arguments, **options) -> None:
        if "loss" in logs:
            logs = {**logs, **self.speed.tell()}
        super().log(logs, *arguments, **options)

    def evaluate(self, *arguments, **options) -> dict[str, float]:
        metrics = super().evaluate(*arguments, **options)
        if self.validation_report is not None:
            model = self.accelerator.unwrap_model(self.model)
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            # A data loader draws a seed, by which the dropout of the steps to come would be another one.
            with self.accelerator.autocast(), torch.random.fork_rng(devices):
                told = self.validation_report.tell(
                    model.get_base_model() if isinstance(model, PeftModel) else model,
                    self.state.global_step,
                    self.is_world_process_zero(),
                )
            self.log(told)
            metrics.update(told)
        self.speed.reset()  # what an evaluation takes is no training
        return metrics

    def evaluation_weight(self, inputs: dict[str, torch.Tensor]) -> float:
        """
        The Trainer averages batches by their number of problems: with this, to the mean over all target tokens. (On
        several processes it fills the last batches with problems a second time, and those count twice.)
        """
        weight = self.mean_target_length * len(inputs["labels"])
        # It multiplies the loss by the number of processes then, to undo an average that evaluation does not take.
        return weight * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)

    @functools.cached_property
    def mean_target_length(self) -> float:
        return sum(target for _, target in lengths_of(self.eval_dataset)) / len(self.eval_dataset)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self.is_saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        """The Trainer's own, written beside the others under another name; whole, with its list of files, it moves."""
        folder = Path(self.args.output_dir)
        unfinished = folder / UNFINISHED
        written = unfinished / f"checkpoint-{self.state.global_step}"
        checkpoint = folder / written.name
        self.is_saving = True
        try:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()  # not its parents: a folder that is lost is not made anew
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(checkpoint)
            if self.args.should_save:
                best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
                self.state.save_to_json(str(written / "trainer_state.json"))  # without a path: a run can be moved
                self.state.best_model_checkpoint = best
                finish_checkpoint(written, checkpoint)
                unfinished.rmdir()
                rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, True)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them
            shutil.rmtree(unfinished, ignore_errors=True)
            raise RunStopped(
                f"The checkpoint of step {self.state.global_step} could not be written to {folder}: {error}. Earlier "
                f"ones are whole; the same command goes on from the last of them."
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
    Those of a checkpoint, into the model. The Trainer loads by parameter names, and a ViT is saved under older names
    than it has in memory: its weights would silently stay as they are. `from_pretrained` knows both.
    """
    # Copied: a run that went on with its tensors themselves differed from the uninterrupted one in last bits.
    model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())


def start_worker(number: int, then: Callable[[int], None] | None) -> None:
    """Of a data loader: a signal that is sent to all processes of a job is for the one that trains to answer."""
    for one in STOPPING:
        signal.signal(one, signal.SIG_IGN)
    if then is not None:
        then(number)


class NamedCollator(StageCollator):
    """Batches with their problems' ids, to name them where something is wrong."""

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor | list[str]]:
        return {**super().__call__(examples), "ids": [row["id"] for row in examples]}
