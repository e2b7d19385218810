"""Options that hold several numbers."""

import pytest

from ktransfer.errors import UsageError
from ktransfer.number_list import number_list


def test_numbers_within_their_range():
    assert number_list("--x", "0.5, 1,2", 0.5, 2, "1,2") == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("given", ["", "1,", "a", "0.4", "2.1", "nan", "inf", "1;2"])
def test_others_are_one_line(given):
    with pytest.raises(UsageError, match=rf"^--x {given}: must be numbers from 0.5 to 2 [^\n]+ such as 1,2$"):
        number_list("--x", given, 0.5, 2, "1,2")


def test_nothing_is_above_0_that_is_0():
    with pytest.raises(UsageError, match=r"^--x 0: must be numbers above 0 and up to 2 "):
        number_list("--x", "0", 0, 2, "1,2")
