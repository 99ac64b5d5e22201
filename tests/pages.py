"""Contents of the pages of documentation: links, headings, commands and blocks of code."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES += sorted(ROOT.glob("docs/*.md"))
LANGUAGES = ("sh", "python", "text")


class Block(NamedTuple):
    """A fenced block: its language, the line of its fence, and its text."""

    page: Path
    language: str
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; a fence that is not closed is an error."""
    result = []
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            inside = []
            for _, text in lines:
                if text.startswith("```"):
                    break
                inside.append(text)
            else:
                raise AssertionError(f"{page.name}:{number}: a block that is not closed")
            result.append(Block(page, line[3:].strip(), number, "\n".join(inside) + "\n"))
    return result


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block; a backslash joins lines, comments are left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Targets of links and pictures, not those in code."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^()\s]+)\)", text)


def inline_code(page: Path) -> list[str]:
    """Texts between backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """Targets of `#...`: GitHub's names of the headings."""
    names: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = 0
        while (unique := f"{name}-{count}" if count else name) in names:
            count += 1
        names.add(unique)
    return names
