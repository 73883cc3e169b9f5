"""The console script `mmcot`: what it lists and what it runs."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

from mmcot.__main__ import COMMANDS, main


def test_every_command_is_listed():
    modules = {file.stem for file in (REPOSITORY / "mmcot").glob("*.py")}
    assert modules - {"__init__", "__main__"} == COMMANDS.keys()


def test_help_lists_the_commands_and_imports_no_torch(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and text in shown for name, text in COMMANDS.items())
    code = (
        "import sys, mmcot.__main__ as m; m.build_parser(); assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_a_command_gets_the_options_that_follow_it(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    assert "usage: python -m mmcot.convert" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: nope.json: no such"):
        main(["evaluate", "--leaderboard", "nope.json"])


@pytest.mark.parametrize("argv", [["predct"], []])
def test_an_unknown_or_missing_command_is_an_error(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "command" in capsys.readouterr().err
