"""What the gateway's Ansible module asks of HAProxy, and what it leaves alone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ansible_modules import agentloop_gateway as module
from tests.module_run import run_module

HEAD = "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight\n"
READY, DRAINED, MAINTENANCE = 0, 8, 1


class HAProxy:
    """Plays the runtime API: hosts with two colours each in two backends."""

    def __init__(self, *hosts: str, backends: tuple[str, ...] = ("grpc", "http")) -> None:
        self.backends = backends
        self.admin = {
            f"{host}-{colour}": READY if colour == "blue" else DRAINED
            for host in hosts
            for colour in ("blue", "green")
        }
        self.up = dict.fromkeys(self.admin, True)
        self.streams = dict.fromkeys(self.admin, 0)
        self.said: list[str] = []
        self.refuses = ""

    def __call__(self, command: str) -> str:
        words = command.split()
        if command.startswith("show servers state"):
            asked = [b for b in self.backends if len(words) == 3 or b == words[3]]
            if not asked:
                return "Can't find backend.\n"
            rows = [
                f"3 {backend} {place} {name} 10.0.0.1 {2 if self.up[name] else 0} {admin} 1\n"
                for backend in asked
                for place, (name, admin) in enumerate(self.admin.items(), 1)
            ]
            return HEAD + "".join(rows) + "\n"
        if command.startswith("show stat"):
            rows = [f"{b},{name},{count},\n" for b in self.backends for name, count in self.streams.items()]
            return "# pxname,svname,scur,\n" + "".join(rows)
        self.said.append(command)
        if self.refuses:
            return self.refuses
        name = words[2].partition("/")[2]
        self.admin[name] = READY if words[4] == "ready" else DRAINED
        return "\n"

    @property
    def serving(self) -> list[str]:
        return [name for name, admin in self.admin.items() if admin == READY]


def gateway(proxy: HAProxy, *, dry: bool = False) -> Any:
    return module.Gateway(proxy, proxy.backends, seconds=0.05, dry=dry, poll=0.001)


def test_a_switch_lets_the_new_colour_in_before_it_drains_the_old_one() -> None:
    proxy = HAProxy("a")
    changes = gateway(proxy)
    changes.serve("a", "green")
    assert changes.changed
    assert [line.removeprefix("set server ") for line in proxy.said] == [
        "grpc/a-green state ready",
        "http/a-green state ready",
        "grpc/a-blue state drain",
        "http/a-blue state drain",
    ]
    again = gateway(proxy)
    again.serve("a", "green")
    assert not again.changed


def test_a_colour_that_is_not_up_gets_nothing() -> None:
    proxy = HAProxy("a")
    proxy.up["a-green"] = False
    with pytest.raises(module.GatewayError, match=r"green on a is not up after 0\.05 s; its requests stay"):
        gateway(proxy).serve("a", "green")
    assert proxy.said == []


def test_check_mode_tells_of_a_switch_and_makes_none() -> None:
    proxy = HAProxy("a")
    changes = gateway(proxy, dry=True)
    changes.serve("a", "green")
    assert changes.changed
    assert proxy.said == []


def test_unknown_hosts_and_colours_are_named() -> None:
    proxy = HAProxy("a", "b")
    with pytest.raises(module.GatewayError, match="knows no host 'c'; it knows a, b"):
        gateway(proxy).serve("c", "blue")
    with pytest.raises(module.GatewayError, match="a has no colour 'red'; it has blue, green"):
        gateway(proxy).serve("a", "red")


def test_a_host_is_drained_until_its_streams_have_ended() -> None:
    proxy = HAProxy("a", "b")
    gateway(proxy).drain("a", None)
    assert proxy.serving == ["b-blue"]
    proxy.streams["b-blue"] = 3
    gateway(proxy).drain("b", "green")
    assert proxy.serving == ["b-blue"]


def test_streams_that_do_not_end_are_told_and_the_host_stays_drained() -> None:
    proxy = HAProxy("a", "b")
    proxy.streams["a-blue"] = 1
    with pytest.raises(module.GatewayError, match=r"a still has streams after 0.05 s\. It gets no new ones"):
        gateway(proxy).drain("a", None)
    assert proxy.serving == ["b-blue"]


def test_the_last_host_is_not_drained() -> None:
    proxy = HAProxy("a", "b")
    gateway(proxy).drain("a", None)
    with pytest.raises(module.GatewayError, match="b is the last that takes requests; nothing was changed"):
        gateway(proxy).drain("b", None)
    assert proxy.serving == ["b-blue"]


def test_all_hosts_return_to_their_other_colours_or_none_does() -> None:
    proxy = HAProxy("a", "b")
    proxy.up["b-green"] = False
    with pytest.raises(module.GatewayError, match="green on b is not up: there is nothing to return to"):
        gateway(proxy).give_back([])
    assert proxy.serving == ["a-blue", "b-blue"]
    gateway(proxy).give_back(["a"])
    assert proxy.serving == ["a-green", "b-blue"]
    proxy.up["b-green"] = True
    gateway(proxy).give_back([])
    assert proxy.serving == ["a-blue", "b-green"]


def test_two_colours_that_get_requests_are_settled_for_the_one_that_is_up() -> None:
    proxy = HAProxy("a", "b")
    proxy.admin = dict.fromkeys(proxy.admin, READY)
    proxy.up["a-blue"] = False
    gateway(proxy).settle(["blue", "green"])
    assert proxy.serving == ["a-green", "b-blue"]


def test_a_server_in_maintenance_gets_no_requests() -> None:
    proxy = HAProxy("a")
    proxy.admin["a-blue"] = MAINTENANCE
    assert module.serves(module.read(proxy, proxy.backends)) == {"a": ""}


def test_what_is_no_colour_of_ours_is_named() -> None:
    proxy = HAProxy("a")
    with pytest.raises(module.GatewayError, match="has no backend 'web': Can't find backend"):
        module.read(proxy, ["web"])
    proxy.admin["alone"] = READY
    proxy.up["alone"] = True
    with pytest.raises(module.GatewayError, match="server 'alone' is not in each of the backends"):
        module.read(proxy, proxy.backends)


def test_a_refusal_of_haproxy_is_passed_on() -> None:
    proxy = HAProxy("a")
    proxy.refuses = "No such server.\n"
    with pytest.raises(module.GatewayError, match="refuses to change grpc/a-green: No such server"):
        gateway(proxy).serve("a", "green")


@contextmanager
def listening(path: Path, proxy: Callable[[str], str]) -> Iterator[None]:
    """HAProxy's socket: one command a connection."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def answer() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    command = connection.recv(1000).decode().strip()
                    if command == "end":
                        return
                    connection.sendall(proxy(command).encode())

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(path))
                last.sendall(b"end\n")
            thread.join()


def test_the_module_switches_over_the_socket_and_keeps_the_state(tmp_path: Path) -> None:
    proxy = HAProxy("a", "b")
    options = {"socket": str(tmp_path / "s"), "state_file": str(tmp_path / "state"), "wait": 1}
    with listening(tmp_path / "s", proxy):
        checked = run_module(module, {**options, "state": "returned"}, check=True)
        assert (checked["changed"], checked["serves"]) == (True, {"a": "blue", "b": "blue"})
        assert not (tmp_path / "state").exists()
        done = run_module(module, {**options, "state": "serving", "host": "a", "colour": "green"})
        assert (done["changed"], done["serves"]) == (True, {"a": "green", "b": "blue"})
        assert "grpc 2 a-green 10.0.0.1 2 0" in (tmp_path / "state").read_text()
        assert run_module(module, {**options, "state": "settled"})["changed"] is False
        assert run_module(module, {**options, "state": "drained", "host": "b"})["serves"]["b"] == ""
        failed = run_module(module, {**options, "state": "drained", "host": "a"})
        assert failed["msg"].startswith("a is the last")


def test_a_gateway_that_does_not_run_is_told(tmp_path: Path) -> None:
    failed = run_module(module, {"socket": str(tmp_path / "none")})
    assert failed["failed"]
    assert failed["msg"].startswith(f"HAProxy does not answer at {tmp_path / 'none'}")
