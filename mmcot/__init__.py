"""Prepares, trains, evaluates and publishes. What ships to the Hub is `modeling_mmcot`."""
