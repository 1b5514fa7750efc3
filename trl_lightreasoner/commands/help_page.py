"""Format of `--help`: sections of flags, short names of values, and defaults if there are any."""

import argparse
from collections.abc import Sequence


# Placeholder of a flag's value, by the name of its type
_METAVARS = {"string_to_bool": "true|false", "int": "N", "float": "X"}
# Sections of flags, by the beginnings of their names
_SECTIONS = {
    "LoRA": ("use_peft", "lora_", "use_rslora", "use_dora"),
    "quantization": ("load_in_", "amateur_load_in_", "bnb_", "use_bnb_"),
    "Hub": ("push_to_hub", "hub_"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults if there are any, and keeps the line breaks of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, bool):  # in the words that the flag takes
            return f"{action.help} (default: {str(action.default).lower()})"
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def metavar(action: argparse.Action) -> str:
    """The placeholder of a flag's value."""
    return _METAVARS.get(getattr(action.type, "__name__", ""), "TEXT")


def make_sections(
    actions: Sequence[argparse.Action], common: Sequence[str] | None
) -> tuple[dict[str, list[argparse.Action]], list[argparse.Action]]:
    """
    The sections of a help page, and the actions that are in none of them.

    Args:
        actions (`Sequence[argparse.Action]`): All actions that may be shown.
        common (`Sequence[str]`, *optional*): Fields of the first section, in order. If `None`, it has all fields that
            are in no other section.
    """

    def title_of(action: argparse.Action) -> str:
        return next((title for title, names in _SECTIONS.items() if action.dest.startswith(names)), "settings")

    sections = {title: [each for each in actions if title_of(each) == title] for title in ("settings", *_SECTIONS)}
    if common is None:
        return sections, []
    names = ["help", "help_all", "config", *common]
    others = [each for each in sections["settings"] if each.dest not in names]
    sections["settings"] = [each for name in names for each in actions if each.dest == name]
    return sections, others
