"""Breaks runs in every way that a real machine does, and counts what is lost: real processes, signals, disks and files.

    python -m tests.torture                                  # the whole campaign; a table at the end
    python -m tests.torture --only kills --kills 100         # one part of it, see PARTS
    python -m tests.torture --only fuzz commands --fuzz 2000 --seed 7

tests/test_torture.py has the short form of each part in the test suite.
"""
import argparse
import contextlib
import hashlib
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
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import SkipTest, mock

import torch

from tests.harness import (ROOT, RUN, Process, Result, descendants, expect, expect_end, flaw, flip, intact, is_saving,
                           last_step, lost_bits, make_data, proc, resume_here, run_main, run_script, seal, snapshot,
                           train_here, training)

import model  # harness has put the repository on the path
import prepare
import sample
import train
from tools import export

# lost: bits, or faults that ended in damage, a hang, a traceback, a step too many; "raises": the check ends the part.
Row = namedtuple("Row", "fault injected resumed lost note", defaults=[""])
HALF = ["--max_steps=12", "--lr_decay_steps=40"]  # the beginning of a run to 40
no_hub = mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Hang(BaseException):
    """No Exception, which the scripts would take for an error of their own."""


def hang(signum, frame):
    raise Hang


def prepared(folder, *argv):
    """(data, the out_dir of a run that nothing disturbs)"""
    data, out = make_data(folder / "data"), folder / "undisturbed"
    expect_end(train_here(data, out, *argv))
    return data, out


def end_of(script, *argv, stdin=b""):
    """How a script ends, run in this process; with a traceback, too."""
    try:
        return run_main(script.main, *argv, stdin=stdin, threads=1)
    except (Exception, Hang):
        return Result("crash", "", traceback.format_exc())


def lost_after_resume(wanted, out):
    expect_end(resume_here(out, f"--max_steps={train.step_of(train.checkpoints(wanted)[-1])}"))
    return lost_bits(wanted, out) + is_saving(out)


# ---- kills and signals ----


INSTANTS = {  # of a process p that writes to out, after the step `at`; and how many seconds it lasts
    "the start": (lambda p, out, at: True, 3),
    "the first step": (lambda p, out, at: "writes " in p.text, 0),
    "compiling": (lambda p, out, at: {"cc1plus\n", "clang\n"} & {proc(pid, "comm") for pid in descendants(p.pid)}, 0),
    "an evaluation": (lambda p, out, at: last_step(out) > at and last_step(out) % 10 == 9, 0.04),
    "a save": (lambda p, out, at: last_step(out) > at and is_saving(out), 0.004),
    "a step": (lambda p, out, at: last_step(out) > at, 0.03)}


def kills(folder, n, seed=0, steps=150):
    """SIGKILL, again and again on the same run until it finishes, at random instants of every kind."""
    keys = [f"--max_steps={steps}", "--learning_rate=1", "--min_lr=1"]  # so wild that the best is not the newest
    rng, (data, wanted) = random.Random(seed), prepared(folder, *keys)
    kinds = ["a save", "an evaluation", "a step", "a save", "the start", "an evaluation"]
    hits, runs, lost, torn = Counter(), 1, 0, 0
    stride = max(12, 2 * steps // (n + 1))  # steps that a life has at most
    while True:
        out = folder / f"run{runs}" / "out"
        with training(out.parent, data, *keys) as p:
            if hits.total() < n:
                kind, begin = kinds[hits.total() % len(kinds)], last_step(out)
                (is_there, seconds), at = INSTANTS[kind], begin + rng.randrange(stride)
                at -= 5 * (kind != "a step")  # between two saves
                p.until(lambda: is_there(p, out, at) and (kind == "the start" or last_step(out) != begin))
                time.sleep(rng.random() * seconds)
                if p.alive:
                    p.kill()
                    hits[kind] += 1
                    torn += is_saving(out)
                    if hits.total() % 10 == 0:
                        print(f"  {hits.total()} kills, run {runs} at step {last_step(out)} of {steps}", flush=True)
                    continue
            expect_end(p.end())
        lost += lost_bits(wanted, out)
        if hits.total() == n:
            note = ", ".join(f"{count} in {kind}" for kind, count in hits.items())
            return Row("SIGKILL in a training", n, n, lost, f"{runs} runs of {steps} steps; {note}; {torn} torn saves")
        runs += 1


def kill_preparation(folder, n, seed=0):
    """SIGKILL at random instants of prepare.py: what is there afterwards is whole, and a last try is right."""
    rng, small = random.Random(seed), make_data(folder / "small")
    text, out = folder / "big.txt", folder / "killed" / "data"
    text.write_text((folder / "small.txt").read_text() * 20)
    command = [ROOT / "prepare.py", "--input", text, "--tokenizer", folder / "bytes", "--out_dir", out]
    began, injected, left, lost = time.monotonic(), 0, 0, 0
    with Process(command, out.parent) as p:
        expect_end(p.end())
    took, whole = time.monotonic() - began, snapshot(out)
    shutil.rmtree(out)
    allowed = [whole, {}]
    for i in range(n):
        with Process(command, out.parent) as p:
            if i % 3:  # as soon as something is on the disk, or at any time
                p.until(lambda: len(os.listdir(out.parent)) > 1 + out.exists())
            time.sleep(rng.random() * took / (1 + (i % 3 > 0)))
            injected += p.alive
        left += out.exists()
        lost += snapshot(out if out.exists() else out.with_name(".data.old")) not in allowed  # between two renames
        if i == 0:  # data that were there before are replaced as a whole, or not at all
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(small, out)
            allowed = [whole, snapshot(out)]
    with Process(command, out.parent) as p:
        expect_end(p.end())
    lost += snapshot(out) != whole
    expect(os.listdir(out.parent) == ["data"], "left over:", os.listdir(out.parent))
    return Row("SIGKILL in prepare.py", injected, injected, lost, f"after {left} of them out_dir was there")


SIGNALS = [((name,), instant) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           for instant in ("the start", "the first step", "an evaluation", "a save", "a step")]
SIGNALS += [(pair, instant) for pair in (("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT"),
                                         ("SIGHUP", "SIGHUP")) for instant in ("a step", "a save", "an evaluation")]
SHORT = [(("SIGINT",), "the first step"), (("SIGTERM",), "an evaluation"), (("SIGHUP",), "a save"),
         (("SIGINT", "SIGINT"), "a step")]
COMPILING = [((name,), "compiling") for name in ("SIGINT", "SIGTERM", "SIGHUP")]


def signals(folder, cases, compiled=False):
    """One or two signals at an instant of a run: it exits as they ask, all is saved, the bits are the same in the end.

    cases: (names of the signals, one of INSTANTS)."""
    keys = ["--compile=true", "--max_steps=10"] if compiled else ["--max_steps=60"]
    lost, (data, wanted) = 0, prepared(folder, *keys)
    for i, (names, instant) in enumerate(cases):
        out, signums = folder / f"out{i}", [getattr(signal, name) for name in names]
        fresh = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache{i}")} if compiled else {}
        is_there, seconds = INSTANTS[instant]
        with training(folder, data, *keys, out=out, **fresh) as p:
            p.until(lambda: is_there(p, out, {"a step": 22, "a save": 10}.get(instant, 0)))
            time.sleep(seconds / 3)
            expect(p.alive, f"ended before the signal in {instant}", p.text)
            at = last_step(out)
            for signum in signums:
                p.signal(signum)
                time.sleep(0.002)
            code, text = p.wait(), p.text
        is_early = code < 0 and instant == "the start" or "before the first step" in text  # nothing to save yet
        codes = [-signums[0]] if code < 0 and is_early else [128 + signum for signum in signums]
        expect(code in codes, f"exit {code} after {names} in {instant}", text)
        expect(instant == "the start" or "Traceback" not in text and "Error" not in text, names, instant, text)
        if is_early or "within a step" in text:
            expect(instant in ("the start", "the first step", "compiling") and not train.checkpoints(out), text)
        elif signum == signal.SIGINT and len(signums) == 2:  # the second Ctrl-C leaves at once
            expect(intact(out), text)
        else:
            newest = train.checkpoints(out)[-1]
            expect(at <= train.step_of(newest) <= at + 2 and f"{newest.name} is written" in text, text)
        expect_end(train_here(data, out, *keys, "--resume=auto"))
        lost += lost_bits(wanted, out)
        print(f"  {'+'.join(names)} in {instant}, at {at}: exit {code}", flush=True)
    what = "SIGINT, SIGTERM, SIGHUP" + (" while compiling" if compiled else "")
    return Row(what, len(cases), len(cases), lost)


def second_process(folder):
    """A second process on an out_dir in use is refused, whatever it wants; the first one never notices."""
    (data, wanted), out = prepared(folder), folder / "out"
    tries = ([], ["--resume"], ["--resume=auto"], ["--overwrite"], [f"--resume={out}"])
    with training(folder, data, out=out) as p:
        p.until(lambda: last_step(out) >= 6)
        p.signal(signal.SIGSTOP)  # it must not end meanwhile
        for argv in tries:
            expect_end(train_here(data, out, *argv), [1], "another process", out)
        p.signal(signal.SIGCONT)
        expect_end(p.end())
    return Row("second process on an out_dir", len(tries), 0, lost_bits(wanted, out), "refused; the first unharmed")


# ---- disks ----


@contextlib.contextmanager
def small_disk(folder, megabytes=16):
    """A file system of its own in folder. Raises SkipTest where this user cannot mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise SkipTest(f"a file system cannot be mounted here: {getattr(e, 'stderr', e)}") from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(folder, leaves):
    """The disk fills while a run goes on; after room is made it goes on, and ends with the same bits."""
    keys = ["--max_steps=200", "--eval_interval=0", "--checkpoint_interval=10"]
    lost, (data, wanted) = 0, prepared(folder, *keys)
    with small_disk(folder / "disk") as disk:
        for leave in leaves:
            out = disk / f"out{leave}"
            with training(folder / "cwd", data, *keys, out=out) as p:
                p.until(lambda: last_step(out) >= 30)
                with open(filler := disk / "filler", "wb", buffering=0) as f, contextlib.suppress(OSError):
                    while True:
                        f.write(bytes(4096))
                os.truncate(filler, filler.stat().st_size - leave // 4096 * 4096)
                expect_end(p.end(), [1], "No space left on device", "--resume")
            expect(intact(out), "no checkpoint is left")
            filler.unlink()
            lost += lost_after_resume(wanted, out)
            shutil.rmtree(out)
    return Row("disk full", len(leaves), len(leaves), lost, "filled to the last byte, or to a part of a checkpoint")


def failed_save(folder, sizes):
    """A save fails half-way, since no file may be larger than a part of a checkpoint (RLIMIT_FSIZE)."""
    lost, (data, wanted) = 0, prepared(folder)
    for size in sizes:
        out = folder / f"out{size}"
        expect_end(train_here(data, out, *HALF))
        before = list(map(Path.read_bytes, train.checkpoints(out)))
        with training(folder, data, out=out, limits=[(resource.RLIMIT_FSIZE, (size, size))]) as p:
            expect_end(p.end(), [1], "File too large", "--resume")
        expect(list(map(Path.read_bytes, train.checkpoints(out))) == before, "checkpoints have changed")
        lost += lost_after_resume(wanted, out)
    return Row("save fails half-way", len(sizes), len(sizes), lost, "RLIMIT_FSIZE below a checkpoint's size")


def read_only(folder):
    """A folder that cannot be written: a new run and a resumed one say so, and the run goes on once it can be."""
    (data, wanted), disk, as_root = prepared(folder), folder / "disk", os.geteuid() == 0
    out = disk / "out"

    def allow(writing):
        if as_root:
            subprocess.run(["mount", "-o", f"remount,{'rw' if writing else 'ro'}", str(disk)], check=True)
        for place in () if as_root else (disk, out):
            place.chmod(0o755 if writing else 0o555)

    with small_disk(disk) if as_root else contextlib.nullcontext():  # root may write whatever the mode says
        expect_end(train_here(data, out, *HALF))
        before = snapshot(out)
        allow(False)
        try:
            for done in (train_here(data, disk / "new"), resume_here(out, "--max_steps=40")):
                expect_end(done, [1], "Read-only" if as_root else "denied")
        finally:
            allow(True)
        expect(snapshot(out) == before and not (disk / "new").exists(), "files have changed")
        return Row("read-only folder", 2, 1, lost_after_resume(wanted, out), "a new run and a resumed one")


# ---- damaged checkpoints and data ----


def damaged_checkpoints(folder, n, seed=0):
    """The newest checkpoint truncated at n lengths, with one of n bytes flipped, zeroed in parts or made longer."""
    keys = ["--vocab_size=257", "--hidden_size=16", "--eval_interval=0", "--max_steps=10", "--lr_decay_steps=40"]
    rng, (_, out), lost = random.Random(seed), prepared(folder, *keys), 0
    before, newest = train.checkpoints(out)
    good = newest.read_bytes()
    size = len(good)
    lengths = {0, 1, size - 1, size - 39, size - 40, *(rng.randrange(size) for _ in range(n))}
    places = {*range(200), *range(size - 200, size), *(rng.randrange(size) for _ in range(n))}
    others = [bytes(size), good + b"\0", good[:-4096] + bytes(4096), good[:4096] + bytes(size - 4096), good + good]

    def bend(place):
        return good[:place] + bytes([good[place] ^ rng.choice([1, 128, 255, 1 << rng.randrange(8)])]) + good[place + 1:]

    for damaged in (*(good[:length] for length in lengths), *map(bend, places), *others):
        newest.write_bytes(damaged)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            path, state = train.load_checkpoint(out)
        if path != before or state["step"] != 5 or said.getvalue().count(f"{newest} is damaged") != 1:
            print(len(damaged), path, said.getvalue())
            lost += 1
    newest.write_bytes(good)
    expect(train.load_checkpoint(out)[0] == newest, "a good one is not taken")
    count = len(lengths) + len(places) + len(others)
    note = f"{len(lengths)} lengths, {len(places)} bytes, {len(others)} others of {size:,} bytes"
    return Row("checkpoint damaged", count, count, lost, note)


def damaged_then_resumed(folder, real):
    """Through the command: a damaged checkpoint is named, the one before is used, the run ends with the same bits."""
    (data, wanted), out, lost = prepared(folder), folder / "out", 0
    for damage in (lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: flip(path, 999)):
        expect_end(train_here(data, out, "--max_steps=25", "--lr_decay_steps=40", "--overwrite"))
        newest = train.checkpoints(out)[-1]
        damage(newest)
        if real:
            with training(folder, data, out=out) as p:
                done = p.end()
        else:
            done = resume_here(out, "--max_steps=40")
        expect_end(done)
        said = done.out + done.err
        expect(f"{newest} is damaged" in said and "step_000020.pt (step 20)" in said, said)
        lost += lost_bits(wanted, out)
    for path in train.checkpoints(out):
        flip(path, -1)
    before = snapshot(out)
    for done in (resume_here(out), train_here(data, out, "--resume=auto")):
        expect_end(done, [1], "no whole checkpoint", out)
    expect(snapshot(out) == before, "something was deleted")
    return Row("checkpoint damaged, resumed", 4, 2, lost, "and with none left whole: refused, nothing deleted")


def damaged_data(folder):
    """train.bin, val.bin, meta.json truncated, changed, missing or of another dataset: refused before a first step."""
    (own, out), data, lost = prepared(folder, *HALF), folder / "damaged", 0
    good, other = snapshot(own), snapshot(make_data(folder / "other", start=100_000))
    run, ids, text = snapshot(out), good["train.bin"], good["meta.json"]
    beyond = ids[:-2] + (5000).to_bytes(2, "little")  # an id that no embedding has

    def sealed(**new):
        return {"meta.json": seal({**json.loads(text), **new}).encode()}

    faults = [({name: bad(good[name])}, word) for name in ("train.bin", "val.bin") for bad, word in (
        (lambda raw: raw[:-2], "tokens"), (lambda raw: raw + b"\0\0", "tokens"), (lambda raw: raw[:-1], "damaged"),
        (lambda raw: b"", "damaged"), (lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:], "sha256"),
        (lambda raw: other[name], name[:-4]), (lambda raw: None, name))]
    faults += [({"meta.json": bad}, word) for bad, word in (
        (other["meta.json"], "train_"), (None, "no prepared data"), (text[:-30], "damaged"), (b"", "damaged"),
        (b"\xff\xfe", "damaged"), (b"[]", "damaged"), (text.replace(b"data.txt", b"evil.txt"), "meta.json"),
        (b"[" * 10**5, "damaged"))]
    faults += [(sealed(vocab_size="many"), "vocab_size"), (sealed(vocab_size=None), "vocab_size"),
               (sealed(val_bytes=None), "val_bytes"), (sealed(train_tokens="1"), "train_tokens"),
               (sealed(vocab_size=10**9), "vocab_size = 2048"),
               ({"train.bin": beyond, **sealed(train_sha256=hashlib.sha256(beyond).hexdigest())}, "vocab_size 257"),
               ({"train.bin": good["val.bin"], "val.bin": ids}, "train_"),
               ({"tokenizer/tokenizer.json": good["tokenizer/tokenizer.json"] + b" "}, "tokenizer")]
    for files, word in faults:
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(own, data)
        for name, raw in files.items():
            (data / name).unlink() if raw is None else (data / name).write_bytes(raw)
        for done in (train_here(data, folder / "new"), resume_here(out, "--max_steps=40", f"--data_dir={data}")):
            problem = flaw(done, [1, 2], word)
            if problem or last_step(folder / "new") or snapshot(out) != run:
                print(list(files), word, problem, done)
                lost += 1
    shutil.rmtree(own)  # a whole other dataset, in the place of the run's own
    shutil.copytree(folder / "other", own)
    expect_end(resume_here(out, "--max_steps=40"), [1], "not the data")
    done = resume_here(out, "--max_steps=14", f"--data_dir={own}")  # meant: made, and said
    expect_end(done)
    expect("no longer the same run to the bit" in done.out and "data " in done.out, done.out)
    return Row("data damaged or swapped", 2 * len(faults) + 1, 0, lost, "each refused before the first step")


# ---- strangers and other machines ----


class Evil(str):
    """What a stranger's pickle can hold: loading it without care makes a file of this name."""

    def __reduce__(self):
        return open, (str(self), "w")


def poison(hf, kind, marker):
    """A copy of the model folder hf with pickled weights, or with code that its files ask to be run."""
    target, evil = shutil.copytree(hf, hf.with_name(kind)), "modeling_evil.Evil"
    edits = {"config.json": {"auto_map": {"AutoModelForCausalLM": evil, "AutoConfig": evil}},
             "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [evil, evil]}}}
    edits["config.json"] |= {"model_type": "evil"} if kind == "code type" else {}
    edits["tokenizer_config.json"] |= {"tokenizer_class": "Evil"} if kind == "code class" else {}
    for name, edit in edits.items() if "code" in kind else ():
        (target / name).write_text(json.dumps({**json.loads((target / name).read_text()), **edit}))
    for name in ("modeling_evil.py", "tokenization_evil.py"):
        (target / name).write_text(f"open({str(marker)!r}, 'w')\nclass Evil:\n    pass\n")
    if "pickle" in kind:
        torch.save({"model.embed_tokens.weight": Evil(marker)}, target / "pytorch_model.bin")
    if kind == "pickle only":
        (target / "model.safetensors").unlink()
    return target


@no_hub
def strangers(folder, real):
    """Checkpoints, models and tokenizers that would run code on loading leave no trace of having done so."""
    (data, out), marker, tried, lost = prepared(folder, "--max_steps=5"), folder / "code was run", 0, 0
    checkpoint = train.checkpoints(out)[-1]
    state = train.read_checkpoint(checkpoint)
    pickle.loads(pickle.dumps(Evil(marker)))
    expect(marker.exists(), "the attack itself does not work")
    marker.unlink()

    def attack(script, *argv, codes=(1,), real=False):
        nonlocal tried, lost
        tried, yes = tried + 1, b"y\n" * 9  # a terminal's worth of consent
        with mock.patch("builtins.input", return_value="y") as asked:
            done = run_script(f"{script.__name__}.py", *argv, stdin=yes) if real else end_of(script, *argv, stdin=yes)
        problem = "CODE WAS RUN" if marker.exists() else "it asked" if asked.called else flaw(done, codes)
        if problem:
            print(problem, argv, done)
            lost += 1
            marker.unlink(missing_ok=True)

    def attack_with(name, state, **how):
        path = folder / name / "step_000005.pt"
        path.parent.mkdir()
        train.write_checkpoint(path, state)  # the digest fits, as a stranger can compute it, too
        attack(train, f"--resume={path}", "--max_steps=6", **how)
        attack(sample, "--checkpoint", path, "--max_new_tokens", "1", **how)
        return path

    evil = Evil(marker)
    for i, bad in enumerate(({**state, "best": evil}, {**state, "rng": [evil]}, {**state, "model": evil}, evil)):
        attack(train, f"--resume={attack_with(f'evil{i}', bad).parent}", real=real and not i)
    path = folder / "evil3" / "step_000005.pt"
    path.write_bytes(pickle.dumps(evil))
    attack(train, f"--resume={path}")  # no file of torch.save at all
    attack(sample, "--checkpoint", path)

    # A model folder: weights as a pickle are not read; a config that names code is refused or ignored.
    hf = folder / "hf"
    sizes = {name: state["config"][name] for name in train.SIZES}
    export.save_pretrained(model.SmolLM2(model.SmolLM2Config(**sizes)), hf, torch.float32)
    shutil.copytree(data / "tokenizer", hf, dirs_exist_ok=True)
    attack(sample, "--checkpoint", hf, "--max_new_tokens", "2", codes=[0])
    new = [*RUN, f"--data_dir={data}", f"--out_dir={folder / 'new'}", "--overwrite", "--max_steps=1"]
    for kind in ("pickle beside", "pickle only", "code", "code class", "code type"):
        target, is_fine = poison(hf, kind, marker), kind not in ("pickle only", "code type")
        attack(sample, "--checkpoint", target, "--max_new_tokens", "2", codes=(0, 1) if is_fine else [1])
        attack(train, *new, f"--init_from={target}", codes=[0] if is_fine else [1])
    # A tokenizer that brings code: beside a checkpoint, beside the data, and for prepare.py.
    for place in (out, data):
        shutil.rmtree(place / "tokenizer")
        shutil.copytree(folder / "code class", place / "tokenizer")
    attack(sample, "--checkpoint", checkpoint, "--max_new_tokens", "2", codes=(0, 1))
    attack(sample, "--checkpoint", folder / "code class", codes=(0, 1), real=real)
    attack(train, f"--resume={out}", "--max_steps=6", "--sample_interval=1", codes=(0, 1))
    attack(prepare, "--input", folder / "data.txt", "--tokenizer", folder / "code class", "--out_dir", folder / "d",
           codes=(0, 1))

    # And values that are plain, but nonsense: refused or used, in one line.
    config, adam = state["config"], state["optimizer"]
    odd = [{"config": {**config, **bad}} for bad in ({"hidden_size": "wide"}, {"hidden_size": -4}, {"no_key": 1},
                                                     {"num_attention_heads": 3}, {"learning_rate": "fast"})]
    odd += [{"config": {}}, {"config": 3}, {"model": {}}, {"optimizer": {}}, {"optimizer": {**adam, "state": {0: 3}}},
            {"model": {**state["model"], "model.norm.weight": torch.ones(3)}}, {"rng": []}, {"rng": [{}]}, {"rng": 3},
            {"step": "five"}, {"step": -1}, {"step": None}, {"epoch": None}, {"sequence": 0.5}, {"best": 5},
            {"best": {"step": 5}}, {"seconds": "long"}, {"machine": None}, {"machine": {}}, {"data": None},
            {"data": {}}, {"data": {**state["data"], "tokenizer": 3}}, {"scaler": None}]
    for i, bad in enumerate(odd):
        attack_with(f"odd{i}", {**state, **bad}, codes=(0, 1, 2))
    return Row("a stranger's file", tried, 0, lost, "no code was run")


def other_machine(folder):
    """Resumed where the bits cannot be the same: says so and why, old → new, and goes on; other sizes are refused."""
    (_, kept), out, lost = prepared(folder, "--max_steps=10", "--lr_decay_steps=40"), folder / "out", 0
    same = [({"torch": "1.0.0"}, [], [f"torch 1.0.0 → {torch.__version__}"]), ({"processes": 1}, [], []),
            ({"device": "cuda (Fast 9000)"}, [], ["device cuda (Fast 9000) → cpu"]),
            ({"threads": 77}, [], ["threads 77 → "]), ({}, ["--dtype=bfloat16"], ["dtype float32 → bfloat16"]),
            ({}, ["--batch_size=8", "--learning_rate=0.5"], ["batch_size 4 → 8", "learning_rate 0.01 → 0.5"]),
            ({}, ["--seed=1"], ["seed 1337 → 1"]), ({}, ["--log_interval=2", "--eval_interval=5"], [])]
    other = ["--hidden_size=64", "--vocab_size=4096", "--num_hidden_layers=3", "--rope_theta=5", "--optimizer=muon"]
    for machine, argv, words in same:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)
        newest = train.checkpoints(out)[-1]
        state = train.read_checkpoint(newest)
        train.write_checkpoint(newest, {**state, "machine": state["machine"] | machine})
        done = resume_here(out, "--max_steps=12", *argv)
        said = "no longer the same run to the bit" in done.out
        if (problem := flaw(done)) or said != bool(words) or not all(word in done.out for word in words) \
                or last_step(out) != 12 or intact(out)[-1] != "step_000012.pt":
            print(machine, argv, problem, done)
            lost += 1
    before = snapshot(out)
    for flag in other:
        done = resume_here(out, "--max_steps=20", flag)
        lost += bool(flaw(done, [1], flag[2:].partition("=")[0])) or snapshot(out) != before
    note = "said so and went on; another model refused"
    return Row("another machine or model", len(same) + len(other), len(same), lost, note)


def other_threads(folder):
    """A run with all threads, resumed by a process with OMP_NUM_THREADS=1."""
    data, out = make_data(folder / "data"), folder / "out"
    expect_end(train_here(data, out, "--max_steps=10", threads=2))
    with training(folder, data, "--max_steps=12", out=out) as p:
        expect_end(p.end())
        expect("no longer the same run" in p.text and "threads 2 → 1" in p.text, p.text)
    return Row("another thread count", 1, 1, "raises", "2 → 1")


def memory(folder, steps):
    """Resident memory of a run with evaluation, samples and checkpoints: its growth after the first hundred steps."""
    data, out, seen = make_data(folder / "data"), folder / "out", {}
    keys = [f"--max_steps={steps}", *(f"--{what}_interval=50" for what in ("sample", "eval", "checkpoint"))]
    with training(folder, data, *keys, out=out) as p:
        while p.alive:
            rss = [line.split()[1] for line in proc(p.pid, "status").splitlines() if line.startswith("VmRSS")]
            if rss and (step := last_step(out)):
                seen[step] = int(rss[0])
            time.sleep(0.01)
        expect_end(p.end())
    expect(len(os.listdir(out / "samples")) == steps // 50 and len(seen) > steps / 50, "too few samples")
    first = max(rss for step, rss in seen.items() if 100 < step <= 150)
    last = max(rss for step, rss in seen.items() if step > steps - 100)
    expect(last / first < 1.02, f"resident memory grew: {first} to {last} kB")
    note = f"{steps} steps: {first >> 10} MiB after 100, {last >> 10} at the end: {last / first - 1:+.2%}"
    return Row("memory", 0, 0, "raises", note)


# ---- fuzzing: good command lines, recipes and texts, with something in them that does not belong there ----

WORDS = ["", " ", "4 4", "\t4", "4\n", "9" * 30, "-" + "9" * 30, "9" * 5000, "\N{SNOWMAN}", "\ud83d", "\udcff", "a\0b",
         *map(str, (2**31, 2**47, 2**48, 2**63, 2**128)), *"""0 -1 -0.0 1 2 3 7 65536 0.5 nan inf -inf 1e999 1e308 1e-320
         1e30 5e-324 0.99999 0x10 1_000 1__0 ٣ ½ 2**3 4. true None [] {} '4' four 4,5 --4 1e +3 nowhere/x /proc/x /dev/null
         . é cpu cpu:1 cuda mps meta xpu cuda:99 float16 bfloat16 adamw muon cosine wsd auto --help --resume
         --overwrite""".split()]
BYTES = [b"", b"\n", b" " * 5000, b"\0" * 700, b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3(", b"\xed\xa0\x80", b"x" * 9000,
         "é\N{SNOWMAN}\U0001f600 ".encode() * 90, b"<|endoftext|>" * 40, b"\r\n\r\r\n" * 90, b"[" * 3000, b"\x1f\x8b",
         b'{"text": "one"}\n{"text": 3}\n' * 20, b"%PDF", b"PK\3\4", b"First Citizen:\nBefore we proceed.\n" * 30]
LINES = ["import os", "x" * 50 + " = 1", "seed = 2; seed = 4", "seed += 1", "a = b = 3", "seed, block_size = 2, 3",
         "seed: int = 4", "print(1)", "open('code was run', 'w')", "del seed", "3", "seed = 2 * 2", "seed = yield",
         "seed = " + "-" * 3000 + "1", "'a docstring'", "seed = " + "(" * 300 + "1", "learning_rate = 1e400",
         "min_lr = 3+4j", "seed = __import__('os').getpid()", "if True:\n  seed = 3", "seed = " + "9" * 5000,
         "out_dir = 'a\\0b'", "out_dir = '\\ud800'", "batch_sise = 4", "device = b'cpu'", "seed = -1", "*seed = 3",
         "[seed] = 3", "seed.x = 3", "lambda: 3", "compile = 2", "dtype = 'bfloat16'", "seed = True", "resume = 'auto'"]
KEYS = {name: f"--{name}={f.default}" for name, f in train.KEYS.items()}
SMALL = [KEYS[name] for name in KEYS if name not in ("max_steps", "batch_size", "block_size", *train.SIZES)]
SAMPLE = ("--temperature=0.8 --top_k=9 --top_p=0.9 --repetition_penalty=1.1 --seed=3 --stop=x --device=cpu "
          "--dtype=float32 --num_samples=2").split()
PREPARE = "--val_fraction=0.2 --allow_unrepresentable --input=book.txt --tokenizer=bytes --split=train".split()
HERE = ["recipes"] * 8 + ["sample flags"] * 3 + ["prepare flags"] * 3 + ["runs"] * 3 + ["prompts"] * 2 + ["texts"]
REAL = ["runs", "recipes", "prompts", "sample flags", "texts", "prepare flags", "model", "runs", "prompts", "too large"]
Case = namedtuple("Case", "kind script argv stdin files", defaults=[b"", {}])


def bent(rng, words):
    """Some words of a command line: with other values, misspelt, twice, cut in two, in the place of each other."""
    words = rng.sample(words, rng.randrange(min(5, len(words))))
    for i in range(len(words)):
        name, _, value = words[i].partition("=")
        letters = rng.choices("abz019 .,-_=+*/\\'\"#()[]{}\n\t%$é\0\N{SNOWMAN}\U0001f600\udcff", k=rng.randrange(12))
        other = rng.choice([*WORDS, *["".join(letters)] * 20])
        words[i:i + 1] = rng.choice([[words[i]] * 2, [other], [name], [name, other], [f"{name[:-1]}={value}"],
                                     *[[words[i]]] * 9, *[[f"{name}={other}"]] * 9])
    return words


def bent_bytes(rng, raw):
    """A text with something inserted, replaced, repeated or cut off."""
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        i = rng.randrange(len(raw) + 1)
        new = rng.choice([rng.choice(BYTES), rng.randbytes(rng.randrange(60)), raw[i:i + 40] * 3])
        raw = raw[:i] + new + raw[i + rng.choice([0, 0, 1, 40, len(raw)]):]
    return raw


def a_case(rng, kind, place, number):
    """One input of a kind; place: the folder with data/, out/ and bytes/ that all of them use."""
    made, path = place / f"made{number}", place / f"file{number}{rng.choice(['.txt', '.md', '.jsonl', '', '.py'])}"
    text = bent_bytes(rng, b"Who's there? Nay, answer me: stand, and unfold yourself.\n" * 9)
    if kind == "recipes":
        lines = rng.sample([word[2:].replace("=", " = ") for word in KEYS.values()], 5)
        lines = rng.sample(lines + LINES, rng.randrange(9))
        recipe = bent_bytes(rng, "\n".join(lines).encode()) if rng.random() < 0.5 else "\n".join(lines).encode()
        return Case(kind, "train.py", [path, *bent(rng, [*KEYS.values()])], files={path: recipe})
    if kind == "runs" and rng.random() < 0.8:
        return Case(kind, "train.py", [*RUN, f"--out_dir={made}", *bent(rng, SMALL), f"--data_dir={place}/data",
                                       "--max_steps=2", "--eval_tokens=64", "--compile=false"])
    if kind == "runs":
        path = made / rng.choice(["step_000001.pt", "step_x.pt", "x", "step_000002.tmp"])
        return Case(kind, "train.py", [f"--resume={rng.choice([path, made])}", "--max_steps=2"], files={path: text})
    if kind == "prompts":
        argv = ["--checkpoint", rng.choice([place / "out"] * 8 + [place / "nothing", place / "data", place / "bytes"]),
                *bent(rng, SAMPLE), "--max_new_tokens", rng.choice(["1", "3", "250", "300"]), "--prompt"]
        is_piped = rng.random() < 0.5
        return Case(kind, "sample.py", [*argv, "-" if is_piped else os.fsdecode(text)], text if is_piped else b"")
    if kind == "texts":
        tokenizer = rng.choice([place / "bytes"] * 8 + [place / "data", path])
        argv = ["--input", path, "--tokenizer", tokenizer, *bent(rng, PREPARE[:2]), "--out_dir", made]
        return Case(kind, "prepare.py", argv, files={path: text})
    if kind == "too large":
        return Case(kind, "train.py", [*RUN, f"--data_dir={place}/data", f"--out_dir={made}", "--hidden_size=65536"])
    words = {"sample": SAMPLE, "prepare": PREPARE, "model": [*KEYS.values()]}[script := kind.partition(" ")[0]]
    return Case(kind, f"{script}.py", bent(rng, words))


def command(case, place):
    """How a case ends as a command, with at most a minute and 8 GB."""
    pins = {"recipes": "--hidden_size=-1", "sample flags": "--checkpoint=not/here/x", "prepare flags": "--input=not there"}
    words = [*map(str, case.argv), *([pins[case.kind]] if case.kind in pins else [])]  # or it would start the real thing
    words = [word.replace("\0", "").replace("\ud83d", "").encode(errors="surrogateescape") for word in words]
    limit = resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30)
    try:
        done = subprocess.run([sys.executable, ROOT / case.script, *words], input=case.stdin, cwd=place, timeout=60,
                              env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True,
                              preexec_fn=lambda: resource.setrlimit(*limit))
    except subprocess.TimeoutExpired:
        return Result("hang", "", "")
    return Result(done.returncode, *(raw.decode(errors="replace") for raw in (done.stdout, done.stderr)))


@no_hub
def fuzz(folder, n, seed=0, real=False):
    """n random inputs, in this process or (real) as commands, two at a time: success, or one line that says why not."""
    rng, (_, out), kinds = random.Random(seed), prepared(folder, "--max_steps=5"), REAL if real else HERE
    before, scripts = snapshot(out.rename(folder / "out")), {f"{m.__name__}.py": m for m in (train, sample, prepare)}
    ends = {"recipes": "train.set_up_machine", "sample flags": "sample.load", "prepare flags": "prepare.prepare"}

    def attempt(number):
        case, made = cases[number], folder / f"made{number}"
        for path, raw in case.files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
        if real:
            done = command(case, folder)
        else:  # what only reads and checks ends where it would begin to work
            signal.alarm(60)
            with mock.patch(ends.get(case.kind, "train.none"), side_effect=SystemExit(0), create=True), \
                    mock.patch.dict(os.environ, WORLD_SIZE=str(number % 3 + 1) if case.kind == "recipes" else "1"):
                done = end_of(scripts[case.script], *case.argv, stdin=case.stdin)
            signal.alarm(0)
        problem = flaw(done, (0, 1, 2), f"{case.script}: ")
        if done.code == 2 and len(done.err.splitlines()) > 1:
            problem = "more than one line"
        if case.script == "prepare.py" and made.exists():
            prepare.open_data(made)  # raises where it is damaged
        shutil.rmtree(made, ignore_errors=True)
        if problem:
            print(problem, [str(word)[:200] for word in case.argv], case, done)
        return case.kind, done.code, bool(problem)

    cases = [a_case(rng, kinds[number % len(kinds)], folder, number) for number in range(n)]
    handler = signal.signal(signal.SIGALRM, hang)
    with contextlib.chdir(folder), ThreadPoolExecutor(2) as pool:
        tried, ended, wrong = map(Counter, zip(*(pool.map if real else map)(attempt, range(n))))
    signal.signal(signal.SIGALRM, handler)
    expect(snapshot(folder / "out") == before, "a file of another run was changed")
    expect(not list(folder.rglob("code was run")), "A RECIPE RAN CODE")
    what = "real commands" if real else "in one process"
    return Row(f"fuzzing, {what}", n, 0, wrong[True], f"{dict(tried)}; exit codes {dict(ended)}")


# ---- the campaign ----

PARTS = {  # what it is, the short form for the test suite, and the long one
    "kills": (kills, {"n": 5, "steps": 60}, {"n": 100}),
    "preparation": (kill_preparation, {"n": 2}, {"n": 25}),
    "disk": (full_disk, {"leaves": (100_000,)}, {"leaves": (0, 4096, 100_000, 300_000, 600_000)}),
    "save": (failed_save, {"sizes": (300_000,)}, {"sizes": (100_000, 300_000, 700_000)}),
    "read_only": (read_only, {}, {}),
    "checkpoints": (damaged_checkpoints, {"n": 40}, {"n": 1000}),
    "resumed": (damaged_then_resumed, {"real": False}, {"real": True}),
    "data": (damaged_data, {}, {}),
    "signals": (signals, {"cases": SHORT}, {"cases": SIGNALS}),
    "compiling": (signals, {"cases": COMPILING[:1], "compiled": True}, {"cases": COMPILING, "compiled": True}),
    "second": (second_process, {}, {}),
    "strangers": (strangers, {"real": False}, {"real": True}),
    "machine": (other_machine, {}, {}),
    "threads": (other_threads, {}, {}),
    "memory": (memory, {"steps": 300}, {"steps": 2000}),
    "fuzz": (fuzz, {"n": 200}, {"n": 2000}),
    "commands": (fuzz, {"n": 6, "real": True}, {"n": 100, "real": True})}


def run_part(name, args):
    part, _, how = PARTS[name]
    counts = {"kills": args.kills, "preparation": max(4, args.kills // 4), "fuzz": args.fuzz, "checkpoints": 1000,
              "commands": max(4, args.fuzz // 20)}
    if name in counts:
        how = {**how, "n": counts[name], "seed": args.seed}
    with tempfile.TemporaryDirectory(prefix="torture_") as folder:
        try:
            return part(Path(folder).resolve(), **how)
        except SkipTest as e:
            return Row(name, 0, 0, 0, f"SKIPPED: {e}")
        except Exception as e:
            traceback.print_exc()
            return Row(name, "", "", "FAILED", (str(e).splitlines() or [type(e).__name__])[0][:100])


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs of a training [100]")
    parser.add_argument("--fuzz", type=int, default=2000, help="inputs in one process; a twentieth as commands [2000]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="of all that is random [0]")
    args, rows, began = parser.parse_args(), {}, time.monotonic()
    for name in args.only:
        start = time.monotonic()
        rows[name] = run_part(name, args)
        print(f"{name}, {time.monotonic() - start:.0f} s: {' | '.join(map(str, rows[name]))}", flush=True)
    print(f"\ntorch {torch.__version__}, {os.cpu_count()} cores, {time.monotonic() - began:.0f} s\n\n"
          "| fault | injected | resumed | lost | |\n| --- | ---: | ---: | ---: | --- |")
    for row in rows.values():
        print(f"| {' | '.join(map(str, row))} |")
    failed = [name for name, row in rows.items() if row.lost not in (0, "raises")]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
