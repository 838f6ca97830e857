"""Nothing is lost, whatever happens: the short form of each part of tests/torture.py."""
import pytest

from tests.torture import PARTS, rng

SLOW = ("kills", "signals", "compiling", "memory")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PARTS]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost(name, tmp_path):
    rng.seed(0)
    part, short, _ = PARTS[name]
    row = part(tmp_path, **short)
    assert not row.lost, row
    assert row.injected or name == "memory", row
