"""Time the report page with as many problems as ScienceQA's test split: loading, filtering, opening a problem.

    python -m benchmarks.report

The page shows 4,241 problems of the demonstration with random answers and is opened from the disk in headless Chromium.
Times are medians of five runs. Prints a JSON object.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.setting import report
from mmcot.analysis.report import write_report
from mmcot.evaluation.metrics import score
from mmcot.problems.demo import SPLIT_SIZES
from mmcot.problems.sources import load_problems

COUNT = 4241
TIMES = 5


def random_predictions(problems) -> dict[str, dict]:
    generator = random.Random(0)
    predictions = {}
    for row in problems.remove_columns("images"):
        scores = [generator.random() for _ in row["choices"]]
        scores = [value / sum(scores) for value in scores]
        predictions[row["id"]] = {"answer": scores.index(max(scores)), "scores": scores, "rationale": row["solution"]}
    return predictions


def in_browser(page_file: Path) -> dict[str, float]:
    """Return the median seconds of each action."""
    from playwright.sync_api import expect, sync_playwright

    seconds: dict[str, list[float]] = {"load": [], "filter": [], "search": [], "open": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(TIMES):
            page = browser.new_page()
            start = time.perf_counter()
            page.goto(page_file.as_uri())
            page.wait_for_selector("#list li")
            seconds["load"].append(time.perf_counter() - start)
            for name, act in (
                ("filter", lambda page=page: page.select_option("#answer", "wrong")),
                ("search", lambda page=page: page.fill("#search", "thermometer")),
                ("open", lambda page=page: page.click("#list button >> nth=3")),
            ):
                start = time.perf_counter()
                act()
                page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
                seconds[name].append(time.perf_counter() - start)
            expect(page.locator("dialog")).to_be_visible()
            page.close()
        browser.close()
    return {name: round(statistics.median(values), 3) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FILE", help="also write the JSON to this file")
    arguments = parser.parse_args()
    assert SPLIT_SIZES["train"] >= COUNT
    problems = load_problems("demo", "train").select(range(COUNT))
    predictions = random_predictions(problems)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        scores = score(problems, predictions)
        write_report(Path(folder) / "report", problems, predictions, scores, Path(folder) / "test.json")
        written = round(time.perf_counter() - start, 1)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        seconds = in_browser(Path(folder) / "report" / "index.html")
    report(
        "report",
        {"problems": COUNT, "written": written, "mb": round(size / 1e6, 1), "seconds": seconds},
        arguments.output,
    )


if __name__ == "__main__":
    main()
