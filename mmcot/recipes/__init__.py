"""Recipes and command-line options: the settings that a user gives. No model is built here."""
