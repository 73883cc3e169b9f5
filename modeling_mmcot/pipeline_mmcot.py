"""Runs the stages: a problem with a picture -> its rationale and its answer.

`write_column` is the one place where a stage's column is written; `mmcot.predict` uses it as well. Everything is
generated freely from the problem, with no gold column in sight.
"""

import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .versions_mmcot import check_versions  # noqa: F401  # isort: skip (it must run before the imports below)

import torch
from transformers import (
    BatchFeature,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Pipeline,
    PreTrainedModel,
    StopStringCriteria,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .attention_mmcot import TokenMaps, token_maps
from .captioning_mmcot import Captioner
from .chat_mmcot import Conversation, is_chat, read_chat
from .generation_mmcot import greedy_search, packed_linears
from .pictures_mmcot import as_pictures
from .processing_mmcot import GOLD_COLUMNS, TOKENIZING, MMCoTProcessor, Stage, own_images, read_answer
from .self_consistency_mmcot import TEMPERATURE, agreed
from .settings_mmcot import decoding_config, given_settings
from .stages_mmcot import StageAdapters, load_stages, stage_model

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
    if not stage.answers:
        generated = generate_finite(model, processor, stage, problems, encoded, streamer=streamer, **generation)
        return [{stage.writes: text, UNFINISHED: is_cut} for text, is_cut in zip(*generated, strict=True)]
    columns = choose_answers(model, processor, stage, problems, encoded)
    open_ended = [index for index, column in enumerate(columns) if column["answer"] == -1]
    if decode_answer or open_ended:
        generated = generate_finite(model, processor, stage, problems, encoded, streamer=streamer, **generation)
        for index, (text, is_cut) in enumerate(zip(*generated, strict=True)):
            columns[index][UNFINISHED] = is_cut
            if index in open_ended:
                columns[index]["answer_text"] = text
            if decode_answer:
                columns[index]["decoded_answer"] = read_answer(text, len(problems[index]["choices"]))
    return columns


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
    if any("images" in stage.reads for stage in processor.stages):
        pixels = processor.prepare_pictures(images, len(problems))
    patches: dict[int, dict[str, torch.Tensor]] = {}
    for stage in processor.stages:
        if stage.writes in given:
            continue
        rows = [{**problem, **written} for problem, written in zip(problems, columns, strict=True)]
        inputs = processor(rows, stage=stage.name)
        with stage_model(models, stage.name) as model, packed_linears(model):
            if "images" in stage.reads and pixels:
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
            model.stages = load_stages(model, model.name_or_path, [stage.name for stage in processor.stages])
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


class Stream(torch.utils.data.IterableDataset):
    """
    Problems that are read one after another. transformers streams torch's datasets in every version; it would take
    another iterable for one problem, and before 5.14 read a whole generator first.
    """

    def __init__(self, problems: Iterable[dict]):
        self.problems = problems

    def __iter__(self) -> Iterator[dict]:
        return iter(self.problems)


class MultimodalCoTPipeline(Pipeline):
    """
    `pipeline("multimodal-cot", model=REPO, trust_remote_code=True)`: one problem or many -> rationale and answer.

    A problem is a dict with `question`, and if it has them `choices` (list of str), `context`, `caption` and `image` (a
    PIL image, a path, a URL, a list of them, or None; or `images`, as `datasets` keeps them). The result is a dict with
    what each stage wrote (`rationale`), `answer` (the choice's text; without choices the generated one), `answer_index`
    (-1 without choices) and `scores` (a probability per choice).

    A chat (`pipe(text=messages)`: one user message, as `chat_mmcot.read_chat` takes it) gives `input_text` and
    `generated_text`, the messages with the rationale and the answer as the assistant's reply.

    A list gives a list. A `datasets.Dataset`, a generator or any other iterable gives an iterator, which reads and
    answers `batch_size` problems at a time: `for result in tqdm(answer(dataset, batch_size=32), total=len(dataset))`.

    A call takes besides:

    - settings of `generate` (`max_new_tokens=…`, `num_beams=…`), or `generate_kwargs={…}`, for whatever is generated;
    - `num_rationales` (`int`): draw so many and take the answer of the highest mean probability (Wang et al. 2023);
    - `decode_answer` (`bool`): generate "The answer is (B)." too and read it (the paper's way), as `decoded_answer`;
    - `given` (`dict[str, str]`): what stands in place of what a stage would write, as `{"rationale": "…"}`. (A
      problem's own column of that name is not looked at: in a dataset it is the gold one.)
    - `streamer` (`BaseStreamer`): gets the tokens of one problem's texts as they are generated, and `end()` after each.

    Args:
        caption_model (`str`, *optional*): what captions the first picture of a problem that comes without a caption,
            where a stage reads captions: a checkpoint, or a name in `captioning_mmcot.CAPTIONERS`.
        check (`bool`, defaults to `True`): compute the known answer that lies in the repository, where one does, and
            raise an error if the result or a file of weights is another. Large files take seconds to read.

    Example, with one stage and random weights:

    ```python
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor, MultimodalCoTPipeline

    >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3}, unk_token="<unk>"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    >>> stage = {
    ...     "name": "answer", "reads": ["question", "choices"], "writes": "answer_text",
    ...     "source": "Question: {{ question }} Answer:", "target": "{{ choices[answer] }}",
    ... }
    >>> size = {"vocab_size": 4, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    >>> config = MMCoTConfig(**size, decoder_start_token_id=0)
    >>> answer = MultimodalCoTPipeline(
    ...     model=MMCoTForConditionalGeneration(config), processor=MMCoTProcessor(tokenizer, None, [stage])
    ... )
    >>> result = answer({"question": "Which color is it?", "choices": ["red", "blue"]})
    >>> sorted(result), result["answer"] in ("red", "blue"), round(sum(result["scores"]), 3)
    (['answer', 'answer_index', 'scores'], True, 1.0)

    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, caption_model: str | None = None, check: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        names = [stage.name for stage in self.processor.stages]
        self.models = load_stages(self.model, self.model.name_or_path, names)
        if check:
            from .known_answer_mmcot import check_known_answer  # which imports this file

            check_known_answer(self.model, self.models, self.processor)
        reads_captions = any("caption" in stage.reads for stage in self.processor.stages)
        self.captioner = Captioner(caption_model, device=self.device) if caption_model and reads_captions else None

    def _sanitize_parameters(
        self,
        decode_answer: bool | None = None,
        given: dict[str, str] | None = None,
        streamer: BaseStreamer | None = None,
        num_rationales: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        return_full_text: bool | None = None,
        **generation,
    ):
        if given is not None:
            self.check_given(given)
        if num_rationales is not None and num_rationales < 1:
            raise ValueError(f"num_rationales is {num_rationales}; expected 1 or more.")
        if twice := generation.keys() & (generate_kwargs or {}).keys():
            raise ValueError(f"{', '.join(sorted(twice))} given twice: by itself and in generate_kwargs.")
        generation = given_settings({**(generate_kwargs or {}), **generation})
        options = {
            "decode_answer": decode_answer,
            "given": given,
            "streamer": streamer,
            "num_rationales": num_rationales,
            "generation": generation or None,
        }
        texts = {} if return_full_text is None else {"return_full_text": return_full_text}
        return {}, {name: value for name, value in options.items() if value is not None}, texts

    def check_given(self, given: dict[str, str]) -> None:
        known = [stage.writes for stage in self.processor.stages if not stage.answers]
        is_fitting = isinstance(given, Mapping) and all(isinstance(text, str) for text in given.values())
        if not is_fitting or set(given) - set(known):
            names = ", ".join(known) or "none here"
            raise ValueError(f"given is a dict of texts for what a stage writes ({names}); found {given!r}.")

    def __call__(
        self,
        inputs: dict | Iterable[dict] | None = None,
        *args,
        text: str | list | None = None,
        images: Any = None,
        batch_size: int | None = None,
        **kwargs,
    ):
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        if text is not None:
            inputs = self.asked_in_text(inputs, text, images)
        elif images is not None:
            raise ValueError("images were given without a text: give text=…, or a problem with its `image`.")
        if isinstance(inputs, list) and not inputs:
            return []
        if is_chat(inputs):
            inputs = {"messages": list(inputs)}
        elif isinstance(inputs, list) and is_chat(inputs[0]):
            inputs = [{"messages": list(messages)} for messages in inputs]
        if isinstance(inputs, Iterable) and not isinstance(inputs, (Mapping, str, list)):
            inputs = Stream(inputs)
        elif isinstance(inputs, torch.utils.data.Dataset):
            inputs = Stream(map(inputs.__getitem__, range(len(inputs))))
        return super().__call__(inputs, *args, batch_size=batch_size, **kwargs)

    def asked_in_text(self, inputs: Any, text: str | list, images: Any) -> Any:
        """`pipe(text=messages)`, `pipe(picture, text="…")`: as pipelines of "image-text-to-text" are called."""
        if inputs is not None and images is not None:
            raise ValueError("pictures were given twice: at the first place and as images=.")
        images = inputs if images is None else images
        if not isinstance(text, str):
            if images is not None:
                raise ValueError("A chat holds its pictures in its message: leave images out.")
            return text
        content = [{"type": "image", "image": picture} for picture in as_list(images)]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    def token_maps(self, problem: dict, stage: str, given: dict[str, str] | None = None) -> TokenMaps:
        """
        Where a stage looked on a problem's pictures, by the tokens that it read.

        Args:
            given (`dict[str, str]`, *optional*): what earlier stages wrote for it, as far as this one reads it.

        Raises:
            ValueError: the problem has no picture, the stage sees none, or the tower's patches have no known places.
        """
        given, reading = given or {}, self.processor.stage(stage)
        self.check_given(given)
        row = self.preprocess(problem)
        if not row["images"] or "images" not in reading.reads:
            raise ValueError(f"The {stage} stage saw no picture of this problem: there is no map.")
        written = {earlier.writes for earlier in self.processor.stages[: self.processor.stages.index(reading)]}
        if absent := written & set(reading.reads) - given.keys():
            raise ValueError(f"The {stage} stage reads {', '.join(sorted(absent))}: give what was written.")
        self.add_captions([row])
        with stage_model(self.models, stage) as model:
            return token_maps(model, self.processor, reading, {**row["problem"], **given}, row["images"])

    def preprocess(self, problem: dict) -> dict:
        if isinstance(problem, Mapping) and problem.keys() == {"messages"}:
            return {**self.preprocess(read_chat(problem["messages"])), "messages": problem["messages"]}
        complete = self.processor.complete(problem)
        texts = {name: complete[name] for name in self.processor.text_columns}
        images = as_pictures(own_images(problem))
        if len(images) > self.model.config.max_images:
            raise ValueError(
                f"`image` of a problem holds {len(images)} pictures; this model takes at most "
                f"{self.model.config.max_images} (config.max_images)."
            )
        return {"problem": {**texts, "choices": complete["choices"]}, "images": images}

    def _forward(
        self,
        rows: list[dict],
        decode_answer: bool = False,
        given: dict[str, str] | None = None,
        streamer: BaseStreamer | None = None,
        num_rationales: int = 1,
        generation: dict[str, Any] | None = None,
    ) -> list[dict]:
        self.add_captions(rows)
        problems, images = [row["problem"] for row in rows], [row["images"] for row in rows]
        generation = dict(generation or {})
        if streamer is not None:
            generation["streamer"] = streamer
        if num_rationales > 1:
            if streamer is not None or given:
                raise ValueError("num_rationales draws several texts: leave streamer and given out.")
            if generation.get("do_sample") is False:
                raise ValueError("num_rationales draws several texts, and do_sample=False always the same one.")
            generation = {"do_sample": True, "num_beams": 1, "temperature": TEMPERATURE, **generation}
        samples = [
            run_stages(self.models, self.processor, problems, images, decode_answer, given, **generation)
            for _ in range(num_rationales)
        ]
        columns = samples[0]
        if num_rationales > 1:
            last = self.processor.stages[-1]
            columns = [agreed(list(drawn), row, last) for row, *drawn in zip(problems, *samples, strict=True)]
        return [
            {"choices": row["problem"]["choices"], "messages": row.get("messages"), **written}
            for row, written in zip(rows, columns, strict=True)
        ]

    def add_captions(self, rows: list[dict]) -> None:
        bare = [row for row in rows if row["images"] and not row["problem"]["caption"]]
        if self.captioner is not None and bare:
            captions = self.captioner([row["images"][0] for row in bare])
            for row, caption in zip(bare, captions, strict=True):
                row["problem"]["caption"] = caption

    def postprocess(self, columns: dict, return_full_text: bool = True) -> dict | list[dict]:
        if columns["messages"] is not None:
            reply = reply_text(self.processor, columns)
            turn = {"role": "assistant", "content": reply}
            return [
                {
                    "input_text": columns["messages"],
                    "generated_text": [*columns["messages"], turn] if return_full_text else reply,
                }
            ]
        hidden = ("choices", "messages", "answer", "answer_text")
        result = {name: value for name, value in columns.items() if name not in hidden}
        index = columns["answer"]
        result["answer"] = columns["choices"][index] if index >= 0 else columns["answer_text"]
        result["answer_index"] = index
        return result

    def get_iterator(
        self,
        inputs: Iterable[dict],
        num_workers,
        batch_size: int,
        preprocess_params,
        forward_params,
        postprocess_params,
    ) -> Iterator[dict]:
        """Batches of problems; transformers' own iterator collates tensors, and ours are made per stage."""
        rows = (self.preprocess(problem, **preprocess_params) for problem in inputs)
        while batch := list(itertools.islice(rows, batch_size)):
            for columns in self.forward(batch, **forward_params):
                yield self.postprocess(columns, **postprocess_params)

    def run_single(self, inputs: dict, preprocess_params, forward_params, postprocess_params) -> dict:
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """The whole system, as it was loaded: every stage, the processor, the code. `push_to_hub` uploads it."""
        self.processor.save_pretrained(save_directory)
        if isinstance(self.models, StageAdapters):
            self.models.save_pretrained(save_directory, **kwargs)
        else:
            self.model.save_pretrained(save_directory, **kwargs)
            for stage in self.processor.stages[:-1]:
                folder = os.path.join(save_directory, stage.name)
                self.models[stage.name].save_pretrained(folder, **kwargs)
                for name in os.listdir(folder):
                    if name.endswith(".py"):  # the code is at the root
                        os.remove(os.path.join(folder, name))
        custom_object_save(self, save_directory)
        from .known_answer_mmcot import write_known_answer  # which imports this file

        write_known_answer(save_directory, self.models, self.processor)


def as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
