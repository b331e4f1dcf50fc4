#!/usr/bin/python
"""Ansible module: whether a host may be given a certificate."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

DOCUMENTATION = r"""
---
module: certificate_check
short_description: Look at a certificate before a host gets it
description:
  - Fails for a certificate that has ended or soon will, that is not of I(key), that does not name both
    I(name) and I(address), or that the authority has not signed. Nothing is changed.
    It needs Python's cryptography, which ansible-core brings, so it is delegated to where Ansible runs.
version_added: "0.1.0"
options:
  certificate:
    description: PEM, the host's certificate, then those between it and the authority.
    type: str
    required: true
  key:
    description: PEM, its key, not encrypted.
    type: str
    required: true
  ca:
    description: PEM, the authorities that others trust.
    type: str
    required: true
  name:
    description: By which the host is called.
    type: str
    required: true
  address:
    description: By which it is reached; empty if that is its name.
    type: str
    default: ""
  days:
    description: So many days must be left.
    type: float
    default: 1
attributes:
  check_mode:
    support: full
    description: The same.
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: Look at its certificate
  certificate_check:
    certificate: "{{ tls_certificate }}"
    key: "{{ tls_key }}"
    ca: "{{ tls_ca }}"
    name: "{{ inventory_hostname }}"
  delegate_to: localhost
"""

RETURN = r"""
ends:
  description: When the certificate ends.
  returned: success
  type: str
"""


def fault(
    chain: list[x509.Certificate],
    key: Any,
    authorities: list[x509.Certificate],
    names: list[str],
    until: datetime,
) -> str:
    """Why the first certificate of the chain may not be given to a host; empty if it may.

    Args:
        chain: the host's certificate, then those between it and an authority.
        key: the private key that it should be of.
        authorities: those that others trust.
        names: what it must name, each: host names, addresses.
        until: when it must be good still.
    """
    leaf = chain[0]
    if leaf.not_valid_after_utc < until:
        return f"it ends on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: have a new one signed"
    if leaf.not_valid_before_utc > datetime.now(UTC):
        return f"it begins on {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only"
    if _public(leaf.public_key()) != _public(key.public_key()):
        return "it is not of the key tls_key: both come from one request to the authority"
    missing = [name for name in names if name not in _names(leaf)]
    if missing:
        return f"it names {', '.join(sorted(_names(leaf))) or 'nobody'}, and not {', '.join(missing)}"
    for one, issuer in pairwise(chain):
        if not _signed(one, issuer):
            return "the certificates after it do not lead from it to an authority"
    if not any(_signed(chain[-1], authority) for authority in authorities):
        return "no authority in tls_ca has signed it"
    return ""


def _public(key: Any) -> bytes:
    found: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return found


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    hosts = named.get_values_for_type(x509.DNSName)
    return {*hosts, *(str(address) for address in named.get_values_for_type(x509.IPAddress))}


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True


def _address(text: str) -> str:
    """As certificates have it; empty for a name."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return ""


def main() -> None:
    """What Ansible runs."""
    module = AnsibleModule(
        argument_spec={
            "certificate": {"type": "str", "required": True},
            "key": {"type": "str", "required": True, "no_log": True},
            "ca": {"type": "str", "required": True},
            "name": {"type": "str", "required": True},
            "address": {"type": "str", "default": ""},
            "days": {"type": "float", "default": 1.0},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        chain = x509.load_pem_x509_certificates(given["certificate"].encode())
        authorities = x509.load_pem_x509_certificates(given["ca"].encode())
        key = load_pem_private_key(given["key"].encode(), None)
    except (TypeError, ValueError) as error:
        kind = "not PEM, or its key is encrypted" if isinstance(error, TypeError) else "not PEM"
        module.fail_json(msg=f"the certificate, key or authority of {given['name']} is {kind}")
        return
    names = [given["name"], *filter(None, [_address(given["address"])])]
    why = fault(chain, key, authorities, names, datetime.now(UTC) + timedelta(days=given["days"]))
    if why:
        module.fail_json(msg=f"the certificate of {given['name']} is not given to it: {why}")
        return
    module.exit_json(changed=False, ends=chain[0].not_valid_after_utc.isoformat())


if __name__ == "__main__":
    main()
