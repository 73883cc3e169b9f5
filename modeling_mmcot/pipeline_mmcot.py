"""`pipeline("multimodal-cot")`: problems in any supported form -> rationales and answers.

`inference_mmcot.py` runs the stages.
"""

import copy
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .versions_mmcot import check_versions  # noqa: F401  # isort: skip (it must run before the imports below)

import torch
from transformers import (
    Pipeline,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation.streamers import BaseStreamer

from .attention_mmcot import TokenMaps, token_maps
from .captioning_mmcot import Captioner
from .chat_mmcot import is_chat, read_chat
from .inference_mmcot import reply_text, run_stages
from .loading_mmcot import RepositorySearcher, StageAdapters, hub_options, load_stages, stage_model
from .pictures_mmcot import as_pictures
from .processing_mmcot import Searchers, own_images
from .retrieval_mmcot import Searcher
from .self_consistency_mmcot import TEMPERATURE, majority_answer
from .settings_mmcot import given_settings


class Stream(torch.utils.data.IterableDataset):
    """
    An iterable of problems as a dataset of torch, which all versions of transformers stream. transformers takes any
    other iterable for one problem. Before 5.14 it reads a generator to its end before it answers the first problem.
    """

    def __init__(self, problems: Iterable[dict]):
        self.problems = problems

    def __iter__(self) -> Iterator[dict]:
        return iter(self.problems)


class MultimodalCoTPipeline(Pipeline):
    """
    Pipeline of all stages, for one or many problems: problem -> rationale and answer. It is loaded with
    `pipeline("multimodal-cot", model=REPO, trust_remote_code=True)`.

    A problem is a dict with `question`, and optionally `choices` (list of str), `context`, `caption` and `image` (a PIL
    image, a path, a URL, a list of these, or None; or `images`, as in `datasets`). If a stage retrieves passages, a
    problem can have its own `passages` (texts, or dicts with `text`, `title` and `source`), which are used instead.

    The result is a dict with the text of each stage (`rationale`), the retrieved passages, `answer` (the text of the
    choice; without choices the generated text), `answer_index` (-1 without choices) and `scores` (a probability per
    choice).

    For a chat (`pipe(text=messages)`, with one user message in a form that `chat_mmcot.read_chat` accepts), the result
    contains `input_text` and `generated_text`: the messages with rationale and answer as the assistant's reply.

    For a list, the pipeline returns a list. For a `datasets.Dataset`, a generator or any other iterable, it returns an
    iterator, which reads and answers `batch_size` problems at a time:
    `for result in tqdm(answer(dataset, batch_size=32), total=len(dataset))`.

    A call also accepts:

    - settings of `generate` (`max_new_tokens=…`, `num_beams=…`), or `generate_kwargs={…}`, for all generated texts;
    - `num_rationales` (`int`): the number of rationales to sample; the answer is the one with the highest mean
      probability (Wang et al. 2023);
    - `decode_answer` (`bool`): whether to also generate "The answer is (B)." and parse it (the paper's method), as
      `decoded_answer`;
    - `given` (`dict[str, str]`): texts to use instead of running the stages that write them, for example
      `{"rationale": "…"}`. (A problem's own column of that name is ignored, because in a dataset it is a gold column.)
    - `streamer` (`BaseStreamer`): receives the tokens of one problem's texts as they are generated, and `end()` after
      each text.

    Args:
        caption_model (`str`, *optional*):
            A checkpoint, or a name in `captioning_mmcot.CAPTIONERS`. If a stage reads captions, this model captions the
            first picture of each problem without a caption.
        searcher (`Searcher`, *optional*):
            Retrieves the passages in place of the repository's index: an object with `search(queries, k)`, which
            returns a list of `retrieval_mmcot.Passage` for each query.
        check (`bool`, *optional*, defaults to `True`):
            Whether to recompute the known answer in the repository, if there is one, and raise an error if the result
            or a file of weights differs. Hashing large files takes seconds.

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

    def __init__(
        self,
        *args,
        caption_model: str | None = None,
        searcher: Searcher | None = None,
        check: bool = True,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # A copy, because another pipeline with the same processor can search another index.
        self.processor = copy.copy(self.processor)
        self.processor.searchers = Searchers(self.processor.searchers)
        if searcher is not None:
            self.use_searcher(searcher)
        self.models = load_stages(self.model, self.model.name_or_path, self.processor)
        if check:
            from .known_answer_mmcot import check_known_answer

            check_known_answer(self.model, self.models, self.processor)
        reads_captions = self.processor.stages.read("caption")
        self.captioner = Captioner(caption_model, device=self.device) if caption_model and reads_captions else None

    def use_searcher(self, searcher: Searcher) -> None:
        """
        Retrieve passages by this searcher.

        Raises:
            ValueError: If no stage retrieves.
        """
        stages = self.processor.stages
        if not stages.retrieving:
            raise ValueError(f"searcher was given, but no stage retrieves: {', '.join(stages.names)}.")
        self.processor.searchers.update(dict.fromkeys(stages.retrieving.names, searcher))

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
            raise ValueError(f"{', '.join(sorted(twice))} given twice: as a keyword and in generate_kwargs.")
        generation = given_settings({**(generate_kwargs or {}), **generation})
        options = {
            "decode_answer": decode_answer,
            "given": given,
            "streamer": streamer,
            "num_rationales": num_rationales,
            "generation": generation or None,
        }
        postprocess_params = {} if return_full_text is None else {"return_full_text": return_full_text}
        return {}, {name: value for name, value in options.items() if value is not None}, postprocess_params

    def check_given(self, given: dict[str, str]) -> None:
        """
        Check the argument `given` of a call.

        Raises:
            ValueError: If it is not a dict of texts for columns that stages generate.
        """
        columns = [stage.writes for stage in self.processor.stages if stage.generates]
        is_dict_of_texts = isinstance(given, Mapping) and all(isinstance(text, str) for text in given.values())
        if not is_dict_of_texts or set(given) - set(columns):
            names = ", ".join(columns) or "none here"
            raise ValueError(f"given must be a dict of texts for generated columns ({names}); found {given!r}.")

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
            inputs = self.build_chat(inputs, text, images)
        elif images is not None:
            raise ValueError("images were given without a text: pass text=…, or a problem with its `image`.")
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

    def build_chat(self, inputs: Any, text: str | list, images: Any) -> Any:
        """
        Build a chat from the arguments of an "image-text-to-text" pipeline: `pipe(text=messages)` or
        `pipe(picture, text="…")`.

        Raises:
            ValueError: If pictures are given twice.
        """
        if inputs is not None and images is not None:
            raise ValueError("pictures were given twice: as the first argument and as images=.")
        images = inputs if images is None else images
        if not isinstance(text, str):
            if images is not None:
                raise ValueError("A chat contains its pictures in its message: omit images.")
            return text
        content = [{"type": "image", "image": picture} for picture in as_list(images)]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    def token_maps(self, problem: dict, stage: str, given: dict[str, str] | None = None) -> TokenMaps:
        """
        Compute the attention of a stage over a problem's pictures, for each token of the stage's source.

        Args:
            problem (`dict`):
                The problem, as in a call.
            stage (`str`):
                The name of the stage.
            given (`dict[str, str]`, *optional*):
                The texts of earlier stages that this stage reads.

        Raises:
            ValueError: If the problem has no picture, the stage reads no pictures, `given` lacks a column, or the
                positions of the tower's patches are unknown.
        """
        given, reader = given or {}, self.processor.stage(stage)
        self.check_given(given)
        row = self.preprocess(problem)
        if not row["images"] or "images" not in reader.reads:
            raise ValueError(f"The {stage} stage saw no picture of this problem: there is no map.")
        written = {earlier.writes for earlier in self.processor.stages.before(reader)}
        if missing := written & set(reader.reads) - given.keys() - row["problem"].keys():
            raise ValueError(f"The {stage} stage reads {', '.join(sorted(missing))}: pass the written text as given.")
        self.add_captions([row])
        with stage_model(self.models, stage) as model:
            return token_maps(model, self.processor, reader, {**row["problem"], **given}, row["images"])

    def preprocess(self, problem: dict) -> dict:
        """Return the problem's text columns and choices, and its pictures in RGB."""
        if isinstance(problem, Mapping) and problem.keys() == {"messages"}:
            return {**self.preprocess(read_chat(problem["messages"])), "messages": problem["messages"]}
        completed = self.processor.complete_problem(problem)
        retrieved = {stage.writes for stage in self.processor.stages.retrieving}
        texts = {name: completed[name] for name in (*self.processor.text_columns, *(retrieved & completed.keys()))}
        images = as_pictures(own_images(problem))
        if len(images) > self.model.config.max_images:
            raise ValueError(
                f"`image` of a problem contains {len(images)} pictures; this model accepts at most "
                f"{self.model.config.max_images} (config.max_images)."
            )
        return {"problem": {**texts, "choices": completed["choices"]}, "images": images}

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
                raise ValueError("num_rationales samples several texts: omit streamer and given.")
            if generation.get("do_sample") is False:
                raise ValueError("num_rationales samples several texts, but do_sample=False always yields the same.")
            generation = {"do_sample": True, "num_beams": 1, "temperature": TEMPERATURE, **generation}
        samples = [
            run_stages(self.models, self.processor, problems, images, decode_answer, given, **generation)
            for _ in range(num_rationales)
        ]
        columns = samples[0]
        if num_rationales > 1:
            answering = self.processor.stages.answering
            columns = [
                majority_answer(list(drawn), row, answering) for row, *drawn in zip(problems, *samples, strict=True)
            ]
        return [
            {"choices": row["problem"]["choices"], "messages": row.get("messages"), **written}
            for row, written in zip(rows, columns, strict=True)
        ]

    def add_captions(self, rows: list[dict]) -> None:
        """Caption the first picture of each row without a caption, if there is a captioner."""
        uncaptioned = [row for row in rows if row["images"] and not row["problem"]["caption"]]
        if self.captioner is not None and uncaptioned:
            captions = self.captioner([row["images"][0] for row in uncaptioned])
            for row, caption in zip(uncaptioned, captions, strict=True):
                row["problem"]["caption"] = caption

    def postprocess(self, columns: dict, return_full_text: bool = True) -> dict | list[dict]:
        """Return the result for one problem, or the reply to its chat."""
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
        """Yield results by batches. transformers' iterator collates inputs of one model, but each stage has its own."""
        rows = (self.preprocess(problem, **preprocess_params) for problem in inputs)
        while batch := list(itertools.islice(rows, batch_size)):
            for columns in self.forward(batch, **forward_params):
                yield self.postprocess(columns, **postprocess_params)

    def run_single(self, inputs: dict, preprocess_params, forward_params, postprocess_params) -> dict:
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the whole system, as it was loaded: all stages, the processor, the code. `push_to_hub` uploads it."""
        self.processor.save_pretrained(save_directory)
        if isinstance(self.models, StageAdapters):
            self.models.save_pretrained(save_directory, **kwargs)
        else:
            self.model.save_pretrained(save_directory, **kwargs)
            for stage in self.processor.stages.with_models:
                if stage.answers or self.model.config.shared_stages is not None:
                    continue  # its model is the root's
                folder = os.path.join(save_directory, stage.name)
                self.models[stage.name].save_pretrained(folder, **kwargs)
                for name in os.listdir(folder):
                    if name.endswith(".py"):  # the root already contains the code
                        os.remove(os.path.join(folder, name))
        for stage in self.processor.stages.retrieving:
            index = RepositorySearcher(self.model.name_or_path, stage.name, hub_options(self.model))
            index.save(os.path.join(save_directory, stage.name))
        custom_object_save(self, save_directory)
        from .known_answer_mmcot import write_known_answer

        write_known_answer(save_directory, self.models, self.processor)


def as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
