#!/usr/bin/env bash
# Fails if protos/ breaks callers that were generated from the landed main: origin/main, or main without a remote.
# AGAINST names another commit.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'buf breaking: %s\n' "$*" >&2; }
has_protos() { git cat-file -e "$1:protos" 2>/dev/null; }

against=${AGAINST:-}
if [[ -z "$against" ]]; then
  for ref in origin/main main; do
    if has_protos "$ref"; then
      against=$ref
      break
    fi
  done
  [[ -n "$against" ]] || { say "there is nothing to compare with: no origin/main and no main with protos"; exit 0; }
fi
has_protos "$against" || { say "$against is no commit with protos"; exit 1; }

landed=$(mktemp -d)
trap 'rm -rf "$landed"' EXIT
git archive "$against" protos | tar -x -C "$landed"
PATH="$PWD/.venv/bin:$PATH" buf breaking protos --against "$landed/protos" ||
  { say "protos breaks callers of $against; see protos/buf.yaml for what may change" ; exit 1; }
