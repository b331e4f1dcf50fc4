"""The actions of a BrowserGym agent as tools, and one action, written as a call in Python, as a tool call.

Names, parameters and types are those of `browsergym/core/action/functions.py` (a test compares them). The two
actions that end a task by speaking to the user are no tools with us: such a turn is the answer itself.
"""

from __future__ import annotations

import ast
from typing import Any

from grpc_server.domain.types import Message, Role, Tool, ToolCall

_BID = {"bid": {"type": "string"}}
_BUTTON = {"button": {"enum": ["left", "middle", "right"]}}
_KEYS = {"enum": ["Alt", "Control", "ControlOrMeta", "Meta", "Shift"]}
_MODIFIERS = {"modifiers": {"type": "array", "items": _KEYS}}
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def _tool(name: str, description: str, required: dict[str, Any], optional: dict[str, Any]) -> Tool:
    return Tool(
        name,
        description,
        {"type": "object", "properties": {**required, **optional}, "required": list(required)},
    )


ACTIONS: tuple[Tool, ...] = (
    _tool("noop", "Wait, in milliseconds.", {}, {"wait_ms": {"type": "number"}}),
    _tool(
        "fill",
        "Write into a field.",
        {**_BID, "value": {"type": "string"}},
        {"enable_autocomplete_menu": {"type": "boolean"}},
    ),
    _tool("check", "Check a box or radio button.", _BID, {}),
    _tool("uncheck", "Uncheck a box.", _BID, {}),
    _tool("select_option", "Select options by value or label.", {**_BID, "options": _TEXTS}, {}),
    _tool("click", "Click an element.", _BID, {**_BUTTON, **_MODIFIERS}),
    _tool("dblclick", "Double-click an element.", _BID, {**_BUTTON, **_MODIFIERS}),
    _tool("hover", "Move the pointer over an element.", _BID, {}),
    _tool("press", "Press keys on an element.", {**_BID, "key_comb": {"type": "string"}}, {}),
    _tool("focus", "Focus an element.", _BID, {}),
    _tool("clear", "Empty a field.", _BID, {}),
    _tool(
        "drag_and_drop",
        "Drag one element to another.",
        {"from_bid": {"type": "string"}, "to_bid": {"type": "string"}},
        {},
    ),
    _tool("scroll", "Scroll by pixels.", {"delta_x": {"type": "number"}, "delta_y": {"type": "number"}}, {}),
    _tool("goto", "Open an address.", {"url": {"type": "string"}}, {}),
    _tool("go_back", "Go back a page.", {}, {}),
    _tool("go_forward", "Go forward a page.", {}, {}),
    _tool("new_tab", "Open a tab.", {}, {}),
    _tool("tab_close", "Close the tab.", {}, {}),
    _tool("tab_focus", "Show another tab.", {"index": {"type": "integer"}}, {}),
    _tool("upload_file", "Upload files.", {**_BID, "file": _TEXTS}, {}),
)
SPOKEN = {"send_msg_to_user": "text", "report_infeasible": "reason"}
"""Actions that end a task, and the parameter that holds what is said."""

_BY_NAME = {tool.name: tool for tool in ACTIONS}


def answer(action: str) -> Message | None:
    """The turn that an action is; None if it is not one call of a known action with literal arguments."""
    try:
        call = ast.parse(action.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return None
        name = call.func.id
        given = [ast.literal_eval(each) for each in call.args]
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    if name in SPOKEN:
        names = [SPOKEN[name]]
    elif name in _BY_NAME:
        names = list(_BY_NAME[name].parameters["properties"])
    else:
        return None
    if len(given) > len(names):
        return None
    arguments = dict(zip(names, given, strict=False))
    if not set(named) <= set(names) - set(arguments):
        return None
    arguments |= named
    if name in SPOKEN:
        said = arguments.get(SPOKEN[name])
        return Message(Role.ASSISTANT, said) if isinstance(said, str) else None
    if not set(_BY_NAME[name].parameters["required"]) <= set(arguments):
        return None
    return Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments),))
