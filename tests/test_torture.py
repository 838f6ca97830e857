"""Breaks runs in every way that a real machine does, and counts what is lost.

    TORTURE=7 python -m pytest -qs tests/test_torture.py     # the long campaign, with this seed

Without TORTURE each part has its short form. It prints its row: faults, runs resumed, lost.
"""
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path
from unittest import SkipTest, mock

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import prepare
import sample
import train
from tests.harness import (PROSE, ROOT, RUN, Process, Result, descendants, expect, expect_end, flaw,
                           intact, last_step, lost_bits, make_data, proc, resume_here, run_main,
                           snapshot, train_here, training)
from tools import export

rng = random.Random(0)  # of all that is random here; runs in this process seed the others


@dataclass
class Row:
    """What a part of the campaign has counted."""
    injected: int = 0
    resumed: int = 0
    lost: int = 0  # bits, or faults that ended in damage, a hang, a traceback, code that ran
    note: str = ""

    def fault(self, problem, *what):
        """Counts a fault and, where it did harm, what is lost; shows the problem."""
        self.injected += 1
        if problem:
            self.lost += 1
            print("LOST:", problem, *what, file=sys.stderr, flush=True)


def prepared(folder, *argv):
    """(data, the out_dir of a run that nothing disturbs)"""
    data, out = make_data(folder / "data"), folder / "undisturbed"
    expect_end(train_here(data, out, *argv))
    return data, out


@mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
def end_of(script, *argv, stdin=b"", threads=1):
    """How a script ends, run in this process; with a traceback or after a minute, too."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    try:
        return run_main(script.main, *argv, stdin=stdin, threads=threads)
    except (Exception, KeyboardInterrupt):
        return Result("crash", "", traceback.format_exc())
    finally:
        signal.alarm(0)


COMPILERS = {"cc1plus\n", "clang\n"}
INSTANTS = {  # what tells that a process p, which writes to out, is there; for how many seconds
    "the start": (lambda p, out: True, 0.3),
    "the first step": (lambda p, out: (out / "run.json").exists(), 0),
    "compiling": (lambda p, out: COMPILERS & {proc(i, "comm") for i in descendants(p.pid)}, 0),
    "an evaluation": (lambda p, out: last_step(out) % 10 == 9, 0.04),
    "a save": (lambda p, out: (out / "checkpoint.tmp").exists(), 0.004),
    "a step": (lambda p, out: True, 0.03)}
INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
EARLY, LATER = ["the start", "the first step"], ["an evaluation", "a save", "a step"]
KILLS = [([KILL], at) for at in ("a save", *LATER, "the start", "an evaluation")]
SIGNALS = [([signum], at) for signum in (INT, TERM, HUP) for at in EARLY + LATER]
SIGNALS += [(s, at) for s in ([INT, INT], [TERM, TERM], [HUP, HUP], [TERM, INT]) for at in LATER]
COMPILING = [([signum], "compiling") for signum in (INT, TERM, HUP)]


def stops(row, folder, n, cases, lives=1):
    """n runs are stopped at an instant, exit as they are asked to, save, and go on to the bit.

    cases: (one or two signals, one of INSTANTS), by turns. lives: stops of the same run. (With
    such learning rates its best checkpoint is not its newest.)"""
    keys = [f"--max_steps={30 + 20 * lives}", "--learning_rate=1", "--min_lr=1"]
    if cases == COMPILING:
        keys = ["--max_steps=10", "--compile=true"]
        if problem := train.compiler_problem(torch.device("cpu")):
            expect(not shutil.which("g++"), problem)
            raise SkipTest("no compiler works here")
    (data, wanted), hits = prepared(folder, *keys), Counter()
    for i in range(n):
        (signums, instant), out = cases[i % len(cases)], folder / f"out{i // lives}"
        is_there, seconds = INSTANTS[instant]
        due = last_step(out) + rng.randrange(6, 16) if instant in LATER else 0
        with training(data, *keys, out=out, TORCHINDUCTOR_CACHE_DIR=folder / f"cache{i}") as p:
            p.until(lambda: last_step(out) >= due and is_there(p, out))
            time.sleep(rng.random() * seconds)
            was_alive = p.poll() is None
            for signum in signums:
                p.signal(signum)
                time.sleep(0.002)
            at, (code, _, text, _) = last_step(out), p.end()
        hits[instant] += 1
        hits["torn saves"] += (out / "checkpoint.tmp").exists()
        saved, is_asked = intact(out), code - 128 in signums
        if signums == [KILL]:
            is_right = code == -KILL
        elif not saved and instant not in LATER:  # it did not listen yet, or had nothing to save
            is_right = code == -signums[0] or is_asked and instant == "compiling"
        elif signums[1:] == [INT]:  # a Ctrl-C after another signal leaves at once
            is_right = is_asked and saved
        else:
            told = f"step_{saved[-1]:06d}.pt is written", f"python train.py --resume={out}\n"
            is_right = is_asked and at <= saved[-1] <= at + 2 and all(t in text for t in told)
        is_silent = instant == "the start" or "Traceback" not in text and "Error" not in text
        row.fault(not (is_right and is_silent and was_alive), signums, instant, at, code, text)
    for out in folder.glob("out*"):
        expect_end(train_here(data, out, *keys, "--resume=auto"))
        row.lost += lost_bits(wanted, out)
    row.resumed, row.note = n, str(dict(hits))


def disks(row, folder, cases):
    """A disk fills up, a file grows too large, a folder is read-only: said; later, no bit is lost.

    cases: (what the system says, bytes that are left)."""
    (data, wanted), disk = prepared(folder), folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise SkipTest("no file system can be mounted here")
    try:
        for words, left in cases:
            out, filler = disk / "out", disk / "filler"
            expect_end(train_here(data, out, "--max_steps=12", "--lr_decay_steps=40"))
            before = [path.read_bytes() for path in train.checkpoints(out)]
            limits = [(resource.RLIMIT_FSIZE, (left, left))] if words == "File too large" else []
            if words == "Read-only":
                subprocess.run(["mount", disk, "-o", "remount,ro"], check=True)
                row.fault(flaw(done := train_here(data, disk / "new"), [1], words), done)
            with training(data, "--checkpoint_interval=40", out=out, limits=limits) as p:
                if words == "No space left":
                    p.until(lambda: last_step(out) >= 13)  # the next save is far
                    p.signal(signal.SIGSTOP)
                    with open(filler, "wb") as f:
                        os.posix_fallocate(f.fileno(), 0, shutil.disk_usage(disk).free - left)
                    p.signal(signal.SIGCONT)
                done = p.end()
            subprocess.run(["mount", disk, "-o", "remount,rw"], check=True)
            filler.unlink(missing_ok=True)
            is_harmed = [path.read_bytes() for path in train.checkpoints(out)] != before
            row.fault(flaw(done, [1], words) or is_harmed, words, left, done)
            expect_end(resume_here(out, "--max_steps=40"))
            row.lost += lost_bits(wanted, out) + (out / "checkpoint.tmp").exists()
            shutil.rmtree(out)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    row.resumed = len(cases)


def damaged_checkpoints(row, folder, n):
    """The newest checkpoint cut at n lengths, with one of n bytes changed, zeroed, made longer."""
    keys = ["--vocab_size=257", "--hidden_size=16", "--eval_interval=0", "--max_steps=10"]
    (_, wanted), edge = prepared(folder, *keys), min(200, n)
    out = shutil.copytree(wanted, folder / "out")
    before, newest = train.checkpoints(out)
    good, size = newest.read_bytes(), newest.stat().st_size
    lengths = {0, 1, size - 1, size - 39, size - 40, *(rng.randrange(size) for _ in range(n))}
    places = {*range(edge), *range(size - edge, size), *(rng.randrange(size) for _ in range(n))}
    bad = [bytes(size), good + b"\0", good[:-4096] + bytes(4096), good + good]
    bad += [good[:length] for length in lengths]
    for place in places:
        byte = good[place] ^ rng.choice([1, 128, 255, 1 << rng.randrange(8)])
        bad.append(good[:place] + bytes([byte]) + good[place + 1:])
    for content in bad:
        newest.write_bytes(content)
        row.fault(train.load_checkpoint(out)[0] != before, len(content))
    for content in (good[:9999], bad[-1]):
        newest.write_bytes(content)
        done = resume_here(out)
        is_named = str(newest) in done.err and str(before) in done.out
        row.fault(flaw(done) or not is_named, done)
        row.lost += lost_bits(wanted, out)
    expect(train.load_checkpoint(out)[0] == newest, "a good one is not taken")
    for path in train.checkpoints(out):
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 4]))
    row.resumed, left, done = 2, snapshot(out), resume_here(out)
    row.fault(flaw(done, [1], out) or snapshot(out) != left, "none is whole", done)


def damaged_data(row, folder):
    """Data cut, changed, missing or of another dataset are refused before a first step."""
    (own, out), data = prepared(folder, "--max_steps=12"), folder / "damaged"
    other, run = snapshot(make_data(folder / "other", start=100_000)), snapshot(out)
    for name in ("train.bin", "val.bin", "meta.json", "tokenizer/tokenizer.json"):
        raw = (own / name).read_bytes()
        changed = raw[:99] + bytes([raw[99] ^ 1]) + raw[100:]
        bad_ones = [raw[:-3], raw[:-2], raw + b"\0\0", b"", changed, b"[" * 100_000]
        if other[name] != raw:  # (the tokenizer is the same, and need not be there)
            bad_ones += [other[name], None]
        for bad in bad_ones:
            shutil.copytree(own, data)
            (data / name).unlink() if bad is None else (data / name).write_bytes(bad)
            for done in (train_here(data, folder / "new"),
                         resume_here(out, "--max_steps=40", f"--data_dir={data}")):
                problem = flaw(done, [1, 2], data) or last_step(folder / "new")
                row.fault(problem or snapshot(out) != run, name, (bad or b"")[:99], done)
            shutil.rmtree(data)
    shutil.rmtree(own)  # a whole other dataset, in the place of the run's own
    shutil.copytree(folder / "other", own)
    row.fault(flaw(done := resume_here(out, "--max_steps=40"), [1], own), done)


class Evil(str):
    """What a stranger's pickle can hold: loading it without care makes a file of this name."""

    def __reduce__(self):
        return open, (str(self), "w")


BAD = "modeling_evil.Evil"
CODE = {"auto_map": {"AutoModelForCausalLM": BAD, "AutoConfig": BAD, "AutoTokenizer": [BAD, BAD]}}


def strangers(row, folder):
    """Checkpoints, models, tokenizers that would run code leave no trace of having done so."""
    (data, out), marker = prepared(folder, "--max_steps=5"), folder / "code was run"
    state, evil, hf = train.load_checkpoint(out)[1], Evil(marker), folder / "hf"
    pickle.loads(pickle.dumps(evil))
    expect(marker.exists(), "the attack itself does not work")
    marker.unlink()

    def attack(codes, script, *argv):
        with mock.patch("builtins.input", return_value="y") as asked:
            done = end_of(script, *argv, stdin=b"y\n" * 9)  # a terminal's worth of consent
        problem = "CODE WAS RUN" if marker.exists() else asked.called or flaw(done, codes)
        row.fault(problem, argv, done)
        marker.unlink(missing_ok=True)
    # Checkpoints whose digest fits, as a stranger can compute it, too: with code, with nonsense.
    bad = [{**state, "best": evil}, {**state, "rng": [evil]}, {**state, "model": evil}, evil]
    for value in (None, -1, "five", {}):
        bad += [{**state, name: value} for name in state]
        for place, name in (("config", "hidden_size"), ("config", "no_key"), ("data", "tokenizer"),
                            ("optimizer", "state"), ("model", "model.norm.weight")):
            bad.append({**state, place: {**state[place], name: value}})
    for i, content in enumerate([pickle.dumps(evil), *bad]):
        path = shutil.copytree(out, folder / f"bad{i}") / "step_000005.pt"
        path.write_bytes(content) if i == 0 else train.write_checkpoint(path, content)
        codes = [1] if i < 5 else [0, 1, 2]
        attack(codes, sample, "--checkpoint", path.parent, "--max_new_tokens=1")
        attack(codes, train, f"--resume={path}", "--max_steps=6")
    # Weights as a pickle are not read; a config that names code is refused or ignored.
    expect_end(end_of(export, out, hf))
    for name in ("modeling_evil.py", "tokenization_evil.py"):
        (hf / name).write_text(f"open({str(marker)!r}, 'w')\nclass Evil:\n    pass\n")
    torch.save({"model.embed_tokens.weight": evil}, hf / "pytorch_model.bin")
    for code, kind, *edits in [  # the exit code, a stranger's folder, what its two configs say
            (0, "pickle beside", {}, {}), (1, "pickle only", {}, {}), (0, "code", CODE, CODE),
            (1, "code type", {**CODE, "model_type": "evil"}, CODE),
            (0, "code class", CODE, {**CODE, "tokenizer_class": "Evil"})]:
        target = shutil.copytree(hf, folder / kind)
        for file, edit in zip((target / "config.json", target / "tokenizer_config.json"), edits):
            file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
        if kind == "pickle only":
            (target / "model.safetensors").unlink()
        keys = [*RUN, f"--data_dir={data}", f"--out_dir={target}-new", "--max_steps=1"]
        attack([code], sample, "--checkpoint", target, "--max_new_tokens=1")
        attack([code], train, *keys, f"--init_from={target}")
    # A tokenizer that brings code: beside a checkpoint, beside the data, and for prepare.py.
    for place in (out, data):
        shutil.copytree(target, place / "tokenizer", dirs_exist_ok=True)
    attack([0], sample, "--checkpoint", out, "--max_new_tokens=1")
    attack([0], train, f"--resume={out}", "--max_steps=6", "--sample_interval=1")
    argv = ["--input", folder / "data.txt", "--tokenizer", target, "--out_dir", folder / "new"]
    attack([0], prepare, *argv)
    PreTrainedTokenizerFast.from_pretrained(folder / "new" / "tokenizer").encode("fox")
    expect(not marker.exists(), "CODE WAS RUN")


def memory(row, folder, steps):
    """Resident memory of a run with evaluations, samples, checkpoints does not grow."""
    data, out, peaks = make_data(folder / "data"), folder / "out", []
    keys = [f"--{what}_interval=50" for what in ("sample", "eval", "checkpoint")]
    with training(data, f"--max_steps={steps}", *keys, out=out) as p:
        for begin in (100, steps - 100):
            p.until(lambda: last_step(out) > begin)
            Path(f"/proc/{p.pid}/clear_refs").write_text("5")  # the peak is that from now on
            p.until(lambda: last_step(out) > begin + 50)
            peaks.append(int(proc(p.pid, "status").partition("VmHWM:")[2].split()[0]))
        expect_end(p.end())
    expect(len(os.listdir(out / "samples")) == steps // 50, "too few samples")
    growth = peaks[1] / peaks[0] - 1
    row.note = f"{peaks[0] >> 10} MiB after 100 steps, {growth:+.2%} after {steps}"
    row.fault(growth >= 0.02, row.note)


WORDS = ["", " ", "4 4", "4\n", "9" * 5000, "a\0b", "\udcff", str(2**47), str(2**48), str(2**63),
         *"""0 -1 -0.0 1 3 65536 0.5 nan inf 1e999 1e308 1e-320 0x10 1__0 ½ true None [] four 4,5
         nowhere/x /proc/x /dev/null . é cuda mps float16 bfloat16 muon wsd auto --help""".split()]
BYTES = [b"\n", b" " * 3000, b"\0" * 700, b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3(", b"\xed\xa0\x80",
         b"x" * 3000, "é\N{SNOWMAN}\U0001f600 ".encode() * 90, b"<|endoftext|>" * 40, b"[" * 3000,
         b"\r\n\r\r\n" * 90, b"\x1f\x8b", b'{"text": 3}\n' * 20, b"%PDF", b"PK\3\4", b"(" * 300,
         b"\nimport os\n", b"\nopen('code was run', 'w')\n", b"\nseed = beta1 = 3\n",
         b"\nseed += 1\n", b"\nseed: int = 4\n", b"\nseed = 2 * 2\n", b"\nbeta1 = 3+4j\n",
         b"\nif True:\n  seed = 3\n"]
KEYS = {name: f.default for name, f in train.KEYS.items()
        if name not in ("max_steps", "batch_size", "block_size", "init_from", *train.SIZES)}
SAMPLE = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 3,
          "stop": "x", "device": "cpu", "dtype": "float32", "num_samples": 2}
PREPARE = {"val_fraction": 0.2, "out_dir": "elsewhere", "tokenizer": "bytes"}
RECIPE = "\n".join(f"{name} = {value!r}" for name, value in KEYS.items()).encode()


def bent(good, new):
    """A command line (a list) or a file with parts repeated, cut off, or replaced by new()."""
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        i = rng.randrange(len(good) + 1)
        part = rng.choice([new(), new(), new(), good[i:i + 30] * 2])
        good = good[:i] + part + good[i + rng.choice([0, 0, 1, 1, 40]):]
    return good


def fuzz(row, folder, n, real=False):
    """n bent inputs, here or (real) as commands: success, or one line that says why not."""
    (data, out), ended = prepared(folder, "--max_steps=5"), Counter()
    before, file, made = snapshot(out), folder / "given" / "step_000001.pt", folder / "made"
    out.rename("out")
    file.parent.mkdir()
    limits = [(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))]
    small = [f"--data_dir={data}", "--max_steps=2", "--eval_tokens=64", "--compile=false"]
    for number in range(n):
        kind = ["recipe", "text", "prompt", "checkpoint", "too large"][number % (4 + real)]
        raw, is_bent = RECIPE if kind == "recipe" else PROSE[:171].encode(), rng.random() < 0.5
        if is_bent:
            raw = bent(raw, lambda: rng.choice(BYTES))
        file.write_bytes(raw)
        script, keys, argv = {
            "recipe": (train, KEYS, [file, *RUN, f"--out_dir={made}", *small]),
            "checkpoint": (train, KEYS, [f"--resume={rng.choice([file, file.parent])}", *small]),
            "text": (prepare, PREPARE, ["--tokenizer", rng.choice(["bytes", file]),
                                        f"--out_dir={made}", f"--input={file}"]),
            "prompt": (sample, SAMPLE, ["--prompt", rng.choice(["-", os.fsdecode(raw)]),
                                        "--checkpoint", rng.choice(["out", "bytes", "nothing"]),
                                        "--max_new_tokens=3"]),
            "too large": (train, KEYS, [*RUN, *small, f"--out_dir={made}", "--hidden_size=65536"])
        }[kind]
        words = [f"--{key}={keys[key]}" for key in rng.sample([*keys], 3)]
        if not is_bent:  # or else a bent line could hide what the file does
            odd = [*WORDS, "".join(rng.choices("az09 .,-_=+*/\\'\"#\n\té\U0001f600", k=9))]
            odd += [f"--{rng.choice([*keys])}={word}" for word in odd * 5]
            words = bent(words, lambda: [rng.choice(odd)])
        argv = [*words, *argv]
        if real:
            argv = [str(word).replace("\0", "") for word in argv]
            with Process([ROOT / f"{script.__name__}.py", *argv], limits=limits) as p:
                done = p.end(300)
        else:
            done = end_of(script, *argv, stdin=raw)
        if script is prepare and made.exists():
            prepare.Data(made)  # raises where it is damaged
        is_long = done.code == 2 and len(done.err.splitlines()) > 1
        problem = is_long or flaw(done, (0, 1, 2), f"{script.__name__}.py: ")
        row.fault(problem, [str(word)[:200] for word in argv], raw[:200], done)
        shutil.rmtree(made, ignore_errors=True)
        ended[kind, done.code] += 1
    expect(n < 100 or all(ended[kind, 0] for kind in ("recipe", "text", "prompt")), ended)
    expect(snapshot("out") == before, "a file of another run was changed")
    expect(not [*folder.rglob("code was run")], "A RECIPE RAN CODE")
    row.note = f"exit codes {dict(ended)}"


SHORT = [SIGNALS[i] for i in (1, 7, 13, 17)]
DISKS = [("No space left", left) for left in (100_000, 0, 4096, 300_000, 600_000)]
DISKS += [("File too large", left) for left in (300_000, 100_000, 700_000)] + [("Read-only", 0)]
PARTS = {  # what it is, its short form, and that of the campaign
    "kills": (stops, {"cases": KILLS, "n": 5, "lives": 5}, {"cases": KILLS, "n": 100, "lives": 6}),
    "disks": (disks, {"cases": DISKS[::5] + DISKS[-1:]}, {"cases": DISKS}),
    "checkpoints": (damaged_checkpoints, {"n": 40}, {"n": 1000}), "data": (damaged_data, {}, {}),
    "signals": (stops, {"cases": SHORT, "n": 4}, {"cases": SIGNALS, "n": 27}),
    "compiling": (stops, {"cases": COMPILING, "n": 1}, {"cases": COMPILING, "n": 3}),
    "strangers": (strangers, {}, {}),
    "memory": (memory, {"steps": 300}, {"steps": 2000}), "fuzz": (fuzz, {"n": 200}, {"n": 2000}),
    "commands": (fuzz, {"n": 5, "real": True}, {"n": 100, "real": True})}
SLOW = ("kills", "signals", "compiling", "memory")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PARTS])
def test_nothing_is_lost(name, tmp_path):
    (part, short, long), row, seed = PARTS[name], Row(), os.environ.get("TORTURE")
    rng.seed(int(seed or 0))
    part(row, tmp_path, **(long if seed else short))
    print(f"\n| {name} | {' | '.join(map(str, astuple(row)))} |")
    assert row.injected and not row.lost, row
