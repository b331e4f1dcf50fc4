"""Seven nights on the leaderboard's traffic, and one score on what nothing has read: `make learn`.

Each night is a turn of the loop as `make demo` plays it: services ask, show the right answers, and the real
DAG learns while slower traffic goes on. Night 1 asks the shorter questions, each later one longer ones; every
sixth is one that no function fits, and is answered in words. At the end the version in service is scored on
`simple_python` 300-399 by the leaderboard's own checker, once (`training.sealed`).

It takes hours, and may be ended at any time: `nights/` in the state folder (var/learn) says which night is
done, which of its questions were asked, and which cycle it is; the next `make learn` goes on there.

Which file answers what: `week` what is asked on which night, `diary` what was done, `conductor` the order of
things, `figures` what learn.json holds, `picture` how the curve is drawn, `table` how it looks in a terminal.
"""
