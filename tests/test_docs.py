"""The generated pages are as new as the code, and links lead somewhere."""

import re
from pathlib import Path

import pytest

from docs.generate import PAGES

HOUSE = Path(__file__).parent.parent
WRITTEN = [
    HOUSE / "README.md",
    HOUSE / "CONTRIBUTING.md",
    HOUSE / "CHANGELOG.md",
    *sorted((HOUSE / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_make_docs_writes(name: str) -> None:
    assert (HOUSE / "docs" / name).read_text() == PAGES[name]()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
