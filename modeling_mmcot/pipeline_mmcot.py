"""Runs the stages: a problem with a picture -> its rationale and its answer.

`write_column` is the one place where a stage's column is written; `mmcot.predict` uses it as well. Everything is
generated freely from the problem, with no gold column in sight.
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

from .versions_mmcot import check_versions  # noqa: F401  # isort: skip (it must run before the imports below)

import torch
from transformers import BatchFeature, Pipeline, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

from .attention_mmcot import TokenMaps, token_maps
from .captioning_mmcot import Captioner
from .generation_mmcot import greedy_search, packed_linears
from .pictures_mmcot import as_pictures
from .processing_mmcot import GOLD_COLUMNS, LETTERS, MMCoTProcessor, Stage, read_answer
from .stages_mmcot import load_stages


def write_column(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: list[dict],
    inputs: dict[str, torch.Tensor],
    decode_answer: bool = False,
    **generation,
) -> list[dict]:
    """
    What a stage writes for a batch of problems.

    Args:
        problems (`list[dict]`): rows with the columns that the stage reads.
        inputs (`dict`): their tensors, as the processor gives them, or with `vision_features` and `vision_mask` in
            place of pixels.
        decode_answer (`bool`): of an answer stage, generate "The answer is (B)." too and read it (the paper's way).
        generation: settings of `generate`, in place of the model's own.

    Returns:
        For each problem the new columns. A stage that answers gives `answer` (index, -1 without choices),
        `answer_text` and `scores` (a probability per choice), and where asked `decoded_answer`; any other stage gives
        the column that it writes.
    """
    for problem in problems:
        leaked = [column for column in GOLD_COLUMNS if column in problem]
        if leaked:
            raise ValueError(f"A problem has gold columns ({', '.join(leaked)}): take them away before predicting.")
    encoded = encode(model, inputs)
    if not stage.answers:
        return [{stage.writes: text} for text in generate_texts(model, processor, encoded, **generation)]
    columns = choose_answers(model, processor, stage, problems, encoded)
    open_ended = [index for index, column in enumerate(columns) if column["answer"] == -1]
    if decode_answer or open_ended:
        for index, text in enumerate(generate_texts(model, processor, encoded, **generation)):
            if index in open_ended:
                columns[index]["answer_text"] = text
            if decode_answer:
                columns[index]["decoded_answer"] = read_answer(text, len(problems[index]["choices"]))
    return columns


@torch.no_grad()
def encode(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict:
    """
    The batch as the decoder reads it: seen and read once, however often it is decoded. Sources of like lengths pass the
    encoder together, so that a long one does not pad all others; a decoder's batch does not mind.
    """
    inputs = BatchFeature(inputs).to(model.device, model.dtype)
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
    return {"encoder_outputs": encoder_outputs, "attention_mask": inputs["attention_mask"]}


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
) -> list[str]:
    """
    By the model's own generation config, but for what is given. A streamer is told by transformers' own decoding; of
    beams, which are not known before the end, the whole text at once.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(**generation)
    mode = config.get_generation_mode()
    custom_generate = greedy_search if mode == GenerationMode.GREEDY_SEARCH and streamer is None else None
    streams = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    in_steps = streamer if streams else None
    tokens = model.generate(**encoded, generation_config=config, custom_generate=custom_generate, streamer=in_steps)
    if streamer is not None and not streams:
        streamer.put(tokens[:, :1].cpu())
        streamer.put(tokens[0, 1:].cpu())
        streamer.end()
    return processor.batch_decode(tokens, skip_special_tokens=True)


def choose_answers(
    model: PreTrainedModel, processor: MMCoTProcessor, stage: Stage, problems: list[dict], encoded: dict
) -> list[dict]:
    """The answer by scoring the choices: softmax over each problem's own of their targets' log-probabilities."""
    if not any(problem["choices"] for problem in problems):
        return [{"answer": -1, "answer_text": "", "scores": []} for _ in problems]
    labels = processor.choice_labels(problems, stage.name).to(model.device)
    mask, states = encoded["attention_mask"], encoded["encoder_outputs"].last_hidden_state
    log_probs = torch.empty(labels.shape[:2], device=labels.device)
    for rows, places in parts_of_like_lengths(mask.bool()):  # one pass each: the work is in the sources' tokens
        part = BaseModelOutput(last_hidden_state=states[rows[:, None], places])
        log_probs[rows] = model.score_choices(labels[rows], mask[rows[:, None], places], part)
    columns = []
    for problem, problem_log_probs in zip(problems, log_probs, strict=True):
        choices = problem["choices"]
        scores = problem_log_probs[: len(choices)].softmax(dim=0)
        answer = int(scores.argmax()) if choices else -1
        answer_text = stage.render_target({**problem, "answer": answer}) if choices else ""
        columns.append({"answer": answer, "answer_text": answer_text, "scores": scores.tolist()})
    return columns


def run_stages(
    get_model: Callable[[Stage], PreTrainedModel],
    processor: MMCoTProcessor,
    problems: list[dict],
    images: list,
    decode_answer: bool = False,
    given: dict[str, str] | None = None,
    streamer: BaseStreamer | None = None,
) -> list[dict]:
    """
    All stages in order; for each problem the columns that they wrote. Pictures are prepared once, and seen once by each
    tower: stages whose models have one tower between them share its patches.

    Args:
        given (`dict[str, str]`, *optional*): columns that are not written but taken from here.
    """
    given = given or {}
    columns: list[dict] = [dict(given) for _ in problems]
    pixels = {}
    if any("images" in stage.reads for stage in processor.stages):
        pixels = processor.prepare_pictures(images, len(problems))
    patches: dict[int, dict[str, torch.Tensor]] = {}
    generation = {} if streamer is None else {"streamer": streamer}
    for stage in processor.stages:
        if stage.writes in given:
            continue
        model = get_model(stage)
        rows = [{**problem, **written} for problem, written in zip(problems, columns, strict=True)]
        inputs = processor(rows, stage=stage.name)
        if "images" in stage.reads and pixels:
            tower = model.get_encoder().vision_tower
            # One that was trained beside adapters is another one for each stage.
            tower = getattr(tower, "modules_to_save", {stage.name: tower})[stage.name]
            if id(tower) not in patches:
                patches[id(tower)] = see(model, pixels)
            inputs.update(patches[id(tower)])
        with packed_linears(model):
            new = write_column(model, processor, stage, rows, inputs, decode_answer, **generation)
        for written, column in zip(columns, new, strict=True):
            written.update(column)
    return columns


@torch.no_grad()
def see(model: PreTrainedModel, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pictures of a batch as the model's tower sees them, in place of `pixel_values` and `pixel_mask`."""
    pixels = BatchFeature(pixels).to(model.device, model.dtype)
    features, mask = model.get_encoder().picture_patches(**pixels)
    return {"vision_features": features, "vision_mask": mask}


class MultimodalCoTPipeline(Pipeline):
    """
    `pipeline("multimodal-cot", model=REPO, trust_remote_code=True)`: one problem or many -> rationale and answer.

    A problem is a dict with `question`, and if it has them `choices` (list of str), `context`, `caption` and `image` (a
    PIL image, a path, a URL, a list of them, or None; or `images`, as `datasets` keeps them). The result is a dict with
    what each stage wrote (`rationale`), `answer` (the choice's text; without choices the generated one), `answer_index`
    (-1 without choices) and `scores` (a probability per choice).

    A list gives a list. A `datasets.Dataset`, a generator or any other iterable gives an iterator, which reads and
    answers `batch_size` problems at a time: `for result in tqdm(answer(dataset, batch_size=32), total=len(dataset))`.

    A call takes besides:

    - `decode_answer` (`bool`): generate "The answer is (B)." too and read it (the paper's way), as `decoded_answer`;
    - `given` (`dict[str, str]`): what stands in place of what a stage would write, as `{"rationale": "…"}`. (A
      problem's own column of that name is not looked at: in a dataset it is the gold one.)
    - `streamer` (`BaseStreamer`): gets the tokens of one problem's texts as they are generated, and `end()` after each.

    Args:
        caption_model (`str`, *optional*): what captions the first picture of a problem that comes without a caption,
            where a stage reads captions: a checkpoint, or a name in `captioning_mmcot.CAPTIONERS`.

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

    def __init__(self, *args, caption_model: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        # Pipelines are not told their revision; the loader files remote code under the commit that it comes from.
        repository = self.model.name_or_path
        revision = None if os.path.isdir(repository) else type(self).__module__.split(".")[-2]
        self.models = load_stages(self.model, repository, [stage.name for stage in self.processor.stages], revision)
        reads_captions = any("caption" in stage.reads for stage in self.processor.stages)
        self.captioner = Captioner(caption_model, device=self.device) if caption_model and reads_captions else None

    def _sanitize_parameters(
        self,
        decode_answer: bool | None = None,
        given: dict[str, str] | None = None,
        streamer: BaseStreamer | None = None,
    ):
        if given is not None:
            self.check_given(given)
        options = {"decode_answer": decode_answer, "given": given, "streamer": streamer}
        return {}, {name: value for name, value in options.items() if value is not None}, {}

    def check_given(self, given: dict[str, str]) -> None:
        known = [stage.writes for stage in self.processor.stages if not stage.answers]
        is_fitting = isinstance(given, Mapping) and all(isinstance(text, str) for text in given.values())
        if not is_fitting or set(given) - set(known):
            names = ", ".join(known) or "none here"
            raise ValueError(f"given is a dict of texts for what a stage writes ({names}); found {given!r}.")

    def __call__(self, inputs: dict | Iterable[dict], *args, batch_size: int | None = None, **kwargs):
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        if isinstance(inputs, list) and not inputs:
            return []
        # transformers streams torch's datasets and generators only, and would take any other for one problem; and it
        # would ask a dataset of torch's without an iterator for ever more rows.
        if isinstance(inputs, Iterable) and not isinstance(inputs, (Mapping, str, list)):
            inputs = (problem for problem in inputs)
        elif isinstance(inputs, torch.utils.data.Dataset):
            inputs = (problem for problem in map(inputs.__getitem__, range(len(inputs))))
        return super().__call__(inputs, *args, batch_size=batch_size, **kwargs)

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
        return token_maps(self.models[stage], self.processor, reading, {**row["problem"], **given}, row["images"])

    def preprocess(self, problem: dict) -> dict:
        if not isinstance(problem, Mapping) or not isinstance(problem.get("question"), str):
            raise ValueError(f"A problem is a dict with a `question` (str); found {problem!r}.")
        choices = problem.get("choices")
        choices = [] if choices is None else choices
        if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"`choices` of a problem is a list of str; found {choices!r}.")
        if len(choices) > len(LETTERS):
            raise ValueError(f"`choices` of a problem are at most {len(LETTERS)}; found {len(choices)}.")
        texts = {name: problem.get(name) or "" for name in ("question", "context", "caption")}
        images = problem.get("image")
        images = as_pictures(problem.get("images") if images is None else images)
        if len(images) > self.model.config.max_images:
            raise ValueError(
                f"`image` of a problem holds {len(images)} pictures; this model takes at most "
                f"{self.model.config.max_images} (config.max_images)."
            )
        return {"problem": {**texts, "choices": list(choices)}, "images": images}

    def _forward(
        self,
        rows: list[dict],
        decode_answer: bool = False,
        given: dict[str, str] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> list[dict]:
        self.add_captions(rows)
        problems = [row["problem"] for row in rows]
        columns = run_stages(
            lambda stage: self.models[stage.name],
            self.processor,
            problems,
            [row["images"] for row in rows],
            decode_answer,
            given,
            streamer,
        )
        return [{"choices": problem["choices"], **written} for problem, written in zip(problems, columns, strict=True)]

    def add_captions(self, rows: list[dict]) -> None:
        bare = [row for row in rows if row["images"] and not row["problem"]["caption"]]
        if self.captioner is not None and bare:
            captions = self.captioner([row["images"][0] for row in bare])
            for row, caption in zip(bare, captions, strict=True):
                row["problem"]["caption"] = caption

    def postprocess(self, columns: dict) -> dict:
        result = {name: value for name, value in columns.items() if name not in ("choices", "answer", "answer_text")}
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
