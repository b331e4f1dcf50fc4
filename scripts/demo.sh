#!/usr/bin/env bash
# The whole loop, once, on this machine. First only what serving needs, so that the first answer comes soon;
# the conductor installs the rest (training, validation, Airflow, Ansible, llama.cpp's tools) while traffic plays:
# beside the service, not under it. What an installation changes, a running service may be about to import.
set -euo pipefail
cd "$(dirname "$0")/.."
export AGENTLOOP_ENGINE="${1:-embedded}"
AGENTLOOP_DEMO_STARTED="$(date +%s)" # the first answer is timed from here
export AGENTLOOP_DEMO_STARTED

scripts/debian.sh libgomp1 # which the prebuilt llama.cpp needs, and a bare Debian lacks
UV_PROJECT_ENVIRONMENT=.venv-serving "$(scripts/uv.sh)" sync --frozen --extra demo
if [[ "$AGENTLOOP_ENGINE" == ollama ]]; then
  # The first time, Ollama and the llama.cpp that it starts are built: about 8 minutes on 2 cores.
  scripts/debian.sh build-essential cmake git
  AGENTLOOP_OLLAMA_BIN="$(scripts/ollama.sh | tail -1)"
  export AGENTLOOP_OLLAMA_BIN
fi
export AGENTLOOP_DEMO_INSTALL="make install prepare"
export AGENTLOOP_DEMO_NIGHT_PYTHON=.venv/bin/python
exec .venv-serving/bin/python -m demo
