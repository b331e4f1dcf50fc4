"""A server's `/metrics`, read: Prometheus' text format, and quantiles from its histograms."""

from __future__ import annotations

import http.client
import math
import os
import re
import ssl
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agentloop.errors import AgentLoopError, ConfigurationError

DEFAULT_HTTP = "http://127.0.0.1:8080"
TIMEOUT_S = 5.0
MAX_BYTES = 16 * 1024 * 1024

_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:\\.|[^"\\])*")*)\})?[ \t]+(\S+)')
_LABEL = re.compile(r'(\w+)="((?:\\.|[^"\\])*)"')
_ESCAPES = {"n": "\n", "\\": "\\", '"': '"'}


class ScrapeError(AgentLoopError):
    """The metrics cannot be had, or are none."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """Every sample at one moment, by its name: its labels, and its value."""

    samples: Mapping[str, list[tuple[Mapping[str, str], float]]]
    at: float = field(default_factory=time.monotonic)

    def total(self, name: str) -> float:
        """The sum over all labels; 0 if there is no such sample."""
        return sum(value for _, value in self.samples.get(name, ()))

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sum for each value of one label."""
        sums: dict[str, float] = defaultdict(float)
        for labels, value in self.samples.get(name, ()):
            sums[labels.get(label, "")] += value
        return dict(sums)

    def quantile(self, name: str, share: float, before: Scrape | None = None) -> float | None:
        """Below which value that share of a histogram's observations lies; of those since `before` only.

        Linear within a bucket, as Prometheus' histogram_quantile; the last bucket has no end, so its
        beginning stands for it. None without observations.
        """
        counts = _buckets(self.by(f"{name}_bucket", "le"))
        if before is not None:
            earlier = _buckets(before.by(f"{name}_bucket", "le"))
            counts = {bound: count - earlier.get(bound, 0.0) for bound, count in counts.items()}
        bounds = sorted(counts)
        if not bounds or counts[bounds[-1]] <= 0:
            return None
        wanted = share * counts[bounds[-1]]
        low, below = 0.0, 0.0
        for bound in bounds:
            if counts[bound] >= wanted and counts[bound] > below:
                if math.isinf(bound):
                    return low
                return low + (bound - low) * (wanted - below) / (counts[bound] - below)
            low, below = bound, counts[bound]
        return low


def scrape(address: str, ca_file: str | Path | None = None) -> Scrape:
    """Ask the server whose HTTP address is `host:port`, or a URL.

    Raises:
        ConfigurationError: for an address that is none, or a CA file that cannot be read.
        ScrapeError: if no metrics come.
    """
    url = address if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"the HTTP address is {address!r}; it must be host:port, or http(s)://…")
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if url.startswith("https://"):
        handlers.append(urllib.request.HTTPSHandler(context=_context(ca_file)))
    try:
        with urllib.request.build_opener(*handlers).open(
            f"{url.rstrip('/')}/metrics", timeout=TIMEOUT_S
        ) as found:
            text = found.read(MAX_BYTES).decode(errors="replace")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ScrapeError(f"no metrics from {url}: {reason}") from error
    return parse(text)


def _context(ca_file: str | Path | None) -> ssl.SSLContext:
    """Trusts that CA, or the system's; shows the caller's certificate where one is set."""
    certificate = os.environ.get("AGENTLOOP_CLIENT_CERT_FILE")
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if certificate:
            context.load_cert_chain(certificate, os.environ.get("AGENTLOOP_CLIENT_KEY_FILE"))
    except OSError as error:  # an ssl.SSLError, too
        files = ", ".join(str(each) for each in (ca_file, certificate) if each)
        raise ConfigurationError(f"{files} cannot be used for TLS: {error}") from error
    return context


def parse(text: str) -> Scrape:
    """The samples in Prometheus' text format. Raises ScrapeError for anything else."""
    samples: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _SAMPLE.match(line)
        try:
            if match is None:
                raise ValueError
            value = float(match[3])
        except ValueError:
            raise ScrapeError("what answers there are no metrics: is it the server's HTTP address?") from None
        labels = {name: _unescaped(each) for name, each in _LABEL.findall(match[2] or "")}
        samples[match[1]].append((labels, value))
    return Scrape(samples)


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), text)


def _buckets(counts: Mapping[str, float]) -> dict[float, float]:
    return {float(bound): count for bound, count in counts.items()}
