"""The examples in the docstrings of what ships: they run, and each public class has one."""

import doctest
import importlib

import pytest

import modeling_mmcot
from mmcot.hub.export import shipped_code

EXAMPLES = {
    example.name: example
    for file in shipped_code()
    for example in doctest.DocTestFinder(exclude_empty=True).find(
        importlib.import_module(f"modeling_mmcot.{file.stem}"), f"modeling_mmcot.{file.stem}"
    )
    if example.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name):
    report = []
    results = doctest.DocTestRunner().run(EXAMPLES[name], out=report.append)
    assert results.failed == 0 < results.attempted, "".join(report)


def test_each_public_class_and_forward_have_an_example():
    described = {getattr(modeling_mmcot, name).__module__ + "." + name for name in modeling_mmcot.__all__}
    described.add("modeling_mmcot.modeling_mmcot.MMCoTForConditionalGeneration.forward")
    assert described <= set(EXAMPLES)
