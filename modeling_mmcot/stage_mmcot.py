"""A stage: the columns that it reads, the column that it writes, and its templates.

A stage is data (Jinja templates, like chat templates). The stages are saved in the processor's config, next to the
weights. A source template sees only the columns that the stage reads; a target template sees the gold columns as well.
This file imports no other shipped file.
"""

import functools
import re
from dataclasses import dataclass

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

GENERATE, CHOOSE = "generate", "choose"
# What a stage does with a batch of problems: write a text, or score the choices. Each kind is a function in
# `inference_mmcot.KINDS`.
KINDS = (GENERATE, CHOOSE)
ANSWER = "answer_text"  # the column that a stage of kind "choose" writes
GOLD_COLUMNS = ("answer", "lecture", "solution", "rationales", "direct_answers")
# How a stage that answers compares choices: by the log-probabilities of their targets' tokens in sum, on average, or in
# sum less what the target has without a question (`inference_mmcot.choose_answers`).
SCORES = ("total", "mean", "calibrated")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_PATTERN = re.compile(r"The answer is \(([A-Z])\)")

_QUESTION = (
    "Question: {{ question }} "
    "Context: {{ (context ~ ' ' ~ caption | default('')) | trim or 'N/A' }} "
    "Options: {% for choice in choices %}({{ letters[loop.index0] }}) {{ choice }} {% endfor %}"
)
_GOLD = "{{ lecture | one_line }} {{ solution | one_line }}"
_ANSWER = "The answer is ({{ letters[answer] }})."

# The prompts of the original's utils_prompt.py, by its names for them: what is given - what is asked for
# (Q question, C context, M choices, G rationale; L lecture, E solution, A answer).
PAPER_TEMPLATES: dict[str, dict[str, str]] = {
    "QCM-A": {"source": _QUESTION + "Answer:", "target": _ANSWER},
    "QCM-E": {"source": _QUESTION + "Solution:", "target": "Solution: {{ solution | one_line }}"},
    "QCM-LE": {"source": _QUESTION + "Solution:", "target": "Solution: " + _GOLD + "."},
    "QCM-LEA": {"source": _QUESTION + "Solution:", "target": _GOLD + " " + _ANSWER},
    "QCM-ALE": {"source": _QUESTION + "Solution:", "target": _ANSWER + " BECAUSE: " + _GOLD},
    "QCMG-A": {
        "source": _QUESTION + "{% if rationale is defined %}{{ rationale }}{% else %}Solution: " + _GOLD + "{% endif %}"
        " Answer:",
        "target": _ANSWER,
    },
}


def one_line(text: str) -> str:
    """
    Line breaks as the two characters backslash and n, as the original writes those of lectures and solutions. (T5's
    vocabulary has no backslash and reads an unknown piece and an n there, in the original too.)
    """
    return text.replace("\n", "\\n")


# The sandbox that transformers uses for chat templates; a column that a template may not see is an error.
ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
ENVIRONMENT.filters["one_line"] = one_line
compile_template = functools.lru_cache(ENVIRONMENT.from_string)


# A stage's name is also its folder's.
STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass
class Stage:
    """
    One pass of the model: it reads columns of a problem (and its pictures) and writes one new column.

    Args:
        name (`str`): the stage's name, also its folder's.
        reads (`list[str]`): the columns that the source template sees; `images` among them when it sees the pictures.
        writes (`str`): the column that it writes.
        source (`str`), target (`str`): Jinja templates. The target's sees every column, the gold ones too.
        max_source_length (`int`), max_target_length (`int`): in tokens.
        score (`str`): of a stage that answers, how choices are compared: a name in `SCORES`.
        kind (`str`, *optional*): a name in `KINDS`. By default "choose" for the stage that writes `answer_text`, and
            "generate" for every other one.
    """

    name: str
    reads: list[str]
    writes: str
    source: str
    target: str
    max_source_length: int = 512
    max_target_length: int = 512
    score: str = "total"
    kind: str = ""

    def __post_init__(self):
        """
        Raises:
            ValueError: a field is not of its kind. A stage comes from a file, and its name is a folder's.
        """
        self.kind = self.kind or default_kind(self.writes)
        texts = {name: isinstance(getattr(self, name), str) for name in ("name", "writes", "source", "target")}
        is_name = texts["name"] and STAGE_NAME.fullmatch(self.name) is not None
        is_list = isinstance(self.reads, (list, tuple)) and all(isinstance(column, str) for column in self.reads)
        checks = {
            "name": (is_name, "letters, digits, _ and -, as it is a folder's name too"),
            "reads": (is_list, "a list of columns"),
            "writes": (texts["writes"] and self.writes != "", "a column"),
            "source": (texts["source"], "a template"),
            "target": (texts["target"], "a template"),
            "score": (self.score in SCORES, f"one of {', '.join(SCORES)}"),
            "kind": (
                self.kind in KINDS and (self.kind == CHOOSE) == (self.writes == ANSWER),
                f'one of {", ".join(KINDS)}; "{CHOOSE}" for the stage that writes `{ANSWER}`, and for no other one',
            ),
        }
        for name in ("max_source_length", "max_target_length"):
            checks[name] = (type(getattr(self, name)) is int and getattr(self, name) > 0, "a number of tokens")
        for name, (is_right, expected) in checks.items():
            if not is_right:
                raise ValueError(f"{name} of a stage is {getattr(self, name)!r:.80}; expected {expected}.")

    def render_source(self, problem: dict) -> str:
        return render(self.source, {name: problem[name] for name in self.reads if name in problem})

    def render_target(self, problem: dict) -> str:
        """The text to learn: the written column where the problem has it already, else the target template's."""
        if self.writes in problem:
            return fold(problem[self.writes])
        return render(self.target, problem)

    @property
    def answers(self) -> bool:
        """Whether this stage gives the answer, which is chosen by scoring the choices."""
        return self.kind == CHOOSE

    @property
    def sees_pictures(self) -> bool:
        return "images" in self.reads


class Stages(list[Stage]):
    """The stages of a system, in the order in which they run."""

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self]

    @property
    def see_pictures(self) -> bool:
        """Whether any stage does."""
        return self.read("images")

    def read(self, column: str) -> bool:
        """Whether any stage reads the column."""
        return any(column in stage.reads for stage in self)

    def named(self, name: str) -> Stage:
        for stage in self:
            if stage.name == name:
                return stage
        raise ValueError(f"stage is {name!r}; this processor's stages: {', '.join(self.names) or 'none'}.")

    def before(self, stage: Stage) -> "Stages":
        return Stages(self[: self.index(stage)])

    def after(self, stage: Stage) -> "Stages":
        return Stages(self[self.index(stage) + 1 :])


def default_kind(writes: str) -> str:
    """The kind of a stage that names none, by the column that it writes."""
    return CHOOSE if writes == ANSWER else GENERATE


def render(template: str, columns: dict) -> str:
    return fold(compile_template(template).render(letters=LETTERS, **columns))


def read_answer(text: str, num_choices: int) -> int:
    """
    The index in "The answer is (B).", the paper's way; -1 where there is none, several, or none of these choices. As in
    the original, two statements of an answer cannot be read, even where they agree.
    """
    letters = ANSWER_PATTERN.findall(text)
    index = LETTERS.index(letters[0]) if len(letters) == 1 else -1
    return index if index < num_choices else -1


def fold(text: str) -> str:
    """White space folded to single blanks, as in the original."""
    return " ".join(text.split())
