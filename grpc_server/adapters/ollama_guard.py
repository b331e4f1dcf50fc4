"""Keeps an `ollama serve` running, and ends it with its parent.

`python -m grpc_server.adapters.ollama_guard OLLAMA`: `ollama serve` starts a llama-server for each model, and
they outlive it when it is killed; so it runs in a process group of its own, behind this guard. On stdout the
guard says one line, `{"url": "http://…"}`, once Ollama listens. When stdin closes, because the parent closed
it or died, everything ends. When Ollama dies it starts anew, on the same port, after a pause that doubles.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

_LISTENING = re.compile(rb"Listening on (127\.0\.0\.1:\d+)")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 30.0
_STEADY_SECONDS = 60.0
_STDIN = 0


def main() -> int:
    """Exit code 0 when the parent has gone, 1 if Ollama never came up (its words are on stderr)."""
    # A terminal's Ctrl-C or a service manager's SIGTERM is for the parent, which lets streams finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    host, deaths = "127.0.0.1:0", 0
    while True:
        started = time.monotonic()
        try:
            process = start(sys.argv[1], host)
        except OSError as error:
            sys.stderr.write(str(error))
            return 1
        try:
            listening, words = until_listening(process)
            if listening and not deaths:
                host = listening
                announce(host)
            if listening:
                until_silent(process)
        finally:
            stop(process)
        if parent_is_gone(0):
            return 0
        if host.endswith(":0"):
            sys.stderr.write(words)
            return 1
        deaths = 1 if time.monotonic() - started > _STEADY_SECONDS else deaths + 1
        if parent_is_gone(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (deaths - 1))):
            return 0


def start(binary: str, host: str) -> subprocess.Popen[bytes]:
    """`ollama serve`, listening on `host`, as the head of a process group."""
    library = ctypes.CDLL(None)

    def between_fork_and_exec() -> None:  # safe: this process has one thread
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # what is ignored stays so through exec
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(
        [binary, "serve"],
        env={**os.environ, "OLLAMA_HOST": host},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
        preexec_fn=between_fork_and_exec,
    )


def until_listening(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Where Ollama listens, and what it said so far; the address is empty if it ended, or the parent did."""
    said = b""
    while chunk := next_words(process):
        said += chunk
        if match := _LISTENING.search(said):
            return match[1].decode(), ""
    return "", said.decode(errors="replace")[-2000:]


def until_silent(process: subprocess.Popen[bytes]) -> None:
    """Return when Ollama or the parent has ended. What Ollama says is dropped: it might quote a prompt."""
    while next_words(process):
        pass


def next_words(process: subprocess.Popen[bytes]) -> bytes:
    """What Ollama says next; empty when Ollama or the parent has ended."""
    assert process.stderr  # noqa: S101
    words = process.stderr.fileno()
    while True:
        ready, _, _ = select.select([words, _STDIN], [], [])
        if _STDIN in ready and parent_is_gone(0):
            return b""
        if words in ready:
            return os.read(words, 65536)


def parent_is_gone(seconds: float) -> bool:
    """Whether stdin is closed, or closes within so many seconds."""
    ready, _, _ = select.select([_STDIN], [], [], seconds)
    return bool(ready) and not os.read(_STDIN, 4096)


def announce(host: str) -> None:
    """Tell the parent where Ollama is."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps({"url": f"http://{host}"}).encode() + b"\n")


def stop(process: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """End Ollama, and whatever it started; kill it if that takes over `patience` seconds."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
