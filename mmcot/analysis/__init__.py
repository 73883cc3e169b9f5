"""Looking into a system: probes, attention maps, the report page."""
