"""A system over a split of problems -> a predictions file."""
