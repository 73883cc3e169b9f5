"""Retrieval: corpora -> an index; queries -> passages."""
