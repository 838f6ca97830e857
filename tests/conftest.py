"""The fixtures of the tests; harness.py has the functions.

The real text and tokenizer come from the folder in SMOLLM2_TEST_DATA (with input.txt and tokenizer/), from the hub's
cache, or from the network. Where none has them, most tests run on prepare.py's stand-in, and the rest are skipped.
"""
import os
import signal
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.harness")
from tests.harness import (ROOT, RUN, TINY, Process, Result, assert_refused, assert_same_bits, descendants,  # noqa: E402, F401
                           differences, flip, last_step, make_data, make_tokenizer, metrics, read, run_main,
                           run_script, snapshot, untimed, wait_until, write_data)


def pytest_configure():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children do
    os.environ.pop("PYTHONUNBUFFERED", None)  # few users set it, so what they see in time must not rest on it


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # fast ones first


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, so that the defaults out/ and data/ are never the user's."""
    monkeypatch.chdir(tmp_path)
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """A folder with the real input.txt and tokenizer/."""
    if folder := os.environ.get("SMOLLM2_TEST_DATA"):
        folder = Path(folder).resolve()
        assert (folder / "input.txt").is_file() and (folder / "tokenizer").is_dir(), f"SMOLLM2_TEST_DATA={folder}"
        return folder
    import prepare
    folder = tmp_path_factory.mktemp("real")
    try:
        tokenizer = prepare.hub_folder(prepare.TOKENIZER, prepare.TOKENIZER_REVISION)
        (folder / "input.txt").write_text(prepare.download_text(), encoding="utf-8", newline="")
    except Exception as e:
        pytest.skip(f"no real text and tokenizer: no SMOLLM2_TEST_DATA, and no download: {type(e).__name__}")
    (folder / "tokenizer").symlink_to(tokenizer, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def data_dir(request, tmp_path_factory):
    """A folder prepared by prepare.py: of the real data, or else of its stand-in."""
    import prepare
    folder = tmp_path_factory.mktemp("data") / "shakespeare"
    try:
        real = request.getfixturevalue("real_data")
        source = ["--input", str(real / "input.txt"), "--tokenizer", str(real / "tokenizer")]
    except pytest.skip.Exception:
        source = []
    result = run_main(prepare.main, *source, f"--out_dir={folder}")
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="session")
def tokenizer(data_dir):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(data_dir / "tokenizer")


@pytest.fixture(scope="session")
def real_tokenizer(real_data):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(real_data / "tokenizer")


@pytest.fixture
def run_train(data_dir):
    """run_train(*argv): a tiny run of train.py in this process. Later keys win over TINY's."""
    import train
    return lambda *argv: run_main(train.main, f"--data_dir={data_dir}", *TINY, *argv)


@pytest.fixture
def resume(data_dir):
    """resume(*argv): train.py --resume in this process, with no key but those in argv."""
    import train
    return lambda *argv: run_main(train.main, *(argv if any("--resume" in a for a in argv) else ("--resume", *argv)))


@pytest.fixture
def start_train(data_dir, tmp_path):
    """start_train(*argv): a Process of train.py in the test's folder; killed after the test."""
    started = []

    def start(*argv, tiny=True, **env):
        keys = [f"--data_dir={data_dir}", *TINY] if tiny else []
        started.append(Process([ROOT / "train.py", *keys, *argv], tmp_path, **env))
        return started[-1]

    yield start
    for process in started:
        process.kill()
