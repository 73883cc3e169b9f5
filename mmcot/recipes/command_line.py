"""Checks of a command's options, before any work: each option has an effect, and numbers are in range."""

import argparse
from collections.abc import Collection, Sequence


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """
    Return the names of the arguments on a command line, even those set to their default.

    Args:
        parser: a parser for this call only, because its defaults are removed.
        argv: the command line; by default that of this process.
    """
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def refuse_without_effect(given: Collection[str], names: Collection[str], reason: str) -> None:
    """
    Args:
        given: the names of the options on the command line.
        names: the options that have no effect here.
        reason: why they have none.

    Raises:
        ValueError: one of `names` was given.
    """
    for name in names:
        if name in given:
            raise ValueError(f"--{name} has no effect here: {reason}.")


def refuse_below(arguments: argparse.Namespace, lowest: int, *names: str) -> None:
    """
    Raises:
        ValueError: an option is a number below `lowest`.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name} is {value}; expected {lowest} or more.")
