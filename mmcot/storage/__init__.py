"""Files and folders on disk: each is complete or absent."""
