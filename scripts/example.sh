#!/usr/bin/env bash
# Sets an example up where that is not done yet, and runs it: scripts/example.sh go|typescript [ARGUMENTS...]
#
# What is generated, installed and compiled stays in the example's folder; nothing of it is committed. A token is read
# from AGENTLOOP_TOKEN.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
name=${1:-}
if [[ $name != go && $name != typescript ]]; then
  echo "there is no example '$name'; there are go and typescript" >&2
  exit 2
fi
shift
cd "$root/examples/$name"
protos=$root/protos/agentloop/v1

# stale STAMP FILES...: whether STAMP is older than one of the files, or is not there.
stale() {
  local stamp=$1 file
  shift
  for file in "$@"; do
    [[ ! -e $stamp || $file -nt $stamp ]] && return 0
  done
  return 1
}

case $name in
  go)
    go=$("$root/scripts/go.sh")
    export GOFLAGS=-p=2 GOTOOLCHAIN=local PATH="$(dirname "$go"):$root/.venv/bin:$PATH"
    exec 9>.lock
    flock 9
    if stale gen/stamp go.mod buf.gen.yaml "$protos"/*.proto; then
      buf generate "$root/protos" >&2
      touch gen/stamp
    fi
    flock --unlock 9
    exec go run . "$@"
    ;;
  typescript)
    bin=$("$root/scripts/node.sh")
    export PATH="$bin:$PATH"
    exec 9>.lock
    flock 9
    if stale node_modules/.package-lock.json package-lock.json; then
      npm ci --silent --no-audit --no-fund --prefer-offline >&2
      touch node_modules/.package-lock.json
    fi
    if stale dist/main.js package.json tsconfig.json main.ts "$protos"/*.proto; then
      npm run --silent build >&2
    fi
    flock --unlock 9
    exec node dist/main.js "$@"
    ;;
esac
