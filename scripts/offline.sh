#!/usr/bin/env bash
# Runs a command where nothing can leave unseen, and says what tried: scripts/offline.sh [-o REPORT] COMMAND...
#
# The command gets a network namespace with a loopback and one way out. Default route and resolver lead to a second
# namespace, which has no other interface: it counts every IP packet (scripts/packet_sink.py), takes every address for
# its own, and refuses, so that an attempt fails at once and not at its timeout. As root only.
#
# Exit code: the command's, or 97 if it went well but something tried to leave. REPORT: packets, destinations, names.
set -euo pipefail

tried_to_leave=97
report=""
if [[ "${1:-}" == -o ]]; then
  report="$2"
  shift 2
fi
if [[ $# -eq 0 || $EUID -ne 0 ]]; then
  echo "usage, as root: scripts/offline.sh [-o REPORT] COMMAND..." >&2
  exit 2
fi
here="$(cd "$(dirname "$0")" && pwd)"
PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps ip and sysctl
python="$here/../.venv/bin/python"
[[ -x "$python" ]] || python=python3
inside="offline-$$" outside="sink-$$"
work="$(mktemp -d)"
report="${report:-$work/report.json}"
sink=""

clean() {
  [[ -z "$sink" ]] || kill "$sink" 2>/dev/null || true
  # What the command left running in the namespace ends with it.
  ip netns pids "$inside" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
  ip netns del "$inside" 2>/dev/null || true
  ip netns del "$outside" 2>/dev/null || true
  rm -rf "/etc/netns/$inside" "$work"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ip netns add "$inside"
ip netns add "$outside"
for namespace in "$inside" "$outside"; do
  ip -n "$namespace" link set lo up
  ip netns exec "$namespace" sh -c 'for all in /proc/sys/net/ipv?/conf/all/forwarding; do echo 0 > "$all"; done'
done
ip -n "$inside" link add out type veth peer name in netns "$outside"
ip -n "$outside" link set in up
ip -n "$inside" link set out up
# 198.18.0.0/15 is for tests of networks (RFC 2544), 2001:2::/48 too (RFC 5180).
ip -n "$inside" addr add 198.18.0.2/30 dev out
ip -n "$outside" addr add 198.18.0.1/30 dev in
ip -n "$inside" route add default via 198.18.0.1
ip -n "$outside" route add local 0.0.0.0/0 dev lo
if [[ -d /proc/sys/net/ipv6 ]]; then
  ip -n "$inside" addr add 2001:2::2/64 dev out nodad
  ip -n "$outside" addr add 2001:2::1/64 dev in nodad
  ip -n "$inside" route add default via 2001:2::1
  ip -n "$outside" route add local ::/0 dev lo
fi

mkdir -p "/etc/netns/$inside"
echo "nameserver 198.18.0.1" > "/etc/netns/$inside/resolv.conf"
# The machine's own name is its own affair, as Debian has it; no service of the host answers for DNS.
{ echo "127.0.0.1 localhost $(hostname)"; echo "::1 localhost ip6-localhost ip6-loopback"; } > "/etc/netns/$inside/hosts"
if [[ -f /etc/nsswitch.conf ]]; then
  sed 's/^hosts:.*/hosts: files dns/' /etc/nsswitch.conf > "/etc/netns/$inside/nsswitch.conf"
fi

mkfifo "$work/ready"
ip netns exec "$outside" "$python" "$here/packet_sink.py" in "$report" > "$work/ready" &
sink=$!
read -r _ < "$work/ready"

code=0
ip netns exec "$inside" "$@" || code=$?

kill "$sink"
wait "$sink" || true
sink=""
packets="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["packets"])' "$report")"
if [[ "$packets" -ne 0 ]]; then
  echo "offline: $packets packets tried to leave:" >&2
  cat "$report" >&2
  [[ $code -ne 0 ]] || code=$tried_to_leave
fi
exit "$code"
