"""Freeze the log into a snapshot, and check it with Great Expectations."""
