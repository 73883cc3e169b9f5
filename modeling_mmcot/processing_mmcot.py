"""Problem and picture -> the tensors that `forward` takes, by the templates of a stage (`stage_mmcot.py`).

A source that is too long loses its least useful words, never the question, the choices or the cue. The stages are part
of the processor's own config. Pictures are prepared by `pictures_mmcot.py`; the model is run by `inference_mmcot.py`.
"""

import bisect
import difflib
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from .versions_mmcot import check_versions  # noqa: F401  # isort: skip (it must run before the imports below)

import torch
from transformers import BatchFeature, ProcessorMixin

from .chat_mmcot import Conversation, is_chat, read_chat
from .pictures_mmcot import as_pictures, build_image_processor, in_pillow_backend, picture_pixels, stack_pixels
from .stage_mmcot import GOLD_COLUMNS, LETTERS, Stage, Stages

# A fast tokenizer keeps how the last call padded and cut: a call of another thread would change it under this one.
TOKENIZING = threading.RLock()
# Columns that problems of our datasets have and no stage need read.
KNOWN_COLUMNS = {
    *("id", "question", "choices", "context", "caption", "image", "images", "hint", "task", "split"),
    *("subject", "grade", "topic", "category", "skill"),
    *GOLD_COLUMNS,
}

# What a source that is too long gives up, in this order: (column, whether its last words go first). A rationale begins
# with the lecture and ends with the conclusion, so it is shortened from its start.
SHORTENED_COLUMNS = (("lecture", True), ("context", True), ("caption", True), ("rationale", False))


def is_absent(value: Any) -> bool:
    """Whether a table has nothing there: None, NaN, pandas' NA and NaT."""
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float) and math.isnan(value))
    )


def as_text(problem: Mapping, column: str) -> str:
    """
    Raises:
        ValueError: the column holds something that is no text.
    """
    value = problem.get(column)
    if is_absent(value):
        return ""
    if not isinstance(value, str):
        raise ValueError(f"`{column}` of a problem is a str; found {value!r:.200}.")
    return value


def as_choices(choices: Any) -> list[str]:
    """
    Raises:
        ValueError: they are no list of texts, or more than there are letters.
    """
    if is_absent(choices):
        return []
    is_list = isinstance(choices, Iterable) and not isinstance(choices, (str, Mapping))
    if not is_list or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"`choices` of a problem is a list of str; found {choices!r:.200}.")
    if len(choices) > len(LETTERS):
        raise ValueError(f"`choices` of a problem are at most {len(LETTERS)}; found {len(choices)}.")
    return list(choices)


def check_columns(problem: Mapping, read: set[str]) -> None:
    """
    Raises:
        ValueError: the problem has a key that is no column, which would be ignored.
    """
    known = KNOWN_COLUMNS | read
    for name in problem.keys() - known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}."
        raise ValueError(f"A problem has the unknown key {name!r}: {hint}")


def own_images(problem: Mapping) -> Any:
    """
    The pictures that a problem holds as `image` or as `images`; None where it holds none.

    Raises:
        ValueError: it holds both.
    """
    given = [problem.get(name) for name in ("image", "images")]
    given = [entry for entry in given if not is_absent(entry) and not (isinstance(entry, (list, tuple)) and not entry)]
    if len(given) > 1:
        raise ValueError("A problem holds pictures twice, as `image` and as `images`: give them once.")
    return given[0] if given else None


def images_of(problems: list[dict], images: list | None) -> list | None:
    """The pictures of each problem: what is given beside them, or what they hold themselves; both is an error."""
    own = [own_images(problem) for problem in problems]
    if all(entry is None for entry in own):
        return images
    if images is not None:
        raise ValueError("images were given, and the problems hold their own (`image` or `images`): give them once.")
    return own


class MMCoTProcessor(ProcessorMixin):
    """
    Args:
        tokenizer: T5's, or one that ends a text with eos as T5's does.
        image_processor (*optional*): the picture tower's; None for a model without tower.
        stages (`list[dict]` or `list[Stage]`, *optional*): the stages in their order.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast, ViTImageProcessor
    >>> from modeling_mmcot import MMCoTProcessor

    >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "bar": 3}, unk_token="<unk>"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    >>> stage = {
    ...     "name": "rationale", "reads": ["question", "images"], "writes": "rationale",
    ...     "source": "Question: {{ question }} Solution:", "target": "{{ solution }}",
    ... }
    >>> processor = MMCoTProcessor(tokenizer, ViTImageProcessor(size={"height": 32, "width": 32}), [stage])

    >>> problems = [{"question": "Which bar is the tallest?"}, {"question": "Why?"}]
    >>> inputs = processor(problems, stage="rationale", images=[Image.new("RGB", (90, 60)), None])
    >>> sorted(inputs), inputs["pixel_values"].shape
    (['attention_mask', 'input_ids', 'pixel_mask', 'pixel_values'], torch.Size([2, 1, 3, 32, 32]))

    ```
    """

    def __init__(self, tokenizer, image_processor=None, stages=None, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_processor = None if image_processor is None else in_pillow_backend(image_processor)
        self.stages = Stages(stage if isinstance(stage, Stage) else Stage(**stage) for stage in stages or [])

    # ProcessorMixin insists on every part that this names, and a model without tower has no image processor.
    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        if processor_dict and processor_dict.get("image_processor") is not None:
            processor_dict["image_processor"] = build_image_processor(processor_dict["image_processor"])
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    @staticmethod
    def get_possibly_dynamic_module(module_name):
        # A file of the model's may name an audio tokenizer, which transformers loads from the repository that it names.
        if module_name not in ("PreTrainedTokenizerBase", "MistralCommonBackend"):
            raise ValueError(
                f"A file of this processor's names the class {module_name!r}; expected none: it has no audio tokenizer."
            )
        return ProcessorMixin.get_possibly_dynamic_module(module_name)

    def save_pretrained(self, save_directory, **kwargs):
        # A tokenizer keeps how it last padded and cut texts, and how it was loaded, which would be saved: one
        # processor, several sets of files.
        for name in ("is_local", "local_files_only", "dtype", "torch_dtype"):
            self.tokenizer.init_kwargs.pop(name, None)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # ByT5's, written in Python, has none
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        return super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict:
        output = super().to_dict()
        output["stages"] = [asdict(stage) for stage in self.stages]
        return output

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]

    @property
    def text_columns(self) -> list[str]:
        """The texts that a problem is given with: what some stage reads and none writes, without gold."""
        read = {column for stage in self.stages for column in stage.reads}
        written = {stage.writes for stage in self.stages}
        return sorted(({"question", "context", "caption"} | read) - written - {"choices", "images", *GOLD_COLUMNS})

    def stage(self, name: str) -> Stage:
        return self.stages.named(name)

    def __call__(
        self,
        problems: dict | list[dict] | None = None,
        stage: str | None = None,
        images=None,
        text: str | list[str] | None = None,
        with_targets: bool = False,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Either `problems` with a `stage`, or `text` as any processor of transformers takes it.

        Args:
            problems (`dict` or `list[dict]`): rows of the problem schema, their pictures as `image` or `images`; for a
                later stage with the columns that the earlier ones wrote. `context`, `choices` and `caption` may be
                missing.
            stage (`str`): the stage whose templates to use.
            images (*optional*): in place of the problems' own, one entry per problem: a picture, a list of pictures or
                None. A picture is anything that `pictures_mmcot.open_picture` takes: a PIL image, a path, a URL, …
            text (`str` or `list[str]`): ready-made sources.
            with_targets (`bool`): give `labels` too, padded with -100.
            kwargs: passed to the tokenizer, over the defaults (padding to the longest).

        Returns:
            `input_ids`, `attention_mask` of shape `(batch_size, sequence_length)`; where the model sees pictures
            `pixel_values` `(batch_size, num_images, 3, height, width)` and `pixel_mask`
            `(batch_size, num_images, height, width)`; and with targets `labels` `(batch_size, target_length)`.
        """
        if (problems is None) == (text is None):
            raise ValueError("Give problems with a stage, or text: exactly one of them.")
        kwargs = {"padding": True, "return_tensors": return_tensors, **kwargs}
        if text is not None:
            batch = self.encode_texts(text, **kwargs)
            batch.update(self.prepare_pictures(images, 1 if isinstance(text, str) else len(text)))
            return BatchFeature(dict(batch), tensor_type=return_tensors)
        problems = [problems] if isinstance(problems, Mapping) else list(problems)
        if not problems:
            raise ValueError("problems is empty: give at least one.")
        stage = self.stage(stage)
        images = images_of(problems, images)
        problems = [self.complete(problem) for problem in problems]
        for problem in problems:
            self.check_written(problem, stage)
        batch = self.encode_texts([self.fit_source(problem, stage) for problem in problems], **kwargs)
        if stage.sees_pictures:
            batch.update(self.prepare_pictures(images, len(problems)))
        if with_targets:
            targets = [stage.render_target(problem) for problem in problems]
            batch["labels"] = self.tokenize_targets(targets, truncation=True, max_length=stage.max_target_length)
        return BatchFeature(dict(batch), tensor_type=return_tensors)

    def complete(self, problem: Mapping) -> dict:
        """
        A problem with a text in each column of text, "" where it has none, and its choices as a list.

        Raises:
            ValueError: it has no question, a key that is no column, or a column of another kind.
        """
        if not isinstance(problem, Mapping) or not isinstance(problem.get("question"), str):
            raise ValueError(f"A problem is a dict with a `question` (str); found {problem!r:.200}.")
        check_columns(problem, {column for stage in self.stages for column in (*stage.reads, stage.writes)})
        texts = {name: as_text(problem, name) for name in self.text_columns}
        if not texts["context"]:
            texts["context"] = as_text(problem, "hint")  # ScienceQA's name for it
        return {**problem, **texts, "choices": as_choices(problem.get("choices"))}

    def check_written(self, problem: Mapping, stage: Stage) -> None:
        """
        Raises:
            ValueError: the problem lacks what an earlier stage writes and this one reads.
        """
        for earlier in self.stages.before(stage):
            if earlier.writes in stage.reads and is_absent(problem.get(earlier.writes)):
                raise ValueError(
                    f"The {stage.name} stage reads `{earlier.writes}`, which the {earlier.name} stage writes: give it."
                )

    def choice_labels(self, problems: list[dict], stage: str) -> torch.LongTensor:
        """
        Each choice's target as labels, `(batch_size, max_choices, target_length)`, -100 where there is nothing. It is
        not cut at `max_target_length`: choices that are longer could become the same.
        """
        stage = self.stage(stage)
        num_choices = max(len(problem["choices"]) for problem in problems)
        targets = [
            stage.render_target({**problem, "answer": index}) if index < len(problem["choices"]) else None
            for problem in problems
            for index in range(num_choices)
        ]
        labels = self.tokenize_targets([target or "" for target in targets], verbose=False)
        labels[torch.tensor([target is None for target in targets])] = -100
        return labels.view(len(problems), num_choices, -1)

    def tokenize_targets(self, targets: list[str], **kwargs) -> torch.LongTensor:
        tokens = self.encode_texts(targets, **kwargs)
        return tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)

    def encode_texts(self, texts: str | list[str], **kwargs):
        """The tokenizer's own call. It keeps the padding and cutting of a call in itself: one thread at a time."""
        with TOKENIZING:
            return self.tokenizer(texts, **{"padding": True, "return_tensors": "pt", **kwargs})

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        **kwargs,
    ):
        """
        A chat of one user message (`chat_mmcot.read_chat` says how it is read) as inputs of `generate`, which then
        answers it by all stages. There is no template to give: a message becomes a problem, and the stages have theirs.

        Returns:
            The first stage's source (`str`, or a list for several chats); with `tokenize=True` its `input_ids`; with
            `return_dict=True` all its inputs, and `problems`, by which `generate` knows that it is a chat.
        """
        kwargs = {name: value for name, value in kwargs.items() if (name, value) != ("padding", True)}  # it pads anyway
        if chat_template is not None or kwargs:
            names = ", ".join([*(["chat_template"] if chat_template is not None else []), *kwargs])
            raise ValueError(f"apply_chat_template: {names} has no effect here; the stages have their own templates.")
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors is {return_tensors!r}; expected 'pt'.")
        chats = [conversation] if is_chat(conversation) else conversation
        problems = [{**dict.fromkeys(self.text_columns, ""), **read_chat(chat)} for chat in chats]
        images = [as_pictures(problem.pop("image")) for problem in problems]
        first = self.stages[0]
        if not tokenize:
            sources = [self.fit_source(problem, first) for problem in problems]
            return sources[0] if is_chat(conversation) else sources
        batch = self(problems, stage=first.name, images=images)
        if not return_dict:
            return batch["input_ids"]
        batch["problems"] = Conversation(self, problems, images)
        return batch

    def fit_source(self, problem: dict, stage: Stage) -> str:
        """The stage's source, shortened to its `max_source_length` where it has to be."""
        source = stage.render_source(problem)
        if not self.is_too_long(source, stage):
            return source
        for column, from_end in SHORTENED_COLUMNS:
            if column not in stage.reads or not problem.get(column):
                continue
            problem = self.shorten(problem, column, from_end, stage)
            if not self.is_too_long(stage.render_source(problem), stage):
                break
        return stage.render_source(problem)

    def shorten(self, problem: dict, column: str, from_end: bool, stage: Stage) -> dict:
        """The problem with as many words of that column as fit."""
        words = problem[column].split()

        def without(count: int) -> dict:
            kept = words[: len(words) - count] if from_end else words[count:]
            return {**problem, column: " ".join(kept)}

        fits = bisect.bisect_left(
            range(len(words)), True, key=lambda count: not self.is_too_long(stage.render_source(without(count)), stage)
        )
        return without(fits)

    def is_too_long(self, source: str, stage: Stage) -> bool:
        tokens = self.encode_texts(source, padding=False, return_tensors=None, verbose=False)
        return len(tokens["input_ids"]) > stage.max_source_length

    def prepare_pictures(self, images, batch_size: int) -> dict[str, torch.Tensor]:
        """
        Pixels of a batch, or nothing where no problem of it has a picture.

        Returns:
            `pixel_values` `(batch_size, num_images, 3, height, width)` and `pixel_mask`
            `(batch_size, num_images, height, width)`, num_images being the most that a problem of the batch has.
        """
        if images is None:
            return {}
        images = images if isinstance(images, (list, tuple)) else [images]
        if len(images) != batch_size:
            raise ValueError(f"images has {len(images)} entries for {batch_size} problems: give one entry per problem.")
        is_empty = [entry is None or (isinstance(entry, (list, tuple)) and not entry) for entry in images]
        if self.image_processor is None and not all(is_empty):
            raise ValueError(
                "A picture was given, but there is no image processor: this model has no picture tower, and its "
                "pictures come as vision_features that were computed before."
            )
        pixels = [[picture_pixels(self.image_processor, picture) for picture in as_pictures(entry)] for entry in images]
        return stack_pixels(pixels)


MMCoTProcessor.register_for_auto_class()
