"""Problems: their rows, sources and columns."""
