"""Compute scores from a predictions file. Needs no model and no torch."""
