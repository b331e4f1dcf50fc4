# ruff: noqa: ASYNC110 - states that no event tells of
"""Tokens: who is let in, and what an outage, a restart, an expiry and a revocation change."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from grpc_server.adapters import credentials
from grpc_server.adapters.credentials import CachedAuthenticator, new_token
from grpc_server.domain.errors import Unauthenticated
from grpc_server.domain.ports import TokenRecord
from grpc_server.domain.types import Scope
from tests.fakes import FakeClock, FakeTokenStore

INFER = frozenset({Scope.INFER})
LONG = 3600.0


class Setup:
    """An authenticator on a fake store, and one token in force."""

    def __init__(self, directory: Path) -> None:
        self.clock = FakeClock()
        self.file = directory / "cache" / "tokens.json"
        self.text, self.record = new_token("billing", INFER, self.clock.now(), None)
        self.store = FakeTokenStore([self.record])
        self.authenticator = self.again()

    def again(self) -> CachedAuthenticator:
        """As after a restart."""
        return CachedAuthenticator(self.store, self.file, LONG, now=self.clock.now)

    def add(self, expires_at: datetime | None = None) -> tuple[str, TokenRecord]:
        text, record = new_token("other", INFER, self.clock.now(), expires_at)
        self.store.tokens[record.key_id] = record
        return text, record


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    made = Setup(tmp_path)
    await made.authenticator.start()
    yield made
    await made.authenticator.close()


@pytest.fixture(autouse=True)
def read_whenever_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "SOONEST_SECONDS", 0.0)


async def test_a_token_in_force_speaks_for_its_caller(setup: Setup) -> None:
    caller = await setup.authenticator.authenticate(setup.text)
    assert (caller.key_id, caller.name, caller.scopes) == (setup.record.key_id, "billing", INFER)


def test_a_token_has_the_promised_form_and_only_its_hash_is_stored() -> None:
    text, record = new_token("billing", INFER, FakeClock().now(), None)
    kind, key_id, secret = text.split("_", 2)
    assert (kind, len(key_id), len(secret)) == ("al", 12, 43)
    assert secret not in repr(record)
    assert len(record.secret_sha256) == 32


async def test_every_wrong_token_gets_the_same_answer(setup: Setup) -> None:
    expired, _ = setup.add(setup.clock.now() - timedelta(seconds=1))
    revoked, record = setup.add()
    setup.store.tokens[record.key_id] = replace(record, revoked_at=setup.clock.now())
    head, secret = setup.text[:16], setup.text[16:]
    wrong = ["", "al_", setup.text[:-1], setup.text + "x", "xx" + setup.text[2:], setup.text.upper()]
    wrong += [head + "A" * 43, "al_aaaaaaaaaaaa_" + secret, expired, revoked, setup.text + "\n", "al_é_é"]
    answers = set()
    for token in wrong:
        with pytest.raises(Unauthenticated) as refused:
            await setup.authenticator.authenticate(token)
        answers.add(str(refused.value))
    assert len(answers) == 1


async def test_a_token_made_just_now_is_known_at_once(setup: Setup) -> None:
    text, _ = setup.add()
    assert (await setup.authenticator.authenticate(text)).name == "other"


async def test_all_who_come_at_once_with_a_new_token_are_let_in(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "SOONEST_SECONDS", 0.02)
    text, _ = setup.add()
    callers = await asyncio.gather(*(setup.authenticator.authenticate(text) for _ in range(20)))
    assert {caller.name for caller in callers} == {"other"}


async def test_strangers_cannot_make_the_server_read_all_the_time(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "SOONEST_SECONDS", 0.02)
    reads = setup.store.reads
    stranger = "al_aaaaaaaaaaaa_" + "A" * 43
    answers = await asyncio.gather(
        *(setup.authenticator.authenticate(stranger) for _ in range(100)), return_exceptions=True
    )
    assert {type(answer) for answer in answers} == {Unauthenticated}
    assert setup.store.reads <= reads + 2


async def test_strangers_share_the_next_read_while_the_database_hangs(setup: Setup) -> None:
    reads = setup.store.reads
    setup.store.hold = asyncio.Event()
    strangers = []
    for _ in range(20):
        stranger = setup.authenticator.authenticate("al_aaaaaaaaaaaa_" + "A" * 43)
        strangers.append(asyncio.create_task(stranger))
        await asyncio.sleep(0.001)
    setup.store.hold.set()
    answers = await asyncio.gather(*strangers, return_exceptions=True)
    assert {type(answer) for answer in answers} == {Unauthenticated}
    assert setup.store.reads == reads + 2  # the one that hung, and one for all who came meanwhile


async def test_an_expiry_acts_at_once(setup: Setup) -> None:
    text, _ = setup.add(setup.clock.now() + timedelta(seconds=10))
    assert await setup.authenticator.authenticate(text)
    setup.store.down = True
    setup.clock.advance(10)
    with pytest.raises(Unauthenticated):
        await setup.authenticator.authenticate(text)


async def test_a_revocation_acts_with_the_next_read(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    authenticator = CachedAuthenticator(setup.store, setup.file, 0.001, now=setup.clock.now)
    await authenticator.start()
    assert await authenticator.authenticate(setup.text)
    await setup.store.revoke(setup.record.key_id, setup.clock.now())
    reads = setup.store.reads
    while setup.store.reads < reads + 2:
        await asyncio.sleep(0.001)
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(setup.text)
    await authenticator.close()


async def test_an_outage_leaves_the_last_known_tokens_in_force(setup: Setup) -> None:
    setup.store.down = True
    assert await setup.authenticator.authenticate(setup.text)


async def test_a_restart_during_an_outage_knows_the_tokens(setup: Setup) -> None:
    setup.store.down = True
    again = setup.again()
    await again.start()
    assert (await again.authenticate(setup.text)).scopes == INFER
    await again.close()


async def test_a_revocation_outlives_a_restart_during_an_outage(setup: Setup) -> None:
    await setup.store.revoke(setup.record.key_id, setup.clock.now())
    with pytest.raises(Unauthenticated):
        await setup.authenticator.authenticate("al_aaaaaaaaaaaa_" + "A" * 43)  # makes it read
    setup.store.down = True
    again = setup.again()
    await again.start()
    with pytest.raises(Unauthenticated):
        await again.authenticate(setup.text)
    await again.close()


async def test_the_cache_file_holds_no_secret_and_is_for_its_owner_only(setup: Setup) -> None:
    content = setup.file.read_text()
    assert setup.text.split("_", 2)[2] not in content
    assert json.loads(content)[0]["key_id"] == setup.record.key_id
    assert stat.S_IMODE(setup.file.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"key_id": "x"}]', '{"a": 1}'])
async def test_an_unreadable_cache_file_lets_nobody_in_and_does_not_stop_the_start(
    tmp_path: Path, content: str
) -> None:
    setup = Setup(tmp_path)
    setup.file.parent.mkdir()
    setup.file.write_text(content)
    setup.store.down = True
    await setup.authenticator.start()
    with pytest.raises(Unauthenticated):
        await setup.authenticator.authenticate(setup.text)
    await setup.authenticator.close()


async def test_a_cache_file_that_cannot_be_written_does_not_stop_the_server(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.file.parent.write_text("a file where the folder should be")
    await setup.authenticator.start()
    assert await setup.authenticator.authenticate(setup.text)
    await setup.authenticator.close()


async def test_without_database_and_file_nobody_is_let_in(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.store.down = True
    await setup.authenticator.start()
    with pytest.raises(Unauthenticated):
        await setup.authenticator.authenticate(setup.text)
    setup.store.down = False
    assert await setup.authenticator.authenticate(setup.text)
    await setup.authenticator.close()
