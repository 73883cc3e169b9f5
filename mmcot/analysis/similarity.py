"""Semantic similarity of rationales to the gold rationales, the paper's `Similarity` score.

The paper compares embeddings of all-MiniLM-L6-v2 (sentence-transformers) by cosine; an embedding is the mean of the
token states. Here the user names any encoder on the Hub; without a name the score is not computed.
"""

from collections.abc import Mapping, Sequence

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from mmcot.evaluation.metrics import Problems, rationale_pairs


def similarity(problems: Problems, rationales: Mapping[str, str], model: str, batch_size: int = 64) -> float | None:
    """
    Return the mean cosine, in percent, between each rationale and its most similar gold rationale.

    Returns None if no problem has both a gold and a generated rationale.

    Args:
        rationales: by problem id.
        model: an encoder's folder or Hub id.
    """
    pairs = rationale_pairs(problems, rationales)
    if not pairs:
        return None
    texts = sorted({text for golds, generated in pairs for text in (*golds, generated)}, key=len)
    vectors = dict(zip(texts, embed(texts, model, batch_size), strict=True))
    nearest = [max(float(vectors[generated] @ vectors[gold]) for gold in golds) for golds, generated in pairs]
    return 100 * sum(nearest) / len(nearest)


@torch.no_grad()
def embed(texts: Sequence[str], model: str, batch_size: int) -> torch.FloatTensor:
    """Return unit vectors of shape `(len(texts), hidden_size)`."""
    tokenizer, encoder = (auto.from_pretrained(model, trust_remote_code=False) for auto in (AutoTokenizer, AutoModel))
    vectors = []
    for start in tqdm(range(0, len(texts), batch_size), desc="embedding rationales", leave=False):
        batch = tokenizer(list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt")
        states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        vectors.append(torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))
    return torch.cat(vectors)
