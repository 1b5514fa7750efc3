r"""How a question becomes a prompt: with a chat template and its switches, or as plain text, a system message or a
prompt template.

A model answers best in the format that it was trained with. So the format is stored with the Dataset, in
`sampling_metadata`, and with a model trained on it, in prompt_format.json, where evaluation finds it.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value

from ..models.hub_access import find_file, from_cache_if_unreachable
from ..text import name_columns, read_text, shown_value
from .caches import map_rows
from .dataset import read_samplings
from .prompt_sources import take_messages
from .switches import as_switches, find_switches, put_switches


FILE_NAME = "prompt_format.json"
STYLES = ("chat", "raw")
# From Qwen2.5-Math's evaluation
SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."
_TEMPLATES = {"chat": "{question}", "raw": "Question: {question}\nAnswer:"}


@dataclass(frozen=True)
class PromptFormat:
    r"""
    The format of a prompt.

    Args:
        prompt_style (`str`): `"chat"`: a user message, in the tokenizer's chat template. `"raw"`: plain text.
        prompt_template (`str`, *optional*): Text that contains {question}. If `None`, it is the question alone for
            `"chat"`, and for `"raw"` it is `"Question: {question}"` followed by a line `"Answer:"`.
        system_prompt (`str`, *optional*, defaults to `""`): System message of the style `"chat"`, empty for none.
        chat_template_kwargs (`dict[str, Any]`, *optional*, defaults to `{}`): Switches of the chat template, as JSON
            values. `None` means that rows differ in them.

    Raises:
        `ValueError`: If the value of a field is not allowed.

    Example:

    ```python
    >>> PromptFormat("raw").make_prompt("What is 2+2?")
    'Question: What is 2+2?\nAnswer:'
    >>> PromptFormat("chat", system_prompt="Think.").make_prompt("What is 2+2?")
    [{'role': 'system', 'content': 'Think.'}, {'role': 'user', 'content': 'What is 2+2?'}]

    ```
    """

    prompt_style: str
    prompt_template: str | None = None
    system_prompt: str = ""
    chat_template_kwargs: dict[str, Any] | None = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.prompt_style not in STYLES:
            raise ValueError(f"`prompt_style` must be one of {list(STYLES)}, got {self.prompt_style!r}.")
        if self.prompt_template is None:
            object.__setattr__(self, "prompt_template", _TEMPLATES[self.prompt_style])
        if "{question}" not in self.prompt_template:  # type: ignore[operator]  # text by now
            raise ValueError(f"`prompt_template` must have {{question}} in it, got {self.prompt_template!r}.")
        if self.prompt_style == "raw" and self.system_prompt:
            raise ValueError(
                "A raw prompt has no system message. Put its text into `prompt_template`, or set "
                "`prompt_style='chat'`."
            )
        if self.chat_template_kwargs is not None:
            object.__setattr__(self, "chat_template_kwargs", as_switches(self.chat_template_kwargs))
        if self.prompt_style == "raw" and self.chat_template_kwargs:
            raise ValueError(
                "A raw prompt has no chat template to switch. Remove `chat_template_kwargs`, or set "
                "`prompt_style='chat'`."
            )

    def make_prompt(self, question: str) -> str | list[dict[str, str]]:
        """The prompt of a question: text, or messages for a chat template."""
        text = self.prompt_template.replace("{question}", question)  # type: ignore[union-attr]  # text by now
        if self.prompt_style == "raw":
            return text
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": text}]

    def find_question(self, text: str) -> str:
        r"""
        Find the question in a raw prompt, or in a user message, of this format.

        Raises:
            `ValueError`: If the text has another format, or the template contains {question} several times.

        Example:

        ```python
        >>> PromptFormat("raw").find_question("Question: What is 2+2?\nAnswer:")
        'What is 2+2?'

        ```
        """
        start, *ends = self.prompt_template.split("{question}")  # type: ignore[union-attr]  # text by now
        end = ends[0]
        if len(ends) > 1 or not (text.startswith(start) and text.endswith(end) and len(text) >= len(start + end)):
            raise ValueError(f"The question cannot be found in {text!r} by the template {self.prompt_template!r}.")
        return text[len(start) : len(text) - len(end)]

    def __str__(self) -> str:
        template = "" if self.prompt_template == "{question}" else f" {self.prompt_template!r}"
        if self.prompt_style == "raw":
            return f"plain text{template}"
        system = f"the system prompt {self.system_prompt!r}" if self.system_prompt else "no system prompt"
        switches = ""
        if self.chat_template_kwargs is None:
            switches = " with chat_template_kwargs that differ"
        elif self.chat_template_kwargs:
            switches = f" with {json.dumps(self.chat_template_kwargs, ensure_ascii=False)}"
        return f"the chat template{switches} and {system}" + (f", as{template}" if template else "")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON-serializable values."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write the format to the folder of a model."""
        Path(folder, FILE_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def read_template(template: str | None, name: str = "prompt_template") -> str | None:
    """
    Read a prompt template, given as text or as a file that holds it, or `None`. `name` is the name of the setting.

    Raises:
        `ValueError`: If it does not contain {question}.
    """
    if template is None or "{question}" in template:
        return template
    if not Path(template).is_file():
        raise ValueError(f"`{name}` must be text with {{question}} in it, or a file with such text, got {template!r}.")
    text = read_text(template, "The prompt template")
    if "{question}" not in text:
        raise ValueError(f"The prompt template {template!r} has no {{question}} in it.")
    return text.removesuffix("\n")  # added by an editor


@from_cache_if_unreachable
def load_prompt_format(model: str, **kwargs: Any) -> PromptFormat | None:
    """
    Load the format stored with a model or an adapter, or `None` if there is none.

    Args:
        model (`str`): Id or path.
        kwargs: How to find the model on the Hub, such as `revision` and `token`.

    Raises:
        `ValueError`: If the file is damaged.
    """
    if (path := find_file(model, FILE_NAME, **kwargs)) is None:
        return None
    try:
        return PromptFormat(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"The {FILE_NAME} of {model!r} cannot be read: {error}. Fix it or remove it.") from error


def name_prompts(dataset: Dataset, column: str) -> Dataset:
    """
    Rename the column that holds the prompts to `prompt`.

    An answer at the end of a conversation is left out, with a warning. Where there is no column `prompt`, `messages`
    takes its place.

    Raises:
        `ValueError`: If there is no such column, or another column is named `prompt`.
    """
    if column == "prompt" and "prompt" not in dataset.column_names and "messages" in dataset.column_names:
        column = "messages"
    if column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {column!r}; it has {name_columns(dataset.column_names)}. Name the one that "
            "holds the prompts with `--prompt_column`."
        )
    if column == "prompt":
        return dataset
    if "prompt" in dataset.column_names:
        raise ValueError(f"The dataset has a column 'prompt' as well as {column!r}. Rename or remove one of them.")
    if isinstance(dataset.features[column], Value):
        return dataset.rename_column(column, "prompt")
    return take_messages(dataset, column)


def has_messages(dataset: Dataset) -> bool:
    """Whether the prompts are lists of messages. If rows have several types, one such row is enough."""
    feature = dataset.features["prompt"]
    if isinstance(feature, Value | List):
        return isinstance(feature, List)
    return any(isinstance(prompt, list | dict) for prompt in dataset["prompt"])


def make_prompts(dataset: Dataset, prompt_format: PromptFormat) -> Dataset:
    """
    Put the text in `prompt` into a format. A row without text gets an empty prompt.

    Raises:
        `ValueError`: If a prompt is not text. The message names the row.
    """
    if prompt_format == PromptFormat("raw", "{question}"):
        return dataset
    empty: list | str = [] if prompt_format.prompt_style == "chat" else ""

    def put(row: dict, index: int) -> dict:
        prompt = row["prompt"] or ""
        if not isinstance(prompt, str):
            raise ValueError(
                f"Row {index}: The content of `prompt` must be text, got {shown_value(prompt)}. Convert it."
            )
        return {"prompt": prompt_format.make_prompt(prompt) if prompt else empty}

    return map_rows(dataset, put, with_indices=True, desc="Making prompts")


def format_of_prompts(dataset: Dataset) -> PromptFormat | None:
    """
    Infer the format of a dataset's prompts: messages that hold one question each, all with the same system message.

    Returns `None` for plain text, whose template cannot be inferred, and for conversations of several turns. Switches
    of the chat template are left to [`agree_on_switches`].
    """
    if dataset.format["type"] == "custom":  # the user's transform
        return None
    systems = set()
    for prompt in filter(None, dataset.with_format(None)["prompt"]):
        if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
            return None
        messages = [(message.get("role"), message.get("content")) for message in prompt]
        roles = [role for role, _ in messages]
        if roles not in (["user"], ["system", "user"]) or not all(isinstance(text, str) for _, text in messages):
            return None
        systems.add(messages[0][1] if len(messages) == 2 else "")
    return PromptFormat("chat", system_prompt=systems.pop()) if len(systems) == 1 else None


def agree_on_switches(dataset: Dataset, prompt_format: PromptFormat) -> tuple[Dataset, PromptFormat]:
    """
    Prompts and their format with the same switches: rows without any get those of the format, and the format gets
    those that all rows share.

    Raises:
        `ValueError`: If both have switches, and they differ.
    """
    if prompt_format.prompt_style == "raw":
        return dataset, prompt_format
    dataset = put_switches(dataset, prompt_format.chat_template_kwargs)
    return dataset, replace(prompt_format, chat_template_kwargs=find_switches(dataset))


def format_of_steps(dataset: Dataset) -> PromptFormat | None:
    """
    The format that all samplings in a Dataset of steps share, or `None` if it is not known or they differ. If they
    differ only in the switches of the chat template, these are `None`.
    """
    known: list[Any] = [sampling.get("prompt_format") for sampling in read_samplings([dataset])]
    if not known or not all(known):
        return None
    formats = [PromptFormat(**each) for each in known]
    if any(each.chat_template_kwargs != formats[0].chat_template_kwargs for each in formats):
        formats = [replace(each, chat_template_kwargs=None) for each in formats]
    return formats[0] if all(each == formats[0] for each in formats) else None
