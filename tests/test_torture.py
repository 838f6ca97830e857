"""Nothing is lost, whatever happens: the short form of each part of tests/torture.py."""
import pytest

from tests.torture import PARTS, Row, rng

SLOW = ("kills", "signals", "compiling", "memory")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PARTS])
def test_nothing_is_lost(name, tmp_path):
    (part, short, _), row = PARTS[name], Row()
    rng.seed(0)
    part(row, tmp_path, **short)
    assert row.injected and not row.lost, row
