#!/usr/bin/env bash
# Prints the path of a uv, installing one beside the user's caches where there is none: a fresh Debian has only python3.
set -euo pipefail
version=0.13.9
oldest=0.9.0 # reads extra-build-variables and dependency-metadata as pyproject.toml uses them

if found="$(command -v uv)" && [[ "$(printf '%s\n' "$oldest" "$(uv --version | cut -d' ' -f2)" | sort -V | head -1)" == "$oldest" ]]; then
  echo "$found"
  exit
fi
home="${XDG_CACHE_HOME:-$HOME/.cache}/agentloop/uv-$version"
if [[ ! -x "$home/bin/uv" ]]; then
  echo "installing uv $version into $home" >&2
  if ! python3 -m venv "$home" >&2; then
    "$(dirname "$0")/debian.sh" python3-venv
    python3 -m venv --clear "$home" >&2
  fi
  "$home/bin/pip" install --quiet --disable-pip-version-check "uv==$version" >&2
fi
echo "$home/bin/uv"
