"""Occlusion: hidden regions, drops of the answer's probability, curves in the order of importance."""

import io

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from mmcot.analysis import occlusion as occluding
from mmcot.analysis.occlusion import Occlusion, format_occlusion, hide, measure_occlusion
from mmcot.probes import main
from mmcot.problems.schema import FEATURES
from mmcot.problems.sources import load_problems
from mmcot.storage.files import read_json


def picture(size=(8, 8), marked=None):
    """A black picture, in which one pixel is white."""
    image = Image.new("RGB", size)
    if marked is not None:
        image.putpixel(marked, (255, 255, 255))
    return image


def decoded(pictures):
    return [np.array(Image.open(io.BytesIO(picture["bytes"]))) for picture in pictures]


def test_hides_only_the_given_regions_with_the_mean_colour():
    image = Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
    mean = np.array(image).reshape(-1, 3).mean(axis=0).round()
    first, second = decoded(hide([image, image], [(0, 0, 1), (1, 3, 3)], grid=4))
    assert (first[0:2, 3:6] == mean).all() and (second[6:8, 9:12] == mean).all()
    kept = np.ones((8, 12), dtype=bool)
    kept[0:2, 3:6] = False
    assert np.array_equal(first[kept], np.array(image)[kept])
    assert np.array_equal(second[:6], np.array(image)[:6])


def test_regions_cover_pictures_whose_sides_the_grid_does_not_divide():
    regions = [(0, row, column) for row in range(4) for column in range(4)]
    (covered,) = decoded(hide([picture((10, 7), marked=(9, 6))], regions, grid=4))
    assert len(np.unique(covered)) == 1


def test_hides_nothing_of_regions_without_pixels():
    regions = [(0, row, column) for row in range(4) for column in range(4)]
    (covered,) = decoded(hide([picture((2, 3), marked=(0, 0))], regions, grid=4))
    assert covered.shape == (3, 2, 3) and len(np.unique(covered)) == 1


def problems(marks):
    """Problems whose answer is whether a picture has a white pixel; None is a picture without."""
    rows = []
    for number, places in enumerate(marks):
        images = []
        for place in places:
            buffer = io.BytesIO()
            picture(marked=place).save(buffer, format="PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        empty = dict.fromkeys(FEATURES)
        rows.append(
            {**empty, "id": str(number), "question": "?", "choices": ["no", "yes"], "answer": 1, "images": images}
        )
    return Dataset.from_list(rows, features=FEATURES)


class SeesWhite:
    """Stands in for `predict`: the probability of "yes" is 0.9 if any picture has a white pixel, else 0.2."""

    def __call__(self, processor, models, rows, options):
        predictions = {}
        for row in rows:
            pictures = decoded(row["images"])
            probability = 0.9 if any((pixels == 255).all(axis=-1).any() for pixels in pictures) else 0.2
            scores = [1 - probability, probability]
            predictions[row["id"]] = {"answer": int(np.argmax(scores)), "scores": scores}
        return predictions


def test_only_the_region_that_the_answer_needs_has_a_drop(monkeypatch):
    monkeypatch.setattr(occluding, "predict", SeesWhite())
    found = Occlusion(None, {}, problems([[(7, 0)], [None, (0, 7)], [None]]), grid=2)
    drops, has_changed = found.drops()
    assert {region for region, drop in drops[0].items() if abs(drop) > 1e-9} == {(0, 0, 1)}
    assert {region for region, drop in drops[1].items() if abs(drop) > 1e-9} == {(1, 1, 0)}
    assert drops[0][0, 0, 1] == pytest.approx(0.7) and len(drops[1]) == 8
    assert has_changed == [True, True, False] and not any(drops[2].values())


def test_curves_follow_the_order_of_importance(monkeypatch):
    """If the needed region is first, deletion falls at once, and insertion rises at once."""
    monkeypatch.setattr(occluding, "predict", SeesWhite())
    found = Occlusion(None, {}, problems([[(7, 0)]]), grid=2)
    others = [(0, 0, 0), (0, 1, 0), (0, 1, 1)]
    shares = np.linspace(0, 1, occluding.NUM_POINTS)
    for order, first in (([(0, 0, 1), *others], 1), ([*others, (0, 0, 1)], 4)):
        hidden = np.array([round(share * 4) >= first for share in shares])
        np.testing.assert_allclose(found.curve([order], inserts=False)[0], np.where(hidden, 0.2, 0.9))
        np.testing.assert_allclose(found.curve([order], inserts=True)[0], np.where(hidden, 0.9, 0.2))


@pytest.mark.parametrize("has_attention", [True, False])
def test_reports_areas_of_each_order_and_why_the_attention_has_none(monkeypatch, has_attention):
    monkeypatch.setattr(occluding, "predict", SeesWhite())

    def attention(self):
        if not has_attention:
            raise ValueError("The fusion 'prefix' has no attention over patches, so there are no maps.")
        return [{region: float(region == (0, 0, 1)) for region in regions} for regions in self.regions]

    monkeypatch.setattr(Occlusion, "attention", attention)
    results = measure_occlusion(None, {}, problems([[(7, 0)]] * 3), grid=2)
    assert results["n"] == 3 and results["changed"] == 100 and results["largest_drop"] == pytest.approx(0.7)
    assert results["drops"]["0"] == [[[0, pytest.approx(0.7)], [0, 0]]]
    curves = results["curves"]
    assert curves["occlusion"]["deletion"] < curves["random"]["deletion"]
    assert curves["occlusion"]["insertion"] > curves["random"]["insertion"]
    assert ("attention" in curves) == has_attention
    if has_attention:
        assert curves["attention"]["deletion"] == curves["occlusion"]["deletion"]
    assert ("'prefix' has no attention" in format_occlusion(results)) == (not has_attention)


def test_measures_a_trained_system_and_writes_the_result(tiny_run, tiny_dataset, tmp_path, capsys):
    output = tmp_path / "probes.json"
    words = [str(tiny_run), "--dataset", str(tiny_dataset), "--split", "test", "--limit", "6"]
    main([*words, "--occlusion", "2", "--output", str(output)])
    results = read_json(output)["occlusion"]
    assert results["n"] == 2 and set(results["curves"]) == {"occlusion", "attention", "random"}
    assert "2 problems with pictures, 4 x 4 regions" in capsys.readouterr().out
    with_pictures = [row["id"] for row in load_problems(str(tiny_dataset), "test") if row["images"]]
    assert list(results["drops"]) == with_pictures[:2]


def test_refuses_problems_without_pictures(tiny_run, tiny_dataset):
    without = next(row["id"] for row in load_problems(str(tiny_dataset), "test") if not row["images"])
    with pytest.raises(SystemExit, match="--occlusion: no selected problem has a picture and choices"):
        main([str(tiny_run), "--dataset", str(tiny_dataset), "--ids", without, "--occlusion", "2"])
