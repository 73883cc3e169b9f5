"""The console script `mmcot`: its list of commands and how it starts one."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

from mmcot.__main__ import COMMANDS, main


def test_lists_every_command():
    modules = {file.stem for file in (REPOSITORY / "mmcot").glob("*.py")}
    modules |= {file.parent.name for file in (REPOSITORY / "mmcot").glob("*/__main__.py")}
    assert modules - {"__init__", "__main__"} == COMMANDS.keys()


def test_help_lists_commands_without_importing_torch(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and text in shown for name, text in COMMANDS.items())
    code = (
        "import sys, mmcot.__main__ as m; m.build_parser(); assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_passes_options_to_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    assert "usage: python -m mmcot.convert" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: nope.json: no such"):
        main(["evaluate", "--leaderboard", "nope.json"])


@pytest.mark.parametrize("argv", [["predct"], []])
def test_refuses_unknown_or_missing_command(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "command" in capsys.readouterr().err
