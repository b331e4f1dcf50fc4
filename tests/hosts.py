"""Debian hosts with systemd and sshd to run playbooks on, each in its own network namespace; as root only.

A host is systemd-nspawn on the image of `scripts/base_image.sh`, under an overlay in memory: what is changed
on it is gone when it stops. Hosts and this machine share one bridge, and there is no way out of it.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
USER = "debian"
BOOT_SECONDS = 300.0
"""What a boot may take on a machine that is busy; alone it takes 8 s."""
STOP_SECONDS = 30.0
CGROUPS = Path("/sys/fs/cgroup")


class NotRootError(Exception):
    """Test hosts cannot be had as another user."""


def see_that_we_are_root() -> None:
    """Raises NotRootError with what to do about it."""
    if os.geteuid() != 0:
        raise NotRootError(
            "test hosts are booted with systemd-nspawn in network namespaces, which only root may; run these"
            " tests as root, or leave them out with -m 'not soak'"
        )


@dataclass
class Host:
    """One host, reached as the user `debian`, who may use sudo, with the run's own key."""

    name: str
    address: str
    image: Path
    folder: Path
    namespace: str
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def console(self) -> str:
        """What its console showed since its last boot."""
        return (self.folder / f"{self.name}.console").read_text(errors="replace")

    @property
    def ssh(self) -> list[str]:
        """The command that runs others on it."""
        return ["ssh", *self.ssh_options, f"{USER}@{self.address}"]

    @property
    def ssh_options(self) -> list[str]:
        """With these, ssh asks nothing and looks at no file of the user who runs the tests."""
        return [
            *("-F", "/dev/null", "-i", str(self.folder / "key"), "-o", "IdentitiesOnly=yes"),
            *("-o", f"UserKnownHostsFile={self.folder / 'known_hosts'}", "-o", "StrictHostKeyChecking=yes"),
            *("-o", "BatchMode=yes", "-o", "ConnectTimeout=5"),
        ]

    def boot(self) -> None:
        """Start it; `wait` tells when it is up."""
        command = [
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--volatile=overlay"),
            *(f"--directory={self.image}", f"--machine={self.name}", f"--hostname={self.name}"),
            *(f"--network-namespace-path=/run/netns/{self.namespace}", "--capability=CAP_NET_ADMIN"),
            *("--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe"),
            f"--bind-ro={self.folder / 'authorized_keys'}:/home/{USER}/.ssh/authorized_keys",
            f"--bind-ro={self.folder / 'hosts'}:/etc/hosts",
        ]
        with (self.folder / f"{self.name}.console").open("wb") as console:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                preexec_fn=self._enter_cgroups,
            )

    def wait(self, seconds: float = BOOT_SECONDS) -> None:
        """Return when sshd takes commands."""
        until = time.monotonic() + seconds
        while True:
            done = subprocess.run(
                [*self.ssh, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return
            ended = self.process is None or self.process.poll() is not None
            if ended or time.monotonic() > until:
                raise AssertionError(f"{self.name} did not boot: {done.stderr}\n{self.console}")
            time.sleep(0.2)

    def run(self, command: str, *, check: bool = True, seconds: float = 120) -> str:
        """What a shell's command says on it, as root."""
        done = subprocess.run(
            [*self.ssh, f"sudo sh -c {shlex.quote(command)}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def lose(self) -> None:
        """End it at once, as a power cut would; `boot` brings a fresh one."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_SECONDS)
        self.process = None
        for folder in self._cgroups():
            _end(folder)

    def _cgroups(self) -> list[Path]:
        """Its own, in each hierarchy in which systemd keeps its units: two in one would end each other's."""
        return [hierarchy / self.namespace for hierarchy in _hierarchies()]

    def _enter_cgroups(self) -> None:
        for folder in self._cgroups():
            folder.mkdir(exist_ok=True)
            (folder / "cgroup.procs").write_text(str(os.getpid()))


def _hierarchies() -> list[Path]:
    """Where cgroups of systemd's kind are: one folder, or two where version 1 is in use beside version 2."""
    there = [CGROUPS / name for name in ("systemd", "unified") if (CGROUPS / name).is_dir()]
    return there or [CGROUPS]


def _end(folder: Path) -> None:
    """End the processes of a cgroup, which are one host's and nobody else's, and remove it."""
    until = time.monotonic() + STOP_SECONDS
    while folder.exists():
        below = [Path(found) for found, _, _ in os.walk(folder, topdown=False)]
        for pid in {int(pid) for one in below for pid in (one / "cgroup.procs").read_text().split()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(OSError):  # until the last has ended
            for one in below:
                one.rmdir()
        assert time.monotonic() < until, f"processes are left in {folder}"
        time.sleep(0.02)


@contextmanager
def hosts(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Hosts of these names, up and reachable while the block runs.

    Args:
        folder: where the run's key, the known hosts and the consoles' output are written.
        names: the hosts' names, at most 200.
    """
    see_that_we_are_root()
    image = base_image()
    _make_key(folder)
    with ExitStack() as stack:
        number = stack.enter_context(_bridge())
        made = {
            name: Host(name, f"198.18.{number}.{10 + place}", image, folder, f"agentloop{number}-{name}")
            for place, name in enumerate(names)
        }
        key = (image / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split(maxsplit=2)[:2]
        lines = [f"{host.address} {' '.join(key)}\n" for host in made.values()]
        (folder / "known_hosts").write_text("".join(lines))
        named = [f"{host.address} {host.name}\n" for host in made.values()]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(named))
        for place, host in enumerate(made.values()):
            stack.enter_context(_namespace(host, number, place))
            stack.callback(host.lose)
            host.boot()
        for host in made.values():
            host.wait()
        yield made


def base_image() -> Path:
    """The image's folder, made now if it is not there yet (some minutes)."""
    done = subprocess.run(
        [ROOT / "scripts/base_image.sh"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def _make_key(folder: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test hosts", "-f", folder / "key"],
        stdin=subprocess.DEVNULL,
        check=True,
    )
    authorized = folder / "authorized_keys"
    authorized.write_bytes((folder / "key.pub").read_bytes())
    os.chown(authorized, 1000, 1000)  # the hosts' user `debian`
    authorized.chmod(0o600)


@contextmanager
def _bridge() -> Iterator[int]:
    """A bridge whose network is 198.18.<number>.0/24, which is for tests of networks (RFC 2544)."""
    number, lock = _free_number()
    with lock:
        _sweep(number)
        _ip("link", "add", f"agentloop{number}", "type", "bridge")
        try:
            _ip("addr", "add", f"198.18.{number}.1/24", "dev", f"agentloop{number}")
            _ip("link", "set", f"agentloop{number}", "up")
            yield number
        finally:
            _ip("link", "del", f"agentloop{number}")


def _free_number() -> tuple[int, IO[str]]:
    """A number that no other run has, and its lock: that goes with us, however we end."""
    for number in range(1, 255):
        lock = Path(f"/run/agentloop-hosts-{number}.lock").open("w")  # noqa: SIM115 - the caller closes it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return number, lock
    raise AssertionError("254 runs with test hosts are at work already")


def _sweep(number: int) -> None:
    """Remove what is left of a run that was killed."""
    for hierarchy in _hierarchies():
        for folder in hierarchy.glob(f"agentloop{number}-*"):
            _end(folder)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        if line.startswith(f"agentloop{number}-"):
            _ip("netns", "del", line.split()[0])
    subprocess.run(["ip", "link", "del", f"agentloop{number}"], capture_output=True, check=False)


@contextmanager
def _namespace(host: Host, number: int, place: int) -> Iterator[None]:
    """The host's network: a loopback, and `host0` to the bridge."""
    inside, outside = host.namespace, f"alh{number}-{place}"
    _ip("netns", "add", inside)
    try:
        _ip("link", "add", outside, "type", "veth", "peer", "name", "host0", "netns", inside)
        _ip("link", "set", outside, "master", f"agentloop{number}", "up")
        _ip("-n", inside, "link", "set", "lo", "up")
        _ip("-n", inside, "addr", "add", f"{host.address}/24", "dev", "host0")
        _ip("-n", inside, "link", "set", "host0", "up")
        yield
    finally:
        _ip("netns", "del", inside)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
