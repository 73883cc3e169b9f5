"""Checks of a command's options, before any work: no option is without effect, and numbers are in range."""

import argparse
from collections.abc import Collection, Sequence


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """
    The names of the arguments that a command line gives, whatever their values.

    Args:
        parser: one of its own; its defaults are taken away.
    """
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def refuse_without_effect(said: Collection[str], names: Collection[str], reason: str) -> None:
    """
    Raises:
        ValueError: one of these options was given, which has no effect here, for that reason.
    """
    for name in names:
        if name in said:
            raise ValueError(f"--{name} has no effect here: {reason}.")


def refuse_below(arguments: argparse.Namespace, lowest: int, *names: str) -> None:
    """
    Raises:
        ValueError: an option is a number below that.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name} is {value}; expected {lowest} or more.")
