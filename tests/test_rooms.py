"""The rooms of `mmcot/` import only along the arrows of docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

# The rooms that each room may import; imports of these rooms' own rooms are allowed as well.
ARROWS = {
    "storage": (),
    "problems": ("storage",),
    "recipes": ("problems",),
    "evaluation": ("problems",),
    "retrieval": ("problems",),
    "pictures": ("problems",),
    "prediction": ("pictures", "retrieval"),
    "analysis": ("prediction", "evaluation"),
    "hub": ("prediction", "evaluation"),
    "training": ("hub", "recipes", "retrieval", "prediction", "evaluation"),
}
WITHOUT_MODEL = ("storage", "problems", "evaluation")
MODULES = sorted((REPOSITORY / "mmcot").rglob("*.py"))


def reachable(room: str) -> set[str]:
    return {room}.union(*(reachable(other) for other in ARROWS[room]))


def imported_modules(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return modules | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_arrows_list_every_room():
    folder = REPOSITORY / "mmcot"
    assert {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"} == ARROWS.keys()


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(REPOSITORY / "mmcot")))
def test_module_imports_only_along_arrows(file):
    room = file.parent.name
    if room == "mmcot" or file.stem == "__main__":
        return  # a command, which may import every room
    ours = {module for module in imported_modules(file) if module.split(".")[0] == "mmcot"}
    forbidden = {module for module in ours if (module.split(".")[1:] or ["mmcot"])[0] not in reachable(room)}
    assert not forbidden - {"mmcot"}
    if room in WITHOUT_MODEL:
        assert not {module for module in imported_modules(file) if module.split(".")[0] in ("modeling_mmcot", "torch")}


def test_no_module_imports_a_command():
    commands = {f"mmcot.{file.stem}" for file in (REPOSITORY / "mmcot").glob("*.py")} - {"mmcot.__init__"}
    commands |= {f"mmcot.{file.parent.name}.__main__" for file in (REPOSITORY / "mmcot").glob("*/__main__.py")}
    for file in MODULES:
        assert not commands & imported_modules(file), file


@pytest.mark.parametrize("module", ["mmcot.evaluation.metrics", "mmcot.evaluation.predictions", "mmcot.storage.files"])
def test_figures_and_files_import_no_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
