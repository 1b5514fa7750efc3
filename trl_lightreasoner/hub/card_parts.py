"""What the cards share: tables, links, sections that are replaced, and the description of a sampling."""

import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .. import __version__
from ..models.provenance import describe_quantization, hub_id, public_name
from ..steps.prompt_format import PromptFormat
from ..text import printable


PAPER_ID = "2510.07962"
CITATION = """@inproceedings{wang-etal-2026-lightreasoner,
  title     = {{L}ight{R}easoner: Can Small Language Models Teach Large Language Models Reasoning?},
  author    = {Wang, Jingyuan and Chen, Yankai and Li, Zhonghang and Huang, Chao},
  booktitle = {Proceedings of the 64th Annual Meeting of the Association for Computational Linguistics
               (Volume 1: Long Papers)},
  year      = {2026},
  pages     = {2635--2663},
  url       = {https://aclanthology.org/2026.acl-long.122/}
}"""
TAGS = ["trl", "light-reasoner"]
LINES = "\n\t"  # control characters that a card may contain

# Settings of the label, which are shown only if they differ from the paper's
_PAPERS_LABEL = {"contrast_strength": 1.0, "expert_anchor": 0.0}


def sampling_rows(sampling: dict[str, Any]) -> list[tuple[str, str]]:
    settings = sampling.get("settings") or {}
    rows = [(f"{role} (pi_{role[0].upper()})", _describe(sampling.get(role))) for role in ("expert", "amateur")]
    if reading := sampling.get("amateur_reading"):
        rows.append(("how the amateur was read", reading["description"]))
    for name, value in settings.items():
        if name in _PAPERS_LABEL and value == _PAPERS_LABEL[name]:
            continue
        if value is not None or name in ("alpha", "beta"):
            shown = "not known" if value is None else show(value)
            rows.append((name, f"{shown} nats" if name == "beta" and value is not None else shown))
    if sampling.get("per_device_batch_size"):
        rows.append(("batch size", show(sampling["per_device_batch_size"])))
    source = sampling.get("prompt_source") or {}
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    rows.append(
        ("source of the prompts", f"{link(source.get('dataset'), 'datasets/')}{revision}" if source else "not known")
    )
    if prompt_format := sampling.get("prompt_format"):
        rows.append(("prompt format", str(PromptFormat(**prompt_format))))
    version = (sampling.get("versions") or {}).get("trl-lightreasoner")
    return rows + ([("trl-lightreasoner", version)] if version else [])


def _describe(model: dict[str, Any] | None) -> str:
    if not model:
        return "not known"
    parts = [link(model.get("model"))]
    if isinstance(model.get("adapter"), str):
        parts.append(f"adapter {link(model['adapter'])}")
    if model.get("revision"):
        parts.append(f"revision {model['revision']}")
    parts += [model["dtype"]] if model.get("dtype") else []
    parts += [describe_quantization(model["quantization"])] if model.get("quantization") else []
    parts += [f"{model['attention']} attention"] if model.get("attention") else []
    parts += [f"on {model['device']}"] if model.get("device") else []
    return ", ".join(parts)


def versions() -> dict[str, str]:
    packages = ("trl", "transformers", "peft", "torch", "datasets", "tokenizers")
    return {"trl-lightreasoner": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def languages_of(samplings: Iterable[dict[str, Any]]) -> list[str] | None:
    """The languages of the prompts of some samplings, if all of them are known."""
    names: list[str] = []
    for sampling in samplings:
        language = (sampling.get("prompt_source") or {}).get("language")
        if language is None:
            return None
        names += [each for each in ([language] if isinstance(language, str) else language) if isinstance(each, str)]
    return list(dict.fromkeys(names)) or None


def show(value: Any) -> str:
    """
    A value as text, with thousands separators and without trailing zeros.

    Example:

    ```python
    >>> show(1024), show(1e-4), show(1.0), show(True)
    ('1,024', '0.0001', '1', 'True')

    ```
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(getattr(value, "value", value))  # of an enum
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def link(name: str | None, kind: str = "") -> str:
    found = hub_id(name)
    return f"[{found}](https://huggingface.co/{kind}{found})" if found else f"`{public_name(name) or 'not named'}`"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_part(text: str, name: str, part: str, before: str | None = None) -> str:
    """`text` with the section `name` replaced. A new section goes before the text `before`, or else to the end."""
    start, end = f"<!-- lightreasoner: {name} -->", f"<!-- lightreasoner: end of {name} -->"
    part = f"{start}\n{printable(part, keep=LINES)}\n{end}"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: part, text, count=1)
    at = text.find(before) if before else -1
    if at >= 0:
        return f"{text[:at].rstrip()}\n\n{part}\n{text[at:]}"
    return f"{text.rstrip()}\n\n{part}\n".lstrip() if text.strip() else f"{part}\n"
