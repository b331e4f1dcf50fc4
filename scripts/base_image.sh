#!/usr/bin/env bash
# Prints the folder of a bare Debian 12: systemd, sshd, python3, and a user `debian` with sudo, as in Debian's own cloud
# images. Test hosts boot on it (tests/hosts.py). It is made once, in a cache outside the checkout, and never changed.
#
# Its only source of packages is a repository inside, /srv/packages, with all that our roles install: so a role really
# installs, with no network. The packages come from the sources that this machine's apt has. As root, on Debian 12.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"

bare=(systemd-sysv dbus openssh-server python3 python3-apt sudo iproute2 ca-certificates procps)
# What the roles ask apt for (their defaults name them); tests/unit/test_gateway_role.py compares.
roles=(chrony haproxy libgomp1 nftables pgbackrest python3-venv postgresql-15 prometheus prometheus-alertmanager prometheus-node-exporter)

[[ $EUID -eq 0 ]] || { echo "test hosts need root: debootstrap and systemd-nspawn mount file systems" >&2; exit 1; }
root="$(cd "$(dirname "$0")/.." && pwd)"
"$root/scripts/debian.sh" debootstrap systemd-container apt-utils openssh-client iproute2
cache="${XDG_CACHE_HOME:-$HOME/.cache}/agentloop"
image="$cache/debian-12-$(sha256sum "$0" | cut -c 1-12)"
if [[ -e "$image" ]]; then
  echo "$image"
  exit
fi

say() { printf 'base image: %s\n' "$*" >&2; }
mkdir -p "$cache"
exec 9> "$cache/debian-12.lock"
flock 9 # two at once make one
[[ ! -e "$image" ]] || { echo "$image"; exit; }
partial="$image.partial"
rm -rf "$partial"
trap 'rm -rf "$partial"' EXIT

mirror="$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Codename: bookworm' 'Component: main' | head -n 1)"
[[ -n "$mirror" ]] || { say "this machine's apt has no source for Debian 12 (bookworm); see /etc/apt/sources.list.d"; exit 1; }
say "debootstrap: a minute or two"
debootstrap --variant=minbase --include="$(IFS=,; echo "${bare[*]}")" bookworm "$partial" "$mirror" >&2

say "fetching what the roles install"
mkdir -p "$partial/srv/packages/partial"
apt-get --quiet --yes --download-only -o DPkg::Lock::Timeout=600 --no-install-recommends \
  -o Dir::State::status="$partial/var/lib/dpkg/status" \
  -o Dir::Cache::archives="$partial/srv/packages" \
  -o APT::Sandbox::User=root install "${roles[@]}" >&2
rm -rf "$partial/srv/packages/partial" "$partial/srv/packages/lock" "$partial/var/cache/apt/archives/"*.deb
(cd "$partial/srv/packages" && apt-ftparchive packages . > Packages && gzip -k Packages && apt-ftparchive release . > Release)
echo 'deb [trusted=yes] file:/srv/packages ./' > "$partial/etc/apt/sources.list"
chroot "$partial" apt-get update --quiet >&2

chroot "$partial" useradd --create-home --shell /bin/bash debian
echo 'debian ALL=(ALL) NOPASSWD: ALL' > "$partial/etc/sudoers.d/debian"
install -d -o 1000 -g 1000 -m 700 "$partial/home/debian/.ssh"
rm -f "$partial/etc/hostname" "$partial/etc/resolv.conf" # this machine's, which debootstrap copies
: > "$partial/etc/hosts"
: > "$partial/etc/machine-id" # each host that boots makes its own
# What has no meaning where kernel and network are not the host's own, and takes time at each boot.
for unit in systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer e2scrub_reap.service \
  systemd-timesyncd.service; do
  ln -sf /dev/null "$partial/etc/systemd/system/$unit"
done
mv "$partial" "$image"
say "made: $(du -sh "$image" | cut -f 1)"
echo "$image"
