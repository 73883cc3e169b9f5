"""SHA-256 digests of files, folders, texts and JSON values; the only module that computes them.

`sha256_of_…` returns hex digits, `digest_of_…` prefixes them with `sha256:`. Files on disk record both forms.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any


def sha256_of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_of_text(text: str) -> str:
    return sha256_of_bytes(text.encode())


def sha256_of_json(value: Any) -> str:
    """Return the digest of a value as JSON; the order of its keys does not matter."""
    return sha256_of_text(json.dumps(value, sort_keys=True))


def sha256_of_file(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def cached_sha256_of_file(file: Path) -> str:
    """Return the digest of a file, which is read once per process unless it changes."""
    found = file.stat()
    return _sha256_of_state(file, (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))


@cache
def _sha256_of_state(file: Path, state: tuple[int, ...]) -> str:
    return sha256_of_file(file)


def digest_of_file(file: Path) -> str:
    return f"sha256:{sha256_of_file(file)}"


def digest_of_text(text: str) -> str:
    return f"sha256:{sha256_of_text(text)}"


def digest_of_folders(folders: Iterable[Path], patterns: Sequence[str]) -> str:
    """Return one digest of the files that match a pattern: names, contents and the order of the folders."""
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
            digest.update(f"{number}/{file.name}".encode() + bytes.fromhex(sha256_of_file(file)))
    return f"sha256:{digest.hexdigest()}"


def digest_of_digests(digests: Mapping[str, str]) -> str:
    """Return one digest of several files from their names and hex digits."""
    digest = hashlib.sha256()
    for name, hex_digits in digests.items():
        digest.update(name.encode() + bytes.fromhex(hex_digits))
    return f"sha256:{digest.hexdigest()}"
