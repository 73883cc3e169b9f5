"""Checks of the options of the Trainer and of `trl.ModelConfig`, before data is read.

Unsupported options are refused with a reason. Options that fail only when they are used are tried.
`tests/recipes/test_trainer_options.py` covers every option of both classes.
"""

import copy
from collections.abc import Set

import torch
from accelerate import PartialState
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, get_scheduler
from trl import ModelConfig

_GENERATION = "generation is set in the entry of a stage (max_target_length, num_beams)"
_BATCHES = "batches are made by the collator of the stages"
_EVALUATION = "an evaluation computes the loss, and report_problems adds scores of generated texts"
_PUBLISHING = "push_to_hub.py publishes a run"
_ONE_COMMAND = "one command trains, evaluates, predicts and resumes"

REFUSED = {
    **dict.fromkeys(("predict_with_generate", "generation_max_length", "generation_num_beams"), _GENERATION),
    **dict.fromkeys(("generation_config", "sortish_sampler"), _GENERATION),
    **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name"), _BATCHES),
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "include_for_metrics"), _EVALUATION),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _EVALUATION),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _PUBLISHING),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUBLISHING),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint"), _ONE_COMMAND),
    "auto_find_batch_size": "another batch size gives other weights, without a warning",
    "ignore_data_skip": "a resumed run would train on the same problems again",
    "restore_callback_states_from_checkpoint": "the callbacks of a run have no state",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "use_liger_kernel": "its kernels do not support this model",
    "liger_kernel_config": "its kernels do not support this model",
    "use_cache": "training uses no cache",
    "enable_jit_checkpoint": "a run saves a checkpoint and ends on SIGTERM in any case",
    "parallelism_config": "a run is split only by problems or by shards (configs/accelerate)",
    "optim_target_modules": "it belongs to optimizers that are not tested",
    "debug": "its hooks do not accept the masks of this model",
    "include_num_input_tokens_seen": "the log reports tokens_per_second",
    "lora_target_parameters": "it applies to layers that T5 does not have: use lora_target_modules",
    "neftune_noise_alpha": "it adds noise to the output of an embedding module that T5's encoder does not call",
    "lora_task_type": "it is always SEQ_2_SEQ_LM",
}


def check_trainer_options(
    training_arguments: Seq2SeqTrainingArguments,
    model_config: ModelConfig,
    given_keys: Set[str],
    reports_problems: bool,
    config: str,
) -> None:
    """
    Args:
        given_keys: the names of all settings in the recipe and on the command line.
        reports_problems: whether `report_problems` is set.

    Raises:
        ValueError: a setting is not supported or cannot be used, with the reason.
    """
    for name in sorted(given_keys & REFUSED.keys()):
        raise ValueError(f"{config}: {name} is set, which is not supported: {REFUSED[name]}.")
    if training_arguments.accelerator_config.dispatch_batches:
        raise ValueError(f"{config}: accelerator_config has dispatch_batches, which is not supported: {_BATCHES}.")
    if "model_revision" in given_keys and model_config.model_name_or_path is None:
        raise ValueError(f"{config}: model_revision is set, which requires model_name_or_path.")
    for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
        if name in given_keys and not model_config.load_in_4bit:
            raise ValueError(f"{config}: {name} is set, which requires load_in_4bit: true.")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor"):
        if getattr(training_arguments, name) and training_arguments.dataloader_num_workers == 0:
            raise ValueError(f"{config}: {name} is set, which requires dataloader_num_workers of 1 or more.")
    if training_arguments.fsdp and PartialState().num_processes == 1:
        raise ValueError(f"{config}: fsdp is set, which requires several processes: accelerate launch …")
    metric = training_arguments.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") != "loss" and not reports_problems:
        raise ValueError(
            f"{config}: metric_for_best_model is {metric!r}; expected eval_loss, or with report_problems a score of "
            f"the generated texts."
        )
    check_optimizer(training_arguments, config)


def check_optimizer(training_arguments: Seq2SeqTrainingArguments, config: str) -> None:
    """
    Create the optimizer and the scheduler for a small parameter, because only that detects a missing library or a wrong
    argument.

    Raises:
        ValueError: with the error of the optimizer or the scheduler.
    """
    name = training_arguments.optim.value
    try:
        optimizer_class, options = Seq2SeqTrainer.get_optimizer_cls_and_kwargs(training_arguments)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ValueError(f"{config}: optim is {name!r}, which cannot be used: {error}") from error
    optim_args = training_arguments.optim_args
    if optim_args is not None:
        without = copy.copy(training_arguments)
        without.optim_args = None
        if Seq2SeqTrainer.get_optimizer_cls_and_kwargs(without)[1] == options:
            raise ValueError(f"{config}: optim_args is {optim_args!r}, which has no effect on {name}.")
    try:
        optimizer_class([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config}: optim_args {optim_args!r} cannot be used: {error}") from error
    scheduler = training_arguments.lr_scheduler_type
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kwargs = dict(training_arguments.lr_scheduler_kwargs or {})
    try:
        get_scheduler(scheduler, sgd, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{config}: lr_scheduler_type {scheduler.value!r} with lr_scheduler_kwargs {kwargs} cannot be used: {error}"
        ) from error
