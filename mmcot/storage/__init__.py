"""Files on disk, each complete or absent."""
