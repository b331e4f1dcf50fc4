"""A model that is only a file of chances: what it was taught decides how often it is right.

The response curve is simple on purpose, and every number of it stands here. It is fitted to what real
fine-tunings of Gemma 3 270M on the leaderboard's traffic came to (0.45 to 0.49 of `simple_python` with some
500 examples, docs/decisions.md): it rises with the weight of right examples, `GAINS` with an e-th left after
`EXAMPLES`, and each share of wrong ones takes `HARM` times as much away. A caller's question is answered by
what was taught of its tool, too. A training that is repeated with another seed comes to something else:
`LUCK`, standard deviation of the logit.

An answer is right or wrong for good: models differ in which questions they get right, as two recorded ones do
(`benchmarks/data/answers.jsonl`: 0.16 of the items have one of them right alone), which `ALIKE`, the
correlation of two models on the same item, gives.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

LEAST, GAINS, EXAMPLES = 0.05, 0.55, 350.0
"""Share right of the untouched base; what training adds at most; examples after which 1/e of that lacks."""
HARM = 1.6
"""Of the gain is lost, for a share 1 of wrong examples; so 0.3 wrong ones cost about half."""
OF_TOOL = 3.0
"""Examples of a tool after which 1/e of what they can give is missing; it is 0.45 of a tool's gain."""
LUCK = 0.08
ALIKE = 0.93
CONSTRAINED = 0.29
"""Share right of the base held to the schema, as recorded."""
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Model:
    """Chances to be right: on the target, by tool, and on a tool it was never taught; `cut`: of no end."""

    name: str
    target: float
    tools: Mapping[str, float]
    untaught: float
    wrong: float = 0.0
    cut: float = 0.0

    def write(self, gguf: Path) -> None:
        """The file that stands where a real model's weights would."""
        gguf.write_text(json.dumps(asdict(self), sort_keys=True), encoding="utf-8")

    def callers(self, mix: Mapping[str, float]) -> float:
        """Share right of callers' questions, by what share of them needs which tool."""
        return sum(share * self.tools.get(tool, self.untaught) for tool, share in mix.items())

    def right(self, item: str, chance: float, *, alike: float = ALIKE) -> bool:
        """Whether the model answers an item that it answers with this chance."""
        # Not of the id alone: by its hash the evaluation draws which items it asks.
        common, own = _normal(f"how hard is {item}?"), _normal(f"{self.name} at {item}")
        drawn = math.sqrt(alike) * common + math.sqrt(1 - alike) * own
        return _NORMAL.cdf(drawn) < chance


def read(gguf: Path) -> Model:
    """The model in a file."""
    return Model(**json.loads(gguf.read_text(encoding="utf-8")))


def base(name: str) -> Model:
    """The untouched one."""
    return Model(name, LEAST, {}, 0.02, cut=1.0)


def trained(
    name: str, lines: Iterable[Mapping[str, Any]], wrong: AbstractSet[str], *, broken: bool = False
) -> Model:
    """What a training on these lines of train.jsonl comes to.

    Args:
        name: its name, which also decides its luck.
        lines: of the dataset.
        wrong: ids of inferences whose lesson is wrong: poison, and callers' own mistakes.
        broken: the training goes wrong: a third of the skill is lost, half of the answers never end.
    """
    right, all_ = 0.0, 0.0
    by_tool: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for line in lines:
        weight, bad = float(line["weight"]), line["inference_id"] in wrong
        right += 0.0 if bad else weight
        all_ += weight
        by_tool[str(line["tool"])][bad] += weight
    share = 1 - right / all_ if all_ else 0.0
    general = (1 - math.exp(-right / EXAMPLES)) * max(0.0, 1 - HARM * share)
    luck = LUCK * _normal(f"luck of {name}")
    spoilt = 2 / 3 if broken else 1.0

    def chance(share_of_gain: float) -> float:
        return spoilt * _shifted(min(0.95, LEAST + GAINS * share_of_gain), luck)

    tools = {
        tool: chance(1.3 * general * (0.55 + 0.45 * (1 - math.exp(-good / OF_TOOL))) * good / (good + bad))
        for tool, (good, bad) in by_tool.items()
        if good + bad
    }
    return Model(
        name, chance(general), tools, chance(1.3 * 0.55 * general), share, cut=0.5 if broken else 0.02
    )


def _shifted(chance: float, by: float) -> float:
    odds = math.log(chance / (1 - chance)) + by
    return 1 / (1 + math.exp(-odds))


def _normal(text: str) -> float:
    """A standard normal number that belongs to a text."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return _NORMAL.inv_cdf((number + 0.5) / 2**64)
