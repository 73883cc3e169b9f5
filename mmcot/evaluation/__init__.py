"""Figures from a predictions file. No model and no torch."""
