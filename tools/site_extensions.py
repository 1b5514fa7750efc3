"""What the documentation's site needs beside zensical: equations without a script, and the docstrings' own dialect.

Used by `zensical.toml`; `make docs` builds the site.
"""

import re
from xml.etree.ElementTree import Element

import griffe
from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.treeprocessors import Treeprocessor


def math_fence(source: str, language: str, css_class: str, options: dict, md, **kwargs) -> str:
    """A ```` ```math ```` block, which GitHub shows as well, as MathML, which browsers draw by themselves."""
    return f'<div class="math" tabindex="0">{_mathml(source, "block")}</div>'


class MathSpan(InlineProcessor):
    """Mathematics in a line, which GitHub writes as a span of code between two dollar signs."""

    def handleMatch(self, m: re.Match, data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(_mathml(m[1], "inline")), m.start(0), m.end(0)


class EmptyHeaders(Treeprocessor):
    """An empty header of a table, in its corner, is a plain cell: screen readers announce headers."""

    def run(self, root: Element) -> None:
        for header in root.iter("th"):
            if not len(header) and not (header.text or "").strip():
                header.tag = "td"


class SiteExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(EmptyHeaders(md), "empty_headers", 0)
        md.inlinePatterns.register(MathSpan(r"\$`([^`]+)`\$", md), "math_span", 195)  # before plain code, at 190


def makeExtension(**kwargs) -> Extension:
    return SiteExtension(**kwargs)


class TransformersDocstrings(griffe.Extension):
    """
    The docstrings are written as those of transformers and TRL are: "name (`type`, *optional*, defaults to `x`):" and
    "[`~package.Name`]". This makes of them what mkdocstrings understands.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = translate(obj.docstring.value)


def translate(docstring: str) -> str:
    """
    >>> translate("beta (`float`, *optional*, defaults to `0.4`):\\n    See [`~trl.TrlParser`].")
    'beta (float):\\n    See `TrlParser`.'
    """
    docstring = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", docstring)
    # Groups of parameters are sections with a title
    docstring = re.sub(r"^Parameters:\n(?= *>)", "", docstring, flags=re.MULTILINE)
    # without the empty line behind it, with which it would be none
    docstring = re.sub(r"^ +> (Parameters.*)\n+", r"Parameters: \1\n", docstring, flags=re.MULTILINE)
    # A note, as GitHub writes it, is an admonition
    docstring = re.sub(r"^( *)> \[!(\w+)\]\n((?:\1>.*\n?)+)", _admonition, docstring, flags=re.MULTILINE)
    # One line a parameter; the signature already tells defaults
    head = re.compile(r"^( *\w+) \((.+?)\):(?=$| )", re.MULTILINE)
    docstring = head.sub(lambda match: f"{match[1]} ({_plain(match[2])}):", docstring)
    # The signature tells the type as well
    docstring = re.sub(r"^( *Returns:\n +)`[^`\n]+`: ", r"\1", docstring, flags=re.MULTILINE)
    return re.sub(r"^( +)`(\w+Error)`:", r"\1\2:", docstring, flags=re.MULTILINE)


def _mathml(source: str, display: str) -> str:
    return convert(source, display=display).replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em" />')


def _admonition(match: re.Match) -> str:
    text = re.sub(rf"^{match[1]}> ?", f"{match[1]}    ", match[3], flags=re.MULTILINE)
    text = re.sub(
        r"^((?! *- ).*\n)(?= *- )", r"\1\n", text, count=1, flags=re.MULTILINE
    )  # before a list, which needs it
    return f"{match[1]}!!! {match[2].lower()}\n\n{text}"


def _plain(annotation: str) -> str:
    return re.sub(r",? or |, (?=`)", " | ", annotation.partition(", *optional*")[0]).replace("`", "")
