"""Occlusion: how much an answer moves when a region of its picture is hidden, and how faithful attention maps are.

Each region of a grid over the picture is filled with the picture's mean colour, one at a time, and the whole system
answers again (Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2). Unlike attention maps, this needs nothing from the
fusion, so that fusions can be compared. Deletion and insertion curves (RISE: Petsiuk et al. 2018, arXiv
1806.07421) hide, or show, more and more regions, the most important ones first: an order of regions, such as that of
the attention, is faithful if the answer's probability falls, or rises, faster than in a random order.
"""

import io
import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw, ImageStat
from torch.nn.functional import adaptive_avg_pool2d
from transformers import PreTrainedModel

from mmcot.analysis.attention import maps_of_problems
from mmcot.analysis.probes import with_images
from mmcot.evaluation.metrics import percentage
from mmcot.evaluation.uncertainty import mean_interval
from mmcot.pictures.reading import read_pictures
from mmcot.prediction.columns import with_columns
from mmcot.prediction.predictor import PredictOptions, predict
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.pictures_mmcot import as_rgb

GRID = 4  # regions along each side of a picture
NUM_POINTS = 9  # of a curve
SEED = 0

Region = tuple[int, int, int]  # number of the picture, row, column
Regions = Collection[Region]


class Occlusion:
    """
    The answers of a system to problems whose pictures are partly hidden.

    Args:
        problems: rows with pictures and choices.
        grid: the number of regions along each side of a picture.
    """

    def __init__(
        self,
        processor: MMCoTProcessor,
        models: Mapping[str, PreTrainedModel],
        problems: Dataset,
        batch_size: int = 32,
        grid: int = GRID,
    ):
        self.processor, self.models, self.problems = processor, models, problems
        self.options, self.grid = PredictOptions(batch_size=batch_size), grid
        self.images = [[as_rgb(picture) for picture in read_pictures(row)] for row in problems]
        self.regions = [
            [(number, row, column) for number in range(len(images)) for row in range(grid) for column in range(grid)]
            for images in self.images
        ]
        self.predictions = predict(processor, models, problems, self.options)
        rows = [self.predictions[name] for name in problems["id"]]
        self.answers = [row["answer"] for row in rows]
        self.before = [row["scores"][row["answer"]] for row in rows]

    def hidden(self, regions: list[Regions]) -> tuple[np.ndarray, list[int]]:
        """Hide regions of each problem; return the probabilities of the original answers, and the new answers."""
        images = [hide(*pair, self.grid) for pair in zip(self.images, regions, strict=True)]
        predictions = predict(self.processor, self.models, with_images(self.problems, images), self.options)
        columns = [predictions[name] for name in self.problems["id"]]
        probabilities = [row["scores"][answer] for row, answer in zip(columns, self.answers, strict=True)]
        return np.array(probabilities), [row["answer"] for row in columns]

    def drops(self) -> tuple[list[dict[Region, float]], list[bool]]:
        """
        Hide one region at a time. Return by how much the probability of each answer drops, by region, and whether the
        answer changes for any region.
        """
        drops: list[dict[Region, float]] = [{} for _ in self.images]
        has_changed = [False for _ in self.images]
        for place in range(max(map(len, self.regions))):
            # A problem with fewer pictures than another one repeats its last region.
            shown = [regions[min(place, len(regions) - 1)] for regions in self.regions]
            after, answers = self.hidden([[region] for region in shown])
            for index, region in enumerate(shown):
                drops[index][region] = float(self.before[index] - after[index])
                has_changed[index] |= answers[index] != self.answers[index]
        return drops, has_changed

    def attention(self) -> list[dict[Region, float]]:
        """
        Return the attention of the last stage that sees pictures to each region, averaged over tokens.

        Raises:
            ValueError: the fusion has no attention over patches, or their positions are unknown.
        """
        stage = [stage for stage in self.processor.stages if stage.sees_pictures][-1]
        rows = with_columns(self.problems, self.predictions, self.processor.stages.before(stage))
        attention = []
        for _, found in maps_of_problems(self.models[stage.name], self.processor, stage, rows):
            pooled = [adaptive_avg_pool2d(maps.mean(dim=0)[None], self.grid)[0] for maps in found.maps]
            attention.append(
                {
                    (number, row, column): float(pooled[number][row, column])
                    for number in range(len(pooled))
                    for row in range(self.grid)
                    for column in range(self.grid)
                }
            )
        return attention

    def curve(self, orders: list[list[Region]], inserts: bool) -> np.ndarray:
        """
        Return the probabilities of the original answers `(num_problems, NUM_POINTS)` while the first regions of an
        order are hidden, from none to all, or shown.
        """
        points = []
        for share in np.linspace(0, 1, NUM_POINTS):
            counts = [round(share * len(order)) for order in orders]
            parts = zip(orders, counts, strict=True)
            regions = [order[count:] if inserts else order[:count] for order, count in parts]
            points.append(self.hidden(regions)[0])
        return np.stack(points, axis=1)


def hide(images: list[Image.Image], regions: Regions, grid: int) -> list[dict[str, Any]]:
    """Fill regions of a problem's pictures with the mean colour of each picture; return them as encoded pictures."""
    encoded = []
    for number, image in enumerate(images):
        colour = tuple(round(value) for value in ImageStat.Stat(image).mean)
        changed = image.copy()
        draw = ImageDraw.Draw(changed)
        columns, rows = ([round(place * side / grid) for place in range(grid + 1)] for side in image.size)
        for picture, row, column in regions:
            is_empty = columns[column] == columns[column + 1] or rows[row] == rows[row + 1]
            if picture == number and not is_empty:
                corner = (columns[column + 1] - 1, rows[row + 1] - 1)  # Pillow includes the last pixel
                draw.rectangle([(columns[column], rows[row]), corner], fill=colour)
        buffer = io.BytesIO()
        changed.save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    return encoded


def by_importance(importance: dict[Region, float]) -> list[Region]:
    return sorted(importance, key=lambda region: -importance[region])


def measure_occlusion(
    processor: MMCoTProcessor,
    models: Mapping[str, PreTrainedModel],
    problems: Dataset,
    batch_size: int = 32,
    grid: int = GRID,
) -> dict[str, Any]:
    """
    Measure how much answers depend on regions of the pictures, and how faithful the fusion's attention is.

    Args:
        problems: rows with pictures and choices.

    Returns:
        `n`, `grid`; `largest_drop`: the drop of the answer's probability when its most important region is hidden,
        averaged over problems; `changed`: the percentage of answers that change when some region is hidden; `curves`:
        for each order of the regions (`occlusion`, `attention` if the fusion has one, `random`) the areas under the
        `deletion` and the `insertion` curve, 0 to 1, and the 95 % intervals of their differences to the random order;
        `drops`: for each problem, the drop of each region, by picture, row and column.
    """
    occlusion = Occlusion(processor, models, problems, batch_size, grid)
    drops, has_changed = occlusion.drops()
    generator = random.Random(SEED)
    orders = {"occlusion": [by_importance(found) for found in drops]}
    try:
        orders["attention"] = [by_importance(found) for found in occlusion.attention()]
        no_attention = None
    except ValueError as error:
        no_attention = str(error)
    orders["random"] = [generator.sample(regions, len(regions)) for regions in occlusion.regions]
    areas = {
        (name, kind): occlusion.curve(order, kind == "insertion").mean(axis=1)
        for name, order in orders.items()
        for kind in ("deletion", "insertion")
    }
    curves: dict[str, dict[str, Any]] = {name: {} for name in orders}
    for (name, kind), area in areas.items():
        curves[name][kind] = float(area.mean())
        if name != "random":
            curves[name][f"{kind}_interval"] = mean_interval((area - areas["random", kind]).tolist())
    return {
        "n": len(problems),
        "grid": grid,
        "largest_drop": float(np.mean([max(found.values()) for found in drops])),
        "changed": percentage(has_changed),
        "no_attention": no_attention,
        "curves": curves,
        "drops": {
            name: [
                [[found[number, row, column] for column in range(grid)] for row in range(grid)]
                for number in range(len(images))
            ]
            for name, images, found in zip(problems["id"], occlusion.images, drops, strict=True)
        },
    }


def format_occlusion(results: Mapping[str, Any]) -> str:
    """Return the results as a table, with areas under curves in percent."""
    lines = [
        f"{results['n']} problems with pictures, {results['grid']} x {results['grid']} regions: hiding the most "
        f"important one lowers the answer's probability by {100 * results['largest_drop']:.1f} points; "
        f"{results['changed']:.1f} % of the answers change when some region is hidden.",
        f"{'order of regions':<18}{'deletion':>10}{'insertion':>11}",
    ]
    for name, areas in results["curves"].items():
        lines.append(f"{name:<18}{100 * areas['deletion']:>10.1f}{100 * areas['insertion']:>11.1f}")
    if results["no_attention"] is not None:
        lines.append(f"No order of the attention: {results['no_attention']}")
    return "\n".join(lines)
