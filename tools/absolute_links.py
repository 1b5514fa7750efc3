"""
Make README.md work on an index such as PyPI, which holds no other file: links and pictures get the address of the
repository, and pyproject.toml names it.

The release does so before it builds:

    python tools/absolute_links.py "$GITHUB_SERVER_URL/$GITHUB_REPOSITORY" "$GITHUB_REF_NAME"
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def make_links_absolute(text: str, repository: str, ref: str) -> str:
    """
    >>> make_links_absolute("[a](b.md#c) ![d](e.png) [f](https://g.org)", "https://h.org/i", "v1")
    '[a](https://h.org/i/blob/v1/b.md#c) ![d](https://h.org/i/raw/v1/e.png) [f](https://g.org)'
    """
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{repository}/raw/{ref}/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/{ref}/", text)


def add_urls(project: str, repository: str, ref: str) -> str:
    """
    >>> print(add_urls("[project.urls]\\nPaper = 'p'\\n", "https://h.org/i", "v1"))
    [project.urls]
    Repository = "https://h.org/i"
    Documentation = "https://h.org/i/blob/v1/docs/index.md"
    Changelog = "https://h.org/i/blob/v1/CHANGELOG.md"
    Paper = 'p'
    <BLANKLINE>
    """
    urls = {"Repository": "", "Documentation": f"/blob/{ref}/docs/index.md", "Changelog": f"/blob/{ref}/CHANGELOG.md"}
    lines = "".join(f'{name} = "{repository}{path}"\n' for name, path in urls.items())
    return project.replace("[project.urls]\n", f"[project.urls]\n{lines}", 1)


def main(repository: str, ref: str) -> None:
    for name, change in (("README.md", make_links_absolute), ("pyproject.toml", add_urls)):
        path = ROOT / name
        path.write_text(change(path.read_text(encoding="utf-8"), repository, ref), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
