"""Studies and timings, each a module with a command; their results stand in README.md."""
