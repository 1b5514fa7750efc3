"""
The built site, page by page: every link within it leads somewhere, and no GitHub note is left as text.

`make docs` runs it.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


SITE = Path(__file__).parents[1] / "site"


class Page(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []
        self._code = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._code += tag in ("pre", "code", "script")
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("pre", "code", "script")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.text.append(data)


def check_site(site: Path) -> list[str]:
    """What is wrong with a built site, in a sentence each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(site)
        if "[!" in "".join(page.text):
            wrong.append(f"{name}: a note is left as text: '[!'")
        if name.name == "404.html":  # served for any address, so that its links are absolute
            continue
        for link in page.links:
            scheme, server, target, _, anchor = urlsplit(link)
            if scheme or server:
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            if not file.is_file():
                wrong.append(f"{name}: {link} leads to no file")
            elif anchor and file in pages and unquote(anchor) not in pages[file].ids:
                wrong.append(f"{name}: {link} leads to no place in its page")
    return wrong


def main() -> int:
    wrong = check_site(SITE)
    for sentence in wrong:
        print(sentence)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
