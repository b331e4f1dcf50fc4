"""A server's log without the server: spool, drain and store, under as much traffic as they take.

    python -m tests.integration.log_writer <spool folder> <dsn> [<most bytes of the spool>]

Prints the id of each inference once it is accepted, `end <id>` once its end is on disk, and `feedback <id>`
once that is. Runs until killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from pathlib import Path

from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.errors import SpoolFull
from grpc_server.drain import Drain
from tests import records as make


async def main(directory: Path, dsn: str, max_bytes: int) -> None:
    spool = FileSpool(directory, "server-1", max_bytes, segment_bytes=32 << 10)
    await spool.open()
    store = PostgresStore(dsn)
    await store.open()
    drain = asyncio.create_task(Drain(spool, store, dead_letters=store, linger_seconds=0.01).run())
    await asyncio.gather(drain, *(traffic(spool) for _ in range(8)))


async def traffic(spool: FileSpool) -> None:
    while True:
        start = make.started()
        try:
            await spool.append(start)
        except SpoolFull:
            print("refused", start.id, flush=True)
            await asyncio.sleep(0.1)
            continue
        print(start.id, flush=True)
        await asyncio.sleep(random.random() * 0.01)
        await spool.append(make.ended(start.id))
        print("end", start.id, flush=True)
        if random.random() < 0.5:
            said = make.feedback(start.id)
            with contextlib.suppress(SpoolFull):
                await spool.append(said)
                print("feedback", said.id, flush=True)


if __name__ == "__main__":
    most = int(sys.argv[3]) if len(sys.argv) > 3 else 1 << 28
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], most))
