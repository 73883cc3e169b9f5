"""What is on disk, each file whole or absent."""
