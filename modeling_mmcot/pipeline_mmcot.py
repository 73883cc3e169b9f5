"""`pipeline("multimodal-cot")`: problems, in whatever form a caller has them -> rationales and answers.

The stages are run by `inference_mmcot.py`.
"""

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
from .loading_mmcot import StageAdapters, load_stages, stage_model
from .pictures_mmcot import as_pictures
from .processing_mmcot import own_images
from .self_consistency_mmcot import TEMPERATURE, agreed
from .settings_mmcot import given_settings


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
        names = self.processor.stages.names
        self.models = load_stages(self.model, self.model.name_or_path, names)
        if check:
            from .known_answer_mmcot import check_known_answer  # which imports this file

            check_known_answer(self.model, self.models, self.processor)
        reads_captions = self.processor.stages.read("caption")
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
        written = {earlier.writes for earlier in self.processor.stages.before(reading)}
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
