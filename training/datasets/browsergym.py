"""Trajectories of BrowserGym agents (WebArena, MiniWoB++, WorkArena ...), as AgentRewardBench publishes them.

Each is a JSON object: a goal, the steps with what the page was and what was done, and what it came to.

Only a trajectory that reached its goal teaches, and of it no action that the page refused. The model sees the
goal, what was done before, and the page as it is now: former pages would not fit into what it reads.
BrowserGym's own files are pickles, which run what they please when they are read; they are not.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from grpc_server.domain.types import ChatRequest, Message, Role
from training.datasets.browser_actions import ACTIONS, answer
from training.datasets.shown import Published, Record, Shown

PAGE = "https://huggingface.co/datasets/McGill-NLP/agent-reward-bench"


class _Step(Published):
    action: str | None = None
    url: str = ""
    last_action_error: str | None = None
    axtree: str = ""
    axtree_pruned: str | None = None

    @property
    def page(self) -> str:
        return f"{self.url}\n{self.axtree if self.axtree_pruned is None else self.axtree_pruned}".strip()


class _Summary(Published):
    cum_reward: float
    err_msg: str | None = None


class _Trajectory(Published):
    benchmark: str
    experiment: str = ""
    seed: int | None = None
    goal: str = Field(min_length=1)
    summary_info: _Summary
    steps: list[_Step] = Field(min_length=1)


def recognises(record: Record) -> bool:
    """Whether it has a goal and steps."""
    return "goal" in record and isinstance(record.get("steps"), list) and "benchmark" in record


def shown(record: Record) -> Iterator[Shown | str]:
    """What each step of a trajectory shows.

    Raises:
        pydantic.ValidationError: naming the field that is not as the page says.
    """
    read = _Trajectory.model_validate(record)
    if read.summary_info.cum_reward <= 0 or read.summary_info.err_msg:
        yield "failed_trajectory"
        return
    session = f"{read.benchmark} {read.experiment} {read.seed} {read.goal}"
    done: list[Message] = []
    for step, after in zip(read.steps, [*read.steps[1:], None], strict=True):
        if step.action is None:
            continue
        said = answer(step.action)
        if said is None:
            yield "unknown_action"
            return  # what follows builds on what cannot be told
        if after is not None and after.last_action_error:
            yield "failed_action"
        else:
            yield Shown(session, ChatRequest(_asked(read.goal, done, step), tools=ACTIONS), said)
        if said.tool_calls:
            outcome = (after.last_action_error if after else None) or "done"
            done += [said, Message(Role.TOOL, outcome, tool_name=said.tool_calls[0].name)]


def _asked(goal: str, done: list[Message], step: _Step) -> tuple[Message, ...]:
    if not done:
        return (Message(Role.USER, f"{goal.strip()}\n\n{step.page}"),)
    *before, last = done
    page = Message(Role.TOOL, f"{last.content}\n\n{step.page}", tool_name=last.tool_name)
    return (Message(Role.USER, goal.strip()), *before, page)
