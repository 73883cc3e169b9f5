"""Problems and pictures -> the inputs of `forward`, with the templates of a stage (`stage_mmcot.py`).

A source that is too long loses its least useful words, but never the question, the choices or the final cue. The stages
are part of the processor's config. `pictures_mmcot.py` prepares pictures, `inference_mmcot.py` runs the model.
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
from .retrieval_mmcot import Searcher
from .stage_mmcot import GOLD_COLUMNS, LETTERS, PASSAGE_FIELDS, Stage, Stages

# A fast tokenizer stores the padding and truncation of its last call, which another thread would overwrite.
TOKENIZING = threading.RLock()
# Columns of the supported datasets that a problem may have even if no stage reads them.
KNOWN_COLUMNS = {
    *("id", "question", "choices", "context", "caption", "image", "images", "hint", "task", "split"),
    *("subject", "grade", "topic", "category", "skill"),
    *GOLD_COLUMNS,
}

# The columns to shorten first in a source that is too long, in this order, by their last words. Then the columns that
# stages wrote follow, by their first words, because a text ends with its conclusion.
SHORTENED_COLUMNS = ("lecture", "context", "caption")


def is_absent(value: Any) -> bool:
    """Return whether a value is a table's marker of a missing value: None, NaN, pandas' NA or NaT."""
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float) and math.isnan(value))
    )


def as_text(problem: Mapping, column: str) -> str:
    """
    Return a problem's text column, "" if it is missing.

    Raises:
        ValueError: If the column contains something other than a text.
    """
    value = problem.get(column)
    if is_absent(value):
        return ""
    if not isinstance(value, str):
        raise ValueError(f"`{column}` of a problem must be a str; found {value!r:.200}.")
    return value


def as_choices(choices: Any) -> list[str]:
    """
    Return a problem's choices as a list, empty if they are missing.

    Raises:
        ValueError: If the choices are not a list of texts, or there are more choices than letters.
    """
    if is_absent(choices):
        return []
    is_list = isinstance(choices, Iterable) and not isinstance(choices, (str, Mapping))
    if not is_list or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"`choices` of a problem must be a list of str; found {choices!r:.200}.")
    if len(choices) > len(LETTERS):
        raise ValueError(f"`choices` of a problem must be at most {len(LETTERS)}; found {len(choices)}.")
    return list(choices)


def check_columns(problem: Mapping, read: set[str]) -> None:
    """
    Check that all keys of a problem are known columns, because unknown ones would be ignored.

    Raises:
        ValueError: If the problem has an unknown key.
    """
    known = KNOWN_COLUMNS | read
    for name in problem.keys() - known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}."
        raise ValueError(f"A problem has the unknown key {name!r}: {hint}")


def own_images(problem: Mapping) -> Any:
    """
    Return the pictures in `image` or `images` of a problem; None if there are none.

    Raises:
        ValueError: If both are present.
    """
    given = [problem.get(name) for name in ("image", "images")]
    given = [entry for entry in given if not is_absent(entry) and not (isinstance(entry, (list, tuple)) and not entry)]
    if len(given) > 1:
        raise ValueError("A problem has pictures twice, as `image` and as `images`: expected only one of them.")
    return given[0] if given else None


def collect_images(problems: list[dict], images: list | None) -> list | None:
    """
    Return the pictures of each problem: from the argument `images`, or from the problems themselves.

    Raises:
        ValueError: If both have pictures.
    """
    own = [own_images(problem) for problem in problems]
    if all(entry is None for entry in own):
        return images
    if images is not None:
        raise ValueError("images were given, but the problems have their own (`image` or `images`): pass them once.")
    return own


def keep_words(value: str | list[dict], count: int, from_end: bool) -> str | list[dict]:
    """
    Return the first words of a text, or with `from_end=False` its last ones; of passages the first words of all of
    them together, without those that have none left.
    """
    if isinstance(value, str):
        words = value.split()
        return " ".join(words[:count] if from_end else words[len(words) - count :])
    kept = []
    for passage in value:
        words = passage["text"].split()[:count]
        if words:
            kept.append({**passage, "text": " ".join(words)})
        count -= len(words)
    return kept


def as_passages(value: Any, column: str) -> list[dict]:
    """
    Return the passages that a problem brings, each with all of `PASSAGE_FIELDS`.

    Raises:
        ValueError: If they are not a list of texts, or of dicts with a `text`.
    """
    given = [{"text": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else [None]
    # Rows of a dataset have None in fields that are absent.
    given = [
        {name: field for name, field in one.items() if field is not None} if isinstance(one, Mapping) else one
        for one in given
    ]
    for passage in given:
        if not is_passage(passage):
            raise ValueError(
                f"`{column}` of a problem must be a list of passages, each a text or a dict with a `text` (str), and "
                f"optionally `id`, `title`, `source` (str) and `score` (float); found {value!r:.200}."
            )
    empty = {**dict.fromkeys(PASSAGE_FIELDS, ""), "score": 0.0}
    return [{**empty, "id": str(number), **passage} for number, passage in enumerate(given)]


def is_passage(value: Any) -> bool:
    """Return whether a value is a dict with a text, and with further fields of a passage or none."""
    if not isinstance(value, Mapping) or not str(value.get("text", "")).strip():
        return False
    known = {**dict.fromkeys((*PASSAGE_FIELDS, "query", "date"), str), "score": (int, float)}
    return all(isinstance(field, known.get(name, ())) for name, field in value.items())


class Searchers(dict[str, Searcher]):
    """The searchers by the names of their stages. They are not serialized with a processor."""

    def __missing__(self, name: str) -> Searcher:
        raise ValueError(
            f"The {name} stage has no searcher: load the system with `pipeline`, or set searchers[{name!r}]."
        )

    def __reduce__(self):
        return Searchers, ()

    def __deepcopy__(self, memo):
        return Searchers(self)


class MMCoTProcessor(ProcessorMixin):
    """
    Processor of a system: a tokenizer, an image processor and the stages, whose templates render problems.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            T5's tokenizer, or another one that appends eos to a text.
        image_processor (`BaseImageProcessor`, *optional*):
            The image processor of the picture tower; None for a model without tower.
        stages (`list[dict]` or `list[Stage]`, *optional*):
            The stages, in the order in which they run.
        chat_template (`str`, *optional*):
            Accepted by all processors of transformers; not used, because the stages have their own templates.

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
        self.searchers = Searchers()  # `loading_mmcot.load_stages` adds those of a repository
        self.stages = Stages(stage if isinstance(stage, Stage) else Stage(**stage) for stage in stages or [])

    # ProcessorMixin requires all attributes in this list, but a model without tower has no image processor.
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
        # A model's file could name an audio tokenizer, which transformers would load from any repository.
        if module_name not in ("PreTrainedTokenizerBase", "MistralCommonBackend"):
            raise ValueError(
                f"A file of this processor names the class {module_name!r}; expected none: it has no audio tokenizer."
            )
        return ProcessorMixin.get_possibly_dynamic_module(module_name)

    def save_pretrained(self, save_directory, **kwargs):
        # A tokenizer saves the padding and truncation of its last call, and the arguments of its loading. They are
        # reset, because the same processor must be saved in the same files.
        for name in ("is_local", "local_files_only", "dtype", "torch_dtype"):
            self.tokenizer.init_kwargs.pop(name, None)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # None for tokenizers in Python (ByT5)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        return super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict:
        output = super().to_dict()
        output["stages"] = [asdict(stage) for stage in self.stages]
        output.pop("searchers", None)
        return output

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]

    @property
    def text_columns(self) -> list[str]:
        """The text columns of an input problem: those that a stage reads and no stage writes, without gold columns."""
        read = {column for stage in self.stages for column in stage.reads}
        written = {stage.writes for stage in self.stages}
        return sorted(({"question", "context", "caption"} | read) - written - {"choices", "images", *GOLD_COLUMNS})

    def stage(self, name: str) -> Stage:
        """Return the stage with the given name."""
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
        Prepare either `problems` for a `stage`, or `text`, as for other processors of transformers.

        Args:
            problems (`dict` or `list[dict]`, *optional*):
                Rows of the problem schema, with pictures as `image` or `images`, and for a later stage with the columns
                that earlier stages wrote. `context`, `choices` and `caption` may be missing.
            stage (`str`, *optional*):
                The name of the stage whose templates to use. Required with `problems`.
            images (*optional*):
                Pictures to use instead of the problems' own, one entry per problem: a picture, a list of pictures or
                None. `pictures_mmcot.open_picture` lists the accepted types: a PIL image, a path, a URL, …
            text (`str` or `list[str]`, *optional*):
                Sources that are already rendered.
            with_targets (`bool`, *optional*, defaults to `False`):
                Whether to also return `labels`, padded with -100.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                The type of the returned tensors.
            kwargs:
                Passed to the tokenizer, overriding the defaults (padding to the longest).

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`; if the stage
            reads pictures, `pixel_values` of shape `(batch_size, num_images, 3, height, width)` and `pixel_mask` of
            shape `(batch_size, num_images, height, width)`; with targets, `labels` of shape
            `(batch_size, target_length)`.
        """
        if (problems is None) == (text is None):
            raise ValueError("Pass either problems with a stage, or text: exactly one of them.")
        kwargs = {"padding": True, "return_tensors": return_tensors, **kwargs}
        if text is not None:
            batch = self.encode_texts(text, **kwargs)
            batch.update(self.prepare_pictures(images, 1 if isinstance(text, str) else len(text)))
            return BatchFeature(dict(batch), tensor_type=return_tensors)
        problems = [problems] if isinstance(problems, Mapping) else list(problems)
        if not problems:
            raise ValueError("problems is empty: expected at least one.")
        stage = self.stage(stage)
        images = collect_images(problems, images)
        problems = [self.complete_problem(problem) for problem in problems]
        for problem in problems:
            self.check_written(problem, stage)
        batch = self.encode_texts([self.fit_source(problem, stage) for problem in problems], **kwargs)
        if stage.sees_pictures:
            batch.update(self.prepare_pictures(images, len(problems)))
        if with_targets:
            targets = [stage.render_target(problem) for problem in problems]
            batch["labels"] = self.tokenize_targets(targets, truncation=True, max_length=stage.max_target_length)
        return BatchFeature(dict(batch), tensor_type=return_tensors)

    def complete_problem(self, problem: Mapping) -> dict:
        """
        Return the problem with all text columns, "" for missing ones, and its choices as a list.

        Raises:
            ValueError: If the problem has no question, an unknown key, or a column of another type.
        """
        if not isinstance(problem, Mapping) or not isinstance(problem.get("question"), str):
            raise ValueError(f"A problem must be a dict with a `question` (str); found {problem!r:.200}.")
        check_columns(problem, {column for stage in self.stages for column in (*stage.reads, stage.writes)})
        texts = {name: as_text(problem, name) for name in self.text_columns}
        retrieved = {stage.writes for stage in self.stages.retrieving} & problem.keys()
        passages = {name: as_passages(problem[name], name) for name in retrieved if not is_absent(problem[name])}
        problem = {name: value for name, value in problem.items() if name not in retrieved}
        if not texts["context"]:
            texts["context"] = as_text(problem, "hint")  # ScienceQA's name for it
        return {**problem, **texts, **passages, "choices": as_choices(problem.get("choices"))}

    def check_written(self, problem: Mapping, stage: Stage) -> None:
        """
        Check that the problem has all columns that earlier stages write and this stage reads.

        Raises:
            ValueError: If a column is missing.
        """
        for earlier in self.stages.before(stage):
            if earlier.writes in stage.reads and is_absent(problem.get(earlier.writes)):
                raise ValueError(
                    f"The {stage.name} stage reads `{earlier.writes}`, which the {earlier.name} stage writes: add it."
                )

    def choice_labels(self, problems: list[dict], stage: str) -> torch.LongTensor:
        """
        Return the targets of all choices as labels, `(batch_size, max_choices, target_length)`, padded with -100. They
        are not truncated to `max_target_length`, because long choices could become equal.
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
        """Return the tokens of the targets, padded with -100."""
        tokens = self.encode_texts(targets, **kwargs)
        return tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)

    def encode_texts(self, texts: str | list[str], **kwargs):
        """Call the tokenizer, one thread at a time, because it stores the padding and truncation of a call."""
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
        Convert a chat of one user message to inputs of `generate`, which answers it with all stages.

        `chat_mmcot.read_chat` reads the message as a problem. A `chat_template` is not supported, because the stages
        have their own templates.

        Returns:
            The source of the first stage (`str`, or a list for several chats); with `tokenize=True` its `input_ids`;
            with `return_dict=True` all its inputs, and `problems`, by which `generate` recognizes a chat.

        Raises:
            ValueError: If a chat cannot be read as a problem, or an argument is not supported.
        """
        kwargs = {name: value for name, value in kwargs.items() if (name, value) != ("padding", True)}  # the default
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
        """Render the stage's source, shortened to `max_source_length` if necessary."""
        source = stage.render_source(problem)
        if not self.is_too_long(source, stage):
            return source
        passages = [other.writes for other in self.stages.retrieving if other.writes in stage.reads]
        given = [column for column in SHORTENED_COLUMNS if column in stage.reads]
        written = [column for column in stage.reads if column not in KNOWN_COLUMNS and column not in passages]
        for column in (*passages, *given, *written):
            if not problem.get(column):
                continue
            problem = self.shorten_column(problem, column, column not in written, stage)
            if not self.is_too_long(stage.render_source(problem), stage):
                break
        return stage.render_source(problem)

    def shorten_column(self, problem: dict, column: str, from_end: bool, stage: Stage) -> dict:
        """Return the problem with as many words of the column as fit into the source."""
        value = problem[column]
        count = len(value.split()) if isinstance(value, str) else sum(len(one["text"].split()) for one in value)

        def remove_words(num_removed: int) -> dict:
            return {**problem, column: keep_words(value, count - num_removed, from_end)}

        num_removed = bisect.bisect_left(
            range(count),
            True,
            key=lambda removed: not self.is_too_long(stage.render_source(remove_words(removed)), stage),
        )
        return remove_words(num_removed)

    def is_too_long(self, source: str, stage: Stage) -> bool:
        """Return whether the source has more tokens than `max_source_length`."""
        tokens = self.encode_texts(source, padding=False, return_tensors=None, verbose=False)
        return len(tokens["input_ids"]) > stage.max_source_length

    def prepare_pictures(self, images, batch_size: int) -> dict[str, torch.Tensor]:
        """
        Prepare the pictures of a batch.

        Args:
            images:
                One entry per problem: a picture, a list of pictures or None.
            batch_size (`int`):
                The number of problems.

        Returns:
            `dict[str, torch.Tensor]`: `pixel_values` of shape `(batch_size, num_images, 3, height, width)` and
            `pixel_mask` of shape `(batch_size, num_images, height, width)`, where `num_images` is the maximum number of
            pictures per problem in the batch. Empty if no problem has a picture.
        """
        if images is None:
            return {}
        images = images if isinstance(images, (list, tuple)) else [images]
        if len(images) != batch_size:
            raise ValueError(f"images has {len(images)} entries for {batch_size} problems: expected one per problem.")
        is_empty = [entry is None or (isinstance(entry, (list, tuple)) and not entry) for entry in images]
        if self.image_processor is None and not all(is_empty):
            raise ValueError(
                "A picture was given, but there is no image processor: this model has no picture tower, and reads "
                "pictures as precomputed vision_features."
            )
        pixels = [[picture_pixels(self.image_processor, picture) for picture in as_pictures(entry)] for entry in images]
        return stack_pixels(pixels)


MMCoTProcessor.register_for_auto_class()
