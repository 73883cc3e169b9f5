"""Trainer callbacks: epoch of the batch sampler, check of the step size, best checkpoint, graceful shutdown."""

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

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # sent by schedulers, and by Ctrl-C


class SamplerEpoch(TrainerCallback):
    """Sets the epoch of a batch sampler. In a resumed run accelerate's wrappers hide the sampler from the Trainer."""

    def __init__(self, sampler: LengthBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.set_epoch(int(state.epoch))


class StepSizeCheck(TrainerCallback):
    """
    Allows a run to resume with another number of processes, another batch size and other accumulation, if a step has as
    many problems as before.
    """

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        if state.global_step == 0 or not has_length(train_dataloader):
            return
        batches, accumulated = len(train_dataloader), args.gradient_accumulation_steps
        steps = math.ceil(batches / accumulated)
        epochs, rest = divmod(state.global_step, steps)
        is_unchanged = abs(epochs + min(rest * accumulated, batches) / batches - state.epoch) < 1e-6
        # Tolerance: with another batch size, the last batches of an epoch can be fuller or emptier.
        if not is_unchanged and not 0.8 < state.epoch / state.global_step * steps < 1.25:
            raise RunStopped(
                f"The checkpoint was written with {state.global_step / state.epoch:.1f} steps per epoch, and an epoch "
                f"now has {steps}: set per_device_train_batch_size and gradient_accumulation_steps so that a step over "
                f"all {args.world_size} processes contains as many problems as before."
            )


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint so far by its step, so that a run can resume after its folder was moved."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.best_global_step:
            return
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if args.load_best_model_at_end and not best.is_dir():
            raise RunStopped(
                f"{best} is missing, the best checkpoint so far, which load_best_model_at_end needs: restore it, or "
                f"remove {args.output_dir} to train the stage again."
            )
        state.best_model_checkpoint = str(best)


class Termination(TrainerCallback):
    """
    Graceful shutdown on SIGTERM, which schedulers send, or Ctrl-C: finishes the step, saves a checkpoint and ends the
    training. Handles the signals while used as a context manager. Launchers forward signals, so one can arrive twice.

    Attributes:
        received: the received signal; None if there was none.
    """

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "Termination":
        self.previous_handlers = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def receive(self, signal_number, frame) -> None:
        if self.received is None and PartialState().is_main_process:
            # Not `print`, which is not reentrant: the signal can interrupt it.
            os.write(2, b"Stopping: this step is finished and saved first (Ctrl-\\ stops at once, without saving).\n")
        self.received = signal.Signals(signal_number)

    def received_by_any(self) -> bool:
        """Whether any process received a signal: all processes have to end at the same step."""
        if PartialState().num_processes > 1:
            self.received = next(
                (received for received in gather_object([self.received]) if received is not None), None
            )
        return self.received is not None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.received_by_any():
            args.save_total_limit = None  # else the Trainer can remove the newest checkpoint at the end
            control.should_training_stop = True
            control.should_save = not state.epoch.is_integer()  # otherwise `on_epoch_end` saves

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.received is not None:
            control.should_save = state.epoch.is_integer()
            control.should_evaluate = control.should_evaluate and state.epoch.is_integer()
