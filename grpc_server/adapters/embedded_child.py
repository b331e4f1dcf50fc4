"""The child process that runs one model version natively: `python -m grpc_server.adapters.embedded_child`.

It reads one line of JSON from stdin (a `ChildOptions`), loads the model, answers on stdout with one line,
`{"address": "http://127.0.0.1:<port>"}`, and serves llama.cpp's HTTP API there, to holders of the key that
came with the options, until stdin closes: so it ends when its parent does, however that ends. The key
never stands in argv or in the environment, where other processes could read it. Once prompts arrive it says
nothing more, as that might quote them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

PROMPT_CACHE_MIB = 256
"""Host memory for prompts of past turns (llama.cpp's own default is 8 GiB a model)."""

GOMP_SPINCOUNT = "300"
"""How long libgomp's threads spin at each of a token's hundred barriers, before they sleep.

Measured on 2 cores with two threads, other processes on the same cores: 2.6 tokens/s as it comes (spinning
for milliseconds), 7 at 2,000, 17 at 300, 12 when they sleep at once; on quiet cores sleeping at once halved
the speed of 2,000.
"""


@dataclass(frozen=True, slots=True)
class ChildOptions:
    """What a child is told: `context_tokens` is for each of `parallel` slots; `embedding` makes vectors.

    With `on_gpu` it has what GPU there is, if the library can use one.
    """

    model: str
    key: str
    context_tokens: int
    parallel: int
    threads: int
    embedding: bool = False
    on_gpu: bool = True

    def to_line(self) -> bytes:
        """One line of JSON, for the child's stdin."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> ChildOptions:
        """The options in one line of JSON. Raises ValueError or TypeError if it holds anything else."""
        return cls(**json.loads(line))


def server_parameters(options: ChildOptions, library: Any) -> Any:
    """llama.cpp's parameters; `library` is the module `xllamacpp`."""
    parameters = library.CommonParams()
    parameters.model.path = options.model
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.api_keys = [options.key]
    parameters.n_ctx = options.context_tokens * options.parallel
    parameters.n_parallel = options.parallel
    parameters.cpuparams.n_threads = options.threads
    parameters.cpuparams_batch.n_threads = options.threads
    parameters.cont_batching = True
    parameters.cache_prompt = True
    parameters.cache_ram_mib = PROMPT_CACHE_MIB
    parameters.ctx_shift = False  # a full context ends the answer; it never forgets the beginning
    parameters.fit_params = False  # or the context would shrink to what memory seems free
    parameters.offline = True
    parameters.ui = False
    parameters.use_jinja = False  # prompts come rendered (domain/chat_format.py)
    parameters.cors_origins = ""
    parameters.endpoint_slots = False  # it would show other callers' prompts
    parameters.verbosity = 1  # errors only
    if not options.on_gpu:
        parameters.n_gpu_layers = 0
    if options.embedding:
        parameters.embedding = True
        parameters.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        parameters.n_batch = parameters.n_ubatch = options.context_tokens
    return parameters


def exit_when_closed(stream: int) -> None:
    """End this process at once when the pipe `stream` (a file descriptor) closes."""
    while os.read(stream, 4096):
        pass
    os._exit(0)


def main() -> None:
    """Serve until stdin closes."""
    # A terminal's Ctrl-C or a service manager's SIGTERM is for the parent, which lets streams finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)
    options = ChildOptions.from_line(sys.stdin.buffer.readline())
    if not options.on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA alone takes 400 MB of a GPU that it sees
    threading.Thread(target=exit_when_closed, args=(sys.stdin.fileno(),), daemon=True).start()
    reply = os.dup(1)
    os.dup2(2, 1)  # what the library prints is a log

    import xllamacpp  # after the environment is set: libgomp reads it when it is loaded

    server = xllamacpp.Server(server_parameters(options, xllamacpp))
    silence = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(silence, output)
    os.write(reply, json.dumps({"address": server.listening_address}).encode() + b"\n")
    os.close(reply)
    threading.Event().wait()


if __name__ == "__main__":
    main()
