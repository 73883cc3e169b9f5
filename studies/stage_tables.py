"""Tables and plot of the study of stages, from its result files; docs/studies/stages.md contains them."""

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from mmcot.evaluation.uncertainty import mean_interval
from mmcot.storage.files import read_json
from studies.stage_arms import ARMS

RESULTS = Path(__file__).parent / "results" / "stages"
PAGE = Path("docs/studies/stages.md")
PLOT = Path("docs/studies/stages.png")
Result = dict[str, Any]


def read_results() -> dict[str, dict[str, list[Result]]]:
    """Return the results of all seeds by setting (dataset, steps, budget) and arm, in the order of `ARMS`."""
    settings = {}
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        files = {name: sorted(folder.glob(f"{name}-[0-9]*.json")) for name in ARMS}
        settings[folder.name] = {name: [read_json(file) for file in found] for name, found in files.items() if found}
    return settings


def write_tables() -> dict[str, str]:
    """Replace the tables between the marks of the page, draw the plot, and return the tables by mark."""
    tables = {}
    for setting, arms in read_results().items():
        tables[f"accuracy {setting}"] = accuracy_table(arms)
        tables[f"errors {setting}"] = errors_table(arms)
        tables[f"mistakes {setting}"] = mistakes_table(arms)
        tables[f"cost {setting}"] = cost_table(arms)
    text = PAGE.read_text()
    for mark, table in tables.items():
        start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{PAGE} has no place for the table {mark!r}: expected a line {start} and a line {end}.")
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text)
    draw(read_results())
    return tables


def table_of(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def accuracy_table(arms: dict[str, list[Result]]) -> str:
    """Return test accuracy by skill."""
    skills = list(next(iter(arms.values()))[0]["test"]["right"])
    header = ["arm", "stages", "seeds", "all", *skills]
    rows = []
    for name, results in arms.items():
        cells = [accuracy_cell(results, skills), *(accuracy_cell(results, [skill]) for skill in skills)]
        rows.append([f"`{name}`", ARMS[name].meaning, str(len(results)), *cells])
    return table_of(header, rows)


def right_by_problem(result: Result, skills: list[str]) -> np.ndarray:
    return np.array([int(flag) for skill in skills for flag in result["test"]["right"][skill]])


def accuracy_cell(results: list[Result], skills: list[str]) -> str:
    """Return "mean [interval over problems] (extremes of the seeds)", in percent."""
    by_seed = 100 * np.array([right_by_problem(result, skills) for result in results])
    interval = mean_interval(by_seed.mean(axis=0).tolist())
    low, high = interval or (by_seed.mean(), by_seed.mean())
    seeds = by_seed.mean(axis=1)
    return f"{by_seed.mean():.1f} [{low:.1f}, {high:.1f}] ({seeds.min():.1f}–{seeds.max():.1f})"


def errors_table(arms: dict[str, list[Result]]) -> str:
    """Return how often texts are right, and the accuracy of answers given right and wrong texts, all seeds together."""
    rows = []
    for name, results in arms.items():
        for column in results[0]["test"]["columns"]:
            counts: Counter[str] = Counter()
            for result in results:
                counts.update(result["test"]["columns"].get(column, {}))
            right, wrong = (
                [counts[f"{text} text, {answer} answer"] for answer in ("right", "wrong")]
                for text in ("right", "wrong")
            )
            share = 100 * sum(right) / (sum(right) + sum(wrong))
            rows.append([f"`{name}`", column, f"{share:.1f}", percent(right), percent(wrong)])
    header = ["arm", "text", "right texts, %", "answers right given a right text", "given a wrong text"]
    return table_of(header, rows)


def percent(counts: list[int]) -> str:
    return f"{100 * counts[0] / sum(counts):.1f} % of {sum(counts)}" if sum(counts) else "none"


def mistakes_table(arms: dict[str, list[Result]]) -> str:
    """Return the mistakes of each kind, and the names in descriptions that are not drawn, as means over the seeds."""
    counts = {
        name: [sum((Counter(kinds) for kinds in result["test"]["mistakes"].values()), Counter()) for result in results]
        for name, results in arms.items()
    }
    kinds = sorted({kind for by_seed in counts.values() for count in by_seed for kind in count})
    rows = []
    for name, results in arms.items():
        num_problems = len(right_by_problem(results[0], list(results[0]["test"]["right"])))
        shares = [100 * np.mean([count[kind] for count in counts[name]]) / num_problems for kind in kinds]
        found = [result["test"]["hallucination"] for result in results]
        absent = "no description" if None in found else f"{np.mean([rates['names'] for rates in found]):.1f}"
        rows.append([f"`{name}`", *(f"{share:.1f}" for share in shares), absent])
    header = ["arm", *(f"{kind.replace('_', ' ')}, %" for kind in kinds), "names that are not drawn, %"]
    return table_of(header, rows)


def cost_table(arms: dict[str, list[Result]]) -> str:
    """
    Return learning rate, steps, seconds and memory of the arms that were trained, as means over the seeds. Stages with
    gold inputs can be trained at the same time: then the longest one determines the time.
    """
    rows = []
    for name, results in arms.items():
        if ARMS[name].run_of is not None:
            continue
        trained = [list(result["stages"].values()) for result in results]
        steps = [sum(stage["steps"] for stage in stages) for stages in trained]
        seconds = [sum(stage["seconds"] for stage in stages) for stages in trained]
        longest = [max(stage["seconds"] for stage in stages) for stages in trained]
        memory = [max(stage["memory_gb"] or 0 for stage in stages) for stages in trained]
        means = [f"{np.mean(values):.0f}" for values in (steps, seconds, longest)] + [f"{np.mean(memory):.1f}"]
        rows.append([f"`{name}`", results[0]["learning_rate"], *means])
    return table_of(["arm", "learning rate", "steps", "training, s", "longest training, s", "memory, GB"], rows)


def draw(settings: dict[str, dict[str, list[Result]]]) -> None:
    """Draw the accuracy of each arm with its interval, one panel for each setting."""
    figure, panels = plt.subplots(1, len(settings), figsize=(7 * len(settings), 5), squeeze=False)
    for panel, (setting, arms) in zip(panels[0], settings.items(), strict=True):
        for place, results in enumerate(arms.values()):
            skills = list(results[0]["test"]["right"])
            by_seed = 100 * np.array([right_by_problem(result, skills) for result in results])
            low, high = mean_interval(by_seed.mean(axis=0).tolist()) or (by_seed.mean(), by_seed.mean())
            panel.plot([low, high], [place, place], color="black")
            panel.plot(by_seed.mean(axis=1), [place] * len(by_seed), "o", color="tab:blue", alpha=0.6)
        panel.set_yticks(range(len(arms)), list(arms))
        panel.invert_yaxis()
        panel.set_xlabel("test accuracy, %: interval over problems, one point for each seed")
        panel.set_title(setting)
        panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)
