#!/usr/bin/env bash
# Generates agentloop/v1 from protos/. With --check: fails if what is committed is not what would be generated.
set -euo pipefail
cd "$(dirname "$0")/.."
out=.
[[ "${1:-}" == --check ]] && out="$(mktemp -d)" && trap 'rm -rf "$out"' EXIT
PATH="$PWD/.venv/bin:$PATH" python -m grpc_tools.protoc -Iprotos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" protos/agentloop/v1/*.proto
if [[ "$out" != . ]]; then
  diff -r --exclude=__init__.py --exclude=__pycache__ "$out/agentloop/v1" agentloop/v1 ||
    { echo "agentloop/v1 is not what protos/ generates: run 'make proto' and commit" >&2; exit 1; }
fi
