"""No host is given a certificate that would lock its callers out."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.ansible_modules import certificate_check
from tests.certificates import Authority
from tests.module_run import run_module

COMPANY = Authority("the company")
PAIR = COMPANY.sign("server1", address="192.0.2.21")


def checked(**changes: str | float) -> dict[str, Any]:
    options = {
        "certificate": PAIR.certificate.decode(),
        "key": PAIR.key.decode(),
        "ca": COMPANY.pem.decode(),
        "name": "server1",
        "address": "192.0.2.21",
    }
    return run_module(certificate_check, {**options, **changes}, check=True)


def test_a_good_certificate_is_taken_and_its_end_is_told() -> None:
    told = checked()
    assert not told.get("failed")
    assert not told["changed"]
    assert "T" in told["ends"]
    assert not checked(ca=(Authority("another").pem + COMPANY.pem).decode()).get("failed")
    assert not checked(address="server1").get("failed"), "a name is no address"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"days": 91}, "it ends on"),
        ({"key": COMPANY.sign("server1").key.decode()}, "it is not of the key"),
        ({"name": "server2"}, "it names 127.0.0.1, 192.0.2.21, localhost, server1, and not server2"),
        ({"address": "192.0.2.99"}, "and not 192.0.2.99"),
        ({"ca": Authority("another").pem.decode()}, "no authority in tls_ca has signed it"),
        ({"certificate": (PAIR.certificate + Authority("another").pem).decode()}, "do not lead from it"),
        ({"certificate": COMPANY.pem.decode(), "key": PAIR.key.decode()}, "it is not of the key"),
        ({"certificate": "nothing\0"}, "is not PEM"),
        ({"key": COMPANY.sign("server1", password=b"x").key.decode()}, "its key is encrypted"),
        ({"ca": ""}, "is not PEM"),
    ],
)
def test_what_would_lock_callers_out_is_refused_with_the_reason(changes: Any, said: str) -> None:
    told = checked(**changes)
    assert told["failed"]
    assert said in told["msg"]
    assert "server" in told["msg"]


def test_one_that_has_ended_or_has_no_names_is_refused() -> None:
    ended = COMPANY.sign("server1", lasts=timedelta(seconds=-5), address="192.0.2.21")
    told = checked(certificate=ended.certificate.decode(), key=ended.key.decode())
    assert "it ends on" in told["msg"]
    assert certificate_check._names(certificate_check.x509.load_pem_x509_certificate(COMPANY.pem)) == set()
