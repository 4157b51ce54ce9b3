"""Every check of doctor names a page, and the page is there."""

import re
from functools import cache

import pytest

from consumer.doctor.findings import PAGES
from deploy.tools.rules import anchor
from tests.servers import REPOSITORY


@cache
def anchors(page: str) -> frozenset[str]:
    headings = re.findall(r"^#+ (.+)$", (REPOSITORY / page).read_text(), re.MULTILINE)
    return frozenset(anchor(heading) for heading in headings)


@pytest.mark.parametrize("target", sorted(set(PAGES.values())))
def test_the_page_and_its_section_are_there(target: str) -> None:
    page, _, section = target.partition("#")
    assert section in anchors(page)
