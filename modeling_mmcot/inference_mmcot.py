"""Runs the stages: problems with their pictures -> each stage's column.

`write_column` is the one place where a stage's column is written; `mmcot.predict` uses it as well. Everything is
generated freely from the problem, without any gold column.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import (
    BatchFeature,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StopStringCriteria,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .chat_mmcot import Conversation
from .generation_mmcot import greedy_search, packed_linears
from .loading_mmcot import load_stages, stage_model
from .processing_mmcot import TOKENIZING, MMCoTProcessor
from .settings_mmcot import decoding_config, given_settings
from .stage_mmcot import ANSWER, CHOOSE, GENERATE, GOLD_COLUMNS, Stage, read_answer

logger = logging.get_logger(__name__)

# In a row of `write_column`: whether the generated text was cut at the limit of new tokens.
UNFINISHED = "unfinished"


def write_column(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: list[dict],
    inputs: dict[str, torch.Tensor],
    decode_answer: bool = False,
    streamer: BaseStreamer | None = None,
    **generation,
) -> list[dict]:
    """
    What a stage writes for a batch of problems.

    Args:
        problems (`list[dict]`): rows with the columns that the stage reads.
        inputs (`dict`): their tensors, as the processor gives them, or with `vision_features` and `vision_mask` in
            place of pixels.
        decode_answer (`bool`): of an answer stage, generate "The answer is (B)." too and read it (the paper's way).
        streamer (`BaseStreamer`, *optional*): gets the tokens of a problem's text as they are generated.
        generation: settings of `generate`, in place of the model's own.

    Returns:
        For each problem the new columns. A stage that answers gives `answer` (index, -1 without choices),
        `answer_text` and `scores` (a probability per choice), and where asked `decoded_answer`; any other stage gives
        the column that it writes. A generated text comes with `UNFINISHED`, which `count_unfinished` removes.
    """
    for problem in problems:
        leaked = [column for column in GOLD_COLUMNS if column in problem]
        if leaked:
            raise ValueError(f"A problem has gold columns ({', '.join(leaked)}): take them away before predicting.")
    decoding_config(model.generation_config, generation)  # what is wrong in it, before anything is computed
    encoded = encode(model, inputs)
    is_finite = encoded["encoder_outputs"].last_hidden_state.isfinite().flatten(1).all(dim=1)
    refuse_non_finite(problems, stage, is_finite)
    return KINDS[stage.kind](model, processor, stage, problems, encoded, decode_answer, streamer, generation)


def write_text(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: list[dict],
    encoded: dict,
    decode_answer: bool,
    streamer: BaseStreamer | None,
    generation: dict[str, Any],
) -> list[dict]:
    """`write_column` of a stage that generates a text."""
    generated = generate_finite(model, processor, stage, problems, encoded, streamer=streamer, **generation)
    return [{stage.writes: text, UNFINISHED: is_cut} for text, is_cut in zip(*generated, strict=True)]


def write_answer(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: list[dict],
    encoded: dict,
    decode_answer: bool,
    streamer: BaseStreamer | None,
    generation: dict[str, Any],
) -> list[dict]:
    """`write_column` of a stage that chooses an answer; it generates one for a problem without choices."""
    columns = choose_answers(model, processor, stage, problems, encoded)
    open_ended = [index for index, column in enumerate(columns) if column["answer"] == -1]
    if decode_answer or open_ended:
        generated = generate_finite(model, processor, stage, problems, encoded, streamer=streamer, **generation)
        for index, (text, is_cut) in enumerate(zip(*generated, strict=True)):
            columns[index][UNFINISHED] = is_cut
            if index in open_ended:
                columns[index][ANSWER] = text
            if decode_answer:
                columns[index]["decoded_answer"] = read_answer(text, len(problems[index]["choices"]))
    return columns


KINDS = {GENERATE: write_text, CHOOSE: write_answer}


def count_unfinished(columns: list[dict]) -> int:
    """How many texts end at the limit of new tokens; their marks are removed."""
    return sum(written.pop(UNFINISHED, False) for written in columns)


def refuse_non_finite(problems: list[dict], stage: Stage, is_finite: torch.BoolTensor) -> None:
    """
    Raises:
        ValueError: a problem's numbers are not all finite; it names the first such problem and the stage.
    """
    for problem, is_right in zip(problems, is_finite.tolist(), strict=True):
        if not is_right:
            name = problem.get("id") or problem.get("question", "")
            raise ValueError(
                f"The {stage.name} stage computes NaN or infinity for the problem {name!r:.100}: its weights, or the "
                f"picture's features, hold numbers that are not finite (float16 overflows in T5: use bfloat16)."
            )


def generate_finite(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: list[dict],
    encoded: dict,
    streamer: BaseStreamer | None = None,
    **generation,
) -> tuple[list[str], list[bool]]:
    """`generate_texts`, where a NaN of the decoder is an error that names the stage and the problem."""
    try:
        return generate_texts(model, processor, encoded, streamer=streamer, **generation)
    except FloatingPointError:
        for row, problem in enumerate(problems):
            states = encoded["encoder_outputs"].last_hidden_state[row : row + 1]
            alone = {name: encoded[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            alone["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
            try:
                generate_texts(model, processor, alone, **generation)
            except FloatingPointError:
                refuse_non_finite([problem], stage, torch.tensor([False]))
        raise


class FiniteLogits(LogitsProcessor):
    """
    Raises:
        FloatingPointError: a logit is NaN: no token would be the likeliest.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.isnan().any():
            raise FloatingPointError("the decoder computes NaN")
        return scores


@torch.no_grad()
def encode(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict:
    """
    The batch as the decoder reads it: seen and read once, however often it is decoded. Sources of like lengths pass the
    encoder together, so that a long one does not pad all others; a decoder's batch does not mind.
    """
    inputs = BatchFeature(inputs).to(model.device, model.dtype)
    input_ids = inputs["input_ids"]  # which `encoder_no_repeat_ngram_size` and its like look at
    if model.virtual_tokens is not None:
        inputs = model.virtual_tokens.before_source(inputs)
    of_text = {"input_ids", "inputs_embeds", "attention_mask"} & inputs.keys()
    mask = inputs["attention_mask"].bool()
    states = torch.zeros(*mask.shape, model.config.d_model, dtype=model.dtype, device=model.device)
    for rows, columns in parts_of_like_lengths(mask):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        part.update({name: part[name][:, columns] for name in of_text})
        states[rows[:, None], columns] = model.get_encoder()(**part).last_hidden_state.to(states)
    encoder_outputs = BaseModelOutput(last_hidden_state=states)
    return {"encoder_outputs": encoder_outputs, "attention_mask": inputs["attention_mask"], "input_ids": input_ids}


def parts_of_like_lengths(mask: torch.BoolTensor) -> Iterator[tuple[torch.LongTensor, torch.LongTensor]]:
    """Rows of like lengths together, and the columns that they fill; of a mask `(batch_size, sequence_length)`."""
    for rows in rows_of_like_lengths(mask.sum(dim=1).tolist()):
        yield torch.tensor(rows, device=mask.device), mask[rows].any(dim=0).nonzero()[:, 0]


def rows_of_like_lengths(lengths: list[int]) -> list[list[int]]:
    """The rows in groups, in none of which one is more than half as long again as another."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if groups and lengths[row] <= 1.5 * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def generate_texts(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    encoded: dict,
    streamer: BaseStreamer | None = None,
    **generation,
) -> tuple[list[str], list[bool]]:
    """
    Each problem's text, and whether it was cut at the limit of new tokens.

    By the model's own generation config, but for what is given. A streamer is told by transformers' own decoding; of
    beams, which are not known before the end, the whole text at once.
    """
    config = decoding_config(model.generation_config, generation)
    if config.stop_strings is not None:
        check_stop_strings(config.stop_strings, processor)
    mode = config.get_generation_mode()
    is_plain = config.use_cache is not False and config.cache_implementation is None and config.stop_strings is None
    is_ours = mode == GenerationMode.GREEDY_SEARCH and is_plain and streamer is None
    custom_generate = greedy_search if is_ours else None
    streams = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    in_steps = streamer if streams else None
    # Beams expand the encoder's output in place: of a copy.
    encoder_outputs = BaseModelOutput(last_hidden_state=encoded["encoder_outputs"].last_hidden_state)
    tokens = model.generate(
        **{**encoded, "encoder_outputs": encoder_outputs},
        generation_config=config,
        custom_generate=custom_generate,
        # The greedy loop looks at its own logits.
        logits_processor=None if custom_generate else LogitsProcessorList([FiniteLogits()]),
        **({} if config.stop_strings is None else {"tokenizer": processor.tokenizer}),
        streamer=in_steps,
    )
    if streamer is not None and not streams:
        streamer.put(tokens[:, :1].cpu())
        streamer.put(tokens[0, 1:].cpu())
        streamer.end()
    return processor.batch_decode(tokens, skip_special_tokens=True), are_cut(tokens, config)


def are_cut(tokens: torch.LongTensor, config: GenerationConfig) -> list[bool]:
    """Whether each row lacks an end token; always False where a text may end without one."""
    if config.eos_token_id is None or config.stop_strings is not None:
        return [False] * len(tokens)
    end_tokens = torch.as_tensor(config.eos_token_id, device=tokens.device)
    return (~torch.isin(tokens, end_tokens).any(dim=1)).tolist()


def check_stop_strings(strings: str | list[str], processor: MMCoTProcessor) -> None:
    """
    Raises:
        ValueError: transformers cannot find strings in the pieces of this tokenizer.
    """
    try:
        with TOKENIZING:
            StopStringCriteria(processor.tokenizer, strings)
    except ValueError as error:
        name = type(processor.tokenizer).__name__
        raise ValueError(
            f"stop_strings is {strings!r}, and transformers finds no strings in the pieces of this tokenizer "
            f"({name}): {error}."
        ) from error


def choose_answers(
    model: PreTrainedModel, processor: MMCoTProcessor, stage: Stage, problems: list[dict], encoded: dict
) -> list[dict]:
    """
    The answer by scoring the choices: softmax over each problem's own of their targets' log-probabilities.

    With `stage.score` "mean" they are divided by the targets' numbers of tokens, with "calibrated" those without a
    question are subtracted (Holtzman et al. 2021, equation 2, as a difference of logarithms): a long target is less
    likely than a short one whatever is asked.
    """
    if not any(problem["choices"] for problem in problems):
        return [{"answer": -1, "answer_text": "", "scores": []} for _ in problems]
    labels = processor.choice_labels(problems, stage.name).to(model.device)
    log_probs = score_targets(model, labels, encoded)
    refuse_non_finite(problems, stage, ~log_probs.isnan().any(dim=1))
    if stage.score == "mean":
        log_probs = log_probs / (labels != -100).sum(dim=-1)
    elif stage.score == "calibrated":
        log_probs = log_probs - score_targets(
            model, labels, encode(model, without_question(problems, processor, stage))
        )
    columns = []
    for problem, problem_log_probs in zip(problems, log_probs, strict=True):
        choices = problem["choices"]
        scores = problem_log_probs[: len(choices)].softmax(dim=0)
        answer = int(scores.argmax()) if choices else -1
        answer_text = stage.render_target({**problem, "answer": answer}) if choices else ""
        columns.append({"answer": answer, "answer_text": answer_text, "scores": scores.tolist()})
    return columns


def score_targets(model: PreTrainedModel, labels: torch.LongTensor, encoded: dict) -> torch.FloatTensor:
    """Each target's log-probability, `(batch_size, num_choices)`, of labels as `choice_labels` gives them."""
    mask, states = encoded["attention_mask"], encoded["encoder_outputs"].last_hidden_state
    log_probs = torch.empty(labels.shape[:2], device=labels.device)
    for rows, places in parts_of_like_lengths(mask.bool()):  # one pass each: the work is in the sources' tokens
        part = BaseModelOutput(last_hidden_state=states[rows[:, None], places])
        log_probs[rows] = model.score_choices(labels[rows], mask[rows[:, None], places], part)
    return log_probs


def without_question(problems: list[dict], processor: MMCoTProcessor, stage: Stage) -> dict[str, torch.Tensor]:
    """Of each problem the source that says nothing but the choices, without a picture."""
    empty = dict.fromkeys(set(stage.reads) - {"choices", "images"}, "")
    return dict(processor.encode_texts([stage.render_source({**problem, **empty}) for problem in problems]))


def run_stages(
    models: Mapping[str, PreTrainedModel],
    processor: MMCoTProcessor,
    problems: list[dict],
    images: list,
    decode_answer: bool = False,
    given: dict[str, str] | None = None,
    **generation,
) -> list[dict]:
    """
    All stages in order; for each problem the columns that they wrote. Pictures are prepared once, and seen once by each
    tower: stages whose models have one tower between them share its patches.

    Args:
        models: each stage's, as `load_stages` gives them.
        given (`dict[str, str]`, *optional*): columns that are not written but taken from here.
        generation: of `generate_texts`.
    """
    given = given or {}
    columns: list[dict] = [dict(given) for _ in problems]
    problems = [
        {name: value for name, value in problem.items() if name not in ("image", "images")} for problem in problems
    ]
    pixels = {}
    if processor.stages.see_pictures:
        pixels = processor.prepare_pictures(images, len(problems))
    patches: dict[int, dict[str, torch.Tensor]] = {}
    for stage in processor.stages:
        if stage.writes in given:
            continue
        rows = [{**problem, **written} for problem, written in zip(problems, columns, strict=True)]
        inputs = processor(rows, stage=stage.name)
        with stage_model(models, stage.name) as model, packed_linears(model):
            if stage.sees_pictures and pixels:
                tower = model.get_encoder().vision_tower
                # One that was trained beside adapters is another one for each stage.
                tower = getattr(tower, "modules_to_save", {stage.name: tower})[stage.name]
                if id(tower) not in patches:
                    patches[id(tower)] = see(model, pixels)
                inputs.update(patches[id(tower)])
            new = write_column(model, processor, stage, rows, inputs, decode_answer, **generation)
        unfinished = count_unfinished(new)
        if unfinished:
            logger.warning(
                f"{stage.name} stage: {unfinished} of {len(new)} texts end at the limit of new tokens, before their end"
            )
        for written, column in zip(columns, new, strict=True):
            written.update(column)
    return columns


# transformers' from_pretrained is of one thread at a time.
LOADING = threading.Lock()


def reply(
    conversation: Conversation,
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.FloatTensor | None = None,
    pixel_mask: torch.Tensor | None = None,
    **generation,
) -> torch.LongTensor:
    """
    `input_ids` and behind them each problem's rationale and answer, `(batch_size, sequence_length + reply_length)`, as
    a decoder-only model's `generate` returns them, because the Hub's snippet cuts the prompt away. The first stage's
    other inputs are made again here, with those of all stages.
    """
    processor = conversation.processor
    generation = given_settings(generation)
    if model.loading_options.get("subfolder"):
        raise ValueError(
            f"A chat is answered by all stages, and this model is the one in {model.loading_options['subfolder']!r}: "
            f"load the repository without subfolder."
        )
    with LOADING:
        if model.stages is None:
            is_training = model.training
            model.stages = load_stages(model, model.name_or_path, processor.stages.names)
            model.train(is_training)
    columns = run_stages(model.stages, processor, conversation.problems, conversation.images, **generation)
    replies = processor.encode_texts([reply_text(processor, written) for written in columns])
    return torch.cat([input_ids, replies["input_ids"].to(input_ids.device)], dim=1)


def reply_text(processor: MMCoTProcessor, written: dict[str, Any]) -> str:
    """What all stages wrote for a problem, in their order."""
    return " ".join(written[stage.writes] for stage in processor.stages if written[stage.writes])


@torch.no_grad()
def see(model: PreTrainedModel, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pictures of a batch as the model's tower sees them, in place of `pixel_values` and `pixel_mask`."""
    pixels = BatchFeature(pixels).to(model.device, model.dtype)
    features, mask = model.get_encoder().picture_patches(**pixels)
    return {"vision_features": features, "vision_mask": mask}
