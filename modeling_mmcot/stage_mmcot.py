"""A stage: the columns that it reads, the column that it writes, and its templates.

A stage is data (Jinja templates, like chat templates). The processor's config contains the stages and is saved next to
the weights. A source template has access only to the columns that the stage reads; a target template also to the gold
columns. This file imports no other shipped file.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

ANSWER = "answer_text"  # the column that a stage of kind "choose" writes
GOLD_COLUMNS = ("answer", "lecture", "solution", "rationales", "direct_answers", "observation", "gold_passages")
# Scores to compare choices by: the sum or the mean of the log-probabilities of the target's tokens, or the sum minus
# that of the same target without a question (`inference_mmcot.choose_answers`).
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

# The prompts of the original's utils_prompt.py, under its names: inputs - outputs (Q question, C context, M choices,
# G rationale; L lecture, E solution, A answer).
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

# The default source of a stage that retrieves.
QUERY = "{{ question }} {{ choices | join(' ') }}"
# The keys of a passage, which is a dict in the column of a stage that retrieves.
PASSAGE_FIELDS = ("id", "title", "text", "source", "score")


def one_line(text: str) -> str:
    r"""
    Replace line breaks by the two characters `\n`, as the original does in lectures and solutions. (T5's vocabulary has
    no backslash and tokenizes them as an unknown token and an n, also in the original.)
    """
    return text.replace("\n", "\\n")


# The sandbox that transformers uses for chat templates. A column that the template has no access to is an error.
ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
ENVIRONMENT.filters["one_line"] = one_line
compile_template = functools.lru_cache(ENVIRONMENT.from_string)


# A stage's name is also the name of its folder.
STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


# The texts that a stage of kind "check" writes.
RIGHT, WRONG = "right", "wrong"
# The key of a predicted problem that was sent back: the columns that later ones replaced.
REJECTED = "rejected"


def verdict_target(answer_target: str) -> str:
    """Return the target of a stage that checks: whether the written answer is the target of the right choice."""
    return (
        f"{{% set right_answer %}}{answer_target}{{% endset %}}"
        f'{{{{ "{RIGHT}" if answer_text.split() == right_answer.split() else "{WRONG}" }}}}'
    )


@dataclass(frozen=True)
class Kind:
    """
    What stages of one kind have in common. `inference_mmcot.WRITERS` has the function that writes their column.

    Args:
        writes (`str`, *optional*):
            The column that only stages of this kind write. By default any column that no other kind writes.
        has_model (`bool`, *optional*, defaults to `True`):
            Whether a stage has a model, which is trained. A stage without a model has no target.
        settings (`tuple[str, ...]`, *optional*):
            The fields of a `Stage` that have a meaning only for this kind.
        make_target (`Callable[[str], str]`, *optional*):
            Makes the target template from that of the stage that answers. By default a recipe contains the target.
        sends_back (`str`, *optional*):
            The text of the column that sends a problem back (`Stages.repeated_by`).
    """

    writes: str | None = None
    has_model: bool = True
    settings: tuple[str, ...] = ()
    make_target: Callable[[str], str] | None = None
    sends_back: str | None = None


GENERATE, CHOOSE, RETRIEVE, CHECK = "generate", "choose", "retrieve", "check"
KINDS = {
    GENERATE: Kind(),
    CHOOSE: Kind(writes=ANSWER, settings=("score",)),
    RETRIEVE: Kind(has_model=False, settings=("num_passages", "exclude_verbatim")),
    CHECK: Kind(make_target=verdict_target, sends_back=WRONG),
}


# The fields of a stage that are numbers, and what they count.
COUNTS = {"max_source_length": "tokens", "max_target_length": "tokens", "num_passages": "passages"}


@dataclass
class Stage:
    """
    One pass of the model, which reads columns of a problem (and its pictures) and writes one new column.

    Args:
        name (`str`):
            The name of the stage, and of its folder.
        reads (`list[str]`):
            The columns that the source template can use, including `images` if the stage reads the pictures.
        writes (`str`):
            The column that the stage writes.
        source (`str`):
            Jinja template of the source. For a stage that retrieves, it is the query.
        target (`str`, *optional*):
            Jinja template of the target, which can use all columns, including the gold ones. A stage without a model
            has none.
        max_source_length (`int`, *optional*, defaults to 512):
            Maximum length of the source, in tokens.
        max_target_length (`int`, *optional*, defaults to 512):
            Maximum length of the target, in tokens.
        score (`str`, *optional*, defaults to `"total"`):
            The score by which a stage that answers compares choices; a name in `SCORES`.
        kind (`str`, *optional*):
            A name in `KINDS`. Defaults to `"choose"` for the stage that writes `answer_text`, and to `"generate"` for
            all others.
        num_passages (`int`, *optional*, defaults to 5):
            The number of passages that a stage retrieves for a problem, at most.
        exclude_verbatim (`bool`, *optional*, defaults to `False`):
            Whether a stage leaves out a passage whose text is the problem's own lecture, where it is known.
    """

    name: str
    reads: list[str]
    writes: str
    source: str
    target: str = ""
    max_source_length: int = 512
    max_target_length: int = 512
    score: str = "total"
    kind: str = ""
    num_passages: int = 5
    exclude_verbatim: bool = False

    def __post_init__(self):
        """
        Check all fields, because a stage comes from a file and its name is used as a folder's name.

        Raises:
            ValueError: If a field has a wrong type or value.
        """
        self.kind = self.kind or default_kind(self.writes)
        texts = {name: isinstance(getattr(self, name), str) for name in ("name", "writes", "source", "target")}
        is_name = texts["name"] and STAGE_NAME.fullmatch(self.name) is not None
        is_list = isinstance(self.reads, (list, tuple)) and all(isinstance(column, str) for column in self.reads)
        checks = {
            "name": (is_name, "letters, digits, _ and -, because it is also a folder's name"),
            "reads": (is_list, "a list of columns"),
            "writes": (texts["writes"] and self.writes != "", "a column"),
            "source": (texts["source"], "a template"),
            "target": (texts["target"], "a template"),
            "kind": (
                isinstance(self.kind, str)
                and self.kind in KINDS
                and KINDS[self.kind].writes == exclusive_column(self.writes),
                f'one of {", ".join(KINDS)}; "{CHOOSE}" for the stage that writes `{ANSWER}`, and for no other one',
            ),
            "score": (self.score in SCORES, f"one of {', '.join(SCORES)}"),
            "exclude_verbatim": (isinstance(self.exclude_verbatim, bool), "true or false"),
        }
        for name, unit in COUNTS.items():
            checks[name] = (type(getattr(self, name)) is int and getattr(self, name) > 0, f"a number of {unit}")
        for name, (is_valid, expected) in checks.items():
            if not is_valid:
                raise ValueError(f"{name} of a stage is {getattr(self, name)!r:.80}; expected {expected}.")

    def render_source(self, problem: dict) -> str:
        """Render the source template with the columns that the stage reads."""
        return render(self.source, {name: problem[name] for name in self.reads if name in problem})

    def render_target(self, problem: dict) -> str:
        """Return the training target: the written column if the problem has it already, else the rendered template."""
        if self.writes in problem:
            return fold(problem[self.writes])
        return render(self.target, problem)

    @property
    def has_model(self) -> bool:
        """Whether this stage has a model, which is trained."""
        return KINDS[self.kind].has_model

    @property
    def answers(self) -> bool:
        """Whether this stage writes the answer, by scoring the choices."""
        return self.kind == CHOOSE

    @property
    def generates(self) -> bool:
        """Whether this stage generates a text, which a caller can replace."""
        return self.kind == GENERATE

    @property
    def sees_pictures(self) -> bool:
        """Whether this stage reads the pictures."""
        return "images" in self.reads

    def sends_back(self, written: dict) -> bool:
        """Return whether the column that this stage wrote for a problem sends it back."""
        verdict = KINDS[self.kind].sends_back
        return verdict is not None and written.get(self.writes) == verdict


class Stages(list[Stage]):
    """The stages of a system, in the order in which they run."""

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self]

    @property
    def see_pictures(self) -> bool:
        """Whether any stage reads the pictures."""
        return self.read("images")

    @property
    def with_models(self) -> "Stages":
        """The stages that have a model."""
        return Stages(stage for stage in self if stage.has_model)

    @property
    def retrieving(self) -> "Stages":
        """The stages that retrieve passages."""
        return Stages(stage for stage in self if stage.kind == RETRIEVE)

    @property
    def answering(self) -> Stage:
        """The stage that answers. If each stage has a model, that of this stage is at the root of a repository."""
        for stage in self:
            if stage.answers:
                return stage
        raise ValueError(f"No stage answers; this processor's stages: {', '.join(self.names) or 'none'}.")

    def read(self, column: str) -> bool:
        """Return whether any stage reads the column."""
        return any(column in stage.reads for stage in self)

    def named(self, name: str) -> Stage:
        """
        Return the stage with the given name.

        Raises:
            ValueError: If there is no such stage.
        """
        for stage in self:
            if stage.name == name:
                return stage
        raise ValueError(f"stage is {name!r}; this processor's stages: {', '.join(self.names) or 'none'}.")

    def before(self, stage: Stage) -> "Stages":
        """Return the stages before the given one."""
        return Stages(self[: self.index(stage)])

    def after(self, stage: Stage) -> "Stages":
        """Return the stages after the given one."""
        return Stages(self[self.index(stage) + 1 :])

    def repeated_by(self, stage: Stage) -> "Stages":
        """
        Return the stages that write again for a problem that the given stage sends back; none if its kind does not.

        The first of them generates a column that the given stage and the stage that answers read; it writes its next
        best text. If there are several such stages, it is the last one. All stages up to the given one follow.

        Raises:
            ValueError: If there is no such stage.
        """
        if KINDS[stage.kind].sends_back is None:
            return Stages()
        earlier, columns = self.before(stage), set(stage.reads) & set(self.answering.reads)
        for number, other in reversed(list(enumerate(earlier))):
            if ANSWER in stage.reads and other.generates and other.writes in columns:
                return Stages(earlier[number:])
        raise ValueError(
            f"stage {stage.name!r} of kind {stage.kind!r} reads {', '.join(stage.reads)}; expected `{ANSWER}`, and a "
            f"column that an earlier stage generates and the stage that answers reads too."
        )


def exclusive_column(writes: str) -> str | None:
    """Return the column if only stages of one kind write it, else None."""
    return writes if any(kind.writes == writes for kind in KINDS.values()) else None


def default_kind(writes: str) -> str:
    """Return the default kind of a stage that writes the given column."""
    return CHOOSE if writes == ANSWER else GENERATE


def render(template: str, columns: dict) -> str:
    """Render a Jinja template with columns, and fold white space."""
    return fold(compile_template(template).render(letters=LETTERS, **columns))


def read_answer(text: str, num_choices: int) -> int:
    """
    Return the index of the choice in "The answer is (B).", the paper's method; -1 if there is no such statement, more
    than one, or no such choice. As in the original, a text with two statements is unreadable, even if they agree.
    """
    letters = ANSWER_PATTERN.findall(text)
    index = LETTERS.index(letters[0]) if len(letters) == 1 else -1
    return index if index < num_choices else -1


def fold(text: str) -> str:
    """Replace all white space by single spaces, as in the original."""
    return " ".join(text.split())
