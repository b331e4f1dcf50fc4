#!/usr/bin/env bash
# Prints the folder of programs of a tool that checks infra/terraform, in an environment of its own outside the checkout:
#   cloud_tool.sh moto     a stand-in for AWS (moto_server), and the `aws` command
#   cloud_tool.sh checkov  what is unsafe in Terraform's files
# Each brings dozens of packages, with pins that do not go with ours.
set -euo pipefail
case "${1:-}" in
  moto) packages=("moto[server]==5.2.5" "awscli==1.46.2") ;;
  checkov) packages=("checkov==3.3.30") ;;
  *) echo "usage: cloud_tool.sh moto|checkov" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
cache="${XDG_CACHE_HOME:-$HOME/.cache}/agentloop"
home="$cache/cloud-$1-$(printf '%s\n' "${packages[@]}" | sha256sum | cut -c1-12)"
mkdir -p "$cache"
exec 9>"$home.lock"
flock 9
if [[ ! -e "$home/whole" ]]; then
  echo "installing ${packages[*]} into $home" >&2
  uv="$("$root/scripts/uv.sh")"
  rm -rf "$home"
  "$uv" venv --quiet --python 3.11 "$home" >&2
  "$uv" pip install --quiet --python "$home/bin/python" "${packages[@]}" >&2
  touch "$home/whole"
fi
echo "$home/bin"
