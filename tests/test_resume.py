"""Exact resume: a run that was stopped, in any way, and resumed ends with the bits of one that was never stopped."""
import os
import pickle
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import model as M
import prepare
import sample
import train
from tests.harness import (ROOT, TINY, assert_refused, assert_same_bits, differences, flip, make_tokenizer, metrics,
                           read, run_main, untimed, wait_until, write_data)


def refused(result, *fragments, code=2):
    assert_refused(result, "train.py", *fragments, code=code)


# Everything that could shift the run: evaluation, samples, micro-batches, the best checkpoint, several epochs.
LONG = ["--max_steps=60", "--checkpoint_interval=10", "--eval_interval=7", "--sample_interval=9",
        "--micro_batch_size=2"]
LAST = "step_000060.pt"


def run_to_the_end(start_train, *argv, tiny=True):
    process = start_train(*argv, tiny=tiny)
    process.wait(timeout=400)
    text = process.text
    assert process.returncode == 0, text
    return text


def lines_of(out_dir):
    path = Path(out_dir, "metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def never_stopped(data_dir, tmp_path_factory):
    """The out_dir of LONG, run in one go."""
    out = tmp_path_factory.mktemp("never_stopped") / "out"
    assert run_main(train.main, f"--data_dir={data_dir}", *TINY, *LONG, f"--out_dir={out}").code == 0
    return out


def assert_same_run(out, never_stopped):
    assert_same_bits(Path(out, LAST), never_stopped / LAST)
    assert untimed(out) == untimed(never_stopped)
    assert [p.name for p in train.checkpoints(out)] == [p.name for p in train.checkpoints(never_stopped)]
    samples = [{p.name: p.read_text() for p in Path(d, "samples").iterdir()} for d in (out, never_stopped)]
    assert samples[0] == samples[1] and len(samples[0]) == 6


@pytest.fixture(scope="module")
def eight_steps(data_dir, tmp_path_factory):
    """The out_dir of a run of 8 steps with checkpoints after 2, 4, 6 and 8."""
    out = tmp_path_factory.mktemp("eight") / "out"
    assert run_main(train.main, f"--data_dir={data_dir}", *TINY, "--max_steps=8", "--checkpoint_interval=2",
                    "--keep_checkpoints=0", f"--out_dir={out}").code == 0
    return out


@pytest.fixture
def finished(eight_steps, tmp_path):
    """A copy of it in out/, to resume or to damage."""
    return Path(shutil.copytree(eight_steps, tmp_path / "out"))


# ------------------------------------------------------------------------------------------------------- to the bit


def test_the_comparison_sees_one_bit(eight_steps):
    a, b = read(eight_steps / "step_000008.pt"), train.read_checkpoint(eight_steps / "step_000008.pt")
    assert not differences(a, b)
    b["model"]["model.norm.weight"].view(torch.int32)[3] ^= 1
    b["optimizer"]["state"][0]["exp_avg"].view(torch.int32)[0, 0] ^= 1
    b["rng"][0]["torch"][7] ^= 1
    assert sorted(differences(a, b)) == [".model.model.norm.weight", ".optimizer.state.0.exp_avg", ".rng[0].torch"]


def test_n_steps_equal_k_steps_sigkill_and_the_rest_to_the_bit(start_train, never_stopped):
    process = start_train(*LONG)
    wait_until(lambda: Path("out/step_000020.pt").exists() and lines_of("out") >= 23, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL and lines_of("out") < 60
    text = run_to_the_end(start_train, "--resume", tiny=False)
    assert "going on from" in text and "no longer the same run" not in text
    assert_same_run("out", never_stopped)


def test_kills_in_the_middle_of_saving_and_before_the_first_checkpoint(start_train, never_stopped):
    """One command for queues: --resume=auto starts, and goes on after each kill."""
    for been in (lambda: lines_of("out") >= 3,  # before there is a checkpoint
                 lambda: any(Path("out").glob("step_*.tmp")),  # while the first is being written
                 lambda: Path("out/step_000030.pt").exists() and any(Path("out").glob("step_*.tmp"))):
        process = start_train("--resume=auto", *LONG)
        wait_until(been, process)
        process.kill()
        process.wait()
    run_to_the_end(start_train, "--resume=auto", *LONG)
    assert not list(Path("out").glob("*.tmp"))
    assert_same_run("out", never_stopped)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_changes_no_bit(signum, code, start_train, resume, never_stopped):
    process = start_train(*LONG)
    wait_until(lambda: lines_of("out") >= 12, process)
    process.signal(signum)
    assert process.wait(timeout=60) == code
    text, step = process.text, metrics("out")[-1]["step"]
    assert "Traceback" not in text and "Go on with: python train.py --resume" in text.splitlines()[-1], text
    assert train.checkpoints("out")[-1].name == f"step_{step:06d}.pt" and step < 60
    assert resume().code == 0
    saved = train.checkpoints("out")  # one more than the other run has: that of the signal, where it is still kept
    assert_same_bits(saved[-1], never_stopped / LAST)
    assert untimed("out") == untimed(never_stopped)


@pytest.fixture
def slow_steps(start_train):
    """A process in steps of a second or more, of which the first is done."""
    process = start_train("--batch_size=256", "--block_size=64", "--max_steps=1000")
    wait_until(lambda: lines_of("out") >= 1, process)
    return process


def test_a_log_file_shows_each_line_when_it_is_written(slow_steps):
    wait_until(lambda: "step 1/1000 | loss" in slow_steps.text, slow_steps, timeout=60)


def test_a_second_ctrl_c_leaves_at_once(slow_steps):
    slow_steps.signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again leaves at once" in slow_steps.text, slow_steps)
    slow_steps.signal(signal.SIGINT)
    assert slow_steps.wait(timeout=60) == 130
    assert not train.checkpoints("out") and "Traceback" not in slow_steps.text


def test_a_second_process_in_the_same_out_dir_is_refused(slow_steps, run_train, resume):
    for argv in (["--max_steps=1"], ["--max_steps=1", "--overwrite"], ["--resume=auto"]):
        refused(run_train(*argv), "another process is training in out", "--out_dir", code=1)
    refused(resume(), "another process is training in out", "--out_dir", code=1)
    assert run_train("--max_steps=1", "--out_dir=another").code == 0
    slow_steps.kill()
    slow_steps.wait()
    assert run_train("--max_steps=1").code == 0  # the lock goes with its process


def test_ctrl_c_before_the_first_step_is_quiet(start_train):
    process = start_train("--max_steps=1000")
    wait_until(lambda: Path("out/.lock").exists(), process)  # torch is imported, the data are not yet loaded
    process.signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in process.text


@pytest.mark.parametrize("keys", [["dtype=float32"], ["dtype=float16"], ["optimizer=muon", "lr_schedule=wsd"],
                                  ["optimizer=muon", "dtype=float16"]])
def test_other_dtypes_and_optimizers_resume_to_the_bit(keys, run_train, resume):
    """float16: the gradient scaler's state is part of it."""
    keys = [f"--{key}" for key in keys] + ["--learning_rate=1e-3", "--lr_decay_steps=9"]
    assert run_train("--max_steps=9", *keys, "--out_dir=whole").code == 0
    assert run_train("--max_steps=5", *keys).code == 0
    assert resume("--max_steps=9").code == 0
    assert_same_bits("whole/step_000009.pt", "out/step_000009.pt")
    assert untimed("whole") == untimed("out")


def test_from_an_older_checkpoint_the_steps_repeat_and_later_files_are_set_aside(finished, resume, eight_steps):
    assert resume("--resume=out/step_000004.pt").code == 0
    assert_same_bits(finished / "step_000008.pt", eight_steps / "step_000008.pt")
    assert untimed(finished) == untimed(eight_steps)
    assert sorted(p.name for p in (finished / "superseded").iterdir()) == ["step_000006.pt", "step_000008.pt"]


def test_metrics_torn_by_a_kill_or_beyond_the_checkpoint_are_cut_off(finished, resume, eight_steps):
    for step in (6, 8):
        (finished / f"step_00000{step}.pt").unlink()
    with open(finished / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 9, "lo')
    assert resume().code == 0
    assert untimed(finished) == untimed(eight_steps)
    assert_same_bits(finished / "step_000008.pt", eight_steps / "step_000008.pt")


# -------------------------------------------------------------------------------------- what --resume does, and not


def test_resuming_a_finished_run_says_so_and_exits_0(finished, resume):
    before = {p: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != ".lock"}
    result = resume()
    assert result.code == 0 and "finished: step 8 of 8" in result.out and "--max_steps=" in result.out
    assert {p: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != ".lock"} == before


def test_extending_keeps_the_learning_rate_horizon_and_holds_the_minimum(finished, resume, eight_steps):
    result = resume("--max_steps=12")
    assert result.code == 0 and "no longer the same run" not in result.out, result
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert untimed(finished)[:8] == untimed(eight_steps)
    assert [line["lr"] for line in lines[8:]] == [3e-5] * 4 and lines[7]["lr"] > 3e-5
    assert read(finished / "step_000012.pt")["config"]["lr_decay_steps"] == 8


def test_a_fresh_start_into_a_folder_with_a_run_is_refused_with_both_ways_out(finished, run_train, eight_steps):
    refused(run_train(), "out holds a run", "--resume", "--out_dir", "--overwrite")
    assert_same_bits(finished / "step_000008.pt", eight_steps / "step_000008.pt")
    assert untimed(finished) == untimed(eight_steps)


def test_overwrite_starts_anew(finished, run_train):
    assert run_train("--overwrite", "--max_steps=3").code == 0
    assert [p.name for p in train.checkpoints("out")] == ["step_000003.pt"]
    assert [line["step"] for line in metrics("out")] == [1, 2, 3]


def test_resume_auto_starts_where_there_is_no_run_and_goes_on_where_there_is_one(run_train):
    assert "going on" not in run_train("--resume=auto", "--max_steps=3", "--lr_decay_steps=5").out
    result = run_train("--resume=auto", "--max_steps=5", "--lr_decay_steps=5")
    assert "going on from out/step_000003.pt" in result.out and [m["step"] for m in metrics("out")] == [1, 2, 3, 4, 5]
    assert "finished" in run_train("--resume=auto", "--max_steps=5", "--lr_decay_steps=5").out


def test_a_resumed_run_writes_where_its_checkpoint_lies(finished, resume):
    finished.rename("elsewhere")
    result = resume("--resume=elsewhere", "--max_steps=10")
    assert result.code == 0 and Path("elsewhere/step_000010.pt").exists() and not Path("out").exists()
    refused(resume("--resume=elsewhere", "--out_dir=o2"), "elsewhere", "o2")


def test_a_change_that_bends_the_run_is_made_and_named(finished, resume):
    result = resume("--max_steps=10", "--batch_size=2", "--seed=7", "--dtype=float32")
    assert result.code == 0
    line = next(line for line in result.out.splitlines() if "no longer the same run" in line)
    assert "batch_size 4 → 2" in line and "seed 1337 → 7" in line and "max_steps" not in line
    assert ("dtype bfloat16 → float32" in line) == M.native_bf16()
    assert read("out/step_000010.pt")["config"]["batch_size"] == 2


def test_another_number_of_threads_is_named(finished, resume):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert f"threads {threads} → {threads + 1}" in resume("--max_steps=9").out
    finally:
        torch.set_num_threads(threads)


def test_other_intervals_are_no_change_of_the_run(finished, resume):
    result = resume("--max_steps=10", "--eval_interval=5", "--sample_interval=0", "--keep_checkpoints=1",
                    "--log_interval=2")
    assert result.code == 0 and "no longer the same run" not in result.out
    assert [p.name for p in train.checkpoints("out")] == ["step_000010.pt"]


@pytest.mark.parametrize("key, old, new", [("hidden_size", 32, 64), ("vocab_size", 49152, 50000),
                                            ("rope_theta", 1e5, 1e4)])
def test_another_model_is_refused(finished, resume, key, old, new):
    refused(resume(f"--{key}={new}", "--max_steps=10"), f"{key} = {old}", str(new), code=1)


def test_other_data_are_refused_unless_named(finished, resume, data_dir):
    write_data("other", range(1007))
    state = read(finished / "step_000008.pt")
    state["data"] = {**state["data"], "train": "0" * 16}
    train.write_checkpoint(finished / "step_000008.pt", state)
    refused(resume("--max_steps=9"), "not the data", "--data_dir", code=1)
    result = resume("--max_steps=9", f"--data_dir={data_dir}")
    assert result.code == 0 and "data 00000000" in result.out, result
    refused(resume("--max_steps=10", "--data_dir=other"), "another tokenizer", code=1)


# ----------------------------------------------------------------------------------------------- damaged checkpoints


PLACES = [0, 100, 1_000_000, 15_000_000, -5000, -200, -41, -33, -1]  # of 19 MB


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, p.stat().st_size - 1), lambda p: os.truncate(p, 1000),
                                    lambda p: os.truncate(p, 0), lambda p: p.write_bytes(b"<html>404</html>" * 100),
                                    *[lambda p, at=at: flip(p, at) for at in PLACES]],
                         ids=["short", "1000 bytes", "empty", "html", *[f"bit at {at}" for at in PLACES]])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_used(damage, finished, resume, eight_steps):
    newest = finished / "step_000008.pt"
    damage(newest)
    result = resume()
    assert result.code == 0, result
    assert any("step_000008.pt" in line and "damaged" in line and "trying the one before" in line
               for line in result.err.splitlines()), result.err
    assert "going on from out/step_000006.pt" in result.out
    assert_same_bits(newest, eight_steps / "step_000008.pt")
    assert untimed(finished) == untimed(eight_steps)


def test_where_no_whole_checkpoint_is_left_nothing_is_started(finished, resume, run_train):
    for path in train.checkpoints(finished):
        flip(path, 5000)
    for result in (resume(), run_train("--resume=auto")):
        assert result.code == 1 and "no whole checkpoint in out" in result.err and "--overwrite" in result.err
        assert "Traceback" not in result.err
    assert len(train.checkpoints(finished)) == 4


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("with_digest", [True, False])
def test_a_checkpoint_with_code_in_it_is_refused_and_does_not_run(with_digest, resume, finished):
    state = {**read(finished / "step_000008.pt"), "more": Hostile()}
    shutil.rmtree(finished)
    finished.mkdir()
    path = finished / "step_000008.pt"
    if with_digest:
        train.write_checkpoint(path, state)
    else:
        torch.save(state, path)
    for result in (resume(), resume(f"--resume={path}")):
        assert result.code == 1 and "Traceback" not in result.err
        assert ("refused" if with_digest else "damaged") in result.err, result
    assert not Path("ran").exists()
    path.write_bytes(pickle.dumps(Hostile()))
    assert resume().code == 1 and not Path("ran").exists()


def test_a_checkpoint_is_written_whole_or_not_at_all(finished, resume, monkeypatch, eight_steps):
    """A full disk in the middle of a save: one line, and what was there stays."""
    class FullDisk:
        def __init__(self, file):
            self.file, self.left, self.flush = file, 5_000_000, file.flush

        def write(self, part):
            self.left -= len(part)
            if self.left < 0:
                raise OSError(28, os.strerror(28))
            return self.file.write(part)
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, FullDisk(file)))
    refused(resume("--max_steps=12"), "No space left on device", "--resume", code=1)
    assert train.checkpoints(finished)[-1].name == "step_000008.pt"
    assert_same_bits(finished / "step_000008.pt", eight_steps / "step_000008.pt")
    monkeypatch.undo()
    os.chdir(finished.parent)  # which undo has undone
    assert resume("--max_steps=12").code == 0


# --------------------------------------------------------------------- what others' resumes broke, and the controls


def whole_and_parts(run_train, resume, steps, keys=(), total=12):
    """A run of `total` steps in one go (whole/), and one stopped after each of `steps` and resumed (out/)."""
    keys = [*keys, f"--lr_decay_steps={total}"]
    assert run_train(f"--max_steps={total}", *keys, "--out_dir=whole").code == 0
    assert run_train(f"--max_steps={steps[0]}", *keys).code == 0
    for step in (*steps[1:], total):
        assert resume(f"--max_steps={step}").code == 0
    return f"whole/step_{total:06d}.pt", f"out/step_{total:06d}.pt"


@pytest.fixture
def short_epochs(tmp_path, data_dir):
    """Data of 12 blocks of 16 tokens: an epoch is three steps of four."""
    folder = write_data(tmp_path / "short", range(13 * 16))
    return [f"--data_dir={folder}"]


@pytest.mark.parametrize("steps", [(1, 2), (3,), (3, 6, 9), (2, 5, 7), (4,), (11,)],
                         ids=["in warm-up, twice in an epoch", "at an epoch's end", "at each", "off it", "after warm-up",
                              "late in the decay"])
def test_stops_anywhere_in_epochs_and_schedule_change_no_bit(steps, run_train, resume, short_epochs):
    whole, out = whole_and_parts(run_train, resume, steps, [*short_epochs, "--weight_decay=0.3", "--beta2=0.8"])
    assert_same_bits(whole, out, aside=["max_steps"])
    assert read(out)["epoch"] == 4 and read(out)["sequence"] == 0


def test_tokens_and_the_place_in_the_data_stay_true_when_the_batch_size_changes(run_train, resume, monkeypatch):
    starts, real = [], train.epoch_order
    monkeypatch.setattr(train, "get_batch", lambda data, config, machine, run, get=train.get_batch: (
        starts.append((run.epoch, run.sequence, config.batch_size)), get(data, config, machine, run))[1])
    assert run_train("--max_steps=4", "--batch_size=2", "--block_size=64", "--checkpoint_interval=0").code == 0
    assert resume("--max_steps=8", "--batch_size=4").code == 0
    assert resume("--max_steps=12", "--batch_size=1").code == 0
    tokens = {line["step"]: line["tokens"] for line in metrics("out")}
    assert [tokens[step] for step in (4, 5, 8, 9, 12)] == [512, 768, 1536, 1600, 1792] and real is train.epoch_order
    read_so_far = [0]
    for epoch, sequence, size in starts:  # nothing is skipped, nothing read twice
        assert (epoch, sequence) == (0, read_so_far[-1])
        read_so_far.append(sequence + size)
    assert len(starts) == 12 and read_so_far[-1] == 28


def test_another_block_size_begins_an_epoch_anew(run_train, resume):
    assert run_train("--max_steps=2").code == 0
    result = resume("--max_steps=3", "--block_size=32")
    assert result.code == 0 and "block_size 16 → 32" in result.out
    assert read("out/step_000003.pt")["epoch"] == 1 and read("out/step_000003.pt")["sequence"] == 4


def test_the_same_data_under_another_path_are_the_same(finished, resume, data_dir, eight_steps):
    shutil.copytree(data_dir, "moved")
    (finished / "step_000008.pt").unlink()
    result = resume("--data_dir=moved")
    assert result.code == 0 and "no longer the same run" not in result.out
    assert_same_bits(finished / "step_000008.pt", eight_steps / "step_000008.pt", aside=["data_dir"])


def test_a_checkpoint_copied_beside_nothing_goes_on_there(finished, resume, eight_steps):
    Path("other").mkdir()
    shutil.copy(finished / "step_000006.pt", "other")
    assert resume("--resume=other").code == 0
    assert_same_bits("other/step_000008.pt", eight_steps / "step_000008.pt")


@pytest.fixture
def noisy_batches(monkeypatch):
    """Training that draws from every generator of the process, as dropout or augmentation would."""
    real = train.get_batch

    def get_batch(data, config, machine, run):
        x, y = real(data, config, machine, run)
        noise = torch.randint(100, x.shape) + random.randrange(100) + np.random.randint(100)
        return (x + noise) % 200, y
    monkeypatch.setattr(train, "get_batch", get_batch)


def test_a_run_that_draws_from_the_generators_resumes_to_the_bit(run_train, resume, noisy_batches):
    assert_same_bits(*whole_and_parts(run_train, resume, (5, 7)), aside=["max_steps"])


@pytest.mark.parametrize("name", ["torch", "numpy", "python"])
def test_control_a_generator_that_is_not_restored_is_seen(name, run_train, resume, noisy_batches, monkeypatch):
    real = train.rng_state
    fresh = real()[name]
    monkeypatch.setattr(train, "rng_state", lambda: {**real(), name: fresh})
    whole, out = whole_and_parts(run_train, resume, (5,))
    assert differences(read(whole)["model"], read(out)["model"])


@pytest.mark.parametrize("loss", ["optimizer", "seed"])
def test_control_a_run_without_its_optimizer_or_with_another_order_is_seen(loss, run_train, resume, short_epochs):
    keys = [*short_epochs, "--lr_decay_steps=8"]
    assert run_train("--max_steps=8", *keys, "--out_dir=whole").code == 0
    assert run_train("--max_steps=4", *keys).code == 0
    more = ["--seed=2"] if loss == "seed" else []
    if loss == "optimizer":
        state = read("out/step_000004.pt")
        state["optimizer"]["state"] = {}
        train.write_checkpoint(Path("out/step_000004.pt"), state)
    assert resume("--max_steps=8", *more).code == 0
    assert differences(read("whole/step_000008.pt")["model"], read("out/step_000008.pt")["model"])


def test_a_checkpoint_reaches_the_disk_before_its_name_and_the_name_after(finished, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("folder" if stat.S_ISDIR(os.fstat(f).st_mode) else "file"),
                                                fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"{Path(a).suffix} to {Path(b).suffix}"), replace(a, b)))
    train.write_checkpoint(finished / "step_000009.pt", read(finished / "step_000008.pt"))
    assert calls == ["file", ".tmp to .pt", "folder"]


# ----------------------------------------------------------------------------------- readers, terminals and folders


def start_piped(data_dir, *argv, **how):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--max_steps=100000",
                             *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_vanished_reader_loses_lines_and_no_steps(signum, code, data_dir):
    """`train.py | tee log`, and Ctrl-C to both; or a terminal that is closed."""
    with start_piped(data_dir) as process:
        while b"step 2/" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        wait_until_step(process, 10)
        process.send_signal(signum)
        assert process.wait(timeout=60) == code
    assert train.step_of(train.checkpoints("out")[-1]) == metrics("out")[-1]["step"] >= 10


def wait_until_step(process, step):
    while lines_of("out") < step:
        assert process.poll() is None
        time.sleep(0.01)


def test_nohup_survives_the_terminal(data_dir):
    with start_piped(data_dir, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.stdout.close()
        wait_until_step(process, 3)
        process.send_signal(signal.SIGHUP)
        wait_until_step(process, lines_of("out") + 5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143


def test_without_any_output_it_trains_all_the_same(data_dir):
    command = shlex.join(map(str, [sys.executable, ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--max_steps=2"]))
    assert subprocess.run(f"{command} >&- 2>&-", shell=True).returncode == 0
    assert [p.name for p in train.checkpoints("out")] == ["step_000002.pt"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples", "tokenizer"])
@pytest.mark.parametrize("argv", [[], ["--overwrite"], ["--resume=auto"]])
def test_files_of_anyone_else_are_left_alone(name, argv, run_train):
    Path("mine", name).mkdir(parents=True)
    refused(run_train("--out_dir=mine", *argv), "mine", "something else")
    assert [p.name for p in Path("mine").iterdir()] == [name]


@pytest.mark.parametrize("argv", [["--beta2=1"], ["--data_dir=nowhere"], ["--device=tpu9"], ["--init_from=./nowhere"]])
def test_a_start_that_fails_leaves_no_folder(argv, run_train):
    assert run_train("--out_dir=new", *argv).code in (1, 2) and not Path("new").exists()


def test_the_run_is_a_whole_whatever_became_of_its_data(data_dir, run_train, resume, monkeypatch):
    """Another tokenizer in the data's folder: the run samples with its own, and does not go on with that one."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    shutil.copytree(data_dir, "data")
    assert run_train("--data_dir=data", "--max_steps=2").code == 0
    wanted = run_main(sample.main, "--prompt=To be", "--max_new_tokens=8")
    assert wanted.code == 0
    make_tokenizer(Path("bytes"))
    Path("text.txt").write_text("To be, or not to be, that is the question. " * 20)
    assert run_main(prepare.main, "--input=text.txt", "--tokenizer=bytes", "--out_dir=data").code == 0
    assert run_main(sample.main, "--prompt=To be", "--max_new_tokens=8") == wanted
    for argv in ([], ["--data_dir=data"]):
        refused(resume("--max_steps=4", *argv), "another tokenizer", "new run", code=1)
    Path("out/tokenizer").rename("kept")
    assert run_main(sample.main, "--max_new_tokens=8").code == 1  # the data's is another, and not taken
    Path("kept").rename("out/tokenizer")
    shutil.rmtree("data")
    assert run_main(sample.main, "--prompt=To be", "--max_new_tokens=8") == wanted
    shutil.rmtree("out/tokenizer")
    refused_sample = run_main(sample.main, "--max_new_tokens=8")
    assert refused_sample.code == 1 and "out/tokenizer" in refused_sample.err and "data/tokenizer" in refused_sample.err
    refused(resume("--max_steps=4"), "no prepared data")


def test_an_older_run_resumes_though_a_key_was_added_since(finished, resume):
    state = read(finished / "step_000008.pt")
    del state["config"]["grad_clip"]
    train.write_checkpoint(finished / "step_000008.pt", state)
    assert resume("--max_steps=9").code == 0


# ----------------------------------------------------------------------------------------------------------- slow ones


@pytest.mark.slow
def test_compiled_runs_resume_to_the_bit(start_train):
    """With SIGKILL, too; the names in the checkpoint are those of an uncompiled run."""
    if problem := M.compiler_problem(torch.device("cpu")):
        pytest.skip(f"no compiler here: {problem}")
    keys = ["--compile=true", "--max_steps=60", "--checkpoint_interval=10", "--eval_interval=8"]
    text = run_to_the_end(start_train, *keys, "--out_dir=whole")
    assert ", compiled" in text, text
    process = start_train(*keys)
    wait_until(lambda: Path("out/step_000020.pt").exists() and lines_of("out") >= 22, process)
    process.kill()
    process.wait()
    assert lines_of("out") < 60
    assert "no longer the same run" not in run_to_the_end(start_train, "--resume", tiny=False)
    assert_same_bits("whole/step_000060.pt", "out/step_000060.pt")
    assert untimed("whole") == untimed("out")
    assert not any("_orig_mod" in name for name in read("out/step_000060.pt")["model"])


@pytest.mark.slow
def test_resume_to_the_bit_at_full_size(start_train, data_dir, tmp_path):
    keys = [f"--data_dir={data_dir}", "--batch_size=1", "--block_size=64", "--max_steps=3", "--compile=false",
            "--log_interval=1", "--eval_interval=0", "--sample_interval=0", "--keep_checkpoints=1"]
    try:
        run_to_the_end(start_train, *keys, "--checkpoint_interval=0", "--out_dir=whole", tiny=False)
        process = start_train(*keys, "--checkpoint_interval=1", tiny=False)
        wait_until(lambda: Path("out/step_000002.pt").exists(), process)
        process.kill()
        process.wait()
        assert not Path("out/step_000003.pt").exists()
        run_to_the_end(start_train, "--resume", "--checkpoint_interval=0", tiny=False)
        assert_same_bits("whole/step_000003.pt", "out/step_000003.pt", aside=["checkpoint_interval"])
        assert untimed("whole") == untimed("out") and len(untimed("out")) == 3
    finally:
        for path in tmp_path.glob("*/*.pt"):  # 1.6 GB each
            path.unlink()
