"""Live search, against a server on this machine and a stand-in for ddgs: results, cache, rate limit, failures."""

import json
import sys
import threading
import time
import types
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from mmcot.retrieval import live
from mmcot.retrieval.live import HttpSearcher, WebSearcher
from modeling_mmcot.retrieval_mmcot import SearchError, search_passages

TODAY = datetime.now(UTC).date().isoformat()
RESULTS = [
    {"title": "Magnets", "content": "Poles attract.", "url": "https://a.example/magnets"},
    {"title": "Maps", "content": "North is up.", "url": "https://b.example/maps"},
]


class Server:
    """Answers each request with `answer`: a status, headers, a body, and seconds to wait before the body."""

    def __init__(self):
        self.answer = (200, {}, json.dumps({"results": RESULTS}).encode(), 0.0)
        self.queries, self.times = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.times.append(time.monotonic())
                outer.queries.append(parse_qs(urlsplit(self.path).query))
                status, headers, body, wait = outer.answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                time.sleep(wait)
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/search?key=SECRET&q={{query}}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def searcher(server, tmp_path):
    return HttpSearcher(server.url, cache=tmp_path / "cache", interval=0, timeout=2)


def test_converts_results_to_passages_with_query_and_date(searcher, server):
    [found] = search_passages(searcher, ["which poles & maps?"], 5)
    assert [(passage.title, passage.text, passage.source) for passage in found] == [
        ("Magnets", "Poles attract.", "https://a.example/magnets"),
        ("Maps", "North is up.", "https://b.example/maps"),
    ]
    assert {(passage.query, passage.date) for passage in found} == {("which poles & maps?", TODAY)}
    assert [passage.score for passage in found] == [1.0, 0.5]
    assert [passage.id for passage in found] == [passage.source for passage in found]
    assert server.queries == [{"key": ["SECRET"], "q": ["which poles & maps?"]}]


def test_returns_at_most_k_passages(searcher):
    assert len(search_passages(searcher, ["poles"], 1)[0]) == 1


def test_inserts_k_into_url(server, tmp_path):
    search_passages(HttpSearcher(server.url + "&n={k}", cache=tmp_path, interval=0), ["poles"], 7)
    assert server.queries[0]["n"] == ["7"]


def test_reads_elasticsearch_response(server, tmp_path):
    hit = {"_id": "d1", "_index": "books", "_score": 7.5, "_source": {"title": "Magnets", "text": "Poles."}}
    server.answer = (200, {}, json.dumps({"hits": {"hits": [hit]}}).encode(), 0.0)
    fields = {"results": "hits.hits", "id": "_id", "title": "_source.title", "text": "_source.text"}
    searcher = HttpSearcher(server.url, {**fields, "source": "_index", "score": "_score"}, tmp_path, interval=0)
    [[found]] = search_passages(searcher, ["poles"], 3)
    assert (found.id, found.title, found.text, found.source, found.score) == ("d1", "Magnets", "Poles.", "books", 7.5)


def test_caches_answer_by_query_k_and_fields(searcher, server, tmp_path):
    first = search_passages(searcher, ["poles"], 5)
    server.answer = (500, {}, b"", 0.0)
    again = HttpSearcher(server.url, cache=tmp_path / "cache", interval=0)
    assert search_passages(again, ["poles"], 5) == first and len(server.queries) == 1
    for queries, k in ((["maps"], 5), (["poles"], 4)):
        with pytest.raises(SearchError, match="HTTP 500"):
            search_passages(again, queries, k)
    other = HttpSearcher(server.url, {"title": "url"}, tmp_path / "cache", interval=0)
    with pytest.raises(SearchError, match="HTTP 500"):
        search_passages(other, ["poles"], 5)


def test_cached_passages_keep_search_date(searcher, tmp_path):
    search_passages(searcher, ["poles"], 5)
    [file] = (tmp_path / "cache").iterdir()
    file.write_text(file.read_text().replace(TODAY, "2020-02-02"))
    assert {passage.date for passage in search_passages(searcher, ["poles"], 5)[0]} == {"2020-02-02"}
    file.write_text('{"passages": [{"id": 1}]}')
    with pytest.raises(SearchError, match="not a cached answer"):
        search_passages(searcher, ["poles"], 5)


def test_does_not_cache_empty_answer(searcher, server, tmp_path):
    server.answer = (200, {}, b'{"results": []}', 0.0)
    assert search_passages(searcher, ["poles"], 5) == [[]]
    assert search_passages(searcher, ["poles"], 5) == [[]] and len(server.queries) == 2


def test_waits_interval_between_requests(server, tmp_path):
    searcher = HttpSearcher(server.url, cache=tmp_path, interval=0.3)
    search_passages(searcher, ["a", "b", "a", "c"], 5)
    assert len(server.times) == 3
    assert all(later - earlier > 0.29 for earlier, later in zip(server.times, server.times[1:], strict=False))


HTML = b"<!DOCTYPE html><html><body>Are you a robot?</body></html>"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {}, HTML, 0.0), "the answer is not JSON; it starts with '<!DOCTYPE html>.*It is a page; SearXNG needs"),
        ((200, {}, b"", 0.0), "the answer is not JSON; it starts with ''"),
        ((429, {"Retry-After": "30"}, b"", 0.0), r"HTTP 429 \(too many requests, retry after 30 s\)"),
        ((403, {}, b"", 0.0), r"HTTP 403 \(Forbidden\)"),
        ((200, {}, b'{"hits": []}', 0.0), "the answer has no 'results' .*; found hits"),
        ((200, {}, b'{"results": 3}', 0.0), "results is 3; expected a list of results"),
        ((200, {}, b'{"results": [{"title": "t", "url": "u"}]}', 0.0), "has no 'content' .*; found title, url"),
        ((200, {}, b'{"results": ["text"]}', 0.0), "has no 'title' .*; found 'text'"),
        ((200, {}, b"{}", 3.0), "no complete answer in 2 s"),
        ((200, {"Content-Length": "99"}, b"{", 0.0), "the connection failed|not JSON"),
    ],
)
def test_error_names_service_and_reason_without_key(searcher, server, answer, message):
    server.answer = answer
    with pytest.raises(SearchError, match=message) as error:
        search_passages(searcher, ["poles"], 5)
    assert str(error.value).startswith("http://127.0.0.1:") and "SECRET" not in str(error.value)


def test_stops_at_time_limit_if_service_is_silent(server, tmp_path):
    server.answer = (200, {}, b"{}", 3.0)
    started = time.monotonic()
    with pytest.raises(SearchError, match="no complete answer in 0.5 s"):
        search_passages(HttpSearcher(server.url, cache=tmp_path, interval=0, timeout=0.5), ["poles"], 5)
    assert time.monotonic() - started < 2


def test_stops_at_time_limit_if_answer_arrives_slowly(server, tmp_path):
    searcher = HttpSearcher(server.url, cache=tmp_path, interval=0, timeout=0.5)
    handler = server.server.RequestHandlerClass

    def drip(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(40):
            self.wfile.write(b" ")
            time.sleep(0.1)

    handler.do_GET = drip
    started = time.monotonic()
    with pytest.raises(SearchError, match="no complete answer in 0.5 s"):
        search_passages(searcher, ["poles"], 5)
    assert time.monotonic() - started < 2


def test_refuses_answer_over_size_limit(searcher, server, monkeypatch):
    monkeypatch.setattr(live, "MAX_BYTES", 10)
    with pytest.raises(SearchError, match="more than 10 bytes"):
        search_passages(searcher, ["poles"], 5)


def test_error_names_unreachable_service(tmp_path):
    searcher = HttpSearcher("http://127.0.0.1:9/?q={query}", cache=tmp_path, interval=0)
    with pytest.raises(SearchError, match=r"http://127.0.0.1:9/: cannot be reached \(.*refused"):
        search_passages(searcher, ["poles"], 5)


def test_skips_failed_query_on_request(searcher, server, caplog):
    search_passages(searcher, ["poles"], 5)
    server.answer = (429, {}, b"", 0.0)
    found = search_passages(searcher, ["maps", "poles"], 5, on_error="skip")
    assert [len(passages) for passages in found] == [0, 2]
    assert "failed for 1 of 2 queries" in caplog.text and "HTTP 429" in caplog.text


def test_omits_result_without_text_and_warns(searcher, server, caplog):
    server.answer = (200, {}, json.dumps({"results": [{**RESULTS[0], "content": None}, RESULTS[1]]}).encode(), 0.0)
    assert [passage.title for passage in search_passages(searcher, ["poles"], 5)[0]] == ["Maps"]
    assert "1 of 2 results of 'poles' have no text" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://a.example/?q="}, "expected an address of http or https with {query} in it"),
        ({"url": "file:///etc/passwd?{query}"}, "url is 'file:.*expected an address of http or https"),
        ({"url": "http://a/{query}", "fields": {"body": "x"}}, "fields names 'body'; expected results, title, text"),
        ({"url": "http://a/{query}", "interval": -1}, "interval is -1 s"),
        ({"url": "http://a/{query}", "timeout": 0}, "timeout 0 s"),
    ],
)
def test_refuses_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        HttpSearcher(**options)


class DDGSException(Exception):
    pass


@pytest.fixture
def ddgs(monkeypatch):
    """A module in place of ddgs: a search returns `answer`, or raises it if it is an exception."""
    module = types.ModuleType("ddgs")
    module.exceptions = types.ModuleType("ddgs.exceptions")
    module.exceptions.DDGSException = DDGSException
    module.asked = []
    module.answer = [{"title": "Magnets", "href": "https://a.example", "body": "Poles attract."}]

    class DDGS:
        def __init__(self, timeout):
            self.timeout = timeout

        def text(self, query, max_results):
            module.asked.append((query, max_results, self.timeout))
            if isinstance(module.answer, Exception):
                raise module.answer
            return module.answer

    module.DDGS = DDGS
    monkeypatch.setitem(sys.modules, "ddgs", module)
    return module


def test_web_search_returns_and_caches_passages(ddgs, tmp_path):
    searcher = WebSearcher(tmp_path, interval=0, timeout=3)
    [[found]] = search_passages(searcher, ["poles"], 4)
    assert (found.title, found.text, found.source) == ("Magnets", "Poles attract.", "https://a.example")
    assert (found.query, found.date, found.score) == ("poles", TODAY, 1.0)
    assert search_passages(searcher, ["poles"], 4) == [[found]]
    assert ddgs.asked == [("poles", 4, 3)]


def test_web_search_reports_failures_and_does_not_cache_them(ddgs, tmp_path, caplog):
    searcher = WebSearcher(tmp_path, interval=0)
    ddgs.answer = DDGSException("202 Ratelimit")
    with pytest.raises(SearchError, match="the web search failed: 202 Ratelimit"):
        search_passages(searcher, ["poles"], 4)
    assert search_passages(searcher, ["poles"], 4, on_error="skip") == [[]]
    assert "failed for 1 of 1 queries" in caplog.text
    ddgs.answer = DDGSException("No results found.")
    assert search_passages(searcher, ["poles"], 4) == [[]]
    assert "The web search found nothing for 'poles'" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_installed_ddgs_has_used_interface():
    """The signatures and messages that `WebSearcher` relies on."""
    ddgs = pytest.importorskip("ddgs", reason="needs mmcot[web]")
    import inspect

    assert {"query", "kwargs"} <= inspect.signature(ddgs.DDGS.text).parameters.keys()
    assert "max_results" in inspect.signature(ddgs.DDGS._search_sync).parameters
    assert "timeout" in inspect.signature(ddgs.DDGS).parameters
    assert issubclass(ddgs.exceptions.DDGSException, Exception)
    assert '"No results found."' in inspect.getsource(sys.modules[ddgs.DDGS.__module__])


def test_missing_package_error_names_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ddgs", None)
    with pytest.raises(ImportError, match=r"pip install 'mmcot\[web\]'"):
        WebSearcher(tmp_path)
