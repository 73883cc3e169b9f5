"""Analyse a system: probes, attention maps, the report page."""
