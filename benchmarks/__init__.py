"""Studies and timings, each a module with a command; README.md contains their results."""
