"""What differs between the versions of libraries that preparing, training and publishing run with.

Each difference names the version that brought it: delete it when the lower bound of requirements.txt rises. Those of
the shipped code are in `modeling_mmcot/versions_mmcot.py`.
"""

from importlib.metadata import version

from huggingface_hub import RepoCard, constants
from huggingface_hub.utils import get_session, hf_raise_for_status

try:  # huggingface-hub 2.0 lets through the errors of httpx2, its client; before, those of httpx
    from httpx2 import TransportError
except ImportError:
    from httpx import TransportError

__all__ = ["TransportError", "validate_card"]


def validate_card(card: RepoCard, repo_type: str) -> None:
    """
    Has the Hub check a card's metadata.

    Raises:
        ValueError: the Hub does not take it.
    """
    # huggingface-hub 2.2 asks the Hub of HF_ENDPOINT; before, huggingface.co for every Hub.
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
