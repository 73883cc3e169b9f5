"""Generates the demonstration problems: short questions in ScienceQA's row format, most with a 96x96 px picture.

Both stages can be trained on them from scratch on two CPU cores in minutes, and their scores are meaningful: val and
test contain combinations of values that never occur in training, and the picture skills cannot be answered from the
text. None of it is real data: every text is a template, and this file draws every picture from seeded numbers, without
a download. The demonstration is not a benchmark, and its scores do not predict scores on ScienceQA.

A skill is one row of `SKILLS`: its metadata, its space of combinations, a function that words a problem and, if it has
a picture, a function that draws it. To add a skill, add a row.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, permutations, product, repeat

from PIL import Image

from mmcot.problems.drawing import COLORS, INK, LINE, SIZE, Canvas, split_of_combination

SPLIT_SIZES: dict[str, int] = {"train": 12_000, "val": 400, "test": 1_800}


@dataclass(frozen=True)
class Wording:
    """The texts of one problem. `answer` is the right choice; `others` are the wrong choices in any order."""

    question: str
    answer: str
    others: list[str]
    solution: str
    context: str = ""


@dataclass(frozen=True)
class Skill:
    """One kind of problem.

    `combinations` lists tuples of values; each tuple belongs to exactly one split. `word` and `draw` take a random
    generator and the values of one combination. The generator varies the form of the question, the wrong choices and
    the jitter, which do not determine the split. `share` is the percentage of the skill in every split; a skill with
    share 0 is generated only if it is named.
    """

    subject: str
    grade: str
    topic: str
    category: str
    share: int
    lecture: str
    combinations: Callable[[], Iterable[tuple]]
    word: Callable[..., Wording]
    draw: Callable[..., Canvas] | None = None


def generate(split: str, difficulty: int = 1, skill: str | None = None) -> Iterator[dict]:
    """
    Yield the problems of a split, with the skills interleaved. The rows are the same in every process.

    Args:
        split: `train`, `val` or `test`.
        difficulty: at 2, 3, … the training split has a half, a third, … of its problems, and each picture has 1, 2, …
            blots of ink, which may hide the object of the question.
        skill: generate only problems of this skill; their number is that of all skills together.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLIT_SIZES)}")
    size = SPLIT_SIZES[split] // (difficulty if split == "train" else 1)
    shares = {name: row.share for name, row in SKILLS.items()} if skill is None else {skill: 100}
    rows = {name: _rows(name, split, num_blots=difficulty - 1) for name in shares}
    order = [name for name, share in shares.items() for _ in range(size * share // 100)]
    random.Random(f"order {split}").shuffle(order)
    return (next(rows[name]) for name in order)


def observation(rationale: str) -> str:
    """Return the part of a solution or rationale that describes the picture: the text before its " So,"."""
    return rationale.partition(" So,")[0].strip()


def _rows(name: str, split: str, num_blots: int) -> Iterator[dict]:
    """Yield distinct rows of one skill. When the combinations of the split are used up, they are used again."""
    skill = SKILLS[name]
    rng, ink = random.Random(f"{split} {name}"), random.Random(f"{split} {name} blots")
    pool = [values for values in skill.combinations() if split_of_combination(name, values) == split]
    rng.shuffle(pool)
    known = set()
    for values in chain.from_iterable(repeat(pool, 100)):
        wording = skill.word(rng, *values)
        picture = None
        if skill.draw:
            canvas = skill.draw(rng, *values)
            for _ in range(num_blots):
                canvas.blot(ink)
            picture = canvas.png()
        key = (wording.question, wording.context, *sorted([wording.answer, *wording.others]), picture)
        if key in known:
            continue
        choices = [wording.answer, *wording.others]
        rng.shuffle(choices)
        yield {
            "id": f"{split}-{name}-{len(known)}",
            "question": wording.question,
            "choices": choices,
            "context": wording.context,
            "images": [{"bytes": picture, "path": None}] if picture else [],
            "caption": "",
            "answer": choices.index(wording.answer),
            "lecture": skill.lecture,
            "solution": wording.solution,
            "rationales": [],
            "direct_answers": [],
            "subject": skill.subject,
            "grade": skill.grade,
            "topic": skill.topic,
            "category": skill.category,
            "skill": name,
            "split": split,
        }
        known.add(key)
    raise ValueError(f"skill {name!r} has only {len(known)} different problems for split {split!r}: ask for fewer")


def _some(rng: random.Random, values: Iterable[str], number: int, without: Iterable[str]) -> list[str]:
    """Return `number` different values, none of them in `without`."""
    return rng.sample([value for value in values if value not in without], number)


# Magnets: which poles face each other.

POLES = {"north": ("N", COLORS["red"]), "south": ("S", COLORS["blue"])}
OTHER_POLE = {"north": "south", "south": "north"}


def _magnet_combinations() -> Iterable[tuple]:
    """The facing poles (left, right); top of the left magnet, gap, rise of the right magnet and shift, all in px."""
    return product(POLES, POLES, range(8, 56, 2), range(4, 10, 2), range(-2, 3), range(-1, 2))


def _word_magnets(rng: random.Random, left: str, right: str, *_place: int) -> Wording:
    rule, answer, other = (
        ("Like poles repel.", "repel", "attract") if left == right else ("Opposite poles attract.", "attract", "repel")
    )
    return Wording(
        question="Will these magnets attract or repel each other?",
        answer=answer,
        others=[other],
        solution=f"The poles that face each other are {left} and {right}. {rule} So, the magnets will {answer}.",
    )


def _draw_magnets(rng: random.Random, left: str, right: str, top: int, gap: int, rise: int, shift: int) -> Canvas:
    canvas = Canvas()
    middle = SIZE // 2 + shift
    _draw_magnet(canvas, middle - gap // 2 - 42, top, (OTHER_POLE[left], left))
    _draw_magnet(canvas, middle + gap // 2, top + rise, (right, OTHER_POLE[right]))
    return canvas


def _draw_magnet(canvas: Canvas, x: int, y: int, poles: tuple[str, str]) -> None:
    """A bar magnet of 42x32 px with its top left corner at (x, y)."""
    for start, pole in zip((x, x + 21), poles, strict=True):
        letter, color = POLES[pole]
        canvas.rectangle((start, y, start + 21, y + 32), fill=color)
        canvas.text((start + 10.5, y + 16), letter, 17, "white")


# Thermometer: which mark the column reaches.

MARKS = range(0, 100, 10)


def _thermometer_combinations() -> Iterable[tuple]:
    """Color, mark in degrees, x of the column's middle in px."""
    return product(COLORS, MARKS, range(30, 71))


def _word_thermometer(rng: random.Random, color: str, mark: int, _x: int) -> Wording:
    answer = f"{mark} degrees"
    return Wording(
        question="What temperature does this thermometer show?",
        answer=answer,
        others=_some(rng, [f"{other} degrees" for other in MARKS], 3, without=[answer]),
        solution=f"The {color} column reaches the {mark} mark. So, the temperature is {answer}.",
    )


def _draw_thermometer(rng: random.Random, color: str, mark: int, x: int) -> Canvas:
    canvas = Canvas()
    heights = {degrees: 76 - 8 * degrees // 10 for degrees in MARKS}  # y of each mark; two marks per 16 px patch
    canvas.rectangle((x - 8, 1, x + 8, 90), fill="white", outline=INK, radius=8)
    canvas.ellipse((x - 10, 75, x + 10, 95), fill="white", outline=INK)
    canvas.ellipse((x - 8, 77, x + 8, 93), fill=COLORS[color])
    canvas.rectangle((x - 6, heights[mark], x + 6, 84), fill=COLORS[color])
    for degrees, y in heights.items():
        labelled = degrees % 30 == 0
        canvas.line((x - (14 if labelled else 12), y), (x - 8, y), INK)
        if labelled:
            canvas.text((x - 16, y + 1), str(degrees), 8, INK, anchor="rm")
    return canvas


# Bar chart: which bar is the tallest or the shortest.

BAR_FORMS = {"tallest": (max, "most"), "shortest": (min, "least")}


def _bar_combinations() -> Iterable[tuple]:
    """The three colors and the three heights (1 to 5), from left to right."""
    return product(permutations(COLORS, 3), permutations(range(1, 6), 3))


def _word_bars(rng: random.Random, colors: tuple, heights: tuple) -> Wording:
    form = rng.choice(list(BAR_FORMS))
    pick, superlative = BAR_FORMS[form]
    extreme = pick(heights)
    answer = colors[heights.index(extreme)]
    (a, b, c), (i, j, k) = colors, heights
    return Wording(
        question=f"Which bar is the {form}?",
        answer=answer,
        others=[color for color in colors if color != answer],
        solution=f"The {a} bar shows {i}, the {b} bar {j} and the {c} bar {k}. "
        f"{extreme} is the {superlative}. So, the {answer} bar is the {form}.",
    )


def _draw_bars(rng: random.Random, colors: tuple, heights: tuple) -> Canvas:
    canvas = Canvas(_chart_paper())
    for slot, (color, height) in enumerate(zip(colors, heights, strict=True)):
        left = 32 * slot + 10  # each bar has two columns of patches
        canvas.rectangle((left, 88 - 16 * height, left + 20, 88), fill=COLORS[color])
    canvas.line((8, 88), (SIZE, 88), INK)
    return canvas


@cache
def _chart_paper() -> Image.Image:
    canvas = Canvas()
    for number in range(1, 6):
        y = 88 - 16 * number  # one unit is the height of a patch
        canvas.line((8, y), (SIZE, y), LINE)
        canvas.text((4, y), str(number), 8, INK)
    canvas.line((8, 4), (8, 89), INK)
    return canvas.image


# Map: which of the eight outer cells contains the star.

SEA = (206, 231, 247)
LAND = (196, 224, 168)
SHORE = (150, 190, 124)
PLACES = {  # the place in the picture, the legend, and the column and row of the 32 px cell
    "northwest": ("top left", "Top is north and left is west.", 0, 0),
    "north": ("top", "Top is north.", 1, 0),
    "northeast": ("top right", "Top is north and right is east.", 2, 0),
    "west": ("left", "Left is west.", 0, 1),
    "east": ("right", "Right is east.", 2, 1),
    "southwest": ("bottom left", "Bottom is south and left is west.", 0, 2),
    "south": ("bottom", "Bottom is south.", 1, 2),
    "southeast": ("bottom right", "Bottom is south and right is east.", 2, 2),
}
STAR = [(0, -13), (3.4, -4.4), (12.4, -4), (5.4, 1.7), (7.6, 10.5), (0, 5.6)]  # right half of a star around (0, 0), px
STAR += [(-x, y) for x, y in reversed(STAR[1:-1])]


def _map_combinations() -> Iterable[tuple]:
    """Color, direction, and the offset of the star from the middle of its cell (x and y, px)."""
    return product(COLORS, PLACES, range(-3, 4), range(-3, 4))


def _word_map(rng: random.Random, color: str, direction: str, *_jitter: int) -> Wording:
    place, legend, *_cell = PLACES[direction]
    return Wording(
        question="In which part of the map is the star?",
        answer=direction,
        others=_some(rng, PLACES, 3, without=[direction]),
        solution=f"The {color} star is at the {place} of the map. {legend} So, the star is in the {direction}.",
    )


def _draw_map(rng: random.Random, color: str, direction: str, dx: int, dy: int) -> Canvas:
    canvas = Canvas(_island())
    *_words, column, row = PLACES[direction]
    x, y = 32 * column + 16 + dx, 32 * row + 16 + dy
    canvas.polygon([(x + a, y + b) for a, b in STAR], fill=COLORS[color], outline="white")
    return canvas


@cache
def _island() -> Image.Image:
    canvas = Canvas(SEA)
    shore = [(12, 30), (22, 15), (38, 19), (52, 9), (70, 13), (84, 27), (80, 42), (89, 58), (78, 79)]
    shore += [(60, 76), (46, 88), (28, 82), (19, 68), (7, 56), (16, 44)]
    canvas.polygon(shore, fill=LAND, outline=SHORE)
    canvas.polygon([(48, 38), (43, 57), (48, 53), (53, 57)], fill=SHORE)  # the arrow to the north
    canvas.text((48, 63), "N", 9, SHORE)
    return canvas.image


# Objects: the color of one of three shapes.

SHAPES: dict[str, Callable[[Canvas, int, int, tuple], None]] = {  # drawn around (x, y), 28 px
    "circle": lambda canvas, x, y, fill: canvas.ellipse((x - 14, y - 14, x + 14, y + 14), fill),
    "square": lambda canvas, x, y, fill: canvas.rectangle((x - 14, y - 14, x + 14, y + 14), fill),
    "triangle": lambda canvas, x, y, fill: canvas.polygon([(x, y - 14), (x + 15, y + 14), (x - 16, y + 14)], fill),
}


def _object_combinations() -> Iterable[tuple]:
    """The three shapes and their three colors, from left to right."""
    return product(permutations(SHAPES), permutations(COLORS, 3))


def _word_objects(rng: random.Random, shapes: tuple, colors: tuple) -> Wording:
    shape, answer = rng.choice(list(zip(shapes, colors, strict=True)))
    drawn = [color for color in colors if color != answer]
    a, b, c = (f"a {color} {shape}" for color, shape in zip(colors, shapes, strict=True))
    return Wording(
        question=f"What color is the {shape}?",
        answer=answer,
        others=drawn + _some(rng, COLORS, 1, without=colors),
        solution=f"There is {a}, {b} and {c}. So, the {shape} is {answer}.",
    )


def _draw_objects(rng: random.Random, shapes: tuple, colors: tuple) -> Canvas:
    canvas = Canvas()
    canvas.rectangle((0, 54, SIZE, SIZE), fill=(238, 234, 224))
    for slot, (shape, color) in enumerate(zip(shapes, colors, strict=True)):
        SHAPES[shape](canvas, 32 * slot + 16, 48 + rng.randint(-2, 2), COLORS[color])
    return canvas


# Descriptions: the pictures of `objects`, with choices of different lengths. The right choice may have any length.
def _description_combinations() -> Iterable[tuple]:
    return product(_object_combinations(), range(1, 4))


def _word_descriptions(rng: random.Random, objects: tuple, length: int) -> Wording:
    shapes, colors = objects

    def state_colors(named: int, is_true: bool) -> str:
        """Return a sentence with the colors of `named` shapes. If it is not true, one color is wrong."""
        order = rng.sample(range(3), named)
        wrong = None if is_true else rng.choice(order)
        other = {number: rng.choice([color for color in COLORS if color != colors[number]]) for number in order}
        parts = [f"the {shapes[number]} is {other[number] if number == wrong else colors[number]}" for number in order]
        return f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]

    answer = state_colors(length, is_true=True)
    a, b, c = (f"a {color} {shape}" for color, shape in zip(colors, shapes, strict=True))
    return Wording(
        question="What is right?",
        answer=answer,
        others=[state_colors(named, is_true=False) for named in range(1, 4) if named != length],
        solution=f"There is {a}, {b} and {c}. So, {answer}.",
    )


def _draw_descriptions(rng: random.Random, objects: tuple, _length: int) -> Canvas:
    return _draw_objects(rng, *objects)


# Tense of a verb (no picture, no context).

NAMES = ["Mia", "Tom", "Anna", "Ben", "Lily", "Sam", "Emma", "Jack", "Nina", "Paul", "Rosa", "Leo"]
VERBS = ["walk", "jump", "crawl", "return", "wander", "head", "travel", "climb"]  # regular: they only take -ed and -s
LOCATIONS = ["park", "school", "lake", "shop", "beach", "farm", "river", "garden", "market", "library"]
TENSES = {"past": "{}ed", "present": "{}s", "future": "will {}"}


def _tense_combinations() -> Iterable[tuple]:
    """Name, verb, location, tense."""
    return product(NAMES, VERBS, LOCATIONS, TENSES)


def _word_tense(rng: random.Random, name: str, verb: str, location: str, tense: str) -> Wording:
    form = TENSES[tense].format(verb)
    return Wording(
        question=f"Which tense does this sentence use? {name} {form} to the {location}.",
        answer=f"{tense} tense",
        others=[f"{other} tense" for other in TENSES if other != tense],
        solution=f"The verb is {form}. It tells about the {tense}. So, the sentence is in the {tense} tense.",
    )


# Classes of animals (the context describes the animal).

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ANIMAL_CLASSES = {
    "feathers": "a bird",
    "a beak": "a bird",
    "fur": "a mammal",
    "hair": "a mammal",
    "gills": "a fish",
    "fins": "a fish",
}


def _animal_combinations() -> Iterable[tuple]:
    """Day, name, location, and the feature of the animal."""
    return product(DAYS, NAMES, LOCATIONS, ANIMAL_CLASSES)


def _word_animal(rng: random.Random, day: str, name: str, location: str, feature: str) -> Wording:
    answer = ANIMAL_CLASSES[feature]
    return Wording(
        question="Which kind of animal is it?",
        context=f"On {day}, near the {location}, {name} sees an animal. It has {feature}.",
        answer=answer,
        others=[other for other in dict.fromkeys(ANIMAL_CLASSES.values()) if other != answer],
        solution=f"The animal has {feature}. Only one kind of animal has that. So, it is {answer}.",
    )


# Demand after a price change (no picture, no context).

FOOD = ["apples", "pears", "cakes", "eggs", "plums", "grapes", "nuts", "beans"]
CLOTHES = ["shoes", "hats", "socks", "coats", "scarves", "shirts", "belts", "boots"]
THINGS = ["books", "bikes", "pens", "cups", "lamps", "kites", "balls", "clocks"]
SHOPS = ["market", "mall", "harbor", "station", "village", "museum", "airport", "fair", "store", "hotel", "zoo", "port"]
PRICE_CHANGES = {"goes up": "up", "rises": "up", "goes down": "down", "falls": "down"}
DEMAND = {
    "up": ("The price goes up. When things cost more, people buy less.", "it goes down"),
    "down": ("The price goes down. When things cost less, people buy more.", "it goes up"),
}


def _demand_combinations() -> Iterable[tuple]:
    """Good, shop, price change."""
    return product(FOOD + CLOTHES + THINGS, SHOPS, PRICE_CHANGES)


def _word_demand(rng: random.Random, good: str, shop: str, change: str) -> Wording:
    reason, answer = DEMAND[PRICE_CHANGES[change]]
    return Wording(
        question=f"At the {shop}, the price of {good} {change}. What happens to the number of {good} that people buy?",
        answer=answer,
        others=[choice for _, choice in DEMAND.values() if choice != answer],
        solution=f"{reason} So, {answer}.",
    )


SKILLS: dict[str, Skill] = {
    "magnets": Skill(
        subject="natural science",
        grade="grade4",
        topic="physics",
        category="Magnets",
        share=10,
        lecture="Every magnet has a north pole and a south pole. Opposite poles attract and like poles repel.",
        combinations=_magnet_combinations,
        word=_word_magnets,
        draw=_draw_magnets,
    ),
    "thermometer": Skill(
        subject="natural science",
        grade="grade2",
        topic="units-and-measurement",
        category="Temperature",
        share=13,
        lecture="A thermometer shows the temperature. Read the mark that the top of the column reaches.",
        combinations=_thermometer_combinations,
        word=_word_thermometer,
        draw=_draw_thermometer,
    ),
    "bar_chart": Skill(
        subject="social science",
        grade="grade5",
        topic="geography",
        category="Charts",
        share=20,
        lecture="A bar chart shows numbers as bars. A taller bar shows a greater number.",
        combinations=_bar_combinations,
        word=_word_bars,
        draw=_draw_bars,
    ),
    "map": Skill(
        subject="social science",
        grade="grade3",
        topic="geography",
        category="Maps",
        share=13,
        lecture="On most maps the top is north, the bottom is south, the left is west and the right is east.",
        combinations=_map_combinations,
        word=_word_map,
        draw=_draw_map,
    ),
    "objects": Skill(
        subject="natural science",
        grade="grade1",
        topic="physics",
        category="Properties of objects",
        share=20,
        lecture="Objects have properties. Color and shape are properties that you can see.",
        combinations=_object_combinations,
        word=_word_objects,
        draw=_draw_objects,
    ),
    "descriptions": Skill(
        subject="natural science",
        grade="grade1",
        topic="physics",
        category="Properties of objects",
        share=0,
        lecture="Objects have properties. Color and shape are properties that you can see.",
        combinations=_description_combinations,
        word=_word_descriptions,
        draw=_draw_descriptions,
    ),
    "tense": Skill(
        subject="language science",
        grade="grade2",
        topic="verbs",
        category="Verb tense",
        share=9,
        lecture="The tense of a verb tells when something happens: in the past, in the present or in the future.",
        combinations=_tense_combinations,
        word=_word_tense,
    ),
    "animals": Skill(
        subject="natural science",
        grade="grade7",
        topic="biology",
        category="Classification",
        share=9,
        lecture="Birds have feathers and a beak, mammals have fur or hair, and fish have gills and fins.",
        combinations=_animal_combinations,
        word=_word_animal,
    ),
    "demand": Skill(
        subject="social science",
        grade="grade9",
        topic="economics",
        category="Supply and demand",
        share=6,
        lecture="When a price goes up, people buy less. When a price goes down, people buy more.",
        combinations=_demand_combinations,
        word=_word_demand,
    ),
}

# The skills with the answer only in the picture, not in the question or the choices.
PICTURE_SKILLS: tuple[str, ...] = tuple(name for name, skill in SKILLS.items() if skill.draw and skill.share)
