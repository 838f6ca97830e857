"""What the tests share: prepared data, a tiny run, and ways to run the scripts and to compare what they leave.

The real text and tokenizer come from the folder in SMOLLM2_TEST_DATA (with input.txt and tokenizer/), from the hub's
cache, or from the network. Where none has them, most tests run on prepare.py's stand-in, and the rest are skipped.
"""
import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

# Threads that wait asleep: where anything else runs on the machine, small models are ten times as fast. Before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# Keys for train.py: a model of 1.6 million parameters, nearly all of them the embedding, at 20 ms a step.
TINY = ["--hidden_size=32", "--intermediate_size=64", "--num_hidden_layers=2", "--num_attention_heads=4",
        "--num_key_value_heads=2", "--initializer_range=0.18", "--max_position_embeddings=256", "--batch_size=4",
        "--block_size=16", "--learning_rate=1e-2", "--warmup_steps=4", "--compile=false", "--log_interval=1",
        "--eval_interval=0", "--eval_tokens=300", "--sample_interval=0", "--checkpoint_interval=0"]

Result = namedtuple("Result", "code out err")


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
        pytest.skip(f"the real text and tokenizer are not to be had: no SMOLLM2_TEST_DATA, and {type(e).__name__}")
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


def run_main(main, *argv, stdin=b""):
    """Runs a script's main as its process would, but here: saves the seconds that importing torch takes."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    out, err, source = (io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", write_through=True)
                        for raw in (b"", b"", stdin))
    real_stdin, sys.stdin, code = sys.stdin, source, 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(a) for a in argv])
            except SystemExit as e:
                code = e.code or 0
                if isinstance(code, str):  # what the interpreter does with sys.exit(text)
                    print(code, file=sys.stderr)
                    code = 1
    finally:
        sys.stdin = real_stdin
        for signum, handler in before.items():
            signal.signal(signum, handler)
        torch.use_deterministic_algorithms(False)
        gc.collect()  # the lock on out_dir goes with its file, and an error's traceback may hold that
    return Result(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def run_script(name, *argv, stdin=None, **env):
    """Runs a script in a process of its own, to its end."""
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, argv)], input=stdin, capture_output=True,
                          env={**os.environ, **env}, timeout=300)
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def start_train(data_dir, tmp_path):
    """start_train(*argv): a process of train.py, whose output goes to the file process.log; killed after the test."""
    started = []

    def start(*argv, tiny=True):
        log = tmp_path / f"train_{len(started)}.log"
        with open(log, "wb") as f:
            process = subprocess.Popen([sys.executable, str(ROOT / "train.py"),
                                        *([f"--data_dir={data_dir}", *TINY] if tiny else []), *map(str, argv)],
                                       stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until(true, process, timeout=240):
    """Waits for true() while the process runs."""
    end = time.monotonic() + timeout
    while not true():
        assert process.poll() is None and time.monotonic() < end, process.log.read_text()
        time.sleep(0.001)


def metrics(out_dir):
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def untimed(out_dir):
    """The lines of metrics.jsonl without what the machine adds to them."""
    aside = ("tokens_per_sec", "seconds", "memory_gb")
    return [{k: v for k, v in line.items() if k not in aside} for line in metrics(out_dir)]


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def differences(a, b, name=""):
    """The places at which two checkpoints, or parts of them, are not equal to the bit."""
    if type(a) is not type(b):
        return [f"{name}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).contiguous().view(torch.uint8),
                                                                        b.reshape(-1).contiguous().view(torch.uint8))
        return [] if same else [name]
    if isinstance(a, dict):
        found = [f"{name}: keys {sorted(map(str, a.keys() ^ b.keys()))}"] if a.keys() != b.keys() else []
        return found + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{name}.{k}")]
    if isinstance(a, (list, tuple)):
        found = [f"{name}: lengths {len(a)} and {len(b)}"] if len(a) != len(b) else []
        return found + [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{name}[{i}]")]
    return [] if a == b else [f"{name}: {a} and {b}"]


def assert_same_bits(a, b, aside=()):
    """Two checkpoint files hold the same weights, optimizer, RNG and all else, aside the times (and out_dir)."""
    a, b = read(a), read(b)
    for state in (a, b):
        assert {"step", "model", "optimizer", "rng", "config"} <= state.keys() and state["optimizer"]["state"]
        state.pop("seconds")
        for key in ("out_dir", *aside):
            state["config"].pop(key)
    assert not differences(a, b)


def write_data(folder, train_ids, val_ids=range(100), vocab_size=49152):
    """A data folder of given ids, without a tokenizer."""
    import hashlib
    folder = Path(folder)
    folder.mkdir(parents=True)
    meta = {"source": "test", "stand_in": None, "vocab_size": vocab_size, "val_bytes": len(val_ids)}
    for name, ids in (("train", train_ids), ("val", val_ids)):
        raw = np.asarray(list(ids), dtype="<u2").tobytes()
        (folder / f"{name}.bin").write_bytes(raw)
        meta |= {f"{name}_tokens": len(raw) // 2, f"{name}_sha256": hashlib.sha256(raw).hexdigest()}
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
