"""The suggestion of a next command, which a command prints at its end."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any


def flags_of(args: Any, without: Sequence[str] = ()) -> list[str]:
    """The flags that reproduce a dataclass, for another command with the same flags."""
    flags: list[str] = []
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in without or value is None or value == field.default:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{field.name}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in values)]
    return flags


def next_command(name: str, *flags: str, label: str = "Next") -> str:
    """The line that suggests the next command."""
    return f"{label}: {shlex.join(['lightreasoner', name, *flags])}"
