"""Measurements of the service beside a named peer, or a physical limit, taken in the same run."""
