"""JWTs: whom they let in, whom they do not, and that all who are not learn the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.adapters.credentials import AnyCredential
from grpc_server.adapters.jwks import Jwks
from grpc_server.adapters.jwt_tokens import JwtAuthenticator, JwtRules, key_id_of
from grpc_server.domain.errors import Unauthenticated
from grpc_server.domain.types import Caller, Limits, Scope
from tests.fakes import FakeAuthenticator, FakeClock
from tests.jwts import (
    AUDIENCE,
    ISSUER,
    by_hand,
    claims,
    confused,
    key_set,
    private_key,
    signed_by_hand,
    token,
    unsigned,
)

RULES = JwtRules(ISSUER, AUDIENCE, leeway_seconds=30, max_bytes=4096)
HEADER = {"alg": "ES256", "kid": "ES256"}
KINDS = ("RS256", "ES256", "EdDSA")


async def published() -> bytes:
    return key_set(*KINDS)


def authenticator(rules: JwtRules = RULES, clock: FakeClock | None = None) -> JwtAuthenticator:
    clock = clock or FakeClock()
    keys = Jwks(
        published, refresh_seconds=3600, retry_seconds=10, max_age_seconds=3600, monotonic=clock.monotonic
    )
    return JwtAuthenticator(keys, rules, monotonic=clock.monotonic)


async def let_in(text: str, **changes: Any) -> Caller:
    return await authenticator(replace(RULES, **changes)).authenticate(text)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_token_of_the_issuer_speaks_for_its_subject(kind: str) -> None:
    caller = await let_in(token(kind))
    assert (caller.name, caller.scopes) == ("billing", frozenset({Scope.INFER, Scope.FEEDBACK}))
    assert caller.key_id == key_id_of(ISSUER, "billing")


async def test_the_key_id_is_that_of_issuer_and_subject_and_of_nothing_else() -> None:
    first = await let_in(token(scope="infer"))
    again = await let_in(token("RS256", exp=int(time.time()) + 9, scope="feedback"))
    other = await let_in(token(sub="billing2"))
    assert first.key_id == again.key_id != other.key_id
    assert key_id_of("a", "b") != key_id_of("a\0b", "")
    assert len(first.key_id) == 28


NOW = int(time.time())
RIGHT: dict[str, Callable[[], str]] = {
    "audience in a list": lambda: token(aud=["other", AUDIENCE]),
    "no nbf, no iat": lambda: token(nbf=None, iat=None),
    "expired within the leeway": lambda: token(exp=int(time.time()) - 10),
    "not yet valid within the leeway": lambda: token(nbf=int(time.time()) + 20),
    "typ of access tokens": lambda: token(headers={"typ": "at+JWT"}),
    "no typ": lambda: signed_by_hand(HEADER, claims()),
    "headers that nobody asked for": lambda: token(headers={"jku": "https://evil.test/keys", "x": 1}),
    "times with fractions": lambda: token(exp=time.time() + 60.5),
}


@pytest.mark.parametrize("name", sorted(RIGHT))
async def test_what_is_right_is_taken(name: str) -> None:
    assert (await let_in(RIGHT[name]())).name == "billing"


def tampered() -> str:
    head, _, signature = token().split(".")
    return f"{head}.{by_hand({}, claims(scope='admin')).split('.')[1]}.{signature}"


WRONG: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "one part": lambda: "abc",
    "two parts": lambda: "a.b",
    "four parts": lambda: token() + ".x",
    "no JSON": lambda: "AAAA.AAAA.AAAA",
    "a list": lambda: by_hand("[]", claims()),
    "not base64": lambda: "!!!!.AAAA.AAAA",
    "not ASCII": lambda: token() + "é",
    "NUL": lambda: token() + "\0",
    "a line end": lambda: token() + "\n",
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "a changed payload": tampered,
    "a key of somebody else": lambda: jwt.encode(
        claims(), private_key("ES256/other"), algorithm="ES256", headers={"kid": "ES256"}
    ),
    "alg none": unsigned,
    "alg None": lambda: by_hand({"alg": "None", "kid": "ES256"}, claims()),
    "HS256 with the public key": confused,
    "HS256 with the public key of ES256": lambda: confused("ES256"),
    "HS256 with an empty secret": lambda: by_hand({"alg": "HS256", "kid": "RS256"}, claims()),
    "RS256 on a key of ES256": lambda: token("RS256", headers={"kid": "ES256"}),
    "PS256 on a key of RS256": lambda: jwt.encode(
        claims(), private_key("RS256"), algorithm="PS256", headers={"kid": "RS256"}
    ),
    "alg is a list": lambda: signed_by_hand({"alg": ["ES256"], "kid": "ES256"}, claims()),
    "no alg": lambda: signed_by_hand({"kid": "ES256"}, claims()),
    "no kid": lambda: signed_by_hand({"alg": "ES256"}, claims()),
    "kid is a number": lambda: signed_by_hand({"alg": "ES256", "kid": 1}, claims()),
    "kid twice": lambda: signed_by_hand('{"alg":"ES256","kid":"RS256","kid":"ES256"}', claims()),
    "unknown kid": lambda: token(headers={"kid": "nobody"}),
    "a kid that is a path": lambda: token(headers={"kid": "../../dev/null"}),
    "crit": lambda: signed_by_hand({**HEADER, "crit": ["exp"]}, claims()),
    "crit of what it has": lambda: signed_by_hand({**HEADER, "crit": ["b64"], "b64": True}, claims()),
    "crit is empty": lambda: signed_by_hand({**HEADER, "crit": []}, claims()),
    "b64": lambda: signed_by_hand({**HEADER, "b64": False}, claims()),
    "another kind of token": lambda: token(headers={"typ": "logout+jwt"}),
    "typ is a number": lambda: signed_by_hand({**HEADER, "typ": 1}, claims()),
    "a key in the header": lambda: jwt.encode(
        claims(), private_key("ES256/other"), algorithm="ES256", headers={"kid": "x", "jwk": {"kty": "EC"}}
    ),
    "another issuer": lambda: token(iss="https://evil.test"),
    "issuer with a slash": lambda: token(iss=ISSUER + "/"),
    "issuer is a list": lambda: signed_by_hand(HEADER, claims(iss=[ISSUER])),
    "no issuer": lambda: token(iss=None),
    "another audience": lambda: token(aud="other"),
    "no audience": lambda: token(aud=None),
    "audience is empty": lambda: token(aud=[]),
    "audience is a number": lambda: token(aud=7),
    "expired": lambda: token(exp=int(time.time()) - 60),
    "no exp": lambda: token(exp=None),
    "exp is text": lambda: token(exp="soon"),
    "exp without end": lambda: signed_by_hand(
        HEADER, json.dumps(claims()).replace('"exp": ', '"exp": 1e999, "x": ')
    ),
    "not yet valid": lambda: token(nbf=int(time.time()) + 120),
    "made in the future": lambda: token(iat=int(time.time()) + 120),
    "no subject": lambda: token(sub=None),
    "an empty subject": lambda: token(sub=""),
    "subject is a number": lambda: signed_by_hand(HEADER, claims(sub=7)),
    "subject with NUL": lambda: token(sub="a\0b"),
    "a long subject": lambda: token(sub="x" * 1001),
    "too long": lambda: token(padding="x" * 4096),
    "payload is a list": lambda: signed_by_hand(HEADER, "[]"),
    "payload without end": lambda: signed_by_hand(HEADER, "[" * 2000),
}


@pytest.mark.parametrize("name", sorted(WRONG))
async def test_what_is_wrong_is_refused_with_the_text_of_api_tokens(name: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        await let_in(WRONG[name]())
    assert str(refused.value) == str(Unauthenticated())
    assert refused.value.__cause__ is None


async def test_why_is_in_the_servers_log_once_a_minute_and_without_the_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    asked = authenticator(clock=clock)
    text = token(exp=1, sub="secret-subject")
    for _ in range(100):
        with pytest.raises(Unauthenticated):
            await asked.authenticate(text)
    refusals = [record for record in caplog.records if record.getMessage() == "a JWT was refused"]
    assert [vars(record)["reason"] for record in refusals] == ["ExpiredSignatureError"]
    assert "secret-subject" not in str([vars(record) for record in caplog.records])
    clock.advance(60)
    with pytest.raises(Unauthenticated):
        await asked.authenticate(text)
    assert len([r for r in caplog.records if r.getMessage() == "a JWT was refused"]) == 2


@pytest.mark.parametrize(
    ("claim", "prefix", "given", "scopes"),
    [
        ("scope", "", {"scope": "infer admin"}, {Scope.INFER, Scope.ADMIN}),
        ("scope", "", {"scope": ["infer", "models:read", 7, None]}, {Scope.INFER, Scope.MODELS_READ}),
        ("scope", "", {"scope": "infer,admin"}, set()),
        ("scope", "", {"scope": "INFER"}, set()),
        ("scope", "", {"scope": {"infer": True}}, set()),
        ("scope", "", {"scope": None}, set()),
        ("scp", "", {"scope": "admin", "scp": ["infer"]}, {Scope.INFER}),
        ("scope", "agentloop:", {"scope": "admin agentloop:infer"}, {Scope.INFER}),
        ("realm_access.roles", "", {"realm_access": {"roles": ["infer"]}}, {Scope.INFER}),
        ("https://x.test/roles", "", {"https://x.test/roles": ["infer"]}, {Scope.INFER}),
        ("realm_access.roles", "", {"realm_access": ["roles"]}, set()),
    ],
)
async def test_scopes_come_from_the_claim_that_is_set(
    claim: str, prefix: str, given: dict[str, Any], scopes: set[Scope]
) -> None:
    caller = await let_in(token(**given), scopes_claim=claim, scope_prefix=prefix)
    assert caller.scopes == scopes


async def test_the_name_comes_from_the_claim_that_is_set_and_must_be_one() -> None:
    assert (await let_in(token(email="a@x.test"), name_claim="email")).name == "a@x.test"
    for bad in (None, "", "a\nb", "x" * 101, 7, ["x"]):
        with pytest.raises(Unauthenticated):
            await let_in(token(email=bad), name_claim="email")


@pytest.mark.parametrize(
    ("claims", "learning", "text"),
    [
        ({}, True, True),
        ({"agentloop_learning": False}, False, True),
        ({"agentloop_text": False}, False, False),
        ({"agentloop_learning": True, "agentloop_text": True}, True, True),
    ],
)
async def test_a_token_may_keep_its_caller_out_of_the_nights_and_of_the_log(
    claims: dict[str, Any], learning: bool, text: bool
) -> None:
    caller = await let_in(token(**claims))
    assert (caller.learning, caller.text) == (learning, text)


@pytest.mark.parametrize("wrong", [0, "false", []])
async def test_what_neither_allows_nor_forbids_is_refused(wrong: Any) -> None:
    for claim in ("agentloop_learning", "agentloop_text"):
        with pytest.raises(Unauthenticated):
            await let_in(token(**{claim: wrong}))


async def test_limits_come_from_the_token_and_for_the_rest_from_the_settings() -> None:
    default = Limits(requests_per_minute=10, aliases=frozenset({"default"}))
    assert (await let_in(token(), limits=default)).limits == default
    own = {"requests_per_minute": 99, "concurrent_streams": 2}
    caller = await let_in(token(agentloop_limits=own), limits=default)
    assert caller.limits == Limits(99, None, 2, frozenset({"default"}))
    nested = await let_in(token(x={"y": {"aliases": None}}), limits=default, limits_claim="x.y")
    assert nested.limits == Limits(10)
    wrongs: tuple[Any, ...] = ({"requests": 5}, {"requests_per_minute": "many"}, [], "none", 7)
    for wrong in wrongs:
        with pytest.raises(Unauthenticated):
            await let_in(token(agentloop_limits=wrong))


@given(text=st.text() | st.text(alphabet="abcABC019-_.=", max_size=60))
async def test_no_text_whatever_gets_in_or_breaks_it(text: str) -> None:
    with pytest.raises(Unauthenticated):
        await let_in(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    changes=st.dictionaries(
        st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "scope", "jti"]), json_values
    )
)
async def test_signed_nonsense_gets_in_or_is_refused_and_breaks_nothing(changes: dict[str, Any]) -> None:
    payload = json.dumps({**claims(), **changes})
    try:
        caller = await let_in(signed_by_hand(HEADER, payload))
    except Unauthenticated:
        return
    assert 1 <= len(caller.name) <= 100


async def test_the_first_letters_tell_who_is_asked() -> None:
    tokens = FakeAuthenticator({"al_x": Caller("k", "n", frozenset())})
    jwts = FakeAuthenticator({"e.y.J": Caller("j", "m", frozenset())})
    both = AnyCredential(tokens, jwts)
    assert (await both.authenticate("al_x")).key_id == "k"
    assert (await both.authenticate("e.y.J")).key_id == "j"
    with pytest.raises(Unauthenticated):
        await both.authenticate("al_e.y.J")
    assert (tokens.asked, jwts.asked) == (["al_x", "al_e.y.J"], ["e.y.J"])


async def test_the_keys_are_read_at_the_start_and_no_more_after_the_end() -> None:
    asked = authenticator()
    await asked.start()
    assert (await asked.authenticate(token())).name == "billing"
    await asked.close()
