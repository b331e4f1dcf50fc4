#!/usr/bin/env bash
# Checks infra/terraform: format, then validity of all, and each module's tests, with mocks: nothing is reached.
# TF_PLUGIN_DIR is a folder with the AWS provider, laid out as `terraform providers mirror` unpacks it; without it, the
# places where Terraform itself looks for local providers are looked at.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z "${TF_PLUGIN_DIR:-}" ]]; then
  for place in "$HOME/.terraform.d/plugins" /usr/local/share/terraform/plugins /usr/share/terraform/plugins; do
    [[ -d "$place/registry.terraform.io/hashicorp/aws" ]] && TF_PLUGIN_DIR="$place" && break
  done
fi
: "${TF_PLUGIN_DIR:?is not set: name the folder that holds the AWS provider; no module of infra/terraform was tested}"
command -v terraform >/dev/null || { echo "no terraform (1.11 or later) on PATH: infra/terraform was not tested" >&2; exit 1; }
# What the user has set up (mirrors, credentials) is none of these checks' business.
export TF_CLI_CONFIG_FILE=/dev/null TF_IN_AUTOMATION=1 CHECKPOINT_DISABLE=1
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cp -r infra/terraform/. "$work"
terraform -chdir="$work" fmt -recursive -check -diff
for folder in "$work"/modules/*/ "$work"/{bootstrap,stage,prod}/; do
  echo "== $(basename "$folder")"
  terraform -chdir="$folder" init -backend=false -input=false -no-color -plugin-dir="$(realpath "$TF_PLUGIN_DIR")" >"$work/init.log" ||
    { cat "$work/init.log" >&2; exit 1; }
  terraform -chdir="$folder" validate -no-color
  [[ ! -d "$folder/tests" ]] || terraform -chdir="$folder" test -no-color
done
