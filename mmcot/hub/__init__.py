"""A run folder <-> a repository of the Hub."""
