"""A year of nights, in about an hour: is what serves ever worse, and does anybody have to get up?

365 accelerated nights go through the real steps: callers' inferences and feedback are stored in a real
Postgres, then frozen, validated, curated, evaluated, judged, and what passed is rolled out by its real route,
a tenth of the traffic first. Only training and answering are made up: a model is a file of chances, which its
dataset decides by a response curve (`benchmarks/year/model.py`: each wrong example that gets into the dataset
costs, a repeated training has its luck), so that its true quality is known.

The year has a seed (`benchmarks/year/calendar.py`): tools, languages and prompt lengths drift, 12 % of the
feedback comes up to 40 nights late, and campaigns of three to six nights poison the log in nine ways; single
nights are empty, repeat the day before, train badly, or lose half of their answers to an engine's outage;
steps are killed in the middle, Postgres dies, the disk is full, the clock is set back. A step is run again
as often as the DAG would.

`false_promotions` are promoted models whose true share of right answers is below the champion's by more than
the gate's margin, on the target (0.05) or on what callers ask that night (0.1); `no_better_promotions` those
below it at all on the target, beside what the error budget allows a year. `quality_lost` is what the
champion's true share lacks of that of the best that had served by then, on average over the nights, and on
the worst one. A human is needed (`interventions`) where a night fails, however often its steps are run again,
and the next night fails at the same step: it does not mend itself. `nights_failed` are all that failed.
`never_learned` are rows that no night has seen. `*_growth` is the last 30 nights' figure over that of nights
61 to 90: of a cycle's bytes (without its model), of the log's (three months are kept), of curation's and of
all processor time.

`AGENTLOOP_YEAR_NIGHTS` (365) and `AGENTLOOP_YEAR_DIR` (var/year) say how many nights, and where; a year that
was ended goes on where it stood. Its picture is `year.html` there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.progress import track

from benchmarks.line import Line
from benchmarks.year import calendar, figures, picture
from benchmarks.year.nights import Year, never_learned
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.migrations import migrate

NIGHTS = 365
SEED = 7


def run() -> Iterator[Line]:
    """Play the nights that the ledger lacks, draw the picture, and tell."""
    home = Path(os.environ.get("AGENTLOOP_YEAR_DIR") or "var/year").absolute()
    wanted = int(os.environ.get("AGENTLOOP_YEAR_NIGHTS") or NIGHTS)
    home.mkdir(parents=True, exist_ok=True)
    first = _first_day(home)
    nights = calendar.year(SEED, first, NIGHTS)
    with LocalPostgres(home / "postgres") as postgres:
        dsn = postgres.dsn()
        migrate(dsn)
        year = Year(home, dsn, SEED, lambda: postgres.pid)
        year.begin()
        done = len(year.ledger())
        for number in track(range(done, wanted), "nights", total=wanted, completed=done):
            year.night(nights, number)
        ledger = year.ledger()[:wanted]
        lost = never_learned(year)
    (home / "year.html").write_text(picture.page(ledger), encoding="utf-8")
    yield from figures.lines(ledger, lost)


def _first_day(home: Path) -> datetime:
    """The year's first day: it ends with the day on which it was begun, as a log's months go by the clock."""
    path = home / "year.json"
    if not path.is_file():
        first = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=NIGHTS)
        path.write_text(json.dumps({"first": first.isoformat(), "seed": SEED}), encoding="utf-8")
    return datetime.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["first"])
