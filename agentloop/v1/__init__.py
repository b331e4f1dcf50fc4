"""Generated from protos/agentloop/v1 by `make proto`."""
