"""Pictures -> pixels, features and captions."""
