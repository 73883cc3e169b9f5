"""Inference: problems with their pictures -> the column of each stage.

`write_column` is the only function that writes a stage's column; `mmcot.predict` uses it too. All columns are computed
from the problem without gold columns.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
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
from .generation_mmcot import greedy_search, packed_linears, source_mask
from .loading_mmcot import add_searchers, load_stages, stage_model
from .processing_mmcot import TOKENIZING, MMCoTProcessor
from .retrieval_mmcot import Searcher, search_passages, to_dict
from .settings_mmcot import decoding_config, given_settings
from .stage_mmcot import (
    ANSWER,
    CHECK,
    CHOOSE,
    GENERATE,
    GOLD_COLUMNS,
    REJECTED,
    RETRIEVE,
    RIGHT,
    WRONG,
    Stage,
    Stages,
    read_answer,
)

logger = logging.get_logger(__name__)

# Key in a row of `write_column`: whether the generated text was cut at the limit of new tokens.
UNFINISHED = "unfinished"
# The number of beams, at least, that the next best text of a problem is selected from.
NEXT_BEST_BEAMS = 4


def write_column(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: list[dict],
    inputs: dict[str, torch.Tensor],
    decode_answer: bool = False,
    streamer: BaseStreamer | None = None,
    rejected: list[str] | None = None,
    **generation,
) -> list[dict]:
    """
    Write the column of a stage for a batch of problems.

    Args:
        problems (`list[dict]`):
            Rows with the columns that the stage reads.
        inputs (`dict[str, torch.Tensor]`):
            The processor's outputs for the problems, or with `vision_features` and `vision_mask` in place of pixels.
        decode_answer (`bool`, *optional*, defaults to `False`):
            Whether a stage that answers also generates "The answer is (B)." and parses it (the paper's method).
        streamer (`BaseStreamer`, *optional*):
            Receives the tokens of a problem's text as they are generated.
        rejected (`list[str]`, *optional*):
            A text for each problem; a stage that generates writes the next best text in its place.
        generation:
            Settings of `generate`, which override the model's own.

    Returns:
        `list[dict]`: The new columns of each problem. A stage that answers returns `answer` (index, -1 without
        choices), `answer_text`, `scores` (a probability per choice), and with `decode_answer` also `decoded_answer`.
        A stage that checks returns the column that it writes, and COLUMN`_score`, the probability of "right". Any other
        stage returns the column that it writes. A generated text comes with `UNFINISHED`, which `count_unfinished`
        removes.

    Raises:
        ValueError: If a problem has gold columns, a setting of `generate` is rejected, or the model computes NaN or
            infinity.
    """
    for problem in problems:
        leaked = [column for column in GOLD_COLUMNS if column in problem]
        if leaked:
            raise ValueError(f"A problem has gold columns ({', '.join(leaked)}): remove them before predicting.")
    decoding_config(model.generation_config, generation)  # raises errors before anything is computed
    batch = Batch(
        model, processor, stage, problems, encode(model, inputs), decode_answer, streamer, rejected, generation
    )
    is_finite = batch.encoded["encoder_outputs"].last_hidden_state.isfinite().flatten(1).all(dim=1)
    refuse_non_finite(problems, stage, is_finite)
    return WRITERS[stage.kind](batch)


@dataclass
class Batch:
    """A batch of problems whose sources the stage's model has encoded. The fields are arguments of `write_column`."""

    model: PreTrainedModel
    processor: MMCoTProcessor
    stage: Stage
    problems: list[dict]
    encoded: dict
    decode_answer: bool
    streamer: BaseStreamer | None
    rejected: list[str] | None
    generation: dict[str, Any]

    def generate(self) -> zip:
        """Generate a text for each problem; yield it, and whether it was cut at the limit of new tokens."""
        texts, are_cut = generate_finite(
            self.model,
            self.processor,
            self.stage,
            self.problems,
            self.encoded,
            streamer=self.streamer,
            rejected=self.rejected,
            **self.generation,
        )
        return zip(texts, are_cut, strict=True)


def write_text(batch: Batch) -> list[dict]:
    """`write_column` for a stage that generates a text."""
    return [{batch.stage.writes: text, UNFINISHED: is_cut} for text, is_cut in batch.generate()]


def write_answer(batch: Batch) -> list[dict]:
    """`write_column` for a stage that chooses an answer, and generates one for a problem without choices."""
    columns = choose_answers(batch.model, batch.processor, batch.stage, batch.problems, batch.encoded)
    open_ended = [index for index, column in enumerate(columns) if column["answer"] == -1]
    if batch.decode_answer or open_ended:
        for index, (text, is_cut) in enumerate(batch.generate()):
            columns[index][UNFINISHED] = is_cut
            if index in open_ended:
                columns[index][ANSWER] = text
            if batch.decode_answer:
                columns[index]["decoded_answer"] = read_answer(text, len(batch.problems[index]["choices"]))
    return columns


def write_verdict(batch: Batch) -> list[dict]:
    """`write_column` for a stage that checks the answer: a softmax over the log-probabilities of both verdicts."""
    labels = batch.processor.tokenize_targets([RIGHT, WRONG]).to(batch.model.device)
    log_probs = score_targets(batch.model, labels.expand(len(batch.problems), -1, -1), batch.encoded)
    refuse_non_finite(batch.problems, batch.stage, ~log_probs.isnan().any(dim=1))
    column, scores = batch.stage.writes, log_probs.softmax(dim=1)[:, 0].tolist()
    return [{column: RIGHT if score >= 0.5 else WRONG, f"{column}_score": score} for score in scores]


# The function that writes the column of a stage with a model, by its kind.
WRITERS = {GENERATE: write_text, CHOOSE: write_answer, CHECK: write_verdict}


def write_passages(searcher: Searcher, stage: Stage, problems: list[dict]) -> list[dict]:
    """Write the column of a stage that retrieves. Passages that a problem already has are not replaced."""
    queries = [stage.render_source(problem) for problem in problems if stage.writes not in problem]
    found = iter(search_passages(searcher, queries, stage.num_passages) if queries else [])
    return [
        {stage.writes: problem[stage.writes] if stage.writes in problem else [to_dict(one) for one in next(found)]}
        for problem in problems
    ]


def count_unfinished(columns: list[dict]) -> int:
    """Count the texts that were cut at the limit of new tokens, and remove their `UNFINISHED` keys."""
    return sum(written.pop(UNFINISHED, False) for written in columns)


def refuse_non_finite(problems: list[dict], stage: Stage, is_finite: torch.BoolTensor) -> None:
    """
    Check that the model's outputs are finite.

    Raises:
        ValueError: If the outputs for a problem are not finite; the message names the stage and the first such problem.
    """
    for problem, is_valid in zip(problems, is_finite.tolist(), strict=True):
        if not is_valid:
            name = problem.get("id") or problem.get("question", "")
            raise ValueError(
                f"The {stage.name} stage computes NaN or infinity for the problem {name!r:.100}: its weights, or the "
                f"picture's features, contain numbers that are not finite (float16 overflows in T5: use bfloat16)."
            )


def generate_finite(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: list[dict],
    encoded: dict,
    streamer: BaseStreamer | None = None,
    rejected: list[str] | None = None,
    **generation,
) -> tuple[list[str], list[bool]]:
    """
    Run `generate_texts`, and report NaN logits with the stage and the problem.

    Raises:
        ValueError: If the decoder computes NaN for a problem.
    """
    try:
        return generate_texts(model, processor, encoded, streamer=streamer, rejected=rejected, **generation)
    except FloatingPointError:
        for row, problem in enumerate(problems):
            states = encoded["encoder_outputs"].last_hidden_state[row : row + 1]
            single = {name: encoded[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            single["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
            try:
                generate_texts(model, processor, single, **generation)
            except FloatingPointError:
                refuse_non_finite([problem], stage, torch.tensor([False]))
        raise


class FiniteLogits(LogitsProcessor):
    """
    Checks the logits and returns them unchanged.

    Raises:
        FloatingPointError: If a logit is NaN, because then no token is the most probable one.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.isnan().any():
            raise FloatingPointError("the decoder computes NaN")
        return scores


@torch.no_grad()
def encode(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict:
    """
    Run the encoder once for a batch, and return the inputs of the decoder, which can be decoded several times.

    The encoder runs over groups of sources of similar length, so that a long source does not pad all others. The
    decoder takes all sources as one batch.
    """
    inputs = BatchFeature(inputs).to(model.device, model.dtype)
    input_ids = inputs["input_ids"]  # needed by logits processors such as `encoder_no_repeat_ngram_size`
    if model.virtual_tokens is not None:
        inputs = model.virtual_tokens.before_source(inputs)
    text_inputs = {"input_ids", "inputs_embeds", "attention_mask"} & inputs.keys()
    mask = inputs["attention_mask"]
    text_length, parts = mask.shape[1], []
    for rows, columns in split_by_length(mask.bool()):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        part.update({name: part[name][:, columns] for name in text_inputs})
        parts.append((rows, columns, model.get_encoder()(**part)))
    # A fusion may add tokens, which follow those of the text.
    num_added = max(outputs.last_hidden_state.shape[1] - len(columns) for _, columns, outputs in parts) if parts else 0
    mask = nn.functional.pad(mask, (0, num_added))
    states = torch.zeros(*mask.shape, model.config.d_model, dtype=model.dtype, device=model.device)
    for rows, columns, outputs in parts:
        part_mask = source_mask(outputs, mask[rows[:, None], columns])
        added = torch.arange(text_length, text_length + part_mask.shape[1] - len(columns), device=mask.device)
        where = rows[:, None], torch.cat([columns, added])
        states[where], mask[where] = outputs.last_hidden_state.to(states), part_mask
    encoder_outputs = BaseModelOutput(last_hidden_state=states)
    return {"encoder_outputs": encoder_outputs, "attention_mask": mask, "input_ids": input_ids}


def split_by_length(mask: torch.BoolTensor) -> Iterator[tuple[torch.LongTensor, torch.LongTensor]]:
    """Yield groups of rows of similar length and their used columns, from a mask `(batch_size, sequence_length)`."""
    for rows in group_by_length(mask.sum(dim=1).tolist()):
        yield torch.tensor(rows, device=mask.device), mask[rows].any(dim=0).nonzero()[:, 0]


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Group row numbers such that the longest row of a group is at most 1.5 times as long as the shortest."""
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
    rejected: list[str] | None = None,
    **generation,
) -> tuple[list[str], list[bool]]:
    """
    Generate each problem's text, and return whether it was cut at the limit of new tokens.

    `generation` overrides the model's own generation config. Only transformers' own decoding supports a streamer; with
    beams, which are not final before the end, the streamer receives the whole text at once. With `rejected`, a text for
    each problem, the result is the best beam with another text.
    """
    config = decoding_config(model.generation_config, generation)
    if rejected is not None:
        config.num_beams = config.num_return_sequences = max(config.num_beams or 1, NEXT_BEST_BEAMS)
    if config.stop_strings is not None:
        check_stop_strings(config.stop_strings, processor)
    mode = config.get_generation_mode()
    is_default = config.use_cache is not False and config.cache_implementation is None and config.stop_strings is None
    is_fast = mode == GenerationMode.GREEDY_SEARCH and is_default and streamer is None
    custom_generate = greedy_search if is_fast else None
    streams_tokens = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    # Beam search expands the encoder's output in place, so it gets its own output object.
    encoder_outputs = BaseModelOutput(last_hidden_state=encoded["encoder_outputs"].last_hidden_state)
    tokens = model.generate(
        **{**encoded, "encoder_outputs": encoder_outputs},
        generation_config=config,
        custom_generate=custom_generate,
        # `greedy_search` checks its logits itself.
        logits_processor=None if custom_generate else LogitsProcessorList([FiniteLogits()]),
        **({} if config.stop_strings is None else {"tokenizer": processor.tokenizer}),
        streamer=streamer if streams_tokens else None,
    )
    if streamer is not None and not streams_tokens:
        streamer.put(tokens[:, :1].cpu())
        streamer.put(tokens[0, 1:].cpu())
        streamer.end()
    texts, cut = processor.batch_decode(tokens, skip_special_tokens=True), are_cut(tokens, config)
    if rejected is None:
        return texts, cut
    best = [
        next((row for row in range(first, first + config.num_beams) if texts[row] != text), first)
        for first, text in zip(range(0, len(texts), config.num_beams), rejected, strict=True)
    ]
    return [texts[row] for row in best], [cut[row] for row in best]


def are_cut(tokens: torch.LongTensor, config: GenerationConfig) -> list[bool]:
    """Return whether each row lacks an end token; always False if a text may end without one."""
    if config.eos_token_id is None or config.stop_strings is not None:
        return [False] * len(tokens)
    end_tokens = torch.as_tensor(config.eos_token_id, device=tokens.device)
    return (~torch.isin(tokens, end_tokens).any(dim=1)).tolist()


def check_stop_strings(strings: str | list[str], processor: MMCoTProcessor) -> None:
    """
    Check that the tokenizer supports stop strings.

    Raises:
        ValueError: If transformers cannot match strings to the tokens of this tokenizer.
    """
    try:
        with TOKENIZING:
            StopStringCriteria(processor.tokenizer, strings)
    except ValueError as error:
        name = type(processor.tokenizer).__name__
        raise ValueError(
            f"stop_strings is {strings!r}, but transformers cannot match strings to the tokens of this tokenizer "
            f"({name}): {error}."
        ) from error


def choose_answers(
    model: PreTrainedModel, processor: MMCoTProcessor, stage: Stage, problems: list[dict], encoded: dict
) -> list[dict]:
    """
    Choose each problem's answer by scoring its choices: a softmax over the log-probabilities of the choices' targets.

    A long target is less probable than a short one for any question. Therefore, with `stage.score` "mean" each
    log-probability is divided by its target's number of tokens, and with "calibrated" the log-probability of the same
    target without a question is subtracted (Holtzman et al. 2021, equation 2, as a difference of logarithms).
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
    """Return the log-probability of each target, `(batch_size, num_choices)`, for labels from `choice_labels`."""
    mask, states = encoded["attention_mask"], encoded["encoder_outputs"].last_hidden_state
    log_probs = torch.empty(labels.shape[:2], device=labels.device)
    for rows, columns in split_by_length(mask.bool()):  # the cost grows with the length of the sources
        part = BaseModelOutput(last_hidden_state=states[rows[:, None], columns])
        log_probs[rows] = model.score_choices(labels[rows], mask[rows[:, None], columns], part)
    return log_probs


def without_question(problems: list[dict], processor: MMCoTProcessor, stage: Stage) -> dict[str, torch.Tensor]:
    """Tokenize the source of each problem with its choices only: all other texts are empty, and there is no picture."""
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
    Run all stages in order, and return the columns that they write for each problem.

    Pictures are prepared once, and encoded once per tower: stages whose models share a tower share its patches.

    Args:
        models (`Mapping[str, PreTrainedModel]`):
            The model of each stage, from `load_stages`.
        problems (`list[dict]`):
            Rows with the columns that the stages read and no stage writes.
        images (`list`):
            The pictures of each problem.
        decode_answer (`bool`, *optional*, defaults to `False`):
            As in `write_column`.
        given (`dict[str, str]`, *optional*):
            Columns to use instead of running the stages that write them.
        generation:
            Settings of `generate`, and `streamer`.
    """
    given = given or {}
    problems = [
        {name: value for name, value in problem.items() if name not in ("image", "images")} for problem in problems
    ]
    pixels = {}
    if processor.stages.see_pictures:
        pixels = processor.prepare_pictures(images, len(problems))
    options = {"decode_answer": decode_answer, **generation}
    batch = SystemBatch(models, processor, problems, [dict(given) for _ in problems], pixels, {}, options)
    for stage in processor.stages:
        if stage.writes not in given:
            batch.write(stage)
            batch.repeat(processor.stages.repeated_by(stage), stage, given)
    return batch.columns


@dataclass
class SystemBatch:
    """A batch of problems on its way through all stages: the columns written so far, and the pictures."""

    models: Mapping[str, PreTrainedModel]
    processor: MMCoTProcessor
    problems: list[dict]
    columns: list[dict]
    pixels: dict[str, torch.Tensor]
    patches: dict[int, dict[str, torch.Tensor]]  # by the id of the tower
    options: dict[str, Any]  # of `write_column`

    def write(self, stage: Stage, rejected: list[str] | None = None) -> None:
        """Write a stage's column, with `rejected` as in `write_column`."""
        texts = {stage.writes for stage in self.processor.stages}  # without an answer's scores
        rows = [
            {**problem, **{name: value for name, value in written.items() if name in texts}}
            for problem, written in zip(self.problems, self.columns, strict=True)
        ]
        if stage.kind == RETRIEVE:
            new = write_passages(self.processor.searchers[stage.name], stage, rows)
        else:
            new = self.write_with_model(stage, rows, rejected)
        for written, column in zip(self.columns, new, strict=True):
            written.update(column)

    def write_with_model(self, stage: Stage, rows: list[dict], rejected: list[str] | None) -> list[dict]:
        inputs = self.processor(rows, stage=stage.name)
        with stage_model(self.models, stage.name) as model, packed_linears(model):
            if stage.sees_pictures and self.pixels:
                tower = model.get_encoder().vision_tower
                # A tower that was trained together with adapters differs between stages.
                tower = getattr(tower, "modules_to_save", {stage.name: tower})[stage.name]
                if id(tower) not in self.patches:
                    self.patches[id(tower)] = compute_patches(model, self.pixels)
                inputs.update(self.patches[id(tower)])
            new = write_column(model, self.processor, stage, rows, inputs, rejected=rejected, **self.options)
        unfinished = count_unfinished(new)
        if unfinished:
            logger.warning(f"{stage.name} stage: {unfinished} of {len(new)} texts were cut at the limit of new tokens")
        return new

    def repeat(self, stages: Stages, check: Stage, given: Mapping[str, str]) -> None:
        """
        Let stages write again for the problems that `check` sends back: first the next best text, then the columns that
        depend on it. A given column is not written again; if it is the first one, no problem is sent back.
        """
        rows = [row for row, written in enumerate(self.columns) if check.sends_back(written)]
        if not stages or not rows or stages[0].writes in given:
            return
        stages = Stages(stage for stage in stages if stage.writes not in given)
        earlier = {*given, *(stage.writes for stage in self.processor.stages.before(stages[0]))}
        kept = [{name: value for name, value in self.columns[row].items() if name in earlier} for row in rows]
        part = SystemBatch(
            self.models,
            self.processor,
            [{**self.problems[row], **columns} for row, columns in zip(rows, kept, strict=True)],
            [{} for _ in rows],
            {name: tensor[rows] for name, tensor in self.pixels.items()},
            {tower: {name: tensor[rows] for name, tensor in found.items()} for tower, found in self.patches.items()},
            {**self.options, "streamer": None},
        )
        part.write(stages[0], rejected=[self.columns[row][stages[0].writes] for row in rows])
        for stage in stages[1:]:
            part.write(stage)
        for row, columns in zip(rows, part.columns, strict=True):
            replace_columns(self.columns[row], columns)


def replace_columns(written: dict[str, Any], new: dict[str, Any]) -> None:
    """Replace columns of a problem that was sent back, and keep the rejected ones under `REJECTED`."""
    written[REJECTED] = {name: written[name] for name in new}
    written.update(new)


# transformers' from_pretrained is not thread-safe.
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
    Answer a chat with all stages, and return `input_ids` followed by each problem's rationale and answer, `(batch_size,
    sequence_length + reply_length)`.

    This is the output format of `generate` for decoder-only models, because the Hub's snippet removes the prompt. The
    first stage's other inputs are ignored: the inputs of all stages are computed here from the conversation.

    Raises:
        ValueError: If the model was loaded from a stage's subfolder.
    """
    processor = conversation.processor
    generation = given_settings(generation)
    if model.loading_options.get("subfolder"):
        raise ValueError(
            f"A chat is answered by all stages, but this model was loaded from the subfolder "
            f"{model.loading_options['subfolder']!r}: load the repository without subfolder."
        )
    with LOADING:
        if model.stages is None:
            is_training = model.training
            model.stages = load_stages(model, model.name_or_path, processor)
            model.train(is_training)
    add_searchers(processor, model, model.name_or_path)  # the stages may have been loaded with another processor
    columns = run_stages(model.stages, processor, conversation.problems, conversation.images, **generation)
    replies = processor.encode_texts([reply_text(processor, written) for written in columns])
    return torch.cat([input_ids, replies["input_ids"].to(input_ids.device)], dim=1)


def reply_text(processor: MMCoTProcessor, written: dict[str, Any]) -> str:
    """Join the texts and the answer that the stages wrote for a problem, in the order of the stages."""
    texts = [written[stage.writes] for stage in processor.stages if stage.generates or stage.answers]
    return " ".join(text for text in texts if text)


@torch.no_grad()
def compute_patches(model: PreTrainedModel, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the model's tower on `pixel_values` and `pixel_mask`, and return `vision_features` and `vision_mask`."""
    pixels = BatchFeature(pixels).to(model.device, model.dtype)
    features, mask = model.get_encoder().picture_patches(**pixels)
    return {"vision_features": features, "vision_mask": mask}
