"""What old nights need no more goes, once a day, while no night trains.

**What it does.** `retain_cycles` lets go of the large files of cycles before the newest
`AGENTLOOP_RETAIN_NIGHTS` (default 30): models, adapters' weights, rows that nobody learned. `retain_log`
drops the log's months before the newest `AGENTLOOP_LOG_RETAIN_MONTHS`, where that is set.

**What breaks when it fails.** Nothing at once: the disk fills, until `room` lets no night begin.

**Who acts.** Whoever runs the nights.

**What to do.** `python -m training retain --dry-run` and `python -m grpc_server log retain --months 12
--dry-run` tell what would go, and why something stays. Then clear the failed task; both may be run at any
time.

**Settings**: `AGENTLOOP_RETENTION_CRON` (default `0 13 * * *`, UTC), those above, and those of
`nightly_loop`.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

from airflow.sdk import DAG, CronDataIntervalTimetable
from night_steps import TRAINING_POOL, command

with DAG(
    dag_id="retention",
    description="What old nights need no more goes; what serves, was best or is someone's to erase stays.",
    doc_md=__doc__,
    schedule=CronDataIntervalTimetable(
        os.environ.get("AGENTLOOP_RETENTION_CRON", "0 13 * * *"), timezone="UTC"
    ),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=24),
    allowed_run_types=["scheduled", "manual"],
    tags=["agentloop"],
) as dag:
    retain_cycles = command(
        "retain_cycles",
        "training retain",
        """
- **Does:** lets go of old cycles' large files.
- **Breaks when it fails:** the disk fills, slowly.
- **Who acts:** whoever runs the nights; an SRE if the live server does not answer (it knows what serves).
- **What to do:** the log says why: a server that is down, a cycle that is at work, a record that cannot be
read. Put that right and clear the task.
""",
        timeout=timedelta(hours=2),
        retries=3,
        pool=TRAINING_POOL,  # while an evaluation runs, what it reads stays
    )
    retain_log = command(
        "retain_log",
        """grpc_server log retain --months "$AGENTLOOP_LOG_RETAIN_MONTHS\"""",
        """
- **Does:** drops the log's old months, with their feedback and dead letters; what no night learned stays.
- **Skipped:** `AGENTLOOP_LOG_RETAIN_MONTHS` is not set.
- **Breaks when it fails:** the database grows.
- **Who acts:** whoever runs Postgres.
- **What to do:** the log says which month could not go; clear the task.
""",
        only_if="AGENTLOOP_LOG_RETAIN_MONTHS",
        timeout=timedelta(hours=2),
        retries=3,
    )
