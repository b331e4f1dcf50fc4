"""Whether everything that the server accepted has reached Postgres."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx
import psycopg
from prometheus_client.parser import text_string_to_metric_families

from demo.failure import LinkError
from demo.serving import Serving

SETTLE_SECONDS = 60.0
POLL_SECONDS = 0.5
_LOGGED = "SELECT inference_id::text FROM learning_log WHERE started_at >= %s"


@dataclass(frozen=True, slots=True)
class Logged:
    """Inferences of this demo: accepted by the server's own count, and found in Postgres."""

    accepted: int
    logged: int


async def check_log(serving: Serving, told: set[str]) -> Logged:
    """Wait until the log has settled, then compare; `told` are the ids that the services were told.

    Raises:
        LinkError: if an inference is missing, or the counts differ.
    """
    deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
    while True:
        try:
            accepted, unsettled = await _server_counts(serving.http_address)
            logged = await _logged(serving)
        except (httpx.HTTPError, psycopg.Error) as error:
            raise LinkError(
                "log", f"its state cannot be read: {error}", "see the log", serving.server.log
            ) from error
        missing = told - logged
        if not missing and not unsettled and accepted == len(logged):
            return Logged(accepted, len(logged))
        if asyncio.get_running_loop().time() > deadline:
            raise LinkError(
                "log",
                f"the server accepted {accepted} inferences, Postgres has {len(logged)};"
                f" {len(missing)} that a service was told of are missing, {unsettled} are on their way",
                "see the log; `python -m grpc_server` and its /metrics tell what the spool holds",
                serving.server.log,
            )
        await asyncio.sleep(POLL_SECONDS)


async def _logged(serving: Serving) -> set[str]:
    connection = await psycopg.AsyncConnection.connect(serving.database_url)
    async with connection, connection.cursor() as cursor:
        await cursor.execute(_LOGGED, (serving.started_at,))
        return {row[0] for row in await cursor.fetchall()}


async def _server_counts(http_address: str) -> tuple[int, int]:
    """Inferences ended, and what is in flight or spooled still."""
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        text = (await client.get(f"http://{http_address}/metrics")).raise_for_status().text
    ended = unsettled = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "agentloop_inferences_total":
                ended += sample.value
            elif sample.name in ("agentloop_in_flight", "agentloop_queued", "agentloop_spool_records"):
                unsettled += sample.value
    return int(ended), int(unsettled)
