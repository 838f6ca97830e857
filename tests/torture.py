"""Breaks runs in every way that a real machine does, and counts what is lost: real processes, signals, disks and files.

    python -m tests.torture                                  # the whole campaign; a table at the end
    python -m tests.torture --only kills --kills 100         # one part of it, see PARTS
    python -m tests.torture --only fuzz commands --fuzz 2000 --seed 7

tests/test_torture.py has the short form of each part in the test suite.
"""
import argparse
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

SIZES = ["--vocab_size=2048", "--hidden_size=32", "--intermediate_size=64", "--num_hidden_layers=2",
         "--num_attention_heads=4", "--num_key_value_heads=2", "--max_position_embeddings=256",
         "--initializer_range=0.18"]
RUN = [*SIZES, "--batch_size=4", "--block_size=32", "--learning_rate=1e-2", "--warmup_steps=4", "--compile=false",
       "--log_interval=1", "--eval_interval=10", "--eval_tokens=6000", "--sample_interval=0", "--checkpoint_interval=5",
       "--max_steps=40", "--dtype=float32"]
MEASURED = ("tokens_per_sec", "seconds", "memory_gb")  # what metrics.jsonl says of the machine, not of the run
EOS = "<|endoftext|>"

Result = namedtuple("Result", "code out err")
Row = namedtuple("Row", "fault injected resumed lost note", defaults=[""])  # lost: bits, or tracebacks, hangs, damage


class Unavailable(Exception):
    """This machine cannot do what the fault needs."""


def expect(true, *what):
    """An assert that is there under python -O, too, and shows what it saw."""
    if not true:
        raise AssertionError("\n".join(str(w)[-3000:] for w in what))


# ---------------------------------------------------------------------------------------------------- data and runs


def make_tokenizer(folder):
    """A tokenizer of the 256 bytes and an end-of-text token, in Hugging Face's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {EOS: 0, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOS, eos_token=EOS, unk_token=EOS)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder, start=0):
    """Prepares 60,000 characters of Python's language reference, from `start` on, with make_tokenizer's tokens."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer, text = folder.parent / "bytes", folder.parent / f"{folder.name}.txt"
    if not tokenizer.exists():
        make_tokenizer(tokenizer)
    text.write_text(prepare.stand_in_text()[start:start + 60_000], encoding="utf-8")
    succeed(run_main(prepare.main, "--input", text, "--tokenizer", tokenizer, "--out_dir", folder))
    return folder


def run_main(main, *argv, stdin=b"", threads=1):
    """Runs a script's main as its process would, but here, which saves the seconds of importing torch."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)  # two for so small a model only wait for each other
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    real = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BytesIO(b), encoding="utf-8", errors=errors, write_through=True)
        for b, errors in ((stdin, "strict"), (b"", "strict"), (b"", "backslashreplace")))
    out, err, code = sys.stdout, sys.stderr, 0
    try:
        main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):  # what the interpreter does with sys.exit(text)
            print(code, file=sys.stderr)
            code = 1
    finally:
        sys.stdin, sys.stdout, sys.stderr = real
        for signum, handler in before.items():
            signal.signal(signum, handler)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads_before)
    return Result(code, out.buffer.getvalue().decode(errors="replace"), err.buffer.getvalue().decode(errors="replace"))


def descendants(pid):
    """The processes below pid, as far as /proc shows them: torchrun puts its workers in sessions of their own."""
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


class Process:
    """A script in a process of its own, its output in a file; used with `with`, nothing of it outlives the block."""

    def __init__(self, command, cwd, limits=None, **env):
        cwd.mkdir(parents=True, exist_ok=True)
        self.log = Path(tempfile.mkstemp(dir=cwd, suffix=".log")[1])
        env = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
               "OMP_NUM_THREADS": "1", **env}
        with open(self.log, "wb") as f:
            self.popen = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=f,
                stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=limits and (lambda: [resource.setrlimit(*limit) for limit in limits]))
        self.pid, self.seen = self.popen.pid, set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.log.unlink(missing_ok=True)

    @property
    def alive(self):
        return self.popen.poll() is None

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    def signal(self, signum, group=True):
        """As a terminal does it (Ctrl-C reaches the whole group), or to the process alone."""
        if self.alive:
            (os.killpg if group else os.kill)(self.pid, signum)

    def kill(self):
        """kill -9 for the process and all below it."""
        below = set(descendants(self.pid)) | self.seen if self.alive else self.seen
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
        self.popen.wait()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in below:  # the kernel frees their locks when they are gone
            while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in status(pid):
                time.sleep(0.005)

    def remember(self):
        """Notes the processes below, for kill() after their parent has died."""
        self.seen |= set(descendants(self.pid))

    def until(self, true, timeout=120):
        """Waits for true(); False where the process ends before."""
        end = time.monotonic() + timeout
        while not true():
            if not self.alive:
                return bool(true())
            expect(time.monotonic() < end, f"waited {timeout} s in vain", self.text)
            time.sleep(0.0002)
        return True

    def wait(self, timeout=180):
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: a hang\n{self.text[-3000:]}") from None


def status(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text()
    return ""


def training(folder, data, *argv, out="out", **how):
    """A process of train.py in folder, writing to folder/out; it resumes where it can."""
    keys = [*RUN, f"--data_dir={data}", f"--out_dir={out}", "--resume=auto", *argv]
    return Process([ROOT / "train.py", *keys], folder, **how)


def train_here(data, out, *argv, **how):
    """A run of train.py in this process."""
    return run_main(train.main, *RUN, f"--data_dir={data}", f"--out_dir={out}", *argv, **how)


def succeed(done):
    expect(done.code == 0, done.out, done.err)
    return done


def reference(folder, data, *argv):
    """The undisturbed run; returns its out_dir."""
    folder.mkdir(parents=True, exist_ok=True)
    succeed(train_here(data, folder / "undisturbed", *argv))
    return folder / "undisturbed"


def last_step(out):
    """The step of the last whole line in metrics.jsonl; 0 where there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open(out / "metrics.jsonl", "rb") as f:
            f.seek(max(0, f.seek(0, 2) - 400))
            return json.loads(f.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"]
    return 0


def saving(out):
    return any(name.endswith(".tmp") for name in os.listdir(out)) if out.is_dir() else False


def flat(value, name=""):
    """A checkpoint's content as {name: bytes}."""
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return {f"{name} {value.dtype} {tuple(value.shape)}": raw}
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: type(value).__name__.encode(),
                **{k: v for key, part in pairs for k, v in flat(part, f"{name}.{key}").items()}}
    return {name: repr(value).encode()}


def content(out):
    """What a run has left, as {name: bytes}: its last checkpoint and its metrics, all but the times and the folder."""
    path = train.checkpoints(out)[-1]
    state = train.read_checkpoint(path)
    expect(state["model"] and state["optimizer"]["state"] and state["rng"], path, "is empty")
    state.pop("seconds")
    state["config"].pop("out_dir")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    expect([line["step"] for line in lines] == list(range(1, state["step"] + 1)), "metrics.jsonl has odd steps")
    rows = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]
    return {**flat(state, path.name), "metrics": json.dumps(rows).encode(), "files": repr(intact(out)).encode()}


def lost_bits(wanted, out):
    """How many bits of the weights, optimizer, RNG and metrics of a run differ from those of the undisturbed one."""
    a, b, lost = content(wanted), content(out), 0
    for key in a.keys() | b.keys():
        x, y = (np.frombuffer(side.get(key, b""), np.uint8) for side in (a, b))
        n = min(len(x), len(y))
        here = int(np.unpackbits(x[:n] ^ y[:n]).sum()) + 8 * (len(x) + len(y) - 2 * n)
        if here:
            print(f"  {here} bits of {key} differ: {a.get(key, b'')[:99]}, {b.get(key, b'')[:99]}", file=sys.stderr)
        lost += here
    return lost


# ------------------------------------------------------------------------------------------------------------ kills


def kills(folder, n, seed=0, steps=150, say=print):
    """SIGKILL, again and again on the same run until it finishes, at random instants of every kind."""
    rng, data = random.Random(seed), make_data(folder / "data")
    keys = [f"--max_steps={steps}", "--learning_rate=1", "--min_lr=1"]  # so wild that the best is not the newest
    wanted = reference(folder, data, *keys)
    kinds = ["a save", "an evaluation", "a step", "a save", "the start", "an evaluation"]
    runs = lost = injected = torn = 0
    hit, stride = dict.fromkeys(kinds, 0), max(12, 2 * steps // (n + 1))  # steps that a life has at most
    while True:
        runs += 1
        out = folder / f"run{runs}" / "out"
        while True:
            with training(out.parent, data, *keys) as p:
                if injected < n:
                    kind = kinds[injected % len(kinds)]
                    begin = last_step(out)
                    if kind == "a save":  # one of the next few
                        fresh = begin + rng.randrange(1, stride)
                        p.until(lambda: last_step(out) != begin and last_step(out) >= fresh - 5 and saving(out))
                        time.sleep(rng.choice([0, 0, rng.random() * 0.004]))
                    elif kind == "an evaluation":
                        p.until(lambda: last_step(out) != begin and last_step(out) % 10 == 9)
                        time.sleep(0.01 + rng.random() * 0.03)
                    elif kind == "a step":
                        fresh = begin + rng.randrange(1, stride)
                        p.until(lambda: last_step(out) >= fresh)
                        time.sleep(rng.random() * 0.03)
                    else:
                        time.sleep(rng.random() * 3)
                    if p.alive:
                        p.kill()
                        injected += 1
                        hit[kind] += 1
                        torn += saving(out)
                        if injected % 10 == 0:
                            say(f"  {injected} kills, run {runs} at step {last_step(out)} of {steps}")
                        continue
                code = p.wait()
                expect(code == 0, f"exit {code}", p.text)
                if train.checkpoints(out)[-1].name == f"step_{steps:06d}.pt":
                    break
        lost += lost_bits(wanted, out)
        if injected >= n:
            note = ", ".join(f"{count} in {kind}" for kind, count in hit.items())
            note = f"{runs} runs of {steps} steps; {note}; {torn} torn saves"
            return Row("SIGKILL in a training", injected, injected, lost, note)


def kill_preparation(folder, n, seed=0):
    """SIGKILL at random instants of prepare.py: what is there afterwards is whole or refused, a last try is right."""
    rng = random.Random(seed)
    wanted = make_data(folder / "wanted")
    text, out = folder / "wanted.txt", folder / "killed" / "data"
    big = folder / "big.txt"
    big.write_text(text.read_text() * 20)
    command = [ROOT / "prepare.py", "--input", big, "--tokenizer", folder / "bytes", "--out_dir", out]
    began = time.monotonic()
    with Process(command, folder / "killed") as p:
        expect(p.wait() == 0, p.text)
    took, whole = time.monotonic() - began, snapshot(out)
    shutil.rmtree(out)
    config = train.TrainConfig(data_dir=str(out), block_size=32)
    lost = injected = left = 0
    allowed = [whole]
    for i in range(n):
        with Process(command, folder / "killed") as p:
            if i % 3:  # as soon as something is on the disk, or at any time
                p.until(lambda: len(list(out.parent.iterdir())) > 1 or out.exists())
                time.sleep(rng.random() * took / 2)
            else:
                time.sleep(rng.random() * took)
            injected += p.alive
            p.kill()
        if out.exists():
            left += 1
            done = run_main(lambda argv: train.load_data(config, True))
            lost += done.code == 0 and snapshot(out) not in allowed
        if i == 0:  # data that were there before are replaced as a whole, or not at all
            run_main(prepare.main, "--input", text, "--tokenizer", folder / "bytes", "--out_dir", out)
            allowed.append(snapshot(out))
    with Process(command, folder / "killed") as p:
        expect(p.wait() == 0, p.text)
    lost += snapshot(out) != whole
    rest = [p.name for p in out.parent.iterdir() if p != out and p.suffix != ".log"]
    expect(wanted.is_dir() and not rest, f"left over: {rest}")
    return Row("SIGKILL in prepare.py", injected, injected, lost, f"after {left} of them out_dir was there")


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """A file system of its own in folder. Raises Unavailable where this user cannot mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as e:
        raise Unavailable(f"no mount command here ({e.strerror})") from None
    if done.returncode:
        raise Unavailable(f"a file system cannot be mounted here ({done.stderr.strip()[:80]})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
    """Fills the disk of folder but for `leave` bytes; returns the file that does it."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(4096))
    os.truncate(filler, max(0, filler.stat().st_size - leave // 4096 * 4096))
    return filler


def one_line(text, *words):
    """The last line of a program's output says what happened, with these words in it; nothing is a traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    expect("Traceback" not in text and lines, "a traceback, or nothing", text)
    expect(lines[-1].startswith(("train.py: ", "sample.py: ", "prepare.py: ")) and all(w in lines[-1] for w in words),
           f"the last line should hold {words}", text)


def intact(out):
    """All checkpoints of a folder are whole; returns their names."""
    for path in train.checkpoints(out):
        train.read_checkpoint(path)
    return [p.name for p in train.checkpoints(out)]


def full_disk(folder, leaves=(0, 100_000, 600_000)):
    """The disk fills while a run goes on; after room is made it goes on, and ends with the same bits."""
    data, lost, resumed = make_data(folder / "data"), 0, 0
    keys = ["--max_steps=200", "--eval_interval=0", "--checkpoint_interval=10"]
    wanted = reference(folder, data, *keys)
    with small_disk(folder / "disk", 16) as disk:
        for i, leave in enumerate(leaves):
            out = disk / f"out{i}"
            with training(folder / "cwd", data, *keys, out=out) as p:
                p.until(lambda: last_step(out) >= 30)
                filler = fill(disk, leave)
                code = p.wait()
                expect(code == 1, f"exit {code}", p.text)
                one_line(p.text, "No space left on device", "--resume")
            expect(intact(out), "no checkpoint is left")
            filler.unlink()
            succeed(run_main(train.main, f"--resume={out}"))
            lost, resumed = lost + lost_bits(wanted, out), resumed + 1
            shutil.rmtree(out)
    return Row("disk full", len(leaves), resumed, lost, "a tmpfs filled to the last byte, or to a part of a checkpoint")


def failed_save(folder, sizes=(300_000,)):
    """A save fails half-way, since no file may be larger than a part of a checkpoint (RLIMIT_FSIZE)."""
    data, lost, resumed = make_data(folder / "data"), 0, 0
    wanted = reference(folder, data)
    for size in sizes:
        out = folder / f"out{size}"
        succeed(train_here(data, out, "--max_steps=12", "--lr_decay_steps=40"))
        before = snapshot(out)
        with training(folder, data, out=out, limits=[(resource.RLIMIT_FSIZE, (size, size))]) as p:
            code = p.wait()
            expect(code == 1, f"exit {code}", p.text)
            one_line(p.text, "File too large", "--resume")
        expect({k: v for k, v in snapshot(out).items() if k.endswith(".pt")} ==
               {k: v for k, v in before.items() if k.endswith(".pt")}, "checkpoints have changed")
        done = run_main(train.main, f"--resume={out}", "--max_steps=40")
        expect(done.code == 0 and not saving(out), done.err)
        lost, resumed = lost + lost_bits(wanted, out), resumed + 1
    return Row("save fails half-way", len(sizes), resumed, lost, "RLIMIT_FSIZE below a checkpoint's size")


def read_only(folder):
    """A folder that cannot be written: a new run and a resumed one say so, and the run goes on once it can be."""
    data = make_data(folder / "data")
    wanted, disk, as_root = reference(folder, data), folder / "disk", os.geteuid() == 0
    with small_disk(disk, 16) if as_root else contextlib.nullcontext():  # root may write whatever the mode says
        disk.mkdir(exist_ok=True)
        out = disk / "out"
        succeed(train_here(data, out, "--max_steps=12", "--lr_decay_steps=40"))

        def write(allowed):
            if as_root:
                subprocess.run(["mount", "-o", f"remount,{'rw' if allowed else 'ro'}", str(disk)], check=True)
            else:
                for place in (disk, out):
                    place.chmod(0o755 if allowed else 0o555)
        before = snapshot(out)
        write(False)
        try:
            for done in (train_here(data, disk / "new"), run_main(train.main, f"--resume={out}", "--max_steps=40")):
                expect(done.code == 1, done)
                one_line(done.err, "Read-only" if as_root else "denied")
        finally:
            write(True)
        expect(snapshot(out) == before, "files have changed")
        succeed(run_main(train.main, f"--resume={out}", "--max_steps=40"))
        lost = lost_bits(wanted, out)
    return Row("read-only folder", 2, 1, lost, "a new run and a resumed one")


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def damaged_checkpoints(folder, n, seed=0):
    """The newest checkpoint truncated at n lengths, with one of n bytes flipped, zeroed in parts or made longer."""
    rng, data = random.Random(seed), make_data(folder / "data")
    keys = ["--vocab_size=257", "--hidden_size=16", "--eval_interval=0", "--max_steps=10", "--lr_decay_steps=40"]
    succeed(train_here(data, folder / "out", *keys))
    before, newest = train.checkpoints(folder / "out")
    good, missed = newest.read_bytes(), []

    def try_one(kind, damaged):
        newest.write_bytes(damaged)
        said = []
        path, state = train.load_checkpoint(folder / "out", said.append)
        if path != before or state["step"] != 5 or len(said) != 1 or str(newest) not in said[0]:
            missed.append((kind, path, said))

    size = len(good)
    lengths = {0, 1, size - 1, size - 39, size - 40, *(rng.randrange(size) for _ in range(n))}
    places = {*range(0, 200), *range(size - 200, size), *(rng.randrange(size) for _ in range(n))}
    for length in lengths:
        try_one(f"cut to {length} bytes", good[:length])
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= rng.choice([1, 128, 255, 1 << rng.randrange(8)])
        try_one(f"byte {place} flipped", damaged)
    others = [bytes(size), good + b"\0", good[:-4096] + bytes(4096), good[:4096] + bytes(size - 4096), good + good]
    for damaged in others:
        try_one("zeros, or more than was written", damaged)
    newest.write_bytes(good)
    path, _ = train.load_checkpoint(folder / "out", lambda text: None)
    expect(path == newest and not missed, missed[:5])
    count = len(lengths) + len(places) + len(others)
    return Row("checkpoint damaged", count, count, len(missed),
               f"{len(lengths)} lengths, {len(places)} bytes, {len(others)} others of {size:,} bytes")


def damaged_then_resumed(folder, real=True):
    """Through the command: a damaged checkpoint is named, the one before is used, the run ends with the same bits."""
    data = make_data(folder / "data")
    wanted, out = reference(folder, data), folder / "out"
    lost = resumed = 0
    for damage in (lambda b: b[:len(b) // 2], lambda b: b[:999] + bytes([b[999] ^ 4]) + b[1000:]):
        succeed(train_here(data, out, "--max_steps=25", "--lr_decay_steps=40",
                        "--overwrite"))
        newest = train.checkpoints(out)[-1]
        newest.write_bytes(damage(newest.read_bytes()))
        if real and not resumed:
            with Process([ROOT / "train.py", f"--resume={out}", "--max_steps=40"], folder) as p:
                code, text = p.wait(), p.text
        else:
            done = run_main(train.main, f"--resume={out}", "--max_steps=40")
            code, text = done.code, done.out + done.err
        expect(code == 0 and f"{newest} is damaged" in text and "step_000020.pt (step 20)" in text, text)
        lost, resumed = lost + lost_bits(wanted, out), resumed + 1
    for path in train.checkpoints(out):
        path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(out)
    for argv in ([f"--resume={out}"], [*RUN, f"--data_dir={data}", f"--out_dir={out}", "--resume=auto"]):
        done = run_main(train.main, *argv)
        expect(done.code == 1, done)
        one_line(done.err, "no whole checkpoint", str(out))
    expect({k: v for k, v in snapshot(out).items()} == before, "something was deleted")
    return Row("checkpoint damaged, resumed", 4, resumed, lost, "and with none left whole: refused, nothing deleted")


# ------------------------------------------------------------------------------------------------------ damaged data


def seal(meta):
    """A meta.json with the digest that fits, as someone who means it would write it."""
    import hashlib
    rest = {k: v for k, v in meta.items() if k != "sha256"}
    return json.dumps({**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()})


def damaged_data(folder):
    """train.bin, val.bin, meta.json truncated, changed, missing or of another dataset: refused before a first step."""
    import hashlib
    good, other = make_data(folder / "good"), make_data(folder / "other", start=100_000)
    data, out = folder / "data", folder / "out"
    succeed(train_here(good, out, "--max_steps=12", "--lr_decay_steps=40"))
    run = snapshot(out)

    def change(name, edit):
        def do():
            (data / name).write_bytes(edit((data / name).read_bytes()))
        return do

    def beyond():  # ids that no embedding has, in files that fit each other
        raw = (data / "train.bin").read_bytes()[:-2] + (5000).to_bytes(2, "little")
        (data / "train.bin").write_bytes(raw)
        meta = json.loads((data / "meta.json").read_text())
        meta["train_sha256"] = hashlib.sha256(raw).hexdigest()
        (data / "meta.json").write_text(seal(meta))

    def flip(b):
        return b[:1000] + bytes([b[1000] ^ 1]) + b[1001:]

    def meta(**new):
        return change("meta.json", lambda b: seal({**json.loads(b), **new}).encode())

    faults = [(change(f"{side}.bin", edit), f"{side}.bin") for side in ("train", "val") for edit in
              (lambda b: b[:-2], lambda b: b[:-1], lambda b: b"", lambda b: b + b"\0\0", flip)]
    faults += [(lambda name=name: shutil.copy(other / name, data / name), name) for name in ("train.bin", "val.bin")]
    faults += [(lambda: shutil.copy(other / "meta.json", data / "meta.json"), ".bin"),
               (lambda: [shutil.move(data / a, data / b) for a, b in
                         [("train.bin", "x"), ("val.bin", "train.bin"), ("x", "val.bin")]], "train.bin"),
               (lambda: (data / "train.bin").unlink(), "train.bin"), (lambda: (data / "val.bin").unlink(), "val.bin"),
               (change("meta.json", lambda b: b[:-30]), "data"), (change("meta.json", lambda b: b""), "data"),
               (change("meta.json", lambda b: b"\xff\xfe"), "data"), (change("meta.json", lambda b: b"[]"), "data"),
               (change("meta.json", lambda b: b.replace(b"good.txt", b"evil.txt")), "meta.json"),
               (meta(vocab_size="many"), "data"), (meta(vocab_size=None), "data"), (meta(val_bytes=None), "data"),
               (meta(train_tokens="1"), "train_tokens"), (meta(vocab_size=10**9), "vocab_size"),
               (beyond, "vocab_size = 2048")]
    for i, (fault, word) in enumerate(faults):
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(good, data)
        fault()
        for argv in ([*RUN, f"--out_dir={folder / 'new'}"], [f"--resume={out}", "--max_steps=40"]):
            done = run_main(train.main, *argv, f"--data_dir={data}")
            expect(done.code == 1, f"fault {i} ({word}): exit {done.code}", done.out, done.err)
            one_line(done.err, word)
        expect(not last_step(folder / "new"), f"fault {i} ({word}): steps were made")
        expect({k: v for k, v in snapshot(out).items()} == run, f"fault {i} ({word}): the run was changed")
    shutil.rmtree(data)  # a whole other dataset, in the place of the run's own
    shutil.copytree(good, folder / "kept")
    shutil.rmtree(good)
    shutil.copytree(other, good)
    done = run_main(train.main, f"--resume={out}", "--max_steps=40")
    expect(done.code == 1, done)
    one_line(done.err, "not the data")
    done = run_main(train.main, f"--resume={out}", "--max_steps=14", f"--data_dir={good}")  # meant: made, and said
    expect(done.code == 0 and "no longer the same run to the bit" in done.out and "data " in done.out, done)
    return Row("data damaged or swapped", 2 * len(faults) + 1, 0, 0, "each refused before the first step")


# ----------------------------------------------------------------------------------------------------------- signals


def compiles(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("cc1plus", "clang", "clang++")


def signals(folder, cases, say=print, compiled=False):
    """SIGINT and SIGTERM at instants of a run, once or twice: exit as the signal asks, all saved, the same bits in the end.

    cases: (signal names, instant), the instant one of first step, evaluation, save, step, start, compile."""
    data, lost, resumed = make_data(folder / "data"), 0, 0
    keys = ["--max_steps=60"] if not compiled else ["--compile=true", "--max_steps=10"]
    wanted = reference(folder, data, *keys)
    for i, (names, instant) in enumerate(cases):
        out, signums = folder / f"out{i}", [getattr(signal, name) for name in names]
        fresh = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache{i}")} if compiled else {}
        with training(folder, data, *keys, out=out, **fresh) as p:
            if instant == "start":
                time.sleep(0.8)
            elif instant == "first step":
                p.until(lambda: "writes " in p.text)
            elif instant == "compile":
                p.until(lambda: "compiling" in p.text and any(map(compiles, descendants(p.pid))))
            elif instant == "evaluation":
                p.until(lambda: last_step(out) % 10 == 9)
                time.sleep(0.02)
            elif instant == "save":
                p.until(lambda: last_step(out) > 10 and saving(out))
            else:
                p.until(lambda: last_step(out) >= 23)
            expect(p.alive, f"ended before the signal in {instant}", p.text)
            at = last_step(out)
            for j, signum in enumerate(signums):
                time.sleep(0.002 * bool(j))
                p.signal(signum)
            code, text = p.wait(), p.text
        early = instant == "start" and code < 0 or "before the first step" in text  # there is nothing to save yet
        codes = [-signums[0]] if code < 0 and early else [128 + signum for signum in signums]
        expect(code in codes, f"exit {code} after {names} in {instant}", text)
        expect(instant == "start" or "Traceback" not in text and "Error" not in text, f"{names} in {instant}", text)
        leaves_at_once = signums.count(signal.SIGINT) > 1 or signums[1:] == [signal.SIGINT]
        if early or "within a step" in text:
            expect(instant in ("start", "first step", "compile") and not train.checkpoints(out), text)
        elif leaves_at_once:
            expect(all(intact(out) or [True]), text)
        else:
            newest = train.checkpoints(out)[-1]
            expect(at <= train.step_of(newest) <= at + 2 and f"{newest.name} is written" in text, text)
        succeed(train_here(data, out, *keys, "--resume=auto"))
        lost, resumed = lost + lost_bits(wanted, out), resumed + 1
        say(f"  {'+'.join(names)} in {instant}, step {at}: exit {code}")
    return Row("SIGINT, SIGTERM" + (" while compiling" if compiled else ""), len(cases), resumed, lost)


SIGNALS = [((name,), instant) for name in ("SIGINT", "SIGTERM")
           for instant in ("start", "first step", "evaluation", "save", "step")]
SIGNALS += [(pair, instant) for pair in (("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT"))
            for instant in ("step", "save", "evaluation")]
COMPILING = [(("SIGINT",), "compile"), (("SIGTERM",), "compile")]


def second_process(folder):
    """A second process on an out_dir in use is refused, whatever it wants; the first one never notices."""
    data = make_data(folder / "data")
    keys, out = ["--max_steps=40"], folder / "out"
    wanted = reference(folder, data, *keys)
    tries = ([], ["--resume"], ["--resume=auto"], ["--overwrite"], [f"--resume={out}"])
    with training(folder, data, *keys, out=out) as p:
        p.until(lambda: last_step(out) >= 6)
        p.signal(signal.SIGSTOP)  # it must not end meanwhile
        for argv in tries:
            done = train_here(data, out, *argv)
            expect(done.code == 1, argv, done)
            one_line(done.err, "another process", str(out))
        p.signal(signal.SIGCONT)
        expect(p.wait() == 0, p.text)
    return Row("second process on an out_dir", len(tries), 0, lost_bits(wanted, out), "refused; the first unharmed")


# --------------------------------------------------------------------------------------------------------- strangers


class Evil:
    """What a stranger's pickle can hold: loading it without care leaves a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def strangers(folder, real=False):
    """Checkpoints, models and tokenizers that would run code on loading leave no trace of having done so."""
    data, marker = make_data(folder / "data"), folder / "code was run"
    out, tried = folder / "out", 0
    succeed(train_here(data, out, "--max_steps=5"))
    checkpoint = train.checkpoints(out)[-1]
    state = train.read_checkpoint(checkpoint)

    def attack(main, *argv, code=(1,), words=(), stdin=b"y\ny\ny\n"):
        nonlocal tried
        tried += 1
        began = time.monotonic()
        done = run_main(main, *argv, stdin=stdin)
        expect(not marker.exists(), f"CODE WAS RUN by {argv}", done)
        expect(done.code in code, done)
        expect(time.monotonic() - began < 14, f"{argv}: it seems to have waited for an answer", done)
        if done.code:
            one_line(done.err)
            expect(all(word in done.out + done.err for word in words), words, done)
        return done

    def write(path, state):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as f:  # Evil on purpose: the digest fits, as a stranger can compute it, too
            hashing = train.HashingFile(f)
            torch.save(state, hashing)
            f.write(train.DIGEST_MARK + hashing.hash.digest())

    with open(folder / "proof", "wb") as f:  # the attack works where nobody takes care
        pickle.dump(Evil(marker), f)
    with open(folder / "proof", "rb") as f:
        pickle.load(f)
    expect(marker.exists(), "the attack itself does not work")
    marker.unlink()

    for i, evil in enumerate(({**state, "best": Evil(marker)}, {**state, "rng": [Evil(marker)]}, Evil(marker))):
        path = folder / f"evil{i}" / "step_000005.pt"
        write(path, evil)
        attack(train.main, f"--resume={path}", words=["could run code"] if i < 2 else ())
        attack(train.main, f"--resume={path.parent}")
        attack(sample.main, "--checkpoint", path, "--max_new_tokens", "1")
    raw = folder / "raw" / "step_000005.pt"  # no file of torch.save at all
    raw.parent.mkdir()
    raw.write_bytes(pickle.dumps(Evil(marker)))
    attack(train.main, f"--resume={raw}")
    attack(sample.main, "--checkpoint", raw)

    # A model folder: weights as a pickle are not read; a config that names code is refused or ignored.
    import model
    hf, code = folder / "hf", f"open({str(marker)!r}, 'w')\n"
    net = model.SmolLM2(model.SmolLM2Config(**{k: state["config"][k] for k in train.MODEL_KEYS}))
    model.save_pretrained(net, hf)
    shutil.copytree(data / "tokenizer", hf, dirs_exist_ok=True)
    attack(sample.main, "--checkpoint", hf, "--max_new_tokens", "2", code=(0,))

    def poison(kind):
        target = folder / kind
        shutil.copytree(hf, target)
        if "pickle" in kind:
            torch.save({"model.embed_tokens.weight": Evil(marker)}, target / "pytorch_model.bin")
        if kind == "pickle only":
            (target / "model.safetensors").unlink()
        evil = "modeling_evil.Evil"
        for name, key, what in (("config.json", "AutoModelForCausalLM", evil), ("config.json", "AutoConfig", evil),
                                ("tokenizer_config.json", "AutoTokenizer", [evil, evil])):
            if "code" in kind:
                content = json.loads((target / name).read_text())
                content.setdefault("auto_map", {})[key] = what
                if name == "config.json" and "type" in kind:
                    content["model_type"] = "evil"
                if name == "tokenizer_config.json" and "class" in kind:
                    content["tokenizer_class"] = "Evil"
                (target / name).write_text(json.dumps(content))
                for script in ("modeling_evil.py", "tokenization_evil.py"):
                    (target / script).write_text(code + "class Evil:\n    pass\n")
        return target

    for kind, fine in (("pickle beside", True), ("pickle only", False), ("code", True), ("code class", True),
                       ("code type", False)):
        target, new = poison(kind), [*RUN, f"--data_dir={data}", f"--out_dir={folder / 'new'}", "--overwrite"]
        attack(sample.main, "--checkpoint", target, "--max_new_tokens", "2", code=(0, 1) if fine else (1,))
        attack(train.main, *new, f"--init_from={target}", "--max_steps=1", code=(0,) if fine else (1,))
    # A tokenizer that brings code: beside the data, where train.py's samples and sample.py use it, and for prepare.py.
    shutil.rmtree(data / "tokenizer")
    shutil.copytree(folder / "code class", data / "tokenizer")
    attack(sample.main, "--checkpoint", checkpoint, "--max_new_tokens", "2", code=(0, 1))
    attack(train.main, f"--resume={out}", "--max_steps=6", "--sample_interval=1", code=(0, 1))
    attack(prepare.main, "--input", folder / "data.txt", "--tokenizer", folder / "code class", "--out_dir",
           folder / "new data", code=(0, 1))
    if real:  # the same as commands, with a terminal's worth of consent on standard input
        for argv in (["sample.py", "--checkpoint", folder / "code class"], ["train.py", f"--resume={folder}/evil0"]):
            tried += 1
            done = subprocess.run([sys.executable, ROOT / argv[0], *argv[1:]], input=b"y\n" * 9, capture_output=True,
                                  timeout=60, cwd=folder)
            expect(not marker.exists() and b"Traceback" not in done.stderr, argv, done.stderr.decode())

    # And values that are plain, but nonsense: refused or used, in one line.
    config = state["config"]
    odd = [{"config": {}}, {"config": 3}, {"config": {**config, "hidden_size": "wide"}}, {"model": {}},
           {"config": {**config, "hidden_size": -4}}, {"config": {**config, "num_attention_heads": 3}},
           {"config": {**config, "learning_rate": "fast"}}, {"optimizer": {}},
           {"model": {**state["model"], "model.norm.weight": torch.ones(3)}}, {"rng": []}, {"rng": [{}]},
           {"step": "five"}, {"step": -1}, {"step": None}, {"best": 5}, {"seconds": "long"},
           {"machine": None}, {"data": None}, {"scaler": None}]
    for i, new in enumerate(odd):
        path = folder / f"odd{i}" / "step_000005.pt"
        write(path, {**state, **new})
        attack(train.main, f"--resume={path}", "--max_steps=6", code=(0, 1, 2), stdin=b"")
        attack(sample.main, "--checkpoint", path, "--max_new_tokens", "1", code=(0, 1, 2), stdin=b"")
    return Row("a stranger's file", tried, 0, 0, "no code was run")


# ------------------------------------------------------------------------------------------------- another machine


def edit_checkpoint(path, **machine):
    state = train.read_checkpoint(path)
    state["machine"] |= machine
    train.write_checkpoint(path, state)


def other_machine(folder):
    """Resumed where the bits cannot be the same: says so and why, old → new, and goes on; other sizes are refused."""
    data, out, tried = make_data(folder / "data"), folder / "out", 0
    succeed(train_here(data, out, "--max_steps=10", "--lr_decay_steps=40"))
    before = snapshot(out)
    for machine, argv, words in (({"torch": "1.0.0"}, [], [f"torch 1.0.0 → {torch.__version__}"]),
                                 ({"device": "cuda (Fast 9000)"}, [], ["device cuda (Fast 9000) → cpu"]),
                                 ({"threads": 77}, [], ["threads 77 → "]), ({"processes": 1}, [], []),
                                 ({}, ["--dtype=bfloat16"], ["dtype float32 → bfloat16"]),
                                 ({}, ["--batch_size=8", "--learning_rate=0.5"],
                                  ["batch_size 4 → 8", "learning_rate 0.01 → 0.5"]),
                                 ({}, ["--seed=1"], ["seed 1337 → 1"]),
                                 ({}, ["--log_interval=2", "--eval_interval=5"], [])):
        shutil.rmtree(out)
        for name, raw in before.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(raw)
        edit_checkpoint(train.checkpoints(out)[-1], **machine)
        done = run_main(train.main, f"--resume={out}", "--max_steps=12", *argv)
        said = "no longer the same run to the bit" in done.out
        succeed(done)
        expect(said == bool(words) and all(word in done.out for word in words), machine, argv, done.out)
        expect(last_step(out) == 12 and train.checkpoints(out)[-1].name == "step_000012.pt", done.out)
        tried += 1
    for argv in (["--hidden_size=64"], ["--vocab_size=4096"], ["--num_hidden_layers=3"], ["--rope_theta=5"]):
        kept = snapshot(out)
        done = run_main(train.main, f"--resume={out}", "--max_steps=20", *argv)
        expect(done.code == 1 and snapshot(out) == kept, done)
        one_line(done.err, argv[0].removeprefix("--").partition("=")[0])
        tried += 1
    return Row("another machine or model", tried, 8, 0, "said so and went on; another model refused")


def other_threads(folder):
    """A run with all threads, resumed by a process with OMP_NUM_THREADS=1."""
    data, out = make_data(folder / "data"), folder / "out"
    succeed(train_here(data, out, "--max_steps=10", threads=2))
    with Process([ROOT / "train.py", f"--resume={out}", "--max_steps=12"], folder, OMP_NUM_THREADS="1") as p:
        expect(p.wait() == 0 and "no longer the same run" in p.text and "threads 2 → 1" in p.text, p.text)
    return Row("another thread count", 1, 1, 0, "2 → 1")


# ------------------------------------------------------------------------------------------------------------ memory


def memory(folder, steps=2000):
    """Resident memory of a run with evaluation, samples and checkpoints: its growth after the first hundred steps."""
    data, out, seen = make_data(folder / "data"), folder / "out", {}
    keys = [f"--max_steps={steps}", *(f"--{what}_interval=50" for what in ("sample", "eval", "checkpoint"))]
    with training(folder, data, *keys, out=out) as p:
        while p.alive:
            rss = [line.split()[1] for line in status(p.pid).splitlines() if line.startswith("VmRSS")]
            if rss and (step := last_step(out)):
                seen[step] = int(rss[0])
            time.sleep(0.01)
        expect(p.wait() == 0, p.text)
    expect(len(list((out / "samples").iterdir())) == steps // 50 and len(seen) > steps / 50, "too few samples")
    first = max(rss for step, rss in seen.items() if 100 < step <= 150)
    last = max(rss for step, rss in seen.items() if step > steps - 100)
    growth = last / first - 1
    expect(growth < 0.02, f"resident memory grew by {growth:.1%}: {first} to {last} kB")
    note = f"{steps} steps: {first / 1024:.0f} MiB after 100, {last / 1024:.0f} at the end: {growth:+.2%}"
    return Row("memory", 0, 0, 0, note)


# ------------------------------------------------------------------------------------------------------------ fuzzing

NUMBERS = ["0", "-1", "-0", "-0.0", "1", "2", "3", "0.5", "nan", "inf", "-inf", "1e999", "-1e999", "1e308", "1e-320",
           "1e5", "", " ", "0x10", "1_000", "1__0", "٣", "½", "9" * 30, "-" + "9" * 30, "9" * 5000, "2**3", "4.0", "4.",
           "true", "True", "none", "None", "[]", "()", "{}", "'4'", "four", "4 4", "4,5", "--4", "\N{SNOWMAN}", "\t4",
           "4\n", "1e", "e1", "+3", str(2**31), str(2**48), str(2**63), str(2**64), str(2**128), "\ud83d", "\udcff"]
EXTREMES = {int: ["0", "1", "2", "3", "4", "7", "65536", str(2**31), str(2**47)], bool: ["true", "false", "0"],
            float: ["0", "1", "2", "0.99999", "1e-8", "1e-30", "5e-324", "1e30", "1e300"],
            str: ["a\0b", "\udcff", "nowhere/x", "/proc/x", "/dev/null", ".", "", "é", "cpu", "cpu:1", "cuda", "mps",
                  "meta", "xpu", "cuda:99", "float16", "bfloat16", "adamw", "muon", "cosine", "wsd"]}  # of each type
TEXTS = [b"", b"\n", b" " * 5000, b"\0", b"\0" * 700, b"\xff\xfe", b"\xef\xbb\xbf", b"\xef\xbb\xbfhello there, all",
         b"\xc3", b"abc \xc3( def", "é\N{SNOWMAN}\U0001f600 ".encode() * 90, b"x" * 9000, b"<|endoftext|>" * 40,
         b"\r\n\r\r\n" * 90, b"\xed\xa0\x80", b"{}", b"[" * 3000, b'{"text": "one"}\n{"text": "two and more"}\n' * 20,
         b'{"text": 3}\n', b'{"text": "\\ud800"}\n', b'{"other": "x"}\n', b'"text"\n', b"[1]\nnull\n",
         b'{"text": null}\n{"text": ""}\n', b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 30]
LARGE_KEYS = {"max_steps", "batch_size", "block_size", *train.MODEL_KEYS}  # the other keys leave a run tiny
SMALL_KEYS = [f for f in train.fields(train.TrainConfig) if f.name not in LARGE_KEYS]
Case = namedtuple("Case", "script argv stdin files", defaults=[b"", {}])


def junk(rng, n=12):
    """A short text of anything, or a number that is none."""
    if rng.random() < 0.6:
        return rng.choice(NUMBERS)
    letters = "abz019 .,-_=+*/\\'\"#()[]{}\n\t%$~é\0\N{SNOWMAN}\U0001f600\udcff"
    return "".join(rng.choice(letters) for _ in range(rng.randrange(n)))


def recipe(rng):
    """The bytes of a recipe: a good one, with things in it that do not belong there."""
    keys = [f.name for f in train.fields(train.TrainConfig)]
    values = ["1", "2", "64", "0.5", "True", "'x'", junk(rng)]
    lines = [f"{rng.choice(keys)} = {rng.choice(values)}" for _ in range(rng.randrange(6))]
    odd = [junk(rng, 40), "import os", "x" * 50 + " = 1", "batch_size = 2; block_size = 4", "batch_size += 1",
           "a = b = 3", "batch_size, block_size = 2, 3", "batch_size: int = 4", "print(1)", "open('code was run', 'w')",
           "del seed", "3", "batch_size = 2 * 2", "batch_size = " + "-" * 3000 + "1", "'a docstring'",
           "batch_size = " + "(" * 300 + "1",
           "learning_rate = 1e400", "learning_rate = 3+4j", "seed = __import__('os').getpid()", "if True:\n  seed = 3",
           "seed = " + "9" * 5000, "out_dir = 'a\\0b'", "out_dir = '\\ud800'", "batch_sise = 4", "device = b'cpu'",
           "seed = -1", "*seed = 3", "[seed] = 3", "seed.x = 3", "seed = (yield)", "lambda: 3"]
    for _ in range(rng.randrange(3)):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(odd))
    raw = bytearray("\n".join(lines).encode(errors=rng.choice(["surrogatepass", "replace"])))
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        raw.insert(rng.randrange(len(raw) + 1), rng.randrange(256))
    return bytes(raw)


def flags(rng, names, n, value=junk):
    argv = []
    for _ in range(rng.randrange(n + 1)):
        key = rng.choice(names)
        if rng.random() < 0.1:
            key = key[:-1] + rng.choice("sx_-")
        argv += rng.choice([[f"--{key}={value(rng)}"]] * 4 + [[f"--{key}", value(rng)]] + [[f"--{key}"]])
    return argv


SAMPLE_FLAGS = ["prompt", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens",
                "num_samples", "stop", "device", "dtype", "checkpoint"]
PREPARE_FLAGS = ["input", "dataset", "split", "column", "max_tokens", "tokenizer", "allow_unrepresentable", "out_dir",
                 "val_fraction"]


def a_case(rng, kind, place, number):
    """One input of a kind; place: the folder with data/, out/ and bytes/ that all of them use."""
    tiny = [*RUN, f"--data_dir={place}/data", f"--out_dir={place}/run{number}", "--max_steps=2", "--eval_tokens=64"]
    if kind == "recipes":
        path = place / f"recipe{number}.py"
        keys = [f.name for f in train.fields(train.TrainConfig)]
        argv = [rng.choice([str(path)] * 8 + [str(place), str(path) + "?", ""])] if rng.random() < 0.8 else []
        more = [["--resume", junk(rng)], ["--overwrite"], [junk(rng)], ["--help"]]
        argv += flags(rng, keys, 4) + rng.choice([[]] * 6 + more)
        return Case("train.py", argv, files={path: recipe(rng)})
    if kind == "runs":
        if rng.random() < 0.8:
            chosen = rng.sample(SMALL_KEYS, rng.randrange(1, 4))
            values = [(f.name, rng.choice(EXTREMES[f.type]) if rng.random() < 0.8 else junk(rng)) for f in chosen]
            more = rng.choice([[], [], [], ["--resume=auto"], ["--overwrite"]])
            return Case("train.py", [*tiny, *(f"--{key}={value}" for key, value in values), *more])
        path = place / f"odd{number}" / rng.choice(["step_000001.pt", "step_x.pt", "x", "step_000002.tmp"])
        argv = [f"--resume={rng.choice([path, path.parent])}", "--max_steps=2"]
        return Case("train.py", argv, files={path: rng.choice(TEXTS)})
    if kind == "sample flags":
        return Case("sample.py", [w for w in flags(rng, SAMPLE_FLAGS, 5) if not w.startswith("--checkpoint")])
    if kind == "prompts":
        text = rng.choice([rng.choice(TEXTS), bytes(rng.randrange(256) for _ in range(rng.randrange(60))), b"a" * 400,
                           junk(rng).encode(errors="replace")])
        argv = ["--checkpoint", rng.choice([place / "out"] * 8 + [place / "nothing", place / "data", place / "bytes"]),
                "--max_new_tokens", rng.choice(["1", "3", "250", "300"])]
        more = flags(rng, ["temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "device", "dtype"], 2,
                     lambda rng: rng.choice([junk(rng), rng.choice(EXTREMES[float])]))
        if rng.random() < 0.5:
            return Case("sample.py", [*argv, *more, "--prompt", "-"], stdin=text)
        return Case("sample.py", [*argv, *more, f"--prompt={os.fsdecode(text)}"])
    if kind == "prepare flags":
        return Case("prepare.py", flags(rng, PREPARE_FLAGS, 5))
    if kind == "texts":
        path = place / f"text{number}{rng.choice(['.txt', '.md', '.jsonl', '', '.JSONL'])}"
        second = place / f"more{number}.txt"
        raw = rng.choice(TEXTS) if rng.random() < 0.7 else bytes(rng.randrange(256) for _ in range(rng.randrange(900)))
        files = {path: raw, **({second: rng.choice(TEXTS)} if rng.random() < 0.3 else {})}
        more = flags(rng, ["val_fraction", "column"], 1) if rng.random() < 0.4 else []
        tokenizer = rng.choice([place / "bytes"] * 8 + [place / "data", path])
        argv = ["--input", *files, "--tokenizer", tokenizer, "--out_dir", place / f"made{number}", *more]
        return Case("prepare.py", argv, files=files)
    raise ValueError(kind)


def plausible(case):
    """What a shell can pass, as bytes, and what is surely fetched from no network."""
    def as_bytes(word):
        if any(0xd800 <= ord(c) < 0xdc80 for c in word):  # half a character, which no argument can be
            return b"\xed\xa0\x80"
        return os.fsencode(word)
    return case._replace(argv=[as_bytes(str(word).replace("\0", "")) for word in case.argv])


class Hang(BaseException):
    pass


def alarm(*_):
    raise Hang


def fault_of(case, result, place, number):
    """What is wrong with how a case has ended, or None."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    if "Traceback" in result.err or "Traceback" in result.out:
        return "traceback"
    if result.code not in (0, 1, 2):
        return f"exit {result.code}"
    if result.code and (not lines or not lines[-1].startswith(f"{case.script}: ") or len(result.err) > 20_000):
        return "no clear line"
    if result.code == 2 and case.script == "train.py" and len(lines) > 1:
        return "more than one line"
    for folder in (place / f"run{number}", place / "out", place / f"odd{number}"):
        if case.script == "train.py" and folder.name != f"odd{number}":
            try:
                intact(folder)
            except ValueError:
                return "damaged checkpoint"
    made = place / f"made{number}"
    if case.script == "prepare.py" and (made.exists() or result.code == 0 and str(made) in map(str, case.argv)):
        check = run_main(lambda argv: train.load_data(train.TrainConfig(data_dir=str(made), block_size=1), True))
        if check.code and "training tokens" not in check.err:
            return f"damaged data: {check.err}"
    return None


def fuzz_place(folder):
    place = folder / "fuzz"
    make_data(place / "data")
    succeed(train_here(place / "data", place / "out", "--max_steps=5"))
    return place


FUZZED = ["recipes"] * 8 + ["sample flags"] * 3 + ["prepare flags"] * 3 + ["runs"] * 3 + ["prompts"] * 2 + ["texts"]


def fuzz(folder, n, seed=0, say=print, kinds=FUZZED):
    """n random inputs in this process: recipes and flags are parsed and checked; runs, prompts and texts are made."""
    rng, place = random.Random(seed), fuzz_place(folder)
    before = snapshot(place / "out")
    wrong, tried, ended = [], dict.fromkeys(kinds, 0), {}
    old, home = signal.signal(signal.SIGALRM, alarm), os.getcwd()
    os.chdir(place)
    try:
        for number in range(n):
            case = a_case(rng, kind := kinds[number % len(kinds)], place, number)
            for path, raw in case.files.items():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(raw)

            def parsed(argv):
                if kind == "recipes":
                    overrides, _ = train.parse_args(argv)
                    train.check(train.TrainConfig(**overrides), rng.choice([1, 1, 2, 3]))
                else:
                    {"sample flags": sample.parse_args, "prepare flags": prepare.parse_args}[kind](argv)
            main = {"runs": train.main, "prompts": sample.main, "texts": prepare.main}.get(kind, parsed)
            signal.alarm(60)
            try:
                result = run_main(main, *case.argv, stdin=case.stdin)
                fault = fault_of(case, result, place, number)
            except Hang:
                fault, result = "hang", None
            except Exception:
                fault, result = traceback.format_exc().strip().splitlines()[-1], traceback.format_exc()
            finally:
                signal.alarm(0)
            tried[kind] += 1
            end = result.code if isinstance(result, Result) else "crash"
            ended[end] = ended.get(end, 0) + 1
            if fault:
                files = {path.name: raw[:300] for path, raw in case.files.items()}
                wrong.append((kind, fault, [str(word)[:200] for word in case.argv], case.stdin[:60], files, result))
            if say and (number + 1) % 500 == 0:
                say(f"  {number + 1} inputs, {len(wrong)} wrong")
            for path in (place / f"run{number}", place / f"made{number}", place / f"odd{number}"):
                shutil.rmtree(path, ignore_errors=True)
            for path in case.files:
                path.unlink(missing_ok=True)
    finally:
        os.chdir(home)
        signal.signal(signal.SIGALRM, old)
    expect(snapshot(place / "out") == before or not wrong, "a file of another run was changed")
    expect(not list(folder.rglob("code was run")), "A RECIPE RAN CODE")
    for each in wrong[:20]:
        say and say(each)
    expect(not wrong, f"{len(wrong)} of {n} inputs: ", *wrong[:3])
    note = ", ".join(f"{count} {kind}" for kind, count in tried.items())
    return Row("fuzzing, in one process", n, 0, len(wrong), f"{note}; {exits(ended)}")


def exits(ended):
    return "exit codes " + ", ".join(f"{code}: {count}" for code, count in sorted(ended.items()))


def at_most_8_gb():
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))


def commands(folder, n, seed=0, say=print, together=2):
    """n random inputs as real commands of all four scripts, two at a time, at most a minute and 8 GB each."""
    rng, place = random.Random(seed), fuzz_place(folder)
    kinds = ["runs", "recipes", "prompts", "sample flags", "texts", "prepare flags", "model"]
    tiny = [*RUN, f"--data_dir={place / 'data'}", "--max_steps=1"]
    fixed = [Case("train.py", [*tiny, f"--out_dir={place / 'huge'}", "--hidden_size=65536"]),
             Case("train.py", [*tiny, f"--out_dir={place}/\udcff"]),
             Case("sample.py", ["--checkpoint", place / "out", "--max_new_tokens", "2", "--prompt", "\udcff"]),
             Case("prepare.py", ["--input", place / "\udcff.txt"])]
    queue, wrong, ended, active, done = [], [], {}, [], 0
    for number in range(n):
        kind = kinds[number % len(kinds)]
        if number % 10 == 9 and fixed:
            case = fixed.pop()
        elif kind == "model":
            case = Case("model.py", flags(rng, ["x", "help", "vocab_size"], 3))
        else:
            case = a_case(rng, kind, place, number)
            if kind == "recipes":  # what is right would start a run of the whole model
                case = case._replace(argv=[*case.argv, "--hidden_size=-1"])
            if kind == "sample flags":
                case = case._replace(argv=[*case.argv, "--checkpoint=nothing/here"])
            if kind == "prepare flags":
                case = case._replace(argv=["--input", "not there.txt", *case.argv])
        queue.append((number, plausible(case)))
    while queue or active:
        if queue and len(active) < together:
            number, case = queue.pop(0)
            for path, raw in case.files.items():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(raw)
            streams = [open(place / f"{number}.{name}", "w+b") for name in ("in", "out", "err")]
            streams[0].write(case.stdin)
            streams[0].seek(0)
            popen = subprocess.Popen([sys.executable, ROOT / case.script, *case.argv], cwd=place, stdin=streams[0],
                                     stdout=streams[1], stderr=streams[2], start_new_session=True,
                                     env={**os.environ, "HF_HUB_OFFLINE": "1"}, preexec_fn=at_most_8_gb)
            active.append((number, case, popen, streams, time.monotonic()))
        for entry in list(active):
            number, case, popen, streams, began = entry
            hangs = time.monotonic() - began > 60
            if hangs:
                os.killpg(popen.pid, signal.SIGKILL)
            if popen.poll() is not None or hangs:
                popen.wait()
                active.remove(entry)
                out, err = (Path(s.name).read_bytes().decode(errors="replace") for s in streams[1:])
                for s in streams:
                    s.close()
                result = Result(popen.returncode, out, err)
                fault = "hang" if hangs else fault_of(case, result, place, number)
                ended[result.code] = ended.get(result.code, 0) + 1
                if fault:
                    wrong.append((fault, case, result.code, result.out[-500:], result.err[-1500:]))
                done += 1
                if say and done % 20 == 0:
                    say(f"  {done} commands, {len(wrong)} wrong")
        time.sleep(0.01)
    expect(not list(folder.rglob("code was run")), "A RECIPE RAN CODE")
    for each in wrong[:20]:
        say and say(each)
    expect(not wrong, f"{len(wrong)} of {n} commands:", *wrong[:3])
    return Row("fuzzing, real commands", n, 0, len(wrong), exits(ended))


# ---------------------------------------------------------------------------------------------------------- campaign

PARTS = {
    "kills": lambda folder, a: kills(folder, a.kills, a.seed),
    "preparation": lambda folder, a: kill_preparation(folder, max(4, a.kills // 4), a.seed),
    "disk": lambda folder, a: full_disk(folder, (0, 4096, 100_000, 300_000, 600_000)),
    "save": lambda folder, a: failed_save(folder, (100_000, 300_000, 700_000)),
    "read_only": lambda folder, a: read_only(folder),
    "checkpoints": lambda folder, a: damaged_checkpoints(folder, 1000, a.seed),
    "resumed": lambda folder, a: damaged_then_resumed(folder),
    "data": lambda folder, a: damaged_data(folder),
    "signals": lambda folder, a: signals(folder, SIGNALS),
    "compiling": lambda folder, a: signals(folder, COMPILING, compiled=True),
    "second": lambda folder, a: second_process(folder),
    "strangers": lambda folder, a: strangers(folder, real=True),
    "machine": lambda folder, a: other_machine(folder),
    "threads": lambda folder, a: other_threads(folder),
    "memory": lambda folder, a: memory(folder),
    "fuzz": lambda folder, a: fuzz(folder, a.fuzz, a.seed),
    "commands": lambda folder, a: commands(folder, max(4, a.fuzz // 20), a.seed),
}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs of a training [100]")
    parser.add_argument("--fuzz", type=int, default=2000, help="inputs in one process; a twentieth as commands [2000]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="of all that is random [0]")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children do
    rows, failed, began = [], [], time.monotonic()
    for name in args.only:
        print(f"{name}:", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture_") as folder:
            try:
                row = PARTS[name](Path(folder).resolve(), args)
            except Unavailable as e:
                row = Row(name, 0, 0, 0, f"SKIPPED: {e}")
            except Exception as e:
                traceback.print_exc()
                row = Row(name, "", "", "FAILED", (str(e).splitlines() or [type(e).__name__])[0][:100])
                failed.append(name)
        rows.append(row)
        print(f"  {time.monotonic() - start:.0f} s: {' | '.join(map(str, row))}", flush=True)
    print(f"\ntorch {torch.__version__}, {os.cpu_count()} cores, {time.monotonic() - began:.0f} s\n\n"
          f"| fault | injected | resumed | lost | |\n| --- | ---: | ---: | ---: | --- |")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
