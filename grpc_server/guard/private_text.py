"""Finds secrets and personal data in a text: where each is, and of what kind.

Secrets are found by the patterns of detect-secrets (each a format that a vendor documents), but for three
whose time grows with the square of a text's length: they are written anew here. Of personal data those kinds
are found that a check confirms: telephone numbers by phonenumbers, cards and accounts by their check digits
(python-stdnum), addresses by `ipaddress`. Names, places and dates are not: patterns cannot tell them.

Python's `re` has no bound of time: who scans what a caller sent does so where it can be ended
(`adapters/redaction_child`), or under a limit of processor time (`validation`).
"""

from __future__ import annotations

import importlib
import ipaddress
import pkgutil
import re
from collections.abc import Callable, Iterator

Span = tuple[int, int, str]

# Each begins and ends where no letter or digit goes on, and no repetition has a choice: linear in time.
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){11,18}(?![\w-])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{1,4}){3,8}(?![A-Za-z0-9])")
_PHONE = re.compile(r"(?<![\w+])\+\d(?:[\s().-]{0,2}\d){6,14}(?!\d)")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:.])")
_OWN_SECRETS: tuple[tuple[str, str], ...] = (
    # From its first line to its last, or to where it was cut off; \\n where it stands inside of JSON.
    (
        "PRIVATE_KEY",
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
        r"[A-Za-z0-9+/=\s:,.\\]{0,16384}(?:-----END [A-Z0-9 ]{0,40}-----)?",
    ),
    ("AGENT_LOOP_TOKEN", r"al_[a-z0-9]{12}_[A-Za-z0-9_-]{43}"),
    ("JSON_WEB_TOKEN", r"(?<![\w-])eyJ[\w-]{4,}\.[\w-]{4,}(?:\.[\w-]*)?"),
    ("NPM_TOKENS", r"(?<![\w-])npm_[A-Za-z0-9]{36}"),
    ("OPENAI_TOKEN", r"(?<![\w-])sk-[\w-]{20,}"),  # and others that begin so
)
_NOT_USED = frozenset(
    ("PrivateKeyDetector", "JwtTokenDetector", "NpmDetector", "OpenAIDetector", "IPPublicDetector")
)
"""Three of square time; keys of which only the first line was found; addresses, which are personal data."""
_LONG_CHARACTERS = 13
_LONG = re.compile(rf"[\w/+=.~-]{{{_LONG_CHARACTERS},}}")
"""What every secret has somewhere, unless one of these marks tells of it."""
_PART = r"(?:[A-Z]?[a-z_]*\d{0,4}|\d+)"
_WORDS = re.compile(rf"{_PART}(?:[/+=.~-]{_PART})*")
"""Words, names and numbers are long, too. A secret is random: of 20 letters and digits, less than one in a
million has small letters first, and then digits, between its signs."""
_REPLACED = re.compile("<[A-Z_]+(?::[0-9a-f]{12})?>")
"""What stands where redaction has taken something out."""
_MARKS = ("://", "xox", "PRIVATE KEY")


def _card(text: str) -> bool:
    from stdnum import luhn

    digits = re.sub(r"[ -]", "", text)
    # Numbers of cards begin with 2 to 6 (ISO/IEC 7812); those of one digit only pass the check, too.
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and len(set(digits)) > 1 and luhn.is_valid(digits)


def _iban(text: str) -> bool:
    from stdnum import iban

    return bool(iban.is_valid(text))


def _phone(text: str) -> bool:
    import phonenumbers

    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(text, None)))
    except phonenumbers.NumberParseException:
        return False


def _address(text: str) -> bool:
    """Whether it names somebody's machine: loopback, private and example addresses do not."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _always(text: str) -> bool:
    del text
    return True


# Kind, a mark without which a text has none, pattern, check.
_PERSONAL: tuple[tuple[str, str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("EMAIL", "@", _EMAIL, _always),
    ("CARD", "", _CARD, _card),
    ("IBAN", "", _IBAN, _iban),
    ("PHONE", "+", _PHONE, _phone),
    ("SSN", "-", _SSN, _always),
    ("IP", ".", _IPV4, _address),
    ("IP", ":", _IPV6, _address),
)


def secret_patterns() -> list[tuple[str, re.Pattern[str]]]:
    """The patterns of every detector of detect-secrets that has some, with a name for what it finds."""
    import detect_secrets.plugins
    from detect_secrets.plugins.base import RegexBasedDetector

    for module in pkgutil.iter_modules(detect_secrets.plugins.__path__):
        importlib.import_module(f"detect_secrets.plugins.{module.name}")
    found = [(kind, re.compile(pattern)) for kind, pattern in _OWN_SECRETS]
    for detector in sorted(RegexBasedDetector.__subclasses__(), key=lambda one: one.__name__):
        if detector.__name__ in _NOT_USED:
            continue
        kind = re.sub(r"[^A-Z0-9]+", "_", str(detector.secret_type).upper()).strip("_")
        found += [(kind, pattern) for pattern in detector.denylist]  # type: ignore[attr-defined]
    return found


class Finder:
    """Finds in a text what must not be kept."""

    def __init__(self) -> None:
        self._secrets = secret_patterns()

    def find(self, text: str) -> list[Span]:
        """What was found, in order and apart: of two that overlap, the union, under the first one's name."""
        spans = sorted([*self.secrets(text), *_personal_spans(text)], key=lambda one: (one[0], -one[1]))
        apart: list[Span] = []
        for start, end, kind in spans:
            if apart and start < apart[-1][1]:
                before = apart[-1]
                apart[-1] = (before[0], max(before[1], end), before[2])
            else:
                apart.append((start, end, kind))
        return apart

    def secrets(self, text: str) -> Iterator[Span]:
        """The secrets alone; two of them may overlap."""
        if not any(mark in text for mark in _MARKS) and not _may_hold_secret(text):
            return
        for kind, pattern in self._secrets:
            for found in pattern.finditer(text):
                # Groups mark the secret in its context, unless they are only the first letters of a token.
                spans = [found.span(group) for group in range(1, pattern.groups + 1)]
                widest = max(spans, key=_width, default=(0, 0))
                start, end = widest if _width(widest) > 0.3 * _width(found.span()) else found.span()
                if not _REPLACED.fullmatch(text, start, end):
                    yield start, end, kind


def _may_hold_secret(text: str) -> bool:
    for piece in text.split():
        if len(piece) >= _LONG_CHARACTERS:
            for run in _LONG.findall(piece):
                if _WORDS.fullmatch(run) is None:
                    return True
    return False


def _width(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _personal_spans(text: str) -> Iterator[Span]:
    for kind, mark, pattern, confirmed in _PERSONAL:
        if mark not in text:
            continue
        for found in pattern.finditer(text):
            if confirmed(found[0]):
                yield found.start(), found.end(), kind
