"""The searchers by name, and the options that each takes.

`bm25`, `dense` and `hybrid` search an index (`index.py`); `http` and `web` search live (`live.py`). A searcher's
options are the arguments of its class.
"""

import inspect
from collections.abc import Callable
from typing import Any

from mmcot.retrieval.dense import DenseSearcher, HybridSearcher
from mmcot.retrieval.live import HttpSearcher, WebSearcher
from modeling_mmcot.retrieval_mmcot import BM25Searcher, Searcher

SEARCHERS: dict[str, Callable[..., Searcher]] = {
    "bm25": BM25Searcher,
    "dense": DenseSearcher,
    "hybrid": HybridSearcher,
    "http": HttpSearcher,
    "web": WebSearcher,
}


def open_searcher(name: str, **options: Any) -> Searcher:
    """
    Return a searcher.

    Args:
        name: a name in `SEARCHERS`.
        options: the arguments of its class. An option that is None counts as not given.

    Raises:
        ValueError: there is no such searcher, or an option is missing, unknown or invalid.
        ImportError: a package of the searcher is not installed.
    """
    if name not in SEARCHERS:
        raise ValueError(f"searcher is {name!r}; expected one of {', '.join(SEARCHERS)}.")
    parameters = inspect.signature(SEARCHERS[name]).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in parameters:
            raise ValueError(f"{option} has no effect on the searcher {name}; its options: {', '.join(parameters)}.")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in given:
            raise ValueError(f"the searcher {name} needs the option {option}.")
    return SEARCHERS[name](**given)
