"""WebArena's execution traces: `render_<task id>.html` a task, and `merge_log.txt`, which says what passed.

A trace shows, step by step, the address, the page as an accessibility tree, what the agent said, and the
action that was read out of it. Only a trace that passed teaches. As with BrowserGym, the model sees the goal,
what was done before, and the present page; `stop` with an answer is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from grpc_server.domain.types import ChatRequest, Message, Role, Tool, ToolCall
from training.datasets.shown import Published, Read, Record, Shown

PAGE = "https://github.com/web-arena-x/webarena/blob/main/resources/README.md"

_LOGS = ("merge_log.txt", "merged_log.txt")
_PASSED = re.compile(r"\[Result\] \(PASS\) \S*?(\d+)\.json")
_INTENT = re.compile(r"^intent: (.+)$", re.MULTILINE)
_TASK = re.compile(r"^task_id: (\d+)$", re.MULTILINE)
_WRITTEN = re.compile(r"```(.+?)```", re.DOTALL)
_WHERE = re.compile(r" where \[\d+\] is .*\Z", re.DOTALL)
_ID = {"id": {"type": "string"}}


def _tool(name: str, description: str, properties: dict[str, Any], optional: dict[str, Any]) -> Tool:
    schema = {"type": "object", "properties": {**properties, **optional}, "required": list(properties)}
    return Tool(name, description, schema)


ACTIONS: tuple[Tool, ...] = (
    _tool("click", "Click an element.", _ID, {}),
    _tool(
        "type",
        "Write into a field, and press Enter unless told not to.",
        {**_ID, "text": {"type": "string"}},
        {"press_enter": {"type": "boolean"}},
    ),
    _tool("hover", "Move the pointer over an element.", _ID, {}),
    _tool("press", "Press keys.", {"keys": {"type": "string"}}, {}),
    _tool("scroll", "Scroll the page.", {"direction": {"enum": ["up", "down"]}}, {}),
    _tool("goto", "Open an address.", {"url": {"type": "string"}}, {}),
    _tool("new_tab", "Open a tab.", {}, {}),
    _tool("tab_focus", "Show another tab.", {"index": {"type": "string"}}, {}),
    _tool("close_tab", "Close the tab.", {}, {}),
    _tool("go_back", "Go back a page.", {}, {}),
    _tool("go_forward", "Go forward a page.", {}, {}),
)
_BY_NAME = {tool.name: tool for tool in ACTIONS}
_RENAMED = {"page_focus": "tab_focus"}


class _Trace(Published):
    html: str


def recognises(record: Record) -> bool:
    """Whether it is a page that shows predicted actions."""
    return isinstance(record.get("html"), str) and "predict_action" in record["html"]


def logs_of(path: Path) -> tuple[Path, ...]:
    """Where the logs of a trace may be."""
    return tuple(path.parent / name for name in _LOGS) if path.suffix == ".html" else ()


def opened(path: Path) -> Read:
    """Reads traces of which the log beside them says that they passed."""
    logs = [log.read_text("utf-8", errors="replace") for log in logs_of(path) if log.is_file()]
    passed = frozenset(int(task) for log in logs for task in _PASSED.findall(log))
    return lambda record: shown(record, passed)


def shown(record: Record, passed: frozenset[int]) -> Iterator[Shown | str]:
    """What each step of a trace shows, if its task is among those that passed.

    Raises:
        pydantic.ValidationError: if it is no page.
    """
    page = _Page()
    page.feed(_Trace.model_validate(record).html)
    page.close()
    intent, task = _INTENT.search(page.settings), _TASK.search(page.settings)
    if intent is None or task is None or not page.steps:
        yield "no_demonstration"
        return
    if int(task[1]) not in passed:
        yield "failed_trajectory"
        return
    done: list[Message] = []
    for step in page.steps:
        said = answer(step)
        if said is None:
            yield "unknown_action"
            return  # what follows builds on what cannot be told
        yield Shown(f"webarena.{task[1]}", ChatRequest(_asked(intent[1], done, step), tools=ACTIONS), said)
        if said.tool_calls:
            done += [said, Message(Role.TOOL, "done", tool_name=said.tool_calls[0].name)]


def answer(step: dict[str, str]) -> Message | None:
    """The turn that a step is: what the agent wrote between its marks, else what was read out of it."""
    written = _WRITTEN.findall(step.get("raw_parsed_prediction", ""))
    text = written[-1] if written else _WHERE.sub("", step.get("parsed_action", ""))
    name, _, rest = text.strip().partition(" ")
    name = _RENAMED.get(name, name)
    given = re.findall(r"\[(.*?)\](?=\s*\[|\s*\Z)", rest, re.DOTALL)
    if name == "stop":
        return Message(Role.ASSISTANT, given[0]) if given and given[0].strip() else None
    tool = _BY_NAME.get(name)
    if tool is None:
        return None
    names, required = list(tool.parameters["properties"]), len(tool.parameters["required"])
    if not required <= len(given) <= len(names):
        return None
    arguments: dict[str, Any] = dict(zip(names, given, strict=False))
    if "press_enter" in arguments:
        arguments["press_enter"] = arguments["press_enter"] != "0"
    return Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments),))


def _asked(goal: str, done: list[Message], step: dict[str, str]) -> tuple[Message, ...]:
    url = step.get("url", "").strip().removeprefix("URL: ")
    page = f"{url}\n{step.get('state_obv', '').strip()}"
    if not done:
        return (Message(Role.USER, f"{goal.strip()}\n\n{page}"),)
    *before, last = done
    return (
        Message(Role.USER, goal.strip()),
        *before,
        Message(Role.TOOL, f"{last.content}\n\n{page}", tool_name=last.tool_name),
    )


class _Page(HTMLParser):
    """The settings of a trace's task, and of each step the texts by the class of their element."""

    _KEPT = ("url", "state_obv", "raw_parsed_prediction", "parsed_action")

    def __init__(self) -> None:
        super().__init__()
        self.settings = ""
        self.steps: list[dict[str, str]] = []
        self._into = "settings"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("class")
        if name == "url":
            self.steps.append({})
        if tag in ("div", "h2", "h3"):
            self._into = name if name in self._KEPT and self.steps else ""

    def handle_data(self, data: str) -> None:
        if self._into == "settings":
            self.settings += data
        elif self._into:
            self.steps[-1][self._into] = self.steps[-1].get(self._into, "") + data
