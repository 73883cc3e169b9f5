"""Converts pictures to pixels, features and captions."""
