"""The agent-loop server: gRPC and HTTP over one inference pipeline."""
