"""Nothing is lost, whatever happens: the short form of each part of tests/torture.py."""
import pytest

from tests.torture import PARTS

SLOW = ("kills", "signals", "compiling")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PARTS])
def test_nothing_is_lost(name, tmp_path):
    part, short, _ = PARTS[name]
    row = part(tmp_path, **short)
    assert row.lost in (0, "raises"), row
    assert row.injected or name == "memory", row
