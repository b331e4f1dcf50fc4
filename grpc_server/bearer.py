"""The token that a caller shows, in gRPC's metadata and in HTTP's headers alike."""

from __future__ import annotations

from collections.abc import Sequence

KEY = "authorization"


def token_in(values: Sequence[str | bytes]) -> str:
    """The token in the one `Bearer …` of these values; empty where there is none, another one, or several."""
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    scheme, _, token = values[0].partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
