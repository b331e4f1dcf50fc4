"""What a GGUF's header says of its model, for those who ask what is installed."""

from __future__ import annotations

import math
from pathlib import Path

from grpc_server.adapters.gguf_file import opened
from grpc_server.domain.errors import Precondition
from grpc_server.domain.gguf_layout import GgufError, layout
from grpc_server.domain.types import ModelDetails

# enum llama_ftype, https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
}


def read_details(path: Path) -> ModelDetails:
    """What the header of the GGUF at `path` says. It takes a moment: a vocabulary is skipped word by word.

    Raises:
        Precondition: the file cannot be read, is no GGUF of version 2 or 3, or its header is damaged.
    """
    with opened(path) as file:
        try:
            found = layout(file)
            architecture = str(found.fields.get("general.architecture", ""))
            file_type = found.fields.get("general.file_type")
            return ModelDetails(
                architecture,
                sum(math.prod(tensor.shape) for tensor in found.tensors),
                "" if file_type is None else _FILE_TYPES.get(file_type, f"type {file_type}"),
                int(found.fields.get(f"{architecture}.context_length") or 0),
            )
        except (GgufError, OSError, ValueError, OverflowError) as error:
            raise Precondition(f"the header of {path} cannot be read: {error}") from error
