#!/usr/bin/env bash
# Makes the image that ours are built on: Debian 12 with python3, from Debian's signed archive by mmdebstrap, with what
# security updates there are. No registry of images is asked. Prints the image's name, whose tag is a hash of its bytes:
# the same packages make the same. One that is older than a week is made anew. Argument: podman or docker. As root.
set -euo pipefail
export LC_ALL=C
program="${1:?podman or docker}"
name=localhost/agentloop-base
root="$(cd "$(dirname "$0")/.." && pwd)"
week=$((7 * 86400))

say() { printf 'container base: %s\n' "$*" >&2; }

label() { "$program" image inspect --format "{{index .Config.Labels \"$1\"}}" "$name:current" 2>/dev/null || true; }
script="$(sha256sum "$0" | cut -c 1-12)"
made="$(label made)"
if [[ "$(label script)" == "$script" && "$made" =~ ^[0-9]+$ ]] && (($(date +%s) - made < week)); then
  echo "$name:$(label content)"
  exit
fi
[[ $EUID -eq 0 ]] || { say "mmdebstrap needs root here; or name another base: BASE=<image>@sha256:<digest>"; exit 1; }
"$root/scripts/debian.sh" mmdebstrap debian-archive-keyring

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# Where this machine is Debian 12 itself, its own sources: they may be a mirror's.
sources=()
if grep -qs '^VERSION_CODENAME=bookworm$' /etc/os-release; then
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list; do
    if [[ -s $file ]] && grep -q bookworm "$file"; then sources+=("$file"); fi
  done
fi
say "mmdebstrap: a minute"
# One time for all files: what differs is then the packages alone.
SOURCE_DATE_EPOCH=1580601600 mmdebstrap --quiet --variant=minbase --format=tar \
  --include=ca-certificates,libgomp1,python3 \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/* "$1"/var/log/*' \
  --customize-hook='rm -f "$1"/etc/hostname "$1"/etc/resolv.conf' \
  bookworm "$work/base.tar" "${sources[@]}" >&2
content="$(sha256sum "$work/base.tar" | cut -c 1-12)"
"$program" import --change "LABEL script=$script" --change "LABEL content=$content" --change "LABEL made=$(date +%s)" \
  "$work/base.tar" "$name:$content" >&2
"$program" tag "$name:$content" "$name:current"
say "made: $(du -h "$work/base.tar" | cut -f 1)"
echo "$name:$content"
