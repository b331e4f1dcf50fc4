#!/usr/bin/env bash
# Checks infra/terraform: format, then for each module validation and its tests, with mocks: nothing is reached.
# TF_PLUGIN_DIR is a folder with the AWS provider, laid out as `terraform providers mirror` unpacks it.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TF_PLUGIN_DIR:?is not set: name the folder that holds the AWS provider; no module of infra/terraform was tested}"
command -v terraform >/dev/null || { echo "no terraform (1.11 or later) on PATH: infra/terraform was not tested" >&2; exit 1; }
# What the user has set up (mirrors, credentials) is none of these checks' business.
export TF_CLI_CONFIG_FILE=/dev/null TF_IN_AUTOMATION=1 CHECKPOINT_DISABLE=1
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cp -r infra/terraform/. "$work"
terraform -chdir="$work" fmt -recursive -check -diff
for module in "$work"/modules/*/; do
  echo "== $(basename "$module")"
  terraform -chdir="$module" init -input=false -no-color -plugin-dir="$(realpath "$TF_PLUGIN_DIR")" >"$work/init.log" ||
    { cat "$work/init.log" >&2; exit 1; }
  terraform -chdir="$module" validate -no-color
  terraform -chdir="$module" test -no-color
done
