"""Where figures of model versions come from: Prometheus, or the servers' own metrics where there is none.

Either gives each server's counters by a label of its own, `instance`, so that one that began anew is seen.
A source from which a server is missing has no figures at all: half of them would look like other ones.
Standard library only: modules run with whatever Python the host has (3.11 or later).
"""

from __future__ import annotations

import json
import math
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.module_utils.agentloop_metrics import Series, checked, fetch, read, trust

Scrape = Callable[[], Mapping[Series, float]]

MOST_BYTES = 64 * 2**20
"""Of Prometheus' answer. A server has at most some thousands of these series, of some 300 bytes each."""
_NAMES = (
    "agentloop_inferences_total|agentloop_fallbacks_total|agentloop_feedback_total"
    "|gen_ai_server_request_duration_seconds_(bucket|sum|count)|gen_ai_client_token_usage_sum"
)


def servers(urls: Sequence[str], ca_file: str | None = None) -> Scrape:
    """The servers' own pages, one after the other; of one page the counters stay as they are."""

    def scrape() -> Mapping[Series, float]:
        if len(urls) == 1:
            return fetch(urls[0], ca_file=ca_file)
        samples = {}
        for url in urls:
            for (name, labels), value in fetch(url, ca_file=ca_file).items():
                samples[name, tuple(sorted((*labels, ("instance", url))))] = value
        return samples

    return scrape


def prometheus(url: str, selector: str, ca_file: str | None = None, timeout: float = 10.0) -> Scrape:
    """What Prometheus' instant query finds of the servers that `selector` picks, as `job="agentloop"`.

    The scrape raises OSError where Prometheus does not answer, and ValueError for an answer that is none, or
    where a server that was there is missing.
    https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries
    """
    checked("prometheus_url", url)
    query = f'{{__name__=~"{_NAMES}"{"," if selector else ""}{selector}}}'
    asked = f"{url.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    context = trust(ca_file)
    seen: set[str] = set()

    def scrape() -> Mapping[Series, float]:
        text = read(asked, timeout, context, MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"Prometheus' answer is larger than {MOST_BYTES} bytes: narrow the selector")
        samples = _samples(text)
        there = {dict(labels).get("instance", "") for _, labels in samples}
        seen.update(there)
        if missing := sorted(seen - there):
            raise ValueError(f"Prometheus has nothing of {', '.join(missing)} any more")
        return samples

    return scrape


def _samples(text: bytes) -> dict[Series, float]:
    try:
        answer: Any = json.loads(text)
        if answer["status"] != "success" or answer["data"]["resultType"] != "vector":
            raise ValueError(f"Prometheus says {str(answer)[:200]}")
        samples = {}
        for one in answer["data"]["result"]:
            labels = {str(name): str(value) for name, value in one["metric"].items()}
            value = float(one["value"][1])
            if math.isfinite(value):
                samples[labels.pop("__name__"), tuple(sorted(labels.items()))] = value
        return samples
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not an answer of Prometheus: {text[:200]!r}") from error
