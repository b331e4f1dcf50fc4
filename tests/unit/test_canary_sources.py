"""Where a canary's figures come from: servers' pages of metrics, or Prometheus."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest

from tests.ansible_modules import metrics, sources


def test_label_values_with_quotes_backslashes_commas_and_newlines_survive() -> None:
    registry = CollectorRegistry()
    value = 'a"b\\c,d}\ne é'
    Counter("x", 'help with } and "', ("one", "two"), registry=registry).labels(value, "").inc(3)
    samples = metrics.parse(generate_latest(registry).decode())
    assert samples["x_total", (("one", value), ("two", ""))] == 3


@given(st.text(), st.text())
def test_every_label_value_survives(one: str, two: str) -> None:
    registry = CollectorRegistry()
    Counter("x", "y", ("one", "two"), registry=registry).labels(one, two).inc()
    samples = metrics.parse(generate_latest(registry).decode())
    assert samples["x_total", (("one", one), ("two", two))] == 1


def test_infinity_not_a_number_and_timestamps_are_read() -> None:
    samples = metrics.parse('a +Inf\nb{le="+Inf"} 3 1700000000000\n# c 1\n\nd NaN\n')
    assert samples["a", ()] == math.inf
    assert samples["b", (("le", "+Inf"),)] == 3
    assert math.isnan(samples["d", ()])


def test_a_page_that_is_no_metrics_is_refused_with_its_line() -> None:
    with pytest.raises(ValueError, match="<html>"):
        metrics.parse("<html> nginx 502")


def test_only_http_is_fetched() -> None:
    with pytest.raises(ValueError, match="http"):
        metrics.fetch("file:///etc/passwd")


@pytest.fixture
def answers() -> Iterator[tuple[str, list[bytes]]]:
    """A Prometheus that answers what the list says, one after the other; its address."""
    left: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(left.pop(0))

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", left
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def vector(*instances: str, count: str = "5") -> bytes:
    found = [
        {
            "metric": {"__name__": "agentloop_inferences_total", "instance": one, "alias": "default"},
            "value": [1.0, count],
        }
        for one in instances
    ]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": found}}).encode()


def test_prometheus_gives_each_servers_counters_by_its_instance(answers: tuple[str, list[bytes]]) -> None:
    url, left = answers
    left[:] = [vector("a:1", "b:1")]
    labels = (("alias", "default"), ("instance", "a:1"))
    found = sources.prometheus(url, 'job="agentloop"')()
    assert (len(found), found["agentloop_inferences_total", labels]) == (2, 5)
    left[:] = [vector("a:1", count="NaN")]
    assert sources.prometheus(url, "")() == {}


def test_a_server_that_prometheus_has_lost_means_no_figures(answers: tuple[str, list[bytes]]) -> None:
    url, left = answers
    left[:] = [vector("a:1", "b:1"), vector("a:1")]
    scrape = sources.prometheus(url, "")
    scrape()
    with pytest.raises(ValueError, match="nothing of b:1 any more"):
        scrape()


@pytest.mark.parametrize(
    "answer",
    [b"", b"<html>", b"[]", b'{"status": "error", "error": "bad"}', b'{"status": "success"}', b"\x00\xff"],
)
def test_what_is_no_answer_of_prometheus_means_no_figures(
    answers: tuple[str, list[bytes]], answer: bytes
) -> None:
    url, left = answers
    left[:] = [answer]
    with pytest.raises(ValueError):
        sources.prometheus(url, "")()


def test_an_answer_without_end_is_not_read_to_its_end(
    answers: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, left = answers
    monkeypatch.setattr(sources, "MOST_BYTES", 10)
    left[:] = [vector("a:1")]
    with pytest.raises(ValueError, match="narrow the selector"):
        sources.prometheus(url, "")()


def test_several_servers_count_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "fetch", lambda url, ca_file: {("up", ()): float(len(url))})
    assert sources.servers(["http://a", "http://bb"])() == {
        ("up", (("instance", "http://a"),)): 8,
        ("up", (("instance", "http://bb"),)): 9,
    }
    assert sources.servers(["http://a"])() == {("up", ()): 8}
