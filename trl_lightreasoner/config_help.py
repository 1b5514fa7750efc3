"""The help of a config's flags, made from its docstring, so that each field is explained once."""

import inspect
import re
from dataclasses import MISSING, Field, field
from types import MappingProxyType
from typing import TypeVar


T = TypeVar("T")

# A parameter of a docstring: its name, and the text below it
_ENTRY = re.compile(r"^ {4}(\w+) \(.+\):\n((?: {8}.+\n?)+)", re.MULTILINE)


def help_from_docstring(config: type[T]) -> type[T]:
    """
    Give the fields of a dataclass the `help` that [`~transformers.HfArgumentParser`] shows: what the docstring says
    under "Parameters", without the marks of links and quoted text. Other metadata of a field is kept.

    Use it below `@dataclass`, which reads the fields.

    Example:

    ```python
    >>> from dataclasses import dataclass, fields
    >>> @dataclass
    ... @help_from_docstring
    ... class Config:
    ...     '''
    ...     Settings.
    ...
    ...     Parameters:
    ...         style (`str`, *optional*, defaults to `"chat"`):
    ...             The style, `"chat"` or `"raw"`, of [`~transformers.Trainer`].
    ...     '''
    ...
    ...     style: str = "chat"
    >>> fields(Config)[0].metadata["help"]
    "The style, 'chat' or 'raw', of `Trainer`."

    ```
    """
    for name, text in _ENTRY.findall(inspect.cleandoc(config.__doc__ or "")):
        default = vars(config).get(name, MISSING)
        declared: Field = default if isinstance(default, Field) else field(default=default)
        declared.metadata = MappingProxyType({"help": _as_help(text), **declared.metadata})
        setattr(config, name, declared)
    return config


def _as_help(text: str) -> str:
    text = re.sub(r"\[`~?(?:[a-z]\w*\.)*([A-Z][\w.]*)`\]", r"`\1`", text)
    text = re.sub(r"""`["'](.*?)["']`""", r"'\1'", text)
    return " ".join(text.split())
