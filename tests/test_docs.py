"""Runs the docstring examples of `modeling_mmcot/`, and checks the links, modules and functions that the pages name."""

import doctest
import importlib
import re
import string

import pytest
from conftest import REPOSITORY

import modeling_mmcot
from mmcot.hub.export import shipped_code
from mmcot.recipes.recipe import parse_recipe

EXAMPLES = {
    example.name: example
    for file in shipped_code()
    for example in doctest.DocTestFinder(exclude_empty=True).find(
        importlib.import_module(f"modeling_mmcot.{file.stem}"), f"modeling_mmcot.{file.stem}"
    )
    if example.examples
}

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PACKAGE = "(?:mmcot|modeling_mmcot|configuration_mmcot)"
FILE = re.compile(rf"(?<![\w./-])({PACKAGE}/[\w/.]*\w/?)")
MODULE = re.compile(rf"(?<![\w./-])({PACKAGE}(?:\.\w+)+)(?![\w(])")
# "`folder/file.py`: `name`, `Class.method`" means that the file defines these names.
DEFINITIONS = re.compile(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_example_runs(name):
    report = []
    results = doctest.DocTestRunner().run(EXAMPLES[name], out=report.append)
    assert results.failed == 0 < results.attempted, "".join(report)


def test_public_classes_and_forward_have_examples():
    documented = {getattr(modeling_mmcot, name).__module__ + "." + name for name in modeling_mmcot.__all__}
    documented.add("modeling_mmcot.modeling_mmcot.MMCoTForConditionalGeneration.forward")
    assert documented <= set(EXAMPLES)


def anchors(page):
    """The anchors that GitHub generates for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    removed = string.punctuation.replace("-", "").replace("_", "") + "–…"
    return {heading.lower().translate(str.maketrans("", "", removed)).replace(" ", "-") for heading in headings}


@pages
def test_relative_links_resolve(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(REPOSITORY) and file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pages
def test_named_modules_and_files_exist(page):
    text = page.read_text()
    for path in FILE.findall(text):
        assert (REPOSITORY / path).exists(), path
    for name in MODULE.findall(text):
        assert is_defined(name), name


def is_defined(name):
    """Whether `name` is a module or an attribute of a module."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return hasattr(importlib.import_module(module), attribute)
    return True


@pages
def test_files_define_the_names_listed_beside_them(page):
    for path, listed in DEFINITIONS.findall(page.read_text()):
        source = (REPOSITORY / path).read_text()
        for name in re.findall(r"[\w.]+", listed):
            last = name.split(".")[-1]
            assert re.search(rf"^\s*(def|class) {last}\b|^{last}\b.* = ", source, re.MULTILINE), f"{path}: {name}"


def test_quickstart_recipe_is_valid(tmp_path, monkeypatch):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "quickstart.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    parsed = parse_recipe(["--config", "mine.yaml", "--dataset", "my_folder"])
    assert [stage.writes for stage in parsed.stages] == ["rationale", "answer_text"]
