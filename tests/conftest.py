"""The fixtures of the tests; harness.py has the functions."""
import os
from functools import partial
from pathlib import Path

import pytest

from tests.harness import TINY, expect_end, make_data, prepare, run_main, train, train_here


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # fast ones first


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, so that out/ and data/ are never the user's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """A folder with the real input.txt and tokenizer/, by SMOLLM2_TEST_DATA or the hub."""
    if folder := os.environ.get("SMOLLM2_TEST_DATA"):
        return Path(folder).resolve(strict=True)
    folder = tmp_path_factory.mktemp("real")
    try:
        (folder / "tokenizer").symlink_to(prepare.hub_folder(prepare.TOKENIZER))
        text, source = prepare.choose_text(prepare.URL)
        assert not source.startswith("stand-in"), source
    except Exception as e:
        pytest.skip(f"no SMOLLM2_TEST_DATA, and no download: {type(e).__name__}")
    (folder / "input.txt").write_text(text, encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="session")
def data_dir(request, tmp_path_factory):
    """A folder prepared by prepare.py: of the real data, or else of its stand-in."""
    folder = tmp_path_factory.mktemp("data") / "shakespeare"
    try:
        real = request.getfixturevalue("real_data")
        source = {"input": real / "input.txt", "tokenizer": real / "tokenizer"}
    except pytest.skip.Exception:
        source = {}
    expect_end(run_main(prepare.main, out_dir=folder, **source))
    return folder


@pytest.fixture(scope="session")
def tokenizer(data_dir):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(data_dir / "tokenizer")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A tokenizer with SmolLM2's special tokens and pre-tokenizer, and a token for every byte."""
    return prepare.stand_in_tokenizer(tmp_path_factory.mktemp("stand_in") / "tokenizer")


@pytest.fixture(scope="session")
def run_dir(data_dir, tmp_path_factory):
    """The out_dir of a run of 12 steps on data_dir, with evaluations after 4, 8 and 12."""
    out = tmp_path_factory.mktemp("run") / "out"
    expect_end(run_main(train.main, *TINY, max_steps=12, eval_interval=4, checkpoint_interval=6,
                        max_position_embeddings=8192, data_dir=data_dir, out_dir=out))
    return out


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("bytes") / "data")


@pytest.fixture
def run(data):
    """run(*argv, **keys): a RUN in out/, in this process; later keys win."""
    return partial(train_here, data, "out")
