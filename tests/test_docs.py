"""Every page of the documentation has both languages, and every relative link in it leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IN_ONE_FILE = {"experiments.md"}
"""Pages whose Chinese part stands at their end."""
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in IN_ONE_FILE)
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "README_zh.md", "CHANGELOG.md", "CONTRIBUTING.md", "data/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ENGLISH = [path for path in PAGES if not path.name.endswith(".zh.md")]


def without_code(text: str) -> str:
    """The text without fenced blocks and inline code, where brackets are no links and `#` is no heading."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def headings(text: str) -> list[str]:
    """Headings with their marks, `## Files`."""
    blocks = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#{1,6} .+$", blocks, re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What links may name after `#`, as GitHub makes it of a heading."""
    found = (re.sub(r"^#+ ", "", line).strip().lower() for line in headings(path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in found}


def broken_links(path: Path) -> list[str]:
    """Relative links of a document that name no file, or no heading of it."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


@pytest.mark.parametrize("path", ENGLISH, ids=lambda path: path.name)
def test_every_page_has_both_languages(path: Path) -> None:
    chinese = path.with_suffix(".zh.md")
    assert chinese.is_file(), f"docs/{path.name} has no Chinese page"
    texts = path.read_text(encoding="utf-8"), chinese.read_text(encoding="utf-8")
    assert f"[中文]({chinese.name})" in texts[0]
    assert f"[English]({path.name})" in texts[1]
    levels = [[line.split()[0] for line in headings(text)] for text in texts]
    assert levels[0] == levels[1], "the two languages have different sections"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_readme_leads_to_every_page(path: Path) -> None:
    readme = ROOT / ("README_zh.md" if path.name.endswith(".zh.md") else "README.md")
    text = without_code(readme.read_text(encoding="utf-8"))
    assert f"](docs/{path.name}" in text, f"{readme.name} does not lead to docs/{path.name}"


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# One\n\n## 二、Two: x\n\n[a](page.md#one) [b](#二two-x) [c](gone.md) [d](#three) `[e](f.md)`\n"
    page.write_text(text, encoding="utf-8")
    assert broken_links(page) == ["gone.md", "#three"]
