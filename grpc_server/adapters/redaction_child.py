"""The child process that finds secrets and personal data, in SECONDS of processor time a question.

`python -m grpc_server.adapters.redaction_child SECONDS` says `ready`; then it answers each line of stdin, a
JSON list of texts, with a line on stdout: for each text a list of `[start, end, kind]`, in order and apart. A
question that takes longer, or too much memory, ends the process, by the kernel's hand: Python's `re` has no
bound of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from grpc_server.adapters.answering_child import answer_questions
from grpc_server.guard.private_text import Finder


def _ready() -> Callable[[str], str]:
    finder = Finder()
    finder.find("+44 20 7946 0958, GB82 WEST 1234 5698 7654 32, 4111 1111 1111 1111")  # loads all libraries
    return lambda line: json.dumps([finder.find(text) for text in json.loads(line)])


if __name__ == "__main__":
    answer_questions(_ready)
