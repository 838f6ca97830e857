"""Exact resume: a run that was stopped, in any way, ends with the bits of one never stopped."""
import os
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

import prepare
import sample
import train
from tests.harness import (ROOT, RUN, Process, differences, expect_end, intact, last_step,
                           lost_bits, make_tokenizer, metrics, refused, resume_here, run_main,
                           snapshot, train_here, training, watch_disk, write, write_data)


def is_same_run(result):
    """It went on, and named no change (old → new) that would bend it."""
    return result.code == 0 and "step_" in result.out + result.err and "→" not in result.out


@pytest.fixture(scope="module")
def eight_steps(data, tmp_path_factory):
    """The out_dir of a run of 8 steps with checkpoints after 2, 4, 6 and 8."""
    out = tmp_path_factory.mktemp("eight") / "out"
    assert train_here(data, out, max_steps=8, checkpoint_interval=2, keep_checkpoints=0).code == 0
    return out


@pytest.fixture
def finished(eight_steps, tmp_path):
    """A copy of it in out/, to resume or to damage."""
    return Path(shutil.copytree(eight_steps, tmp_path / "out"))


def at(step, in_a_save=False):
    return lambda: last_step("out") >= step and Path("out/checkpoint.tmp").exists() >= in_a_save


# All that could shift a run: evaluation, samples, micro-batches, the best checkpoint, epochs.
LONG = """--max_steps=60 --checkpoint_interval=10 --eval_interval=7 --sample_interval=9
    --eval_tokens=600 --micro_batch_size=2 --dtype=auto""".split()
COMPILED = ["--compile=true", "--max_steps=12", "--eval_interval=4"]
FULL_SIZE = [*(f"--{name}={getattr(train.TrainConfig, name)}" for name in train.SIZES),
             "--batch_size=1", "--initializer_range=0.04", "--learning_rate=3e-4", "--max_steps=2",
             "--checkpoint_interval=1", "--keep_checkpoints=1", "--dtype=auto"]


@pytest.mark.parametrize("keys, instants", [
    (LONG, [at(3), at(1, in_a_save=True), at(23), at(31, in_a_save=True)]),
    pytest.param(COMPILED, [Path("out/step_000005.pt").exists], marks=pytest.mark.slow),
    pytest.param(FULL_SIZE, [Path("out/step_000001.pt").exists], marks=pytest.mark.slow)],
    ids=["all at once", "compiled", "full size"])
def test_n_steps_equal_k_steps_sigkill_and_the_rest_to_the_bit(keys, instants, data):
    """Killed before the first checkpoint, while it is written, between two, and in a later one."""
    if keys is COMPILED and (problem := train.compiler_problem(torch.device("cpu"))):
        assert not shutil.which("g++"), problem
        pytest.skip(f"no compiler here: {problem}")
    start = partial(training, data, *keys, OMP_NUM_THREADS="2" if keys is FULL_SIZE else "1")
    with start(out="whole") as whole:
        expect_end(whole.end(400))
        machine = train.load_checkpoint("whole")[1]["machine"]
        assert (", compiled" in whole.text) == ("compiler" in machine) == (keys is COMPILED)
    for instant in instants:
        with start() as process:
            process.until(instant)
            process.kill()
            assert process.end().code == -signal.SIGKILL
    with start() as process:
        assert is_same_run(process.end(400)), process.text
    assert not lost_bits("whole", "out")
    samples = snapshot("whole/samples")
    assert samples == snapshot("out/samples") and len(samples) == 6 * (keys is LONG)
    for path in Path().glob("*/*.pt"):  # 1.6 GB each
        path.unlink()


def test_a_log_has_each_line_in_time_and_a_second_ctrl_c_leaves_at_once(data):
    with training(data, "--batch_size=512", "--micro_batch_size=1") as process:  # slow steps
        for words in ("step 1/40", "Ctrl-C"):
            assert process.until(lambda: words in process.text)
            process.signal(signal.SIGINT)
        assert process.end(60).code == 130 and "Traceback" not in process.text
    assert not intact("out")


def test_the_bar_fits_the_terminal_and_tells_loss_speed_and_time_left(data):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    text = b""
    with training(data, "--max_steps=200", stream=os.ttyname(theirs)) as process:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                text += os.read(ours, 4096)
        assert process.end().code == 0, text.decode()
    os.close(ours)
    os.close(theirs)
    bars = [line for line in text.decode().splitlines() if "%|" in line]
    assert len(bars) > 3 and max(map(len, bars)) <= 80
    assert all(word in bars[-1] for word in ("█", "/200", "loss", "tok/s", "left")), bars[-1]


def test_ctrl_c_before_the_first_step_ends_it_and_leaves_nothing(data):
    code = ("import os, sys, train; train.SmolLM2 = lambda config: os.kill(os.getpid(), 2); "
            "train.main(sys.argv[1:])")
    with Process(["-c", code, *RUN, f"--data_dir={data}"]) as process:
        assert process.end(60).code == -signal.SIGINT and "train.py: " not in process.text
    assert not Path("out").exists()


@pytest.fixture
def short(run):
    """run on data of 12 blocks, so that an epoch is three steps; each id is its own place."""
    folder = write_data("short", range(13 * 16), vocab_size=2048)
    return partial(run, data_dir=folder, block_size=16, eval_interval=0, lr_decay_steps=12)


@pytest.fixture
def starts(monkeypatch):
    """The places of all sequences that are trained on, in write_data's ranges.
    The training draws from every generator, as dropout or augmentation would."""
    found, real = [], train.get_batch
    def get_batch(*args):
        rows = real(*args)
        found.extend(rows[:, 0].tolist())
        drawn = torch.randint(100, rows.shape) + random.randrange(100) + np.random.randint(100)
        return (rows + drawn) % 200
    monkeypatch.setattr(train, "get_batch", get_batch)
    return found


STOPS = {  # the steps after which it is stopped, and what else is asked for
    "in the warm-up": ((1, 2), ""), "at the warm-up's end": ((4, 5), ""),
    "at each epoch's end": ((3, 6, 9), ""), "in the decay": ((8, 11), ""),
    "bf16": ((5, 7), "--dtype=bfloat16"), "fp16": ((5,), "--dtype=float16"),
    "Muon": ((5,), "--optimizer=muon --lr_schedule=wsd"),
    "Muon in fp16": ((5,), "--optimizer=muon --dtype=float16 --share_spelling=true")}


@pytest.mark.parametrize("steps, keys", STOPS.values(), ids=STOPS)
def test_stops_anywhere_in_epochs_and_schedule_change_no_bit(steps, keys, short, starts):
    """Nor do they change what is drawn from the generators, or a gradient scaler's state."""
    start = partial(short, *keys.split(), weight_decay=0.3, beta2=0.8, grad_clip=0.5,
                    keep_checkpoints=1)
    assert start(max_steps=12, out_dir="whole").code == 0
    assert start(max_steps=steps[0]).code == 0
    for step in (*steps[1:], 12):
        result = resume_here("out", max_steps=step)
        assert is_same_run(result), result
    assert not lost_bits("whole", "out")
    assert starts[48:] == starts[:48] and len(set(starts[:12])) == 12  # a batch of 4, 12 blocks


@pytest.mark.parametrize("lose", [lambda state: state["optimizer"].update(state={}),
    lambda state: state["rng"][0].update(python=random.Random(1).getstate()),
    lambda state: state["config"].update(seed=7)], ids=["optimizer", "generators", "data's order"])
def test_control_a_resume_with_a_part_of_its_state_lost_is_seen(lose, short, starts):
    assert short(max_steps=8, out_dir="whole").code == 0
    assert short(max_steps=4).code == 0
    state = train.read_checkpoint(Path("out/step_000004.pt"))
    lose(state)
    train.write_checkpoint(Path("out/step_000004.pt"), state)
    assert is_same_run(resume_here("out", max_steps=8))  # it cannot know
    weights = [train.read_checkpoint(f"{out}/step_000008.pt")["model"] for out in ("whole", "out")]
    assert differences(*weights) and metrics("whole")[4:] != metrics("out")[4:]


OTHER_DATA = {"data": {"train": "0" * 16}}
NAMED = {**OTHER_DATA, "config": {"data_dir": "others"}}  # by another name than now
FP16 = {"machine": {"dtype": "float16"}, "scaler": torch.amp.GradScaler("cpu").state_dict()}


@pytest.mark.parametrize("was, argv, code, words", [
    ({"machine": {"torch": "1.0", "device": "cuda (Fast)", "processor": "x", "threads": 77}}, "", 0,
     f"device cuda (Fast) → cpu, processor x →, threads 77 → 2, torch 1.0 → {torch.__version__}"),
    ({}, "--dtype=bfloat16", 0, "threads 1 → 2, dtype float32 → bfloat16"),
    ({}, "--dtype=float16", 0, "dtype float32 → float16"), (FP16, "", 0, "dtype float16 → float32"),
    ({}, "--batch_size=8 --learning_rate=0.5", 0, "batch_size 4 → 8, rate 0.01 → 0.5"),
    ({}, "--seed=1", 0, "seed 1337 → 1"), (NAMED, "--data_dir={}", 0, "train 00000000"),
    ({"machine": {"threads": 2}}, "--log_interval=2 --eval_interval=5", 0, ""),
    *((OTHER_DATA, argv, 1, "other data, --data_dir") for argv in ("", "--data_dir={}")),
    *(({}, f"--{key}", 1, key.partition("=")[0]) for key in (
        "hidden_size=64", "vocab_size=4096", "rope_theta=5", "optimizer=muon"))])
def test_where_bits_cannot_be_the_same_a_resume_names_why(was, argv, code, words, finished, data):
    """was: in the checkpoint. Another model or data are refused; generators stay as they are."""
    random.random()
    torch.rand(9)
    path, drawn = finished / "step_000008.pt", [train.rng_state()]  # not as at a start
    state = train.read_checkpoint(path)
    state |= {"rng": drawn, **{name: state[name] | part for name, part in was.items()}}
    train.write_checkpoint(path, state)
    done = run_main(train.main, *argv.format(data).split(), resume="out", max_steps=10, threads=2)
    expect_end(done, [code])
    assert all(word in done.out + done.err for word in words.split(", "))
    assert words or "→" not in done.out
    assert last_step("out") == (8 if code else 10) and (code == 0 or done.err.count("\n") == 1)
    state = train.load_checkpoint("out")[1]
    rate = state["optimizer"]["param_groups"][0]["initial_lr"]  # a change is made, not only named
    assert rate == state["config"]["learning_rate"] and not differences(state["rng"], drawn)


def test_tokens_and_the_place_in_the_data_stay_true_when_sizes_change(run, starts):
    n, T = 29 * 64, 64  # an epoch of 28 blocks
    folder = write_data("data", range(n), vocab_size=2048)
    assert run(data_dir=folder, block_size=T, max_steps=4, batch_size=2).code == 0
    assert resume_here("out", max_steps=8, batch_size=4).code == 0
    assert resume_here("out", max_steps=12, batch_size=1).code == 0
    tokens = {line["step"]: line["tokens"] for line in metrics("out")}
    assert [tokens[step] for step in (4, 5, 8, 9, 12)] == [512, 768, 1536, 1600, 1792]
    assert starts == list(train.epoch_order(1337, 0, n, T)) and len(set(starts)) == 28
    assert resume_here("out", max_steps=13).code == 0
    result = resume_here("out", max_steps=14, batch_size=4, block_size=32)
    assert result.code == 0 and "block_size 64 → 32" in result.out
    assert starts[29:] == list(train.epoch_order(1337, 2, n, 32)[:4])  # it begins an epoch anew
    assert not train.load_checkpoint("out")[1]["best"]  # which was of longer windows
    assert resume_here("out", max_steps=20).code == 0 and train.load_checkpoint("out")[1]["best"]
    assert resume_here("out", max_steps=21, eval_tokens=99).code == 0
    assert not train.load_checkpoint("out")[1]["best"]
    assert resume_here("out", max_steps=22, eval_interval=22).code == 0
    other = write_data("other", range(1, n), vocab_size=2048, val_ids=range(1, 101))
    assert resume_here("out", max_steps=23, data_dir=other).code == 0
    state = train.load_checkpoint("out")[1]
    assert not state["best"] and state["sequence"] == 4


def test_a_run_goes_on_in_another_place_with_its_data_in_another(finished, data):
    finished.rename("other")
    shutil.copytree(data, "moved")
    for file in Path("moved/tokenizer").iterdir():
        file.chmod(0o444)
    assert is_same_run(resume_here("other", max_steps=9, data_dir="moved"))
    assert all(file.stat().st_mode & 0o200 for file in Path("other/tokenizer").iterdir())
    assert last_step("other") == 9 and not Path("out").exists()
    refused(resume_here("other", out_dir="o2"), "other", "o2")


def test_from_an_older_checkpoint_steps_repeat_and_later_files_go_aside(finished, eight_steps):
    with open(finished / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 9, "lo')  # torn by a kill
    with patch.object(shutil, "disk_usage", return_value=Mock(free=0)):
        for keep in (1, 0):
            write("out/checkpoint.tmp", "what a killed save left, and takes room")
            refused(resume_here("out/step_000004.pt", keep_checkpoints=keep), "1 more che", code=1)
            assert not Path("out/checkpoint.tmp").exists()
    for _ in range(2):
        assert resume_here("out/step_000004.pt").code == 0
        assert not lost_bits(eight_steps, finished)
    aside = sorted(path.name[:14] for path in finished.glob("*.superseded"))
    assert aside == 2 * ["step_000006.pt"] + 2 * ["step_000008.pt"]


def test_a_checkpoint_copied_alone_resumes_and_no_step_is_logged_twice(finished):
    write("copy/step_000004.pt", (finished / "step_000004.pt").read_bytes())
    for n in (8, 9, 10):
        assert resume_here("copy", checkpoint_interval=0, eval_interval=0, max_steps=n).code == 0
        os.remove(f"copy/step_{n:06d}.pt")
    assert [line["step"] for line in metrics("copy")] == [5, 6, 7, 8, 9, 10]
    assert metrics("copy")[:4] == [{k: v for k, v in line.items() if k != "val_loss"}
                                   for line in metrics(finished)[4:]]


def test_a_finished_run_stays_as_it_is(finished, run):
    before = snapshot(finished)
    for result in (resume_here("out"), run("--resume=auto", "--max_steps=8")):
        assert result.code == 0 and "finished" in result.out and "--max_steps=" in result.out
    refused(run(), "out holds a run", "--resume", "--out_dir", "delete")
    assert snapshot(finished) == before


def test_a_longer_run_keeps_the_learning_rate_horizon(finished, eight_steps):
    state = train.read_checkpoint(finished / "step_000008.pt")
    del state["config"]["grad_clip"]  # as if train.py had it only since then
    train.write_checkpoint(finished / "step_000008.pt", state)
    assert is_same_run(resume_here("out", max_steps=12, eval_interval=6, keep_checkpoints=1))
    lines = metrics(finished)
    assert lines[:8] == metrics(eight_steps)
    assert [line["step"] for line in lines[8:]] == [9, 10, 11, 12] and "val_loss" in lines[11]
    assert [line["lr"] for line in lines[8:]] == [3e-5] * 4 and lines[7]["lr"] > 3e-5
    assert intact("out") == [12]


def test_a_checkpoint_reaches_the_disk_before_its_name_and_the_name_after(finished, monkeypatch):
    """And what was logged before either."""
    seen = watch_disk(monkeypatch)
    assert resume_here("out", max_steps=9).code == 0
    assert seen == ["metrics.jsonl", "checkpoint.tmp", ("checkpoint.tmp", "step_000009.pt"), "out"]


def test_a_second_process_is_refused_and_the_first_one_never_notices(data, run):
    assert run(out_dir="whole").code == 0
    with training(data) as process:
        process.until(lambda: last_step("out") >= 6)
        process.signal(signal.SIGSTOP)  # it must not end meanwhile
        for argv in ([], ["--resume"], ["--resume=auto"], ["--resume=out"]):
            expect_end(run(*argv), [1], "training in out")
        process.signal(signal.SIGCONT)
        expect_end(process.end())
    assert not lost_bits("whole", "out")


def test_a_vanished_reader_loses_lines_and_no_steps(data):
    """`nohup train.py 2>&1 | tee log`, of which tee goes first; then the terminal is closed."""
    command = [sys.executable, ROOT / "train.py", *RUN, f"--data_dir={data}", "--max_steps=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as p:
        while b"step 2/" not in p.stdout.readline():
            assert p.poll() is None
        p.stdout.close()
        for signum in (signal.SIGHUP, signal.SIGTERM):
            step = last_step("out")
            while last_step("out") < step + 5 and p.poll() is None:
                time.sleep(0.01)
            p.send_signal(signum)
        assert p.wait(60) == 143
    assert intact("out")[-1] == last_step("out") > 10


@pytest.mark.slow
def test_without_any_output_it_trains_all_the_same(data):
    command = [sys.executable, ROOT / "train.py", *RUN, f"--data_dir={data}", "--max_steps=2"]
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command])
    assert done.returncode == 0 and intact("out") == [2]


def test_a_path_is_a_shells_and_what_is_printed_can_be_pasted(run, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    done = run(out_dir="~/it's & \"mine\"/", max_steps=1)
    script, *argv = shlex.split(done.out.partition("Next: python ")[2].splitlines()[0])
    assert script == "sample.py" and run_main(sample.main, *argv, max_new_tokens=1).code == 0
    done = resume_here("it's & \"mine\"")
    script, *argv = shlex.split(done.out.partition("Longer: python ")[2].splitlines()[0])
    assert script == "train.py" and run_main(train.main, *argv, max_steps=2).code == 0


def test_the_run_is_a_whole_whatever_became_of_its_data(data, run, monkeypatch):
    """It samples with its own tokenizer, and without a network."""
    monkeypatch.setattr("socket.getaddrinfo", None)
    sampled = partial(run_main, sample.main, prompt="To be", max_new_tokens=8)
    shutil.copytree(data, "data")
    assert run(data_dir="data", max_steps=2).code == 0
    wanted = sampled()
    assert wanted.code == 0 and wanted == sampled(checkpoint="best")  # nothing was evaluated
    path = make_tokenizer(Path("other")) / "tokenizer.json"
    path.write_text(path.read_text().replace('"z": ', '"zz": '))
    Path("text.txt").write_text("To be, or not to be. " * 20)
    prepared = run_main(prepare.main, input="text.txt", tokenizer="other", out_dir="data")
    assert prepared.code == 0 and sampled() == wanted
    refused(resume_here("out", max_steps=4), "another tokenizer", code=1)
    Path("out/tokenizer").rename("kept")
    assert sampled().code == 1  # the data's is another, and not taken
    Path("kept").rename("out/tokenizer")
    shutil.rmtree("data")
    assert sampled() == wanted
    refused(resume_here("out", max_steps=4), "data_dir", "python prepare.py")
    shutil.copytree(data, "data")
    shutil.rmtree("out/tokenizer")
    assert sampled() == wanted  # the data's fits: an older run, or a checkpoint copied alone
    shutil.rmtree("data")
    refused(sampled(), "out/tokenizer", "data/tokenizer", code=1)
