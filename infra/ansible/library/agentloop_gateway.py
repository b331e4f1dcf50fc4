#!/usr/bin/python
"""Ansible module: which colour of which host gets requests from HAProxy."""

from __future__ import annotations

import csv
import io
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: agentloop_gateway
short_description: Read or change which colour of a host gets requests
description:
  - Reads or changes the state of HAProxy's servers over its runtime API. Each is named C(<host>-<colour>),
    and is in every one of I(backends).
  - A colour that is drained gets no new request; the streams that it has go on to their end.
  - After a change the state is written to I(state_file), from which HAProxy takes it when it starts again.
version_added: "0.1.0"
options:
  state:
    description:
      - C(read) changes nothing.
      - C(serving) gives the requests of I(host) to I(colour), once that is up, and drains its other colour.
      - C(drained) drains I(host), or only its I(colour), and waits until its streams have ended.
      - C(returned) gives the requests of each of I(hosts) to its other colour. Nothing is changed unless the
        other colour is up on all of them.
      - C(settled) sees that no host has two colours that get requests, as after a start without a state file.
    type: str
    choices: [read, serving, drained, returned, settled]
    default: read
  host:
    description: The host. Required if I(state) is C(serving) or C(drained).
    type: str
  colour:
    description: The colour. Required if I(state=serving).
    type: str
  hosts:
    description: The hosts to return; empty for all. I(state=returned) only.
    type: list
    elements: str
    default: []
  colours:
    description: The colours, the one that a new host begins with first.
    type: list
    elements: str
    default: [blue, green]
  backends:
    description: HAProxy's backends.
    type: list
    elements: str
    default: [grpc, http]
  wait:
    description: Seconds to wait for a colour to be up, or for streams to end.
    type: float
    default: 60
  socket:
    description: Where HAProxy takes commands, with the level admin.
    type: path
    default: /run/haproxy/admin.sock
  state_file:
    description: Where the state is kept.
    type: path
    default: /var/lib/haproxy/state/servers
attributes:
  check_mode:
    support: full
    description: Tells what would change, without waiting.
  diff_mode:
    support: full
    description: Shows which colours get requests before and after.
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: See what serves
  agentloop_gateway:
  register: gateway

- name: Switch one host over
  agentloop_gateway:
    state: serving
    host: app1
    colour: green

- name: Return to what served before, on every host
  agentloop_gateway:
    state: returned
"""

RETURN = r"""
colours:
  description: By host and colour, whether it gets requests, whether it is up, and how many streams it has.
  returned: success
  type: dict
  sample: {app1: {blue: {ready: true, up: true, streams: 12}, green: {ready: false, up: true, streams: 0}}}
serves:
  description: By host the colour that gets its requests; empty for a host that is drained.
  returned: success
  type: dict
  sample: {app1: blue}
seconds:
  description: How long the change took.
  returned: success
  type: float
"""

POLL_SECONDS = 0.2
MAINTENANCE = 0x01 | 0x02 | 0x04 | 0x20 | 0x40
DRAINED = 0x08 | 0x10
"""Bits of `srv_admin_state`: https://docs.haproxy.org/2.6/management.html#9.3-show%20servers%20state"""
RUNNING = "2"
"""`srv_op_state` of a server that its checks find up."""


class GatewayError(Exception):
    """What was asked cannot be; the text says why, and what to do."""


@dataclass(frozen=True)
class Colour:
    """One colour of a host, over all backends."""

    ready: bool
    up: bool
    streams: int

    def plain(self) -> dict[str, bool | int]:
        """For JSON."""
        return {"ready": self.ready, "up": self.up, "streams": self.streams}


Colours = dict[str, dict[str, Colour]]
Say = Callable[[str], str]


def read(say: Say, backends: Sequence[str]) -> Colours:
    """The colours of every host as HAProxy has them now.

    Raises:
        GatewayError: a backend is not there, or has other servers than the first.
    """
    streams = _streams(say("show stat -1 4 -1"), backends)
    parts: dict[str, list[Colour]] = {}
    for backend in backends:
        for name, state in _states(say(f"show servers state {backend}"), backend).items():
            admin, running = state
            one = Colour(not admin & (MAINTENANCE | DRAINED), running, streams.get((backend, name), 0))
            parts.setdefault(name, []).append(one)
    colours: Colours = {}
    for name, found in parts.items():
        host, separator, colour = name.rpartition("-")
        if not separator or len(found) != len(backends):
            raise GatewayError(
                f"server {name!r} is not in each of the backends {', '.join(backends)} as <host>-<colour>;"
                " play site.yml, which writes HAProxy's configuration"
            )
        whole = Colour(all(f.ready for f in found), all(f.up for f in found), sum(f.streams for f in found))
        colours.setdefault(host, {})[colour] = whole
    return colours


def _states(answer: str, backend: str) -> dict[str, tuple[int, bool]]:
    """By server: its administrative state, and whether it is up."""
    lines = [line for line in answer.splitlines() if line.strip()]
    if len(lines) < 2 or not lines[1].startswith("#"):
        raise GatewayError(f"HAProxy has no backend {backend!r}: {answer.strip()[:200] or 'it said nothing'}")
    names = lines[1].lstrip("# ").split()
    found = {}
    for line in lines[2:]:
        row = dict(zip(names, line.split(), strict=False))
        found[row["srv_name"]] = (int(row["srv_admin_state"]), row["srv_op_state"] == RUNNING)
    return found


def _streams(answer: str, backends: Sequence[str]) -> dict[tuple[str, str], int]:
    rows = csv.DictReader(io.StringIO(answer.lstrip("# ")))
    return {(row["pxname"], row["svname"]): int(row["scur"]) for row in rows if row["pxname"] in backends}


def serves(colours: Colours) -> dict[str, str]:
    """By host the colour that gets its requests, the first of several; empty if none does."""
    return {
        host: next((name for name, colour in found.items() if colour.ready), "")
        for host, found in colours.items()
    }


class Gateway:
    """Changes HAProxy's servers, or in check mode only tells what would change.

    Args:
        say: gives a command to HAProxy and returns its answer.
        backends: every server is in each of them.
        seconds: how long to wait for a colour to be up, or for streams to end.
        dry: whether nothing is to be changed.
    """

    def __init__(
        self, say: Say, backends: Sequence[str], *, seconds: float, dry: bool, poll: float = POLL_SECONDS
    ) -> None:
        self._say = say
        self._backends = backends
        self._seconds = seconds
        self._dry = dry
        self._poll = poll
        self.changed = False

    def colours(self) -> Colours:
        """As they are now."""
        return read(self._say, self._backends)

    def serve(self, host: str, colour: str) -> None:
        """Give a host's requests to one colour.

        Raises:
            GatewayError: it is not up in time; nothing was changed.
        """
        others = [name for name in self._of(host) if name != colour]
        if colour not in self._of(host):
            raise GatewayError(f"{host} has no colour {colour!r}; it has {', '.join(self._of(host))}")
        if not self._dry:
            self._until(
                lambda: self._of(host)[colour].up,
                f"{colour} on {host} is not up after {self._seconds:g} s; its requests stay where they are."
                f" On {host}: journalctl --unit agentloop@{colour}",
            )
        self._set(host, colour, ready=True)  # first, so that at no time nobody gets them
        for other in others:
            self._set(host, other, ready=False)

    def drain(self, host: str, colour: str | None) -> None:
        """Give a host, or one colour of it, no new request, and wait until its streams have ended.

        Raises:
            GatewayError: it would leave nobody; or streams are left after the time, though it is drained.
        """
        names = [colour] if colour else list(self._of(host))
        everywhere = self.colours()
        left = [
            (at, name)
            for at, found in everywhere.items()
            for name, one in found.items()
            if one.ready and one.up and not (at == host and name in names)
        ]
        drained = [name for name in names if self._of(host)[name].ready and self._of(host)[name].up]
        if drained and not left:
            raise GatewayError(f"{host} is the last that takes requests; nothing was changed")
        for name in names:
            self._set(host, name, ready=False)
        if not self._dry:
            self._until(
                lambda: not sum(self._of(host)[name].streams for name in names),
                f"{host} still has streams after {self._seconds:g} s. It gets no new ones: wait, and run"
                " this again",
            )

    def give_back(self, hosts: Sequence[str]) -> None:
        """Give the requests of these hosts (none: of all that serve) to their other colour.

        Raises:
            GatewayError: a host's other colour is not up; nothing was changed.
        """
        colours = self.colours()
        now = serves(colours)
        targets = {}
        for host in hosts or [host for host, colour in now.items() if colour]:
            others = [name for name in self._of(host) if name != now[host]]
            up = [name for name in others if colours[host][name].up]
            if not up:
                raise GatewayError(
                    f"{' and '.join(others)} on {host} is not up: there is nothing to return to. Nothing was"
                    f" changed. On {host}: systemctl status 'agentloop@*'; or deploy the former release"
                )
            targets[host] = up[0]
        for host, colour in targets.items():
            self._set(host, colour, ready=True)
        for host, colour in targets.items():
            for other in self._of(host):
                if other != colour:
                    self._set(host, other, ready=False)

    def settle(self, order: Sequence[str]) -> None:
        """Leave each host at most one colour that gets requests: the first that is up, else the first."""
        for host, found in self.colours().items():
            ready = sorted((name for name in found if found[name].ready), key=order.index)
            ready.sort(key=lambda name: not found[name].up)
            for name in ready[1:]:
                self._set(host, name, ready=False)

    def save(self, path: str) -> None:
        """Keep the state for HAProxy's next start."""
        text = self._say("show servers state")
        partial = f"{path}.partial"
        with open(partial, "w", encoding="utf-8") as file:  # noqa: PTH123 - as Ansible's own modules do
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # noqa: PTH105

    def _of(self, host: str) -> dict[str, Colour]:
        colours = self.colours()
        if host not in colours:
            raise GatewayError(
                f"HAProxy knows no host {host!r}; it knows {', '.join(sorted(colours)) or 'none'}."
                " Play site.yml, which writes its configuration"
            )
        return colours[host]

    def _set(self, host: str, colour: str, *, ready: bool) -> None:
        if self._of(host)[colour].ready == ready:
            return
        self.changed = True
        if self._dry:
            return
        for backend in self._backends:
            server = f"{backend}/{host}-{colour}"
            answer = self._say(f"set server {server} state {'ready' if ready else 'drain'}").strip()
            if answer:
                raise GatewayError(f"HAProxy refuses to change {server}: {answer}")

    def _until(self, holds: Callable[[], bool], otherwise: str) -> None:
        end = time.monotonic() + self._seconds
        while not holds():
            if time.monotonic() > end:
                raise GatewayError(otherwise)
            time.sleep(self._poll)


def runtime(path: str, seconds: float = 10.0) -> Say:
    """Commands for HAProxy's socket at `path`; each has a connection of its own."""

    def say(command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(path)
            connection.sendall(command.encode() + b"\n")
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts).decode()

    return say


def act(gateway: Gateway, asked: dict[str, Any]) -> None:
    """Do what the module's options ask for."""
    if asked["state"] == "serving":
        gateway.serve(asked["host"], asked["colour"])
    elif asked["state"] == "drained":
        gateway.drain(asked["host"], asked["colour"])
    elif asked["state"] == "returned":
        gateway.give_back(asked["hosts"])
    elif asked["state"] == "settled":
        gateway.settle(asked["colours"])


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "default": "read",
                "choices": ["read", "serving", "drained", "returned", "settled"],
            },
            "host": {"type": "str"},
            "colour": {"type": "str"},
            "hosts": {"type": "list", "elements": "str", "default": []},
            "colours": {"type": "list", "elements": "str", "default": ["blue", "green"]},
            "backends": {"type": "list", "elements": "str", "default": ["grpc", "http"]},
            "wait": {"type": "float", "default": 60.0},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
            "state_file": {"type": "path", "default": "/var/lib/haproxy/state/servers"},
        },
        required_if=[("state", "serving", ["host", "colour"]), ("state", "drained", ["host"])],
        supports_check_mode=True,
    )
    asked = module.params
    began = time.monotonic()
    gateway = Gateway(
        runtime(asked["socket"]), asked["backends"], seconds=asked["wait"], dry=module.check_mode
    )
    try:
        before = gateway.colours()
        try:
            act(gateway, asked)
        finally:
            if gateway.changed and not module.check_mode:
                gateway.save(asked["state_file"])
        after = gateway.colours()
    except GatewayError as error:
        module.fail_json(msg=str(error), changed=gateway.changed)
    except OSError as error:
        module.fail_json(
            msg=f"HAProxy does not answer at {asked['socket']}: {error}; systemctl status haproxy",
            changed=gateway.changed,
        )
    module.exit_json(
        changed=gateway.changed,
        colours={host: {name: one.plain() for name, one in found.items()} for host, found in after.items()},
        serves=serves(after),
        seconds=round(time.monotonic() - began, 3),
        diff={"before": serves(before), "after": serves(after)},
    )


if __name__ == "__main__":
    main()
