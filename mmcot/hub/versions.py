"""Differences between the supported versions of libraries, in preparation, training and publication.

Each difference names the version that introduced it: delete it when the lower bound in requirements.txt rises.
`modeling_mmcot/versions_mmcot.py` contains those of the shipped code.
"""

from importlib.metadata import version

from huggingface_hub import RepoCard, constants
from huggingface_hub.utils import get_session, hf_raise_for_status

try:  # huggingface-hub does not wrap the errors of its HTTP client: httpx2 since version 2.0, httpx before
    from httpx2 import TransportError
except ImportError:
    from httpx import TransportError

__all__ = ["TransportError", "validate_card"]


def validate_card(card: RepoCard, repo_type: str) -> None:
    """
    Let the Hub validate a card's metadata.

    Raises:
        ValueError: the Hub rejects the metadata.
    """
    # Since huggingface-hub 2.2, `validate` calls the Hub at HF_ENDPOINT; before, it always called huggingface.co.
    if tuple(map(int, version("huggingface-hub").split(".")[:2])) >= (2, 2):
        return card.validate(repo_type)
    response = get_session().post(
        f"{constants.ENDPOINT}/api/validate-yaml",
        json={"repoType": repo_type, "content": str(card)},
        headers={"Accept": "text/plain"},
    )
    if response.status_code == 400:
        raise ValueError(response.text)
    hf_raise_for_status(response)
