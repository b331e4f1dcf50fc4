"""gRPC's side of every call: metadata to caller, errors to status."""
