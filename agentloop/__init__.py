"""Typed client and command line of the agent-loop service."""
