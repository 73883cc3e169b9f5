"""Studies: each module answers one question with trained models. Not part of the installed package."""
