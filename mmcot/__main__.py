"""The console script `mmcot`, also `python -m mmcot`: lists the commands and runs one of them.

    mmcot --help
    mmcot train --config configs/demo/two_stages.yaml

Only the module of the requested command is imported, so that `mmcot --help` is fast.
"""

import argparse
import importlib
import importlib.util
import sys

# Each command is a module of this package with `main(argv)`, or a room with such a `__main__`.
COMMANDS = {
    "train": "train, predict, score and export a recipe; resumes an interrupted run",
    "predict": "predict a split with a finished run or a published model",
    "evaluate": "score and compare predictions files",
    "features": "compute the pictures' features or captions once, before training",
    "retrieval": "build, search and evaluate an index of passages",
    "probes": "test how much the answers depend on rationale, picture and choices",
    "convert": "convert the authors' checkpoints",
    "push": "publish a finished run, or a Space, on the Hub",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmcot",
        usage="mmcot COMMAND [OPTION …]",
        description="\n".join(["commands:", *(f"  {name:<11}{text}" for name, text in COMMANDS.items())]),
        epilog="`mmcot COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """
    Run a command.

    Args:
        argv: the command line; by default that of this process.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv[:1])
    module = f"mmcot.{arguments.command}"
    is_room = importlib.util.find_spec(module).submodule_search_locations is not None
    importlib.import_module(f"{module}.__main__" if is_room else module).main(argv[1:])


if __name__ == "__main__":
    main()
