"""Callbacks of the Trainer: the data's epoch, equal steps in all processes, best checkpoint, shutdown on a signal."""

import math
import os
import signal
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from mmcot.prediction.batching import LengthBatchSampler
from mmcot.storage.checkpoints import RunStopped

STOPPING = (signal.SIGTERM, signal.SIGINT)  # a scheduler's, and Ctrl-C


class EpochOf(TrainerCallback):
    """Tells a batch sampler the epoch, in a resumed run too, where accelerate's wrappers hide the sampler."""

    def __init__(self, sampler: LengthBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.set_epoch(int(state.epoch))


class SameSteps(TrainerCallback):
    """A run goes on with other processes, batches and accumulation, as long as a step holds as many problems."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        if state.global_step == 0 or not has_length(train_dataloader):
            return
        batches, accumulated = len(train_dataloader), args.gradient_accumulation_steps
        steps = math.ceil(batches / accumulated)
        epochs, rest = divmod(state.global_step, steps)
        is_as_before = abs(epochs + min(rest * accumulated, batches) / batches - state.epoch) < 1e-6
        # Otherwise shared out, the last batches of an epoch can be fuller or emptier.
        if not is_as_before and not 0.8 < state.epoch / state.global_step * steps < 1.25:
            raise RunStopped(
                f"The checkpoint comes from {state.global_step / state.epoch:.1f} steps an epoch, and here an epoch "
                f"has {steps}: choose per_device_train_batch_size and gradient_accumulation_steps such that, times "
                f"{args.world_size} processes, a step holds as many problems as before."
            )


class BestCheckpoint(TrainerCallback):
    """The best checkpoint so far is known by its step, so that a run goes on wherever its folder is moved to."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.best_global_step:
            return
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if args.load_best_model_at_end and not best.is_dir():
            raise RunStopped(
                f"{best} is missing, the best checkpoint so far, which load_best_model_at_end would take: restore it, "
                f"or remove {args.output_dir} to train the stage anew."
            )
        state.best_model_checkpoint = str(best)


class Termination(TrainerCallback):
    """
    SIGTERM, which schedulers send, or Ctrl-C: the step is ended, a checkpoint saved, the training ended. A context,
    within which the signals are waited for; launchers pass them on, so that one can come twice.

    Attributes:
        asked: the signal that came, None without one.
    """

    def __init__(self):
        self.asked: signal.Signals | None = None

    def __enter__(self) -> "Termination":
        self.earlier = {one: signal.signal(one, self.ask) for one in STOPPING}
        return self

    def __exit__(self, *exception) -> None:
        for one, handler in self.earlier.items():
            signal.signal(one, handler)

    def ask(self, signal_number, frame) -> None:
        if self.asked is None and PartialState().is_main_process:
            # `print` must not be interrupted by itself.
            os.write(2, b"Stopping: this step is ended and saved first (Ctrl-\\ stops at once, without).\n")
        self.asked = signal.Signals(signal_number)

    def is_asked_of_any(self) -> bool:
        """So that all processes end at the same step."""
        if PartialState().num_processes > 1:
            self.asked = next((one for one in gather_object([self.asked]) if one is not None), None)
        return self.asked is not None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.is_asked_of_any():
            args.save_total_limit = None  # by which the Trainer can remove the newest checkpoint at its end
            control.should_training_stop = True
            control.should_save = not state.epoch.is_integer()  # else at the end of the epoch

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.asked is not None:
            control.should_save = state.epoch.is_integer()
            control.should_evaluate = control.should_evaluate and state.epoch.is_integer()
