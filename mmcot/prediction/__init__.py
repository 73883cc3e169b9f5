"""Run a system over a split of problems and write a predictions file."""
