"""What may go to the Hub: a model's files, whole, its own code, and nothing of the machine that it was made on."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_token, metadata_load
from safetensors import SafetensorError, safe_open

from mmcot.card import PICTURE
from mmcot.hub import shipped_code
from mmcot.results import SCORES_FILE

# What a model's repository may hold; anything else (pickles, optimizer states, data) does not go up.
MODEL_PATTERNS = (
    r"([\w.-]+/)?(config|generation_config|adapter_config)\.json",
    r"([\w.-]+/)?(model|adapter_model)(-\d+-of-\d+)?\.safetensors",
    r"([\w.-]+/)?model\.safetensors\.index\.json",
    r"(processor_config|tokenizer_config|tokenizer|special_tokens_map|added_tokens)\.json",
    r"spiece\.model|chat_template\.jinja",
    r"\.eval_results/[\w.-]+\.yaml",
    r"README\.md|\w+\.py",
    re.escape(PICTURE),
    re.escape(SCORES_FILE),
)
ALLOWED_IMPORTS = sys.stdlib_module_names | {"torch", "transformers", "PIL", "jinja2"}
GUARDED_IMPORTS = {"peft"}  # where stages are adapters, in a `try`
SECRETS = {
    "a token of the Hub": rb"\bhf_[A-Za-z0-9]{30,}",
    "a token of GitHub": rb"\bgh[pousr]_[A-Za-z0-9]{36,}",
    "a key of AWS": rb"\bAKIA[0-9A-Z]{16}\b",
    "a key of an API": rb"\bsk-(?=\w*\d)[\w-]{32,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
ROOTS = (
    rb"home|Users|root|mnt|tmp|work|workspace|scratch|data|content|opt|srv|nfs|lustre|gpfs|var|media|Volumes|private"
)
ABSOLUTE_PATH = rb"file://[\w./-]+|(?<![\w./:-])(?:/(?:" + ROOTS + rb")/|[A-Z]:\\+\w)[\w./\\-]+"
TEXT_FILES = {".json", ".md", ".py", ".yaml", ".jinja", ".txt"}


def check_model_folder(folder: Path) -> None:
    """
    Raises:
        ValueError: all that must not, or cannot, be published, by file.
    """
    found = [*surplus_files(folder), *broken_weights(folder), *code_faults(folder), *leaks(folder)]
    metadata = metadata_load(folder / "README.md") or {}
    if not metadata.get("license"):
        found.append("README.md: no licence, and that of the dataset is not known: give --license")
    if found:
        raise ValueError(f"{folder} is not published:\n  " + "\n  ".join(found))


def surplus_files(folder: Path) -> Iterator[str]:
    for name in names_of(folder):
        if not is_model_file(name):
            yield f"{name}: is no file of a model's repository"


def broken_weights(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            yield f"{file.relative_to(folder)}: not whole ({error})"


def code_faults(folder: Path) -> Iterator[str]:
    """Code that is not the library's, and imports of what a user of the model need not have."""
    ours = {file.name: file.read_bytes() for file in shipped_code()}
    theirs = {file.name: file.read_bytes() for file in folder.glob("*.py")}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: differs from this mmcot's own"
    for name, content in theirs.items():
        tree = ast.parse(content)
        guarded = {id(node) for tried in ast.walk(tree) if isinstance(tried, ast.Try) for node in ast.walk(tried)}
        for node in ast.walk(tree):
            allowed = ALLOWED_IMPORTS | (GUARDED_IMPORTS if id(node) in guarded else set())
            for module in imported(node):
                if module.split(".")[0] not in allowed:
                    yield f"{name}, line {node.lineno}: imports {module}"


def imported(node: ast.AST) -> list[str]:
    """The modules of other packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []


def leaks(folder: Path) -> Iterator[str]:
    """Paths of this machine, and what looks like a secret; which is not repeated."""
    token = get_token()
    patterns = SECRETS | ({"your token of the Hub": re.escape(token).encode()} if token else {})
    for name in names_of(folder):
        if Path(name).suffix not in TEXT_FILES:
            continue
        for number, line in enumerate((folder / name).read_bytes().splitlines(), start=1):
            for what, pattern in patterns.items():
                if re.search(pattern, line):
                    yield f"{name}, line {number}: holds {what}"
            if path := re.search(ABSOLUTE_PATH, line):
                yield f"{name}, line {number}: holds a path of this machine, {path[0].decode(errors='replace')}"


def is_model_file(name: str) -> bool:
    """Whether a model's repository may hold a file of that name."""
    return any(re.fullmatch(pattern, name) for pattern in MODEL_PATTERNS)


def names_of(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
