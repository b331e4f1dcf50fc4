"""`python -m grpc_server`, with a fake engine: tokens, tables, log and transports are the real ones."""

from __future__ import annotations

from functools import partial

from grpc_server import bootstrap
from grpc_server.__main__ import main
from tests.fakes import FakeEngine

if __name__ == "__main__":
    bootstrap.service = partial(bootstrap.service, engine=FakeEngine(models=()))
    main()
