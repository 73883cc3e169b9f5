"""transformers' Seq2SeqTrainer with what is ours: batches by length, the loss without logits of padding.

What is trained, on what and when, is `training.py`'s.
"""

import functools

import torch
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, TrainerCallback

from mmcot.batching import LengthBatchSampler
from mmcot.examples import lengths_of


class StageTrainer(Seq2SeqTrainer):
    """Batches by length, and the loss without logits of padding. The loss is the mean over all target tokens."""

    def get_train_dataloader(self) -> DataLoader:
        """With `train_sampling_strategy: group_by_length` ours (`batching.py`), else the Trainer's own."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super().get_train_dataloader()
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
        if not model.training:
            num_items_in_batch = self.evaluation_weight(inputs)
        return super().compute_loss(model, {**inputs, "skip_logits": True}, return_outputs, num_items_in_batch)

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


class EpochOf(TrainerCallback):
    """Tells a batch sampler the epoch, in a resumed run too, where accelerate's wrappers hide the sampler."""

    def __init__(self, sampler: LengthBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.set_epoch(int(state.epoch))
