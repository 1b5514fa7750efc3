"""Render the messages of a row as text, with the expert's chat template.

A template can omit part of its input without an error, so a row that is not rendered in full is refused.
"""

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

from ..text import shown_value
from .switches import without_nulls


# How templates print today's date
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# Switches that tell Qwen3 and SmolLM3 whether to think. Templates remove them
_SWITCH = re.compile(r"/(no_)?think\b")
_THINK, _END_OF_THINK = "<think>", "</think>"
_REASONING = ("reasoning_content", "reasoning", "thinking")


def render_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, date: datetime | None = None
) -> dict[str, str]:
    """
    Render `prompt`, and `completion` if there is one, as text.

    Args:
        row (`dict`): Text or messages. With messages also `tools` and `chat_template_kwargs`, if there are any.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's.
        date ([`~datetime.datetime`], *optional*): Date for chat templates that print today's date.

    Raises:
        `ValueError`: If the row breaks TRL's conventions, or the template omits part of it.
    """
    _check_types(row)
    prompt = row["prompt"]
    if len(prompt) == 0:
        return {"prompt": ""}
    text = {key: row[key] for key in ("prompt", "completion", "chat_template_kwargs") if row.get(key) is not None}
    if isinstance(prompt, str):
        return text
    # Arrow fills in nulls if the rows of a dataset have different keys
    for key, value in text.items():
        plain = value if key == "chat_template_kwargs" else [_as_plain_message(message, key) for message in value]
        text[key] = without_nulls(plain)
    tools = _tools_of(row)
    template = tokenizer.get_chat_template(tools=tools or None)
    template = _TODAY.sub(lambda call: json.dumps((date or datetime.now()).strftime(call[2])), template)
    try:
        rendered = apply_chat_template(text, tokenizer, tools=tools, chat_template=template)
    except (TemplateError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # in the template's code
        reason = str(error).rstrip(".")
        raise ValueError(f"The chat template refuses the messages {shown_value(prompt)}: {reason}.") from None
    for column, texts in {"prompt": _texts_of_prompt(text["prompt"], tools), **_texts_of_completion(text)}.items():
        for given in texts:
            if column == "completion" and rendered["prompt"].rstrip().endswith(_THINK):  # the prompt opens the answer
                given = given.lstrip().removeprefix(_THINK)
            if not _holds(rendered[column], given):
                raise ValueError(
                    f"The chat template omits {given!r} of `{column}`, so the models would not see it. Set another "
                    "`chat_template`, give the row as text, or remove the omitted part."
                )
    return rendered


def _check_types(row: dict[str, Any]) -> None:
    """Refuse a row whose prompt, completion and switches are not of TRL's types, or do not fit together."""
    prompt, completion = row["prompt"], row.get("completion")
    if not isinstance(prompt, str | list):
        raise ValueError(
            f"`prompt` must be text or a list of messages, got {shown_value(prompt)}. Filter such rows out, or "
            "convert them."
        )
    if "completion" in row and not isinstance(completion, str | list):
        raise ValueError(
            f"`completion` must be text or a list of one message, got {shown_value(completion)}. Filter such rows "
            "out, or remove the column to let the expert answer."
        )
    if len(prompt) == 0:
        return
    conversational = is_conversational({"prompt": prompt}) and isinstance(completion, list | None)
    if not conversational and not (isinstance(prompt, str) and isinstance(completion, str | None)):
        raise ValueError(
            "`prompt` and `completion` must both be text or both be lists of messages with `role` and `content`, got "
            f"{shown_value(prompt)}" + (f" and {shown_value(completion)}." if "completion" in row else ".")
        )
    if not conversational:
        return
    if completion is not None and len(completion) != 1:
        raise ValueError(f"`completion` must be one assistant message, got {len(completion)} of them.")
    if completion and isinstance(completion[0], dict) and completion[0].get("role") not in ("assistant", None):
        raise ValueError(
            f"`completion` must be one assistant message, got {shown_value(completion[0])}. Filter such rows out."
        )
    switches = row.get("chat_template_kwargs")
    if not isinstance(switches, dict | None):
        raise ValueError(f"`chat_template_kwargs` must be a dict, got {shown_value(switches)}. Convert it.")


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template of the tokenizer prints today's date."""
    return _TODAY.search(_templates_of(tokenizer)) is not None


def say_unread(tokenizer: PreTrainedTokenizerBase, switches: Iterable[str]) -> str:
    """A warning that names those keys of `chat_template_kwargs` that no chat template mentions, or an empty text."""
    templates = _templates_of(tokenizer)
    unread = sorted({name for name in switches if not re.search(rf"\b{re.escape(name)}\b", templates)})
    if not unread:
        return ""
    return (
        f"The chat template does not read {' and '.join(map(repr, unread))} of 'chat_template_kwargs', so the prompts "
        "are the same without it. Correct the name, or remove it."
    )


def _templates_of(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())  # several by name


def _tools_of(row: dict[str, Any]) -> list[Any]:
    tools = row.get("tools") or []
    if not tools:
        return []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or []
        except ValueError as error:
            raise ValueError(f"`tools` is not JSON: {error}. Repair it.") from None
    if not isinstance(tools, list):
        raise ValueError(f"`tools` must be a list, got {shown_value(tools)}. Convert it.")
    return tools if isinstance(row["tools"], str) else without_nulls(tools)


def _as_plain_message(message: Any, column: str) -> dict[str, Any]:
    # A template prints any value, including numbers and lists
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"A message of `{column}` has no role: {shown_value(message)}. Filter such rows out.")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(
            f"`tool_calls` of a message of `{column}` must be a list of calls, got {shown_value(calls)}. Convert it."
        )
    content = message.get("content")
    if not content and content != "" and not calls:
        raise ValueError(f"A message of `{column}` has no content: {shown_value(message)}. Filter such rows out.")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"A message of `{column}` has a part that is not text: {shown_value(part)}. Filter such rows "
                    "out: these models read only text."
                )
        return {**message, "content": "".join(part["text"] for part in content)}
    if not isinstance(content, str | None):
        raise ValueError(
            f"The content of a message of `{column}` must be text, got {shown_value(content)}. Convert it."
        )
    return message


def _texts_of_prompt(messages: list[dict[str, Any]], tools: list[Any]) -> Iterator[str]:
    """The texts of a prompt that must be rendered. Reasoning of earlier turns is not: most templates drop it."""
    for tool in tools:
        yield from _names_of([tool])
    for message in messages:
        calls = message.get("tool_calls") or []
        yield from _names_of(calls)
        # Some templates drop the content of a message with calls
        if not calls and "content" in message:
            yield (
                message["content"].rpartition(_END_OF_THINK)[2]
                if message["role"] == "assistant"
                else message["content"]
            )


def _texts_of_completion(text: dict[str, Any]) -> dict[str, list[str]]:
    if "completion" not in text:
        return {}
    (message,) = text["completion"]
    given = [message.get("content"), *(message.get(name) for name in _REASONING)]
    return {"completion": [each for each in given if isinstance(each, str)] + [*_names_of(message.get("tool_calls"))]}


def _names_of(functions: Any) -> Iterator[str]:
    for each in functions or []:
        function = each.get("function", each) if isinstance(each, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield function["name"]


def _holds(rendered: str, given: str) -> bool:
    """Whether a rendered text contains another, verbatim or as JSON. White space is ignored: templates trim it."""

    def bare(text: str) -> str:
        return "".join(_SWITCH.sub("", text).split())

    rendered = bare(rendered)
    as_json = (json.dumps(given, ensure_ascii=ensure_ascii)[1:-1] for ensure_ascii in (False, True))
    return any(bare(each) in rendered for each in (given, *as_json))
