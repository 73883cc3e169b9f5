"""Live search: any JSON search endpoint, and the web through `ddgs`.

Each answer is cached on disk, so that a run can be repeated without the service. Each passage contains its query and
the day of the search. An empty answer is not cached, because engines that refuse a query also send one. Requests are at
least `interval` seconds apart. Every failure is a `SearchError`.
"""

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from mmcot.storage.digests import sha256_of_json
from mmcot.storage.files import cache_folder, read_json, write_json
from modeling_mmcot.retrieval_mmcot import Passage, SearchError

INTERVAL, TIMEOUT = 1.0, 10.0  # seconds
MAX_BYTES = 10_000_000  # of an answer
# The paths of the results in an answer, and of the columns in a result. The defaults are those of SearXNG.
FIELDS = {"results": "results", "title": "title", "text": "content", "source": "url"}
OPTIONAL_FIELDS = ("id", "score")

logger = logging.getLogger(__name__)


class LiveSearcher:
    """
    A searcher that asks a service. A subclass defines `fetch` and `identity`.

    Args:
        cache: the folder of cached answers; by default in the cache of `datasets`.
        interval: the minimum time between two requests, in seconds.
        timeout: the maximum time for an answer, in seconds.
    """

    def __init__(self, cache: str | Path | None = None, interval: float = INTERVAL, timeout: float = TIMEOUT):
        if interval < 0 or timeout <= 0:
            raise ValueError(f"interval is {interval} s and timeout {timeout} s; expected 0 or more, and more than 0.")
        self._cache = Path(cache) if cache is not None else cache_folder() / "searches"
        self._interval, self._timeout = interval, timeout
        self._next_request = 0.0
        self._lock = threading.Lock()

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Return at most `k` passages for each query, in the service's order."""
        return [self._search(query, k) for query in queries]

    def fetch(self, query: str, k: int) -> list[dict[str, Any]]:
        """
        Return the results of one query, best first, each with `title`, `text`, `source` and optionally `id` and
        `score`.

        Raises:
            SearchError: the service is offline, refuses the request, or answers in another form.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the results of a query."""
        raise NotImplementedError

    def _search(self, query: str, k: int) -> list[Passage]:
        key = sha256_of_json({**self.identity(), "query": query, "k": k})
        file = self._cache / f"{key}.json"
        with self._lock:
            if file.is_file():
                return read_answer(file)
            time.sleep(max(0.0, self._next_request - time.monotonic()))
            try:
                results = self.fetch(query, k)
            finally:
                self._next_request = time.monotonic() + self._interval
            passages = to_passages(results, query)[:k]
            if passages:
                write_json(file, {"passages": [asdict(passage) for passage in passages]})
            return passages


def to_passages(results: list[dict[str, Any]], query: str) -> list[Passage]:
    """
    Return the passages of results. A result without an id gets its source as id; one without a score gets 1 / rank.
    Results without text are left out, with a warning.
    """
    today = datetime.now(UTC).date().isoformat()
    passages = []
    for rank, result in enumerate(results, start=1):
        if not result["text"].strip():
            continue
        score = float(result.get("score", 1 / rank))
        name = str(result.get("id", result["source"]))
        passages.append(Passage(name, result["title"], result["text"], result["source"], score, query, today))
    if len(passages) < len(results):
        logger.warning("%d of %d results of %r have no text.", len(results) - len(passages), len(results), query[:80])
    return passages


def read_answer(file: Path) -> list[Passage]:
    """
    Return the passages of a cached answer.

    Raises:
        ValueError: the file is not a cached answer.
    """
    try:
        return [Passage(**{**row, "problem_ids": ()}) for row in read_json(file)["passages"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a cached answer ({error}); remove it.") from error


class HttpSearcher(LiveSearcher):
    """
    Asks a search endpoint that answers with JSON, such as SearXNG, Elasticsearch or `ddgs api`.

    Args:
        url: the address, with `{query}` and optionally `{k}`:
            `http://localhost:8888/search?format=json&q={query}`.
        fields: the paths of the results and of their columns in the answer, if they differ from `FIELDS`. A dot
            separates the names of nested objects. For Elasticsearch: `results=hits.hits`, `id=_id`,
            `title=_source.title`, `text=_source.text`, `source=_index`, `score=_score`. For `ddgs api`: `text=body`,
            `source=href`.
        cache, interval, timeout: as in `LiveSearcher`.

    Raises:
        ValueError: the address or a field is invalid.
    """

    def __init__(
        self,
        url: str,
        fields: Mapping[str, str] | None = None,
        cache: str | Path | None = None,
        interval: float = INTERVAL,
        timeout: float = TIMEOUT,
    ):
        super().__init__(cache, interval, timeout)
        if not url.startswith(("http://", "https://")) or "{query}" not in url:
            raise ValueError(f"url is {url!r}; expected an address of http or https with {{query}} in it.")
        unknown = [name for name in fields or {} if name not in (*FIELDS, *OPTIONAL_FIELDS)]
        if unknown:
            raise ValueError(f"fields names {unknown[0]!r}; expected {', '.join((*FIELDS, *OPTIONAL_FIELDS))}.")
        self._url, self._fields = url, {**FIELDS, **(fields or {})}

    def identity(self) -> dict[str, Any]:
        return {"url": self._url, "fields": self._fields}

    def fetch(self, query: str, k: int) -> list[dict[str, Any]]:
        url = self._url.replace("{k}", str(k)).replace("{query}", quote(query, safe=""))
        # Errors name the address without its query and without a password or key in it.
        parts = urlsplit(url)
        service = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        answer = parse_json(get(url, service, self._timeout), service)
        results = member(answer, self._fields["results"], service)
        if not isinstance(results, list):
            raise SearchError(f"{service}: {self._fields['results']} is {results!r:.80}; expected a list of results.")
        return [self._columns(result, service) for result in results]

    def _columns(self, result: Any, service: str) -> dict[str, Any]:
        columns = {name: member(result, path, service) for name, path in self._fields.items() if name != "results"}
        if type(columns.get("score", 0.0)) not in (int, float):
            raise SearchError(f"{service}: {self._fields['score']} is {columns['score']!r:.80}; expected a number.")
        texts = {name: "" if columns[name] is None else str(columns[name]) for name in ("title", "text", "source")}
        return {**columns, **texts}


def member(value: Any, path: str, service: str) -> Any:
    """
    Return the value at a dotted path of JSON.

    Raises:
        SearchError: there is no such value.
    """
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            found = ", ".join(value) if isinstance(value, dict) else f"{value!r:.80}"
            raise SearchError(f"{service}: the answer has no {path!r} ({name!r} is missing); found {found}.")
        value = value[name]
    return value


def get(url: str, service: str, timeout: float) -> bytes:
    """
    Return the content of the answer of an address.

    Raises:
        SearchError: the service is offline or slow, refuses the request, or sends too large an answer.
    """
    request = Request(url, headers={"Accept": "application/json", "User-Agent": "mmcot"})
    deadline, content = time.monotonic() + timeout, b""
    try:
        with urlopen(request, timeout=timeout) as response:
            while part := response.read1():
                content += part
                if len(content) > MAX_BYTES:
                    raise SearchError(f"{service}: the answer has more than {MAX_BYTES:,} bytes.")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except HTTPError as error:
        wait = error.headers.get("Retry-After")
        reason = (
            "too many requests" + (f", retry after {wait} s" if wait else "") if error.code == 429 else error.reason
        )
        raise SearchError(f"{service}: HTTP {error.code} ({reason}).") from error
    except TimeoutError as error:
        raise SearchError(f"{service}: no complete answer in {timeout:g} s.") from error
    except URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise SearchError(f"{service}: no complete answer in {timeout:g} s.") from error
        raise SearchError(f"{service}: cannot be reached ({error.reason}).") from error
    except (HTTPException, ConnectionError) as error:
        raise SearchError(f"{service}: the connection failed ({error!r}).") from error
    return content


def parse_json(content: bytes, service: str) -> Any:
    """
    Return the JSON of an answer.

    Raises:
        SearchError: the answer is not JSON but, for example, a page.
    """
    try:
        return json.loads(content)
    except ValueError as error:
        start = content[:60].decode(errors="replace")
        hint = " It is a page; SearXNG needs format=json, also in its settings." if b"<html" in content.lower() else ""
        raise SearchError(f"{service}: the answer is not JSON; it starts with {start!r}.{hint}") from error


class WebSearcher(LiveSearcher):
    """
    Asks the web's search engines through `ddgs`, which raises only `DDGSException`. Needs `mmcot[web]`.

    Args:
        cache, interval, timeout: as in `LiveSearcher`.

    Raises:
        ImportError: `ddgs` is not installed.
    """

    def __init__(self, cache: str | Path | None = None, interval: float = INTERVAL, timeout: float = TIMEOUT):
        super().__init__(cache, interval, timeout)
        try:
            import ddgs
        except ImportError as error:
            raise ImportError("web search needs the package ddgs: pip install 'mmcot[web]'") from error
        self._ddgs = ddgs

    def identity(self) -> dict[str, Any]:
        return {"service": "ddgs"}

    def fetch(self, query: str, k: int) -> list[dict[str, Any]]:
        try:
            results = self._ddgs.DDGS(timeout=self._timeout).text(query, max_results=k)
        except self._ddgs.exceptions.DDGSException as error:
            if str(error) == "No results found.":  # also raised if all engines refuse
                logger.warning("The web search found nothing for %r.", query[:80])
                return []
            raise SearchError(f"the web search failed: {error}") from error
        return [{"title": found["title"], "text": found["body"], "source": found["href"]} for found in results]
