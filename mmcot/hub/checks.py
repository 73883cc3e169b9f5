"""Checks a folder before its upload: only a model's files, complete weights, unchanged code, no secrets or paths."""

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_token, metadata_load
from safetensors import SafetensorError, safe_open

from mmcot.hub.card import PICTURE
from mmcot.hub.export import shipped_code
from mmcot.hub.results import SCORES_FILE
from mmcot.storage.files import list_files
from modeling_mmcot.retrieval_mmcot import INDEX_FILES, MANIFEST

# Files that a model's repository may contain; anything else (pickles, optimizer states, data) is not uploaded.
MODEL_PATTERNS = (
    r"([\w.-]+/)?(config|generation_config|adapter_config)\.json",
    r"([\w.-]+/)?(model|adapter_model)(-\d+-of-\d+)?\.safetensors",
    r"([\w.-]+/)?model\.safetensors\.index\.json",
    r"([\w.-]+/)?known_answer\.json",
    rf"[\w.-]+/({'|'.join(map(re.escape, (MANIFEST, *INDEX_FILES)))})",
    r"(processor_config|tokenizer_config|tokenizer|special_tokens_map|added_tokens|chat_template)\.json",
    r"spiece\.model|chat_template\.jinja",
    r"\.eval_results/[\w.-]+\.yaml",
    r"README\.md|\w+\.py",
    re.escape(PICTURE),
    re.escape(SCORES_FILE),
)
# The packages that a card lists, and those that transformers needs.
ALLOWED_IMPORTS = sys.stdlib_module_names | {"torch", "transformers", "safetensors", "PIL", "jinja2", "numpy"}
# Needed for adapters, and for retrieval, only; allowed inside `try`.
GUARDED_IMPORTS = {"peft", "bm25s", "Stemmer"}
SECRETS = {
    "a token of the Hub": rb"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "a token of GitHub": rb"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{30,}",
    "a token of GitLab": rb"\bglpat-[\w-]{20,}",
    "a key of Google": rb"\bAIza[\w-]{30,}|\bGOCSPX-[\w-]{20,}|\bya29\.[\w-]{30,}",
    "a token of Slack": rb"\bxox[a-z]-(?=[\w-]*\d)[\w-]{10,}|\bhooks\.slack\.com/services/T\w+/B\w+/\w+",
    "a key of AWS": rb"\bA(KI|SI)A[0-9A-Z]{16}\b",
    "a key of an API": rb"\bsk-(?=[\w-]*\d)[\w-]{32,}|\b(gsk|r8)_[A-Za-z0-9]{30,}|\bnvapi-[\w-]{40,}",
    "a key of Stripe": rb"\b[rs]k_(live|test)_[A-Za-z0-9]{16,}",
    "a token of npm": rb"\bnpm_[A-Za-z0-9]{36}\b",
    "a token of PyPI": rb"\bpypi-AgEIcHlwaS5vcmc[\w-]{20,}",
    "a key of Weights & Biases": rb"(?i)\bwandb_api_key\W{1,5}[0-9a-f]{40}\b",
    "a key of SendGrid": rb"\bSG\.[\w-]{22}\.[\w-]{43}",
    "a signed token (JWT)": rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a password in an address": rb"://[^\s/:@\"']+:[^\s/:@\"']+@\w",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----",
}
ROOTS = (
    rb"home|Users|users|user|root|mnt|media|Volumes|private|tmp|var|opt|srv|run|dev/shm|"
    rb"work|workspace|workspaces|scratch|gscratch|project|projects|proj|storage|data|datasets|content|export|exports|"
    rb"net|nfs|lustre|gpfs|fsx|efs|beegfs|ceph|cephfs|afs|vast|weka|cluster|raid|nvme|ssd|disk|kaggle|dbfs|teamspace"
)
PATH = rb"[\w./\\-]"
PATHS = (
    rb"file://[\w./-]+",
    rb"(?<![\w./:-])(?:/(?:" + ROOTS + rb")\d*/|[A-Z]:\\+\w)" + PATH + rb"+",
    rb"(?<![\w./-])/?(?:[\w-][\w.-]*/)*\.\./(?:\.\./)*\w" + PATH + rb"*",  # leaves its folder
    rb"(?<![\w./~-])~(?:[A-Za-z_][\w-]*)?/\w" + PATH + rb"*",  # in a home folder
)
TEXT_FILES = {".json", ".jsonl", ".md", ".py", ".yaml", ".jinja", ".txt"}


def check_model_folder(folder: Path) -> None:
    """
    Check a model's folder.

    Raises:
        ValueError: lists all problems, by file.
    """
    problems = [*surplus_files(folder), *broken_weights(folder), *code_faults(folder), *find_leaks(folder)]
    metadata = metadata_load(folder / "README.md") or {}
    if not metadata.get("license"):
        problems.append("README.md: no licence, and the licence of the dataset is not known: set --license")
    if problems:
        raise ValueError(f"{folder} is not published:\n  " + "\n  ".join(problems))


def surplus_files(folder: Path) -> Iterator[str]:
    for name in list_files(folder):
        if not is_model_file(name):
            yield f"{name}: not a file of a model's repository"


def broken_weights(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            yield f"{file.relative_to(folder)}: damaged ({error})"


def code_faults(folder: Path) -> Iterator[str]:
    """Find code that differs from this version of mmcot, and imports of packages that users of a model may lack."""
    own_files = {file.name: file.read_bytes() for file in shipped_code()}
    files = {file.name: file.read_bytes() for file in folder.glob("*.py")}
    for name in sorted(own_files.keys() | files.keys()):
        if own_files.get(name) != files.get(name):
            yield f"{name}: differs from the file of this version of mmcot"
    for name, content in files.items():
        tree = ast.parse(content)
        guarded = {id(node) for tried in ast.walk(tree) if isinstance(tried, ast.Try) for node in ast.walk(tried)}
        for node in ast.walk(tree):
            allowed = ALLOWED_IMPORTS | (GUARDED_IMPORTS if id(node) in guarded else set())
            for module in imported(node):
                if module.split(".")[0] not in allowed:
                    yield f"{name}, line {node.lineno}: imports {module}"


def imported(node: ast.AST) -> list[str]:
    """Return the modules of other packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []


def find_leaks(folder: Path) -> Iterator[str]:
    """Find paths of this machine, and texts that look like secrets; the secrets themselves are not reported."""
    token = get_token()
    secrets = SECRETS | ({"your token of the Hub": re.escape(token).encode()} if token else {})
    paths = b"|".join((*PATHS, *own_folders()))
    for name in list_files(folder):
        if Path(name).suffix not in TEXT_FILES:
            continue
        for number, line in enumerate((folder / name).read_bytes().splitlines(), start=1):
            for kind, pattern in secrets.items():
                if re.search(pattern, line):
                    yield f"{name}, line {number}: contains {kind}"
            if path := re.search(paths, line):
                yield f"{name}, line {number}: contains a path of this machine, {path[0].decode(errors='replace')}"


def own_folders() -> list[bytes]:
    """Return patterns of the paths in the home and the working folder; a folder that is the disk's root is left out."""
    folders = {Path.home(), Path.home().resolve(), Path.cwd()}
    return [
        rb"(?<![\w.-])" + re.escape(os.fsencode(folder)) + rb"(?!\w)" + PATH + b"*"
        for folder in sorted(folders)
        if folder != Path(folder.anchor)
    ]


def is_model_file(name: str) -> bool:
    """Whether a model's repository may contain a file of this name."""
    return any(re.fullmatch(pattern, name) for pattern in MODEL_PATTERNS)
