"""What a server's `/metrics` says of each model version, between two moments.

Standard library only: modules run with whatever Python the host has (3.11 or later).
"""

from __future__ import annotations

import math
import re
import ssl
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Series = tuple[str, tuple[tuple[str, str], ...]]  # name, labels in alphabetical order

FAILED = frozenset({"error", "deadline"})  # ends that are the service's; a caller may cancel when it likes
MISTAKEN = frozenset({"InvalidArgument"})  # errors that are the caller's, though only the engine could tell
_MISTAKE = "mistake"
_BY_TARGET = ("agentloop_inferences_total", "agentloop_fallbacks_total", "agentloop_feedback_total")
_LINE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")


def parse(text: str) -> dict[Series, float]:
    """Every sample of Prometheus' text format 0.0.4.

    https://prometheus.io/docs/instrumenting/exposition_formats/

    Raises:
        ValueError: a line is neither a comment nor a sample; it is quoted.
    """
    samples = {}
    for line in text.split("\n"):  # a label may hold what else Python takes for the end of a line
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.match(line.strip())
        if found is None:
            raise ValueError(f"not Prometheus' text format: {line[:200]!r}")
        name, labels, value = found.groups()
        pairs = tuple(sorted((key, _unescaped(text)) for key, text in _LABEL.findall(labels or "")))
        samples[name, pairs] = float(value)
    return samples


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda found: "\n" if found[1] == "n" else found[1], text)


def fetch(url: str, timeout: float = 10.0, ca_file: str | None = None) -> dict[Series, float]:
    """The samples at `url` now; `ca_file` is the authority of its certificate, if not one of the host's.

    Raises:
        OSError: no answer, or one that is not 200.
        ValueError: the answer is no Prometheus text, or `url` no http URL.
    """
    text = read(checked("metrics_url", url), timeout, trust(ca_file))
    return parse(text.decode("utf-8", "replace"))


def checked(option: str, url: str) -> str:
    """The URL, if it is one of http. Raises ValueError, naming the option."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{option} is {url!r}; it must begin with http:// or https://")
    return url


def trust(ca_file: str | None) -> ssl.SSLContext | None:
    """Whom to believe: this authority, or without one the host's. Raises OSError if it cannot be read."""
    return ssl.create_default_context(cafile=ca_file) if ca_file else None


def read(url: str, timeout: float, context: ssl.SSLContext | None, most: int = -1) -> bytes:
    """What is at a `checked` URL, at most so many bytes.

    Raises:
        OSError: no answer, or one that is not 200.
    """
    with urllib.request.urlopen(url, timeout=timeout, context=context) as answer:  # noqa: S310 - checked
        found: bytes = answer.read(most)
    return found


class Increase:
    """How much each counter grew over several scrapes.

    A counter that fell, or was gone in between, began anew at 0 with its server (Prometheus' `increase()`
    sees it the same way); one that is seen for the first time after the first scrape began at 0.
    """

    def __init__(self) -> None:
        self.total: dict[Series, float] = {}
        self._last: dict[Series, float] | None = None

    def add(self, samples: Mapping[Series, float]) -> None:
        """Takes one more scrape; the first is only where counting begins."""
        if self._last is not None:
            for series, value in samples.items():
                before = self._last.get(series, 0.0)
                grown = value - before if value >= before else value
                self.total[series] = self.total.get(series, 0.0) + grown
        self._last = dict(samples)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one model version did: counts of requests, and how long they took (seconds)."""

    requests: int = 0  # those that ended well or failed; not those that their callers cancelled
    failed: int = 0  # those too for which another version answered in the end
    cancelled: int = 0
    mistaken: int = 0  # as the prompt was too long, or the schema too much; not of the requests
    answered: int = 0
    cut: int = 0  # of the answered: ended by their length
    opinions: int = 0  # answers of which their callers said later that they were good, or were not
    negative: int = 0  # of the opinions
    output_tokens: int = 0
    seconds: float = 0.0
    timed: int = 0  # of the requests
    buckets: tuple[tuple[float, float], ...] = ()  # upper bound, requests up to it

    @property
    def failed_share(self) -> float:
        """Of the requests, 0 to 1; 0 if there were none."""
        return self.failed / self.requests if self.requests else 0.0

    @property
    def cut_share(self) -> float:
        """Of the answers, 0 to 1; 0 if there were none."""
        return self.cut / self.answered if self.answered else 0.0

    @property
    def negative_share(self) -> float:
        """Of the opinions, 0 to 1; 0 if there were none."""
        return self.negative / self.opinions if self.opinions else 0.0

    @property
    def mean(self) -> float | None:
        """Mean seconds a request; None if none was timed."""
        return self.seconds / self.timed if self.timed else None

    def quantile(self, q: float) -> float | None:
        """Seconds under which the share `q` of the requests stayed; None if none was timed.

        Straight lines inside a bucket, the last finite bound beyond it, as Prometheus' `histogram_quantile`.
        """
        if not self.buckets or self.buckets[-1][1] <= 0:
            return None
        rank, low, below = q * self.buckets[-1][1], 0.0, 0.0
        for bound, count in self.buckets:
            if count >= rank and count > below:
                return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
            low, below = (low if math.isinf(bound) else bound), count
        return low

    def plain(self) -> dict[str, float | int | None]:
        """For JSON: counts, shares (0 to 1) and milliseconds."""
        return {
            "requests": self.requests,
            "failed": self.failed,
            "cancelled": self.cancelled,
            "mistaken": self.mistaken,
            "cut_by_length": self.cut,
            "error_share": round(self.failed_share, 4),
            "length_share": round(self.cut_share, 4),
            "opinions": self.opinions,
            "negative_share": round(self.negative_share, 4),
            "latency_mean_ms": _milliseconds(self.mean),
            "latency_p50_ms": _milliseconds(self.quantile(0.5)),
            "latency_p95_ms": _milliseconds(self.quantile(0.95)),
            "output_tokens": self.output_tokens,
        }

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Figures:
        """From `dataclasses.asdict`, as it is after JSON.

        Raises:
            ValueError: it is something else.
        """
        try:
            counts = {name: type(getattr(cls(), name))(value) for name, value in given.items()}
            counts["buckets"] = tuple((float(bound), float(count)) for bound, count in given["buckets"])
            return cls(**counts)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"these are no figures of a version: {error}") from error


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def figures(total: Mapping[Series, float], alias: str, model_version: str) -> Figures:
    """What `model_version` did for `alias`, as stable or canary, by these totals of counters."""
    ends: dict[str, float] = {}
    cut = seconds = timed = tokens = opinions = negative = 0.0
    buckets: dict[float, float] = {}
    for (name, pairs), value in total.items():
        labels = dict(pairs)
        if name in _BY_TARGET:
            if not _answers(labels, alias, model_version):
                continue
            if name == "agentloop_inferences_total":
                status = _end(labels)
                ends[status] = ends.get(status, 0.0) + value
                cut += value if status == "ok" and labels.get("finish_reason") == "length" else 0.0
            elif name == "agentloop_fallbacks_total":
                ends["error"] = ends.get("error", 0.0) + value
            else:
                opinions += value
                negative += value if labels.get("opinion") == "negative" else 0.0
        elif labels.get("gen_ai_response_model") != model_version:
            continue
        elif name == "gen_ai_client_token_usage_sum":
            tokens += value if labels.get("gen_ai_token_type") == "output" else 0.0
        elif labels.get("gen_ai_request_model") != alias:
            continue
        elif name == "gen_ai_server_request_duration_seconds_sum":
            seconds += value
        elif name == "gen_ai_server_request_duration_seconds_count":
            timed += value
        elif name == "gen_ai_server_request_duration_seconds_bucket":
            bound = float(labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + value
    failed = sum(ends.get(status, 0.0) for status in FAILED)
    return Figures(
        requests=round(ends.get("ok", 0.0) + failed),
        failed=round(failed),
        cancelled=round(ends.get("cancelled", 0.0)),
        mistaken=round(ends.get(_MISTAKE, 0.0)),
        answered=round(ends.get("ok", 0.0)),
        cut=round(cut),
        opinions=round(opinions),
        negative=round(negative),
        output_tokens=round(tokens),
        seconds=seconds,
        timed=round(timed),
        buckets=tuple(sorted(buckets.items())),
    )


def _answers(labels: Mapping[str, str], alias: str, model_version: str) -> bool:
    mine = labels.get("alias") == alias and labels.get("model_version") == model_version
    return mine and labels.get("target_role") != "shadow"


def _end(labels: Mapping[str, str]) -> str:
    """How an inference ended: its status, but for a caller's mistake, which is no failure of the service."""
    return _MISTAKE if labels.get("error_type") in MISTAKEN else labels.get("status", "")


def ended(samples: Mapping[Series, float], alias: str, statuses: Iterable[str] | None = None) -> int:
    """How many inferences of `alias` ended since the server began, in one of `statuses` (None: in any)."""
    wanted = None if statuses is None else frozenset(statuses)
    count = 0.0
    for (name, pairs), value in samples.items():
        labels = dict(pairs)
        if name == "agentloop_inferences_total" and labels.get("alias") == alias:
            count += value if wanted is None or _end(labels) in wanted else 0.0
    return round(count)
