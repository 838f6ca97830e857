"""What all tests share: small data, a tiny run, ways to start the scripts and to compare ends."""
import atexit
import contextlib
import ctypes
import functools
import gc
import io
import json
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

# Threads that wait asleep: beside anything else, small models are ten times as fast. Before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Not torchrun's, if it is above; and what users see in time must not rest on the last one.
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONUNBUFFERED"):
    os.environ.pop(name, None)
# A shell's background job ignores it, and its children do.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402
import train  # noqa: E402

# 1.6 million parameters, nearly all of them the embedding, on tokens of SmolLM2: 20 ms a step.
TINY = """--hidden_size=32 --intermediate_size=64 --num_hidden_layers=2 --num_attention_heads=4
    --num_key_value_heads=2 --initializer_range=0.18 --max_position_embeddings=256 --batch_size=4
    --block_size=16 --learning_rate=1e-2 --warmup_steps=4 --compile=false --log_interval=1
    --eval_interval=0 --eval_tokens=300 --sample_interval=0 --checkpoint_interval=0
    --device=cpu""".split()
# The same on the bytes of make_data, with evaluations and checkpoints: 5 ms a step.
RUN = [*TINY, *"""--vocab_size=2048 --block_size=32 --eval_interval=10 --eval_tokens=6000
    --checkpoint_interval=5 --max_steps=40 --dtype=float32""".split()]
END = "<|endoftext|>"
PROSE = "The quick brown fox jumps over the lazy dog; it's 42 times, they said.\n" * 40

# script: a pattern of the program that its last line names
Result = namedtuple("Result", "code out err script", defaults=[r"\w+\.py|tools\.\w+"])


def expect(true, *what):
    """An assert that is there under python -O, too, and shows what it saw."""
    if not true:
        raise AssertionError("\n".join(str(w)[-3000:] for w in what))


def run_main(main, *argv, stdin=b"", threads=None, **keys):
    """Runs a script's main as its process would, but here. keys: more words, --key=value."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = files = [
        io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", errors=errors, write_through=True)
        for raw, errors in ((stdin, "strict"), (b"", "strict"), (b"", "backslashreplace"))]
    code = 0
    try:
        main([*map(str, argv), *(f"--{key}={value}" for key, value in keys.items())])
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads_before)
    out, err = (f.buffer.getvalue().decode(errors="replace") for f in files[1:])
    script = main.__module__ if main.__module__.startswith("tools.") else f"{main.__module__}.py"
    return Result(code, out, err, script)


class Process(contextlib.AbstractContextManager):
    """python COMMAND in cwd and in a process group of its own, its output in the file `log`.

    Used with `with`, nothing of it outlives the block. limits: arguments of resource.setrlimit.
    stream: the path of what it has as all three standard streams instead, as a terminal."""

    def __init__(self, command, cwd="", limits=(), stream=None, **env):
        cwd = Path(cwd).absolute()
        cwd.mkdir(parents=True, exist_ok=True)
        self.log = cwd / f"{time.monotonic_ns()}.log"
        self.log.touch()
        streams = [stream] * 3 if stream else [os.devnull, self.log, self.log]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOT, **env}
        request = json.dumps([command, cwd, env, limits, streams], default=str)
        print(request, file=zygote().stdin, flush=True)
        self.pid, self.code = int(zygote().stdout.readline()), None

    def __exit__(self, *_):
        self.kill()
        self.log.unlink(missing_ok=True)

    def poll(self, timeout=0):
        """Its exit code; None where it is still running after that many seconds."""
        end = time.monotonic() + timeout
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
            if pid or time.monotonic() >= end:
                break
            time.sleep(0.001)
        return self.code

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    def signal(self, signum):
        """As a terminal does it: Ctrl-C reaches the whole group."""
        if self.poll() is None:
            os.killpg(self.pid, signum)

    def kill(self):
        """kill -9 for the process and all below it: torchrun's workers have groups of their own."""
        below = descendants(self.pid) if self.poll() is None else []
        self.signal(signal.SIGKILL)
        self.end()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in below:  # the kernel frees their locks when they are gone
            while (text := proc(pid, "status")) and "\nState:\tZ" not in text:
                time.sleep(0.005)

    def until(self, true, timeout=120):
        """Waits for true(), or for the end of the process; returns whether it is true then."""
        end = time.monotonic() + timeout
        while not true() and self.poll() is None:
            expect(time.monotonic() < end, f"waited {timeout} s in vain", self.text)
            time.sleep(0.0002)
        return true()

    def end(self, timeout=180):
        """Its Result, both streams in err."""
        self.poll(timeout)
        expect(self.code is not None, f"a hang: still running after {timeout} s", self.text)
        return Result(self.code, "", self.text)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return str(s.getsockname()[1])


def proc(pid, name):
    """What Linux tells of a process, which may be gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text()
    return ""


def descendants(pid):
    """The processes below pid, as far as /proc shows them."""
    parents, found = {}, [pid]
    for folder in Path("/proc").glob("[0-9]*"):
        if stat := proc(folder.name, "stat"):
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    for parent in found:  # it grows meanwhile
        found += [child for child in parents if parents[child] == parent]
    return found[1:]


@functools.cache
def zygote():
    """A process that runs serve(), and ends with this one; a fork of it saves three seconds."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what it lets go of is this process's
    return subprocess.Popen([sys.executable, __file__], text=True, start_new_session=True,
                            env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def serve():
    """Forks a process for each request, a line of standard input.

    Nothing may use torch before: its threads, once started, do not live on in a fork."""
    import torch._dynamo  # noqa: F401
    import transformers  # noqa: F401

    import sample  # noqa: F401
    gc.freeze()  # or every child would copy all pages when it collects
    for request in sys.stdin:  # until the tests have ended
        if os.fork() == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:  # until it is a child of the tests
                time.sleep(0.0002)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with them
            become(*json.loads(request))
        os.wait()


def become(words, cwd, env, limits, streams):
    """Makes this process one in which Python has just started, runs these words and ends."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored by nohup
    for limit in limits:
        resource.setrlimit(*limit)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.write(1, b"%d\n" % os.getpid())  # the answer
    for number, name in enumerate(streams):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND | os.O_NOCTTY), number)
    scripts = [str(ROOT / f"{name}.py") for name in ("train", "prepare", "sample", "model")]
    if words[0] not in scripts or torch.cuda.is_available():  # CUDA and forks do not mix
        os.execv(sys.executable, [sys.executable, *words])
    if threads := env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    sys.argv, code = words, 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # without the second in which Python frees it all


def flaw(done, codes=(0,), *words):
    """What is wrong with how a script has ended; None if it is as it should be.
    It has one of the codes; where that is not 0, its last line says why, with these words."""
    last = ([""] + [line for line in done.err.splitlines() if line.strip()])[-1]
    if "Traceback" in done.out + done.err:
        return "traceback"
    if done.code not in codes:
        return f"exit {done.code}, not {codes}"
    if done.code and not re.match(f"({done.script}): ", last):
        return "no clear last line"
    if done.code and not all(str(word) in last for word in words) or len(last) > 20_000:
        return f"the last line should hold {words}"


def expect_end(done, codes=(0,), *words):
    problem = flaw(done, codes, *words)
    expect(not problem, problem, done.out, done.err)


def refused(done, *words, code=2):
    """The script ended with this code and one line that says why, with all words in it."""
    expect_end(done, [code], *words)
    expect(len(done.err.splitlines()) == 1, done.err)


def keys_of_run(data, out, *argv):
    """Those of a RUN that resumes where it can."""
    return [*RUN, f"--data_dir={data}", f"--out_dir={out}", "--resume=auto", *argv]


def training(data, *argv, out="out", **how):
    """A process of such a RUN."""
    command = [ROOT / "train.py", *keys_of_run(data, out, *argv)]
    return Process(command, **{"OMP_NUM_THREADS": "1", **how})


def train_here(data, out, *argv, **keys):
    """A RUN in this process. With two threads, so small a model only waits."""
    argv = [*RUN, f"--data_dir={data}", f"--out_dir={out}", *argv]
    return run_main(train.main, *argv, threads=1, **keys)


def resume_here(out, *argv, **keys):
    return run_main(train.main, f"--resume={out}", *argv, threads=1, **keys)


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def make_tokenizer(folder):
    """A tokenizer of the 256 bytes and an end-of-text token, as a folder of Hugging Face's."""
    from tokenizers import ByteLevelBPETokenizer
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([], vocab_size=257, special_tokens=[END], show_progress=False)
    write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    return folder


def make_data(folder, start=0):
    """60,000 characters of Python's reference, from `start` on, in make_tokenizer's tokens."""
    tokenizer, text = make_tokenizer(folder.parent / "bytes"), folder.parent / f"{folder.name}.txt"
    text.write_text(prepare.stand_in_text()[start:start + 60_000], encoding="utf-8")
    expect_end(run_main(prepare.main, input=text, tokenizer=tokenizer, out_dir=folder))
    return folder


def write_data(folder, train_ids, vocab_size=49152, val_ids=range(100)):
    """A prepared folder of given ids."""
    folder = Path(folder)
    make_tokenizer(folder / "tokenizer")
    for side, ids in (("train", train_ids), ("val", val_ids)):
        write(folder / f"{side}.bin", np.asarray(list(ids), dtype="<u2").tobytes())
    prepare.write_meta(folder, {"source": "test", "vocab_size": vocab_size, "val_bytes": 100,
                                "val_tokens": 100, "stand_in": None})
    return folder


def snapshot(folder="."):
    """Every file and folder in it, with what the files hold; the lock aside, which says nothing."""
    paths = [path for path in Path(folder).rglob("*") if path.name != ".lock"]
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in paths}


def watch_disk(monkeypatch):
    """A list that gets the name of each file and folder flushed, and (old, new) of each renamed."""
    events = []
    def watch(name, event_of):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: events.append(event_of(*args)) or real(*args))
    watch("fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    for name in ("rename", "replace"):
        watch(name, lambda old, new: (Path(old).name, Path(new).name))
    return events


def metrics(out_dir):
    """The lines of metrics.jsonl without what the machine adds to them."""
    lines = map(json.loads, Path(out_dir, "metrics.jsonl").read_text().splitlines())
    aside = ("tokens_per_sec", "seconds")
    return [{k: v for k, v in line.items() if k not in aside} for line in lines]


def last_step(out):
    """The step of the last whole line in metrics.jsonl; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError), open(f"{out}/metrics.jsonl", "rb") as f:
        f.seek(max(0, f.seek(0, 2) - 800))
        return json.loads(f.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"]
    return 0


def flat(value, name=""):
    """A checkpoint's content, or a part of it, as {name: bytes}."""
    if isinstance(value, torch.Tensor):
        raw = value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return {name: f"{value.dtype} {tuple(value.shape)} ".encode() + raw}
    if not isinstance(value, (dict, list, tuple)):
        return {name: repr(value).encode()}
    found = {name: type(value).__name__.encode()}
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        found |= flat(part, f"{name}.{key}")
    return found


def differences(a, b):
    """{name: the bytes of both} of the places at which two checkpoints, or parts, differ."""
    a, b = flat(a), flat(b)
    both = {name: (a.get(name, b""), b.get(name, b"")) for name in sorted(a.keys() | b.keys())}
    return {name: (x, y) for name, (x, y) in both.items() if x != y}


def intact(out):
    """The steps of a folder's checkpoints; raises ValueError where one is not whole."""
    return [train.read_checkpoint(path, mmap=True)["step"] for path in train.checkpoints(out)]


def content(out):
    """A run's last checkpoint, its metrics and the names of its files, but for time and out_dir."""
    (path, state), lines = train.load_checkpoint(out, mmap=True), metrics(out)
    expect(state["model"] and state["optimizer"]["state"] and state["rng"], "it is empty")
    expect([line["step"] for line in lines] == [*range(1, state["step"] + 1)], "a step is missing")
    state |= {"seconds": None, "config": {**state["config"], "out_dir": None}}
    return {path.name: state, "metrics": json.dumps(lines), "files": intact(out)}


def lost_bits(wanted, out):
    """How many bits of weights, optimizer, RNG and metrics differ from the undisturbed run's."""
    lost = 0
    for name, (x, y) in differences(content(wanted), content(out)).items():
        bits = (int.from_bytes(x) ^ int.from_bytes(y)).bit_count() + 8 * abs(len(x) - len(y))
        print(f"  {bits} bits of {name} differ: {x[:99]}, {y[:99]}", file=sys.stderr)
        lost += bits
    return lost


if __name__ == "__main__":  # the zygote
    serve()
