"""What all tests share: small data, a tiny run, ways to start the scripts and to compare what they leave."""
import contextlib
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

# Threads that wait asleep: with anything else on the machine, small models are ten times as fast. Before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402
import train  # noqa: E402

# A model of 1.6 million parameters, nearly all of them the embedding, on tokens of SmolLM2: 20 ms a step.
TINY = ["--hidden_size=32", "--intermediate_size=64", "--num_hidden_layers=2", "--num_attention_heads=4",
        "--num_key_value_heads=2", "--initializer_range=0.18", "--max_position_embeddings=256", "--batch_size=4",
        "--block_size=16", "--learning_rate=1e-2", "--warmup_steps=4", "--compile=false", "--log_interval=1",
        "--eval_interval=0", "--eval_tokens=300", "--sample_interval=0", "--checkpoint_interval=0"]
# The same on the bytes of make_data, with evaluations and checkpoints: 5 ms a step.
RUN = [*TINY, "--vocab_size=2048", "--block_size=32", "--eval_interval=10", "--eval_tokens=6000",
       "--checkpoint_interval=5", "--max_steps=40", "--dtype=float32"]
END = "<|endoftext|>"

Result = namedtuple("Result", "code out err")


def expect(true, *what):
    """An assert that is there under python -O, too, and shows what it saw."""
    if not true:
        raise AssertionError("\n".join(str(w)[-3000:] for w in what))


# ---- running the scripts ----


def run_main(main, *argv, stdin=b"", threads=None):
    """Runs a script's main as its process would, but here, which saves the seconds of importing torch."""
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in signums}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, out, err = (io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", errors=errors, write_through=True)
                           for raw, errors in ((stdin, "strict"), (b"", "strict"), (b"", "backslashreplace")))
    sys.stdout, sys.stderr, code = out, err, 0
    try:
        main([str(word) for word in argv])
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):  # what the interpreter does with sys.exit(text)
            err.write(code + "\n")
            code = 1
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        for signum, handler in before.items():
            signal.signal(signum, handler)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads_before)
    return Result(code, *(stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)))


def run_script(name, *argv, stdin=None, **env):
    """Runs a script in a process of its own, to its end."""
    done = subprocess.run([sys.executable, ROOT / name, *map(str, argv)], input=stdin, capture_output=True,
                          env={**os.environ, **env}, timeout=300)
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


class Process(subprocess.Popen):
    """python COMMAND in cwd and in a process group of its own, its output in the file `log`.

    Used with `with`, nothing of it outlives the block. limits: arguments of resource.setrlimit."""

    def __init__(self, command, cwd, limits=(), **env):
        def in_the_child():
            for signum in (signal.SIGINT, signal.SIGHUP):  # ignored in a shell's background, or under nohup
                signal.signal(signum, signal.SIG_DFL)
            for limit in limits:
                resource.setrlimit(*limit)

        cwd.mkdir(parents=True, exist_ok=True)
        self.log = Path(tempfile.mkstemp(dir=cwd, suffix=".log")[1])
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        with open(self.log, "wb") as log:
            super().__init__([sys.executable, *map(str, command)], cwd=cwd, stdin=subprocess.DEVNULL, stdout=log,
                             stderr=subprocess.STDOUT, env={**inherited, "HF_HUB_OFFLINE": "1", **env},
                             start_new_session=True, preexec_fn=in_the_child)

    def __exit__(self, *_):
        self.kill()
        self.log.unlink(missing_ok=True)

    @property
    def alive(self):
        return self.poll() is None

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    def signal(self, signum, group=True):
        """As a terminal does it (Ctrl-C reaches the whole group), or to the process alone."""
        if self.alive:
            (os.killpg if group else os.kill)(self.pid, signum)

    def kill(self):
        """kill -9 for the process and all below it: torchrun's workers have groups of their own."""
        below = descendants(self.pid) if self.alive else []
        self.signal(signal.SIGKILL)
        super().wait()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in below:  # the kernel frees their locks when they are gone
            while (text := proc(pid, "status")) and "\nState:\tZ" not in text:
                time.sleep(0.005)

    def until(self, true, timeout=120):
        """Waits for true(); False where the process ends before."""
        end = time.monotonic() + timeout
        while not true():
            if not self.alive:
                return bool(true())
            expect(time.monotonic() < end, f"waited {timeout} s in vain", self.text)
            time.sleep(0.0002)
        return True

    def end(self, timeout=180):
        """Its Result, both streams in err."""
        return Result(self.wait(timeout), "", self.text)

    def wait(self, timeout=180):
        try:
            return super().wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: a hang\n{self.text[-3000:]}") from None


def wait_until(true, process, timeout=240):
    """Waits for true(), which must come while the process runs."""
    expect(process.until(true, timeout), "ended too early", process.text)


def proc(pid, name):
    """What Linux tells of a process, which may be gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text()
    return ""


def descendants(pid):
    """The processes below pid, as far as /proc shows them."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        todo += (new := children.get(todo.pop(), []))
        found += new
    return found


def flaw(done, codes=(0,), *words):
    """What is wrong with how a script has ended; None if it is as it should be.

    It has one of the codes; where that is not 0, its last line says why, with these words in it."""
    last = ([""] + [line for line in done.err.splitlines() if line.strip()])[-1]
    if "Traceback" in done.out + done.err:
        return "traceback"
    if done.code not in codes:
        return f"exit {done.code}, not {codes}"
    if done.code and not re.match(r"(\w+\.py|tools\.\w+): ", last):
        return "no clear last line"
    if done.code and not all(str(word) in last for word in words) or len(last) > 20_000:
        return f"the last line should hold {words}"
    return None


def expect_end(done, codes=(0,), *words):
    problem = flaw(done, codes, *words)
    expect(not problem, problem, done.out, done.err)


def assert_refused(done, script, *fragments, code=2):
    """The script ended with this code and with one line that says why, with all fragments in it."""
    expect_end(done, [code], *fragments)
    expect(len(done.err.strip().splitlines()) == 1 and done.err.startswith(f"{script}: "), done.err)


def training(folder, data, *argv, out="out", **how):
    """A process of a RUN in folder, writing to folder/out; it resumes where it can."""
    keys = [*RUN, f"--data_dir={data}", f"--out_dir={out}", "--resume=auto", *argv]
    return Process([ROOT / "train.py", *keys], folder, OMP_NUM_THREADS="1", **how)


def train_here(data, out, *argv, threads=1):
    """A RUN in this process. With two threads, so small a model only waits."""
    return run_main(train.main, *RUN, f"--data_dir={data}", f"--out_dir={out}", *argv, threads=threads)


def resume_here(out, *argv):
    return run_main(train.main, f"--resume={out}", *argv, threads=1)


# ---- data ----


def make_tokenizer(folder):
    """A tokenizer of the 256 bytes and an end-of-text token, in Hugging Face's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {END: 0, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END) \
        .save_pretrained(folder)
    return folder


def make_data(folder, start=0):
    """Prepares 60,000 characters of Python's language reference, from `start` on, with make_tokenizer's tokens."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer, text = folder.parent / "bytes", folder.parent / f"{folder.name}.txt"
    if not tokenizer.exists():
        make_tokenizer(tokenizer)
    text.write_text(prepare.stand_in_text()[start:start + 60_000], encoding="utf-8")
    done = run_main(prepare.main, "--input", text, "--tokenizer", tokenizer, "--out_dir", folder)
    expect(done.code == 0, done)
    return folder


def write_data(folder, train_ids, val_ids=range(100), vocab_size=49152):
    """A prepared folder of given ids, without a tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    meta = {"source": "test", "stand_in": None, "vocab_size": vocab_size, "val_bytes": len(val_ids)}
    for side, ids in (("train", train_ids), ("val", val_ids)):
        raw = np.asarray(list(ids), dtype="<u2").tobytes()
        (folder / f"{side}.bin").write_bytes(raw)
        meta |= {f"{side}_tokens": len(raw) // 2, f"{side}_sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "meta.json").write_text(seal(meta))
    return folder


def seal(meta):
    """The text of a meta.json with the digest that fits, as someone who means it would write it."""
    rest = {k: v for k, v in meta.items() if k != "sha256"}
    return json.dumps({**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()})


def flip(path, offset):
    """Inverts one bit of a file; a negative offset counts from its end."""
    raw = bytearray(Path(path).read_bytes())
    raw[offset] ^= 4
    Path(path).write_bytes(raw)


def snapshot(folder):
    """The content of all files in a folder, aside the lock, which says nothing."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- what a run leaves ----


def metrics(out_dir):
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def untimed(out_dir):
    """The lines of metrics.jsonl without what the machine adds to them."""
    aside = ("tokens_per_sec", "seconds")
    return [{k: v for k, v in line.items() if k not in aside} for line in metrics(out_dir)]


def last_step(out):
    """The step of the last whole line in metrics.jsonl; 0 where there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open(Path(out, "metrics.jsonl"), "rb") as f:
            f.seek(max(0, f.seek(0, 2) - 800))
            return json.loads(f.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"]
    return 0


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def flat(value, name=""):
    """A checkpoint's content, or a part of it, as {name: bytes}."""
    if isinstance(value, torch.Tensor):
        raw = value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return {name: f"{value.dtype} {tuple(value.shape)} ".encode() + raw}
    if not isinstance(value, (dict, list, tuple)):
        return {name: repr(value).encode()}
    found = {name: type(value).__name__.encode()}
    if isinstance(value, dict):
        parts = {f"{name}.{key}": part for key, part in value.items()}
    else:
        parts = {f"{name}[{i}]": part for i, part in enumerate(value)}
    for key, part in parts.items():
        found |= flat(part, key)
    return found


def differences(a, b):
    """The names of the places at which two checkpoints, or parts of them, are not equal to the bit."""
    a, b = flat(a), flat(b)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def assert_same_bits(a, b, aside=()):
    """Two checkpoint files hold the same weights, optimizer, RNG and all else, aside the time and out_dir."""
    a, b = read(a), read(b)
    for state in (a, b):
        assert {"step", "model", "optimizer", "rng", "config"} <= state.keys() and state["optimizer"]["state"]
        state.pop("seconds")
        for key in ("out_dir", *aside):
            state["config"].pop(key)
    assert not differences(a, b)


def intact(out):
    """The names of a folder's checkpoints; raises ValueError where one is not whole."""
    for path in train.checkpoints(out):
        train.read_checkpoint(path)
    return [path.name for path in train.checkpoints(out)]


def is_saving(out):
    return out.is_dir() and any(name.endswith(".tmp") for name in os.listdir(out))


def content(out):
    """What a run has left, as {name: bytes}: its last checkpoint and its metrics, aside the times and the folder."""
    path = train.checkpoints(out)[-1]
    state, lines = train.read_checkpoint(path), untimed(out)
    expect(state["model"] and state["optimizer"]["state"] and state["rng"], path, "is empty")
    expect([line["step"] for line in lines] == list(range(1, state["step"] + 1)), "metrics.jsonl has other steps")
    state.pop("seconds")
    state["config"].pop("out_dir")
    return {**flat(state, path.name), "metrics": json.dumps(lines).encode(), "files": repr(intact(out)).encode()}


def lost_bits(wanted, out):
    """How many bits of the weights, optimizer, RNG and metrics of a run differ from those of the undisturbed one."""
    a, b, lost = content(wanted), content(out), 0
    for name in a.keys() | b.keys():
        x, y = (np.frombuffer(side.get(name, b""), np.uint8) for side in (a, b))
        n = min(len(x), len(y))
        bits = int(np.unpackbits(x[:n] ^ y[:n]).sum()) + 8 * (len(x) + len(y) - 2 * n)
        if bits:
            print(f"  {bits} bits of {name} differ: {a.get(name, b'')[:99]}, {b.get(name, b'')[:99]}", file=sys.stderr)
        lost += bits
    return lost
