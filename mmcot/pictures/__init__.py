"""Convert pictures to pixels, features and captions."""
