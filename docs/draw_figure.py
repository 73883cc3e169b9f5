"""Draw the README's figure from a finished run of the demonstration: a problem, its picture, what the model made of it.

python -m docs.draw_figure runs/demo docs/demo.png
"""

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmcot.pictures.reading import read_pictures
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json
from mmcot.storage.run_folder import RunFolder

SKILL = "bar_chart"
WIDTH, HEIGHT, PICTURE = 980, 300, 260
INK, FAINT, BAR, RIGHT = "#222222", "#777777", "#c9ced6", "#2f6fdb"


def draw(run: Path) -> Image.Image:
    predictions = read_json(RunFolder(run).predictions("test"))
    problem = next(row for row in load_problems("demo", "test") if row["skill"] == SKILL)
    columns = predictions[problem["id"]]
    figure = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(figure)
    text, small = ImageFont.load_default(size=19), ImageFont.load_default(size=14)
    (picture,) = read_pictures(problem)
    figure.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS), (20, 20))
    left = PICTURE + 50
    pen.text((left, 20), problem["question"], INK, font=text)
    pen.text((left, 58), "rationale (generated)", FAINT, font=small)
    for number, line in enumerate(textwrap.wrap(columns["rationale"], 66)):
        pen.text((left, 80 + 26 * number), line, INK, font=text)
    pen.text((left, 150), "probability of each choice", FAINT, font=small)
    for number, (choice, score) in enumerate(zip(problem["choices"], columns["scores"], strict=True)):
        top = 176 + 36 * number
        color = RIGHT if number == columns["answer"] else BAR
        pen.text((left, top), choice, INK, font=text)
        pen.rectangle((left + 100, top + 2, left + 102 + 400 * score, top + 22), fill=color)
        pen.text((left + 515, top), f"{100 * score:.1f} %", INK, font=text)
    return figure


def main() -> None:
    run, output = map(Path, sys.argv[1:])
    draw(run).save(output, optimize=True)
    print(output)


if __name__ == "__main__":
    main()
