"""The table of published layouts in docs/formats.md says what the program does."""

import random

import pytest
from support.published import PUBLISHED
from support.published.not_read import NOT_READ
from support.published_table import BLOCK, DOCUMENT, ORIGINS, documented, row

FEW = 3  # rows that every run makes again


def table():
    return BLOCK.search(DOCUMENT.read_text(encoding="utf-8"))[0]


def test_every_layout_has_a_row_and_there_are_enough():
    assert set(ORIGINS) == {*PUBLISHED, *NOT_READ}
    assert len(ORIGINS) >= 60
    assert table().count("\n| ") == len(ORIGINS) + 1


def test_some_rows_say_what_the_program_says():
    for name in random.Random(0).sample(sorted(ORIGINS), FEW):
        assert row(name) in table(), "`python tests/support/published_table.py` writes it again"


@pytest.mark.exhaustive
def test_the_table_says_what_the_program_says():
    assert documented() in table(), "`python tests/support/published_table.py` writes it again"
