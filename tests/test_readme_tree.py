"""The file tree in both READMEs is the one on disk: a file missing from it, or listed and gone, is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

READMES = ("README.md", "README_zh.md")


def listed_paths(text: str) -> list[str]:
    """Paths of the tree between the TREE markers; two blanks of indentation per level, folders end with a slash."""
    found = re.search(r"<!-- TREE -->\n```text\n(.*?)\n```\n<!-- /TREE -->", text, re.DOTALL)
    assert found, "no tree between <!-- TREE --> and <!-- /TREE -->"
    folders: list[str] = []
    paths = []
    for line in found[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip(" "))) // 2
        assert depth <= len(folders), f"'{line}' is indented deeper than the folder above it"
        folders = folders[:depth]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


@pytest.mark.parametrize("readme", READMES)
def test_every_file_of_the_package_is_in_the_tree(repo_root: Path, readme: str) -> None:
    listed = set(listed_paths((repo_root / readme).read_text(encoding="utf-8")))
    sources = [*(repo_root / "finetune").rglob("*.py"), *(repo_root / "finetune").rglob("*.yaml")]
    sources += [*(repo_root / "script").glob("*.sh"), *(repo_root / "bench").glob("*.py")]
    files = {str(path.relative_to(repo_root)) for path in sources if path.stat().st_size}  # empty: __init__.py
    assert not files - listed, f"add to the tree of {readme}: {sorted(files - listed)}"


@pytest.mark.parametrize("readme", READMES)
def test_every_listed_path_exists_once(repo_root: Path, readme: str) -> None:
    listed = listed_paths((repo_root / readme).read_text(encoding="utf-8"))
    gone = [path for path in listed if not (repo_root / path).exists()]
    assert not gone, f"{readme} lists what is not there: {gone}"
    assert len(set(listed)) == len(listed), f"{readme} lists a path twice"


def test_both_languages_list_the_same_files(repo_root: Path) -> None:
    english, chinese = (listed_paths((repo_root / name).read_text(encoding="utf-8")) for name in READMES)
    assert english == chinese


def test_a_wrong_indentation_is_seen() -> None:
    with pytest.raises(AssertionError, match="indented deeper"):
        listed_paths("<!-- TREE -->\n```text\na/\n    b.py  too deep\n```\n<!-- /TREE -->")
