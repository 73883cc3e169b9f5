"""A recipe -> a run folder."""
