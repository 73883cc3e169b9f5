"""SHA-256 digests of files, folders and texts."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path


def digest_of_file(file: Path) -> str:
    with file.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def sha256_of_text(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def folders_digest(folders: Iterable[Path], patterns: Sequence[str]) -> str:
    """Of the files of those names that lie in the folders, by their places."""
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
            digest.update(f"{number}/{file.name}".encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
