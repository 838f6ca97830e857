"""Exact resume: a run that was stopped, in any way, and resumed ends with the bits of one that was never stopped."""
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

import model as M
import prepare
import sample
import train
from tests.harness import (ROOT, TINY, Process, assert_refused, assert_same_bits, differences, expect_end, flip,
                           is_saving, last_step, make_tokenizer, metrics, read, run_main, snapshot, untimed, wait_until,
                           write_data)

# Everything that could shift the run: evaluation, samples, micro-batches, the best checkpoint, several epochs.
LONG = ["--max_steps=60", "--checkpoint_interval=10", "--eval_interval=7", "--sample_interval=9",
        "--micro_batch_size=2"]


def refused(result, *fragments, code=2):
    assert_refused(result, "train.py", *fragments, code=code)


def assert_same_end(a, b, **how):
    """Two out_dirs end with the same checkpoint to the bit, and have the same metrics."""
    a, b = Path(a), Path(b)
    assert untimed(a) == untimed(b)
    assert_same_bits(train.checkpoints(a)[-1], train.checkpoints(b)[-1], **how)


def whole_run(tmp_path_factory, data_dir, *keys):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run_main(train.main, f"--data_dir={data_dir}", *TINY, *keys, f"--out_dir={out}").code == 0
    return out


@pytest.fixture(scope="module")
def never_stopped(data_dir, tmp_path_factory):
    """The out_dir of LONG, run in one go."""
    return whole_run(tmp_path_factory, data_dir, *LONG)


@pytest.fixture(scope="module")
def eight_steps(data_dir, tmp_path_factory):
    """The out_dir of a run of 8 steps with checkpoints after 2, 4, 6 and 8."""
    return whole_run(tmp_path_factory, data_dir, "--max_steps=8", "--checkpoint_interval=2", "--keep_checkpoints=0")


@pytest.fixture
def finished(eight_steps, tmp_path):
    """A copy of it in out/, to resume or to damage."""
    return Path(shutil.copytree(eight_steps, tmp_path / "out"))


@pytest.fixture
def slow_steps(start_train):
    """A process in steps of a second or more, of which the first is done."""
    process = start_train("--batch_size=256", "--block_size=64", "--max_steps=1000")
    wait_until(at(1), process)
    return process


# ------------------------------------------------------------------------------------------------ stopped, in any way


def kill_and_resume(start_train, keys, *instants):
    """A run in out/ that is killed at each of the instants, and each time resumed as queues do it."""
    for instant in instants:
        process = start_train("--resume=auto", *keys)
        wait_until(instant, process)
        process.kill()
        assert process.returncode == -signal.SIGKILL
    done = start_train("--resume", tiny=False).end(400)
    expect_end(done)
    assert "going on from" in done.err and "no longer the same run" not in done.err


def at(step, in_a_save=False):
    return lambda: last_step("out") >= step and is_saving(Path("out")) >= in_a_save


def test_n_steps_equal_k_steps_sigkill_and_the_rest_to_the_bit(start_train, never_stopped):
    """Killed before the first checkpoint, while it is written, between two, and in a later one."""
    kill_and_resume(start_train, LONG, at(3), at(1, True), at(23), at(31, True))
    assert_same_end("out", never_stopped)
    assert sorted(Path("out").glob("step_*")) == [Path("out", p.name) for p in train.checkpoints(never_stopped)]
    assert snapshot("out/samples") == snapshot(never_stopped / "samples") and len(snapshot("out/samples")) == 6


COMPILED = ["--compile=true", "--max_steps=60", "--checkpoint_interval=10", "--eval_interval=8"]
FULL_SIZE = [*(f"--{name}={getattr(train.TrainConfig, name)}" for name in train.SIZES), "--batch_size=1",
             "--initializer_range=0.04", "--learning_rate=3e-4", "--block_size=64", "--max_steps=4",
             "--checkpoint_interval=2", "--keep_checkpoints=1"]


@pytest.mark.slow
@pytest.mark.parametrize("keys, instant", [(COMPILED, at(22)), (FULL_SIZE, at(3))], ids=["compiled", "full size"])
def test_compiled_and_at_full_size_too(keys, instant, start_train, tmp_path):
    if keys is COMPILED and (problem := M.compiler_problem(torch.device("cpu"))):
        pytest.skip(f"no compiler here: {problem}")
    try:
        done = start_train(*keys, "--out_dir=whole").end(400)
        assert done.code == 0 and (", compiled" in done.err) == (keys is COMPILED), done
        kill_and_resume(start_train, keys, instant)
        assert_same_end("whole", "out")
        assert not any("_orig_mod" in name for name in read(train.checkpoints("out")[-1])["model"])
    finally:
        for path in tmp_path.glob("*/*.pt"):  # 1.6 GB each
            path.unlink()


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_changes_no_bit(signum, code, start_train, resume, never_stopped):
    process = start_train(*LONG)
    wait_until(at(12), process)
    process.signal(signum)
    assert process.wait(timeout=60) == code
    text, step = process.text, last_step("out")
    assert "Traceback" not in text and "Go on with: python train.py --resume" in text.splitlines()[-1], text
    assert train.checkpoints("out")[-1].name == f"step_{step:06d}.pt" and step < 60
    assert resume().code == 0
    assert_same_end("out", never_stopped)


def test_a_log_has_each_line_in_time_and_a_second_ctrl_c_leaves_at_once(slow_steps):
    wait_until(lambda: "step 1/1000 | loss" in slow_steps.text, slow_steps, timeout=60)
    slow_steps.signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again leaves at once" in slow_steps.text, slow_steps)
    slow_steps.signal(signal.SIGINT)
    assert slow_steps.wait(timeout=60) == 130
    assert not train.checkpoints("out") and "Traceback" not in slow_steps.text


def test_ctrl_c_before_the_first_step_is_quiet_and_leaves_nothing(data_dir, tmp_path):
    code = ("import os, signal, sys, train\nreal = train.SmolLM2\n"
            "train.SmolLM2 = lambda config: (os.kill(os.getpid(), signal.SIGINT), real(config))\n"
            "train.main(sys.argv[1:])")
    with Process(["-c", code, *TINY, f"--data_dir={data_dir}"], tmp_path, PYTHONPATH=str(ROOT)) as process:
        assert process.wait(timeout=60) == 130
        assert process.text.split("\n")[-2] == "train.py: stopped before the first step" and not Path("out").exists()


def test_a_second_process_in_the_same_out_dir_is_refused(slow_steps, run_train, resume):
    for argv in (["--max_steps=1"], ["--max_steps=1", "--overwrite"], ["--resume=auto"]):
        refused(run_train(*argv), "another process is training in out", "--out_dir", code=1)
    refused(resume(), "another process is training in out", "--out_dir", code=1)
    assert run_train("--max_steps=1", "--out_dir=another").code == 0
    slow_steps.kill()
    assert run_train("--max_steps=1").code == 0  # the lock goes with its process


# ----------------------------------------------------------------------- stopped anywhere; and what a loss looks like


def whole_and_parts(run_train, resume, steps, *keys, total=12):
    """A run of `total` steps in one go (whole/), and one that was stopped after each of `steps` and resumed (out/)."""
    keys = [*keys, f"--lr_decay_steps={total}"]
    assert run_train(*keys, f"--max_steps={total}", "--out_dir=whole").code == 0
    assert run_train(*keys, f"--max_steps={steps[0]}").code == 0
    for step in (*steps[1:], total):
        result = resume(f"--max_steps={step}")
        assert result.code == 0 and "no longer the same run" not in result.out, result


@pytest.fixture
def short(tmp_path):
    """Data of 12 blocks of 16 tokens, so that an epoch is three steps; each id is its own place."""
    return f"--data_dir={write_data(tmp_path / 'short', range(13 * 16))}"


@pytest.fixture
def starts(monkeypatch):
    """The places of all sequences that are trained on, in write_data's ranges."""
    found, real = [], train.get_batch

    def get_batch(*args):
        x, y = real(*args)
        assert torch.equal(x + 1, y)
        found.extend(x[:, 0].tolist())
        return x, y
    monkeypatch.setattr(train, "get_batch", get_batch)
    return found


@pytest.fixture
def noise(monkeypatch):
    """Training that draws from every generator of the process, as dropout or augmentation would."""
    real = train.get_batch

    def get_batch(*args):
        x, y = real(*args)
        return (x + torch.randint(100, x.shape) + random.randrange(100) + np.random.randint(100)) % 200, y
    monkeypatch.setattr(train, "get_batch", get_batch)


@pytest.mark.parametrize("keys", [["dtype=float32"], ["dtype=float16"], ["optimizer=muon", "lr_schedule=wsd"],
                                  ["optimizer=muon", "dtype=float16"]])
def test_other_dtypes_and_optimizers_resume_to_the_bit(keys, run_train, resume):
    """float16: the gradient scaler's state is part of it."""
    whole_and_parts(run_train, resume, [5], *(f"--{key}" for key in keys), "--learning_rate=1e-3", total=9)
    assert_same_end("whole", "out")


@pytest.mark.parametrize("steps", [(1, 2), (3,), (3, 6, 9), (4,), (4, 5), (8, 11)], ids=[
    "in the warm-up", "at an epoch's end", "at each epoch's end", "at the warm-up's end", "twice within an epoch",
    "in the decay"])
def test_stops_anywhere_in_epochs_and_schedule_change_no_bit(steps, run_train, resume, short):
    whole_and_parts(run_train, resume, steps, short, "--weight_decay=0.3", "--beta2=0.8", "--grad_clip=0.5")
    assert_same_end("whole", "out")
    assert (read("out/step_000012.pt")["epoch"], read("out/step_000012.pt")["sequence"]) == (4, 0)


def test_a_run_that_draws_from_the_generators_resumes_to_the_bit(run_train, resume, noise):
    whole_and_parts(run_train, resume, [5, 7])
    assert_same_end("whole", "out")


@pytest.mark.parametrize("lost", ["torch", "numpy", "python", "optimizer", "order", "nothing"])
def test_control_a_resume_that_has_lost_a_state_is_seen(lost, run_train, resume, short, noise):
    keys, other = [short, "--lr_decay_steps=6"], train.rng_state()
    assert run_train(*keys, "--max_steps=6", "--out_dir=whole").code == 0
    assert run_train(*keys, "--max_steps=3").code == 0
    state = read("out/step_000003.pt")
    if lost in state["rng"][0]:
        state["rng"][0][lost] = other[lost]
    if lost == "optimizer":
        state["optimizer"]["state"] = {}
    train.write_checkpoint(Path("out/step_000003.pt"), state)
    order = ["--seed=2"] if lost == "order" else []  # of the second epoch
    assert resume("--max_steps=6", *order).code == 0
    found = differences(read("whole/step_000006.pt")["model"], read("out/step_000006.pt")["model"])
    assert bool(found) == (lost != "nothing")


def test_control_the_comparison_sees_one_bit(eight_steps):
    a, b = (train.read_checkpoint(eight_steps / "step_000008.pt") for _ in range(2))
    assert not differences(a, b)
    b["model"]["model.norm.weight"].view(torch.int32)[3] ^= 1
    b["optimizer"]["state"][0]["exp_avg"].view(torch.int32)[0, 0] ^= 1
    b["rng"][0]["torch"][7] ^= 1
    assert differences(a, b) == [".model.model.norm.weight", ".optimizer.state.0.exp_avg", ".rng[0].torch"]


def test_tokens_and_the_place_in_the_data_stay_true_when_the_batch_size_changes(run_train, resume, starts):
    data = write_data("data", range(29 * 64))  # an epoch of 28 blocks
    assert run_train(f"--data_dir={data}", "--max_steps=4", "--batch_size=2", "--block_size=64").code == 0
    assert resume("--max_steps=8", "--batch_size=4").code == 0
    assert resume("--max_steps=12", "--batch_size=1").code == 0
    tokens = {line["step"]: line["tokens"] for line in metrics("out")}
    assert [tokens[step] for step in (4, 5, 8, 9, 12)] == [512, 768, 1536, 1600, 1792]
    assert starts == list(train.epoch_order(1337, 0, 29 * 64, 64)) and len(set(starts)) == 28


def test_another_block_size_begins_an_epoch_anew(run_train, resume, short, starts):
    assert run_train(short, "--max_steps=2").code == 0
    result = resume("--max_steps=3", "--block_size=32")
    assert result.code == 0 and "block_size 16 → 32" in result.out
    assert starts[8:] == list(train.epoch_order(1337, 1, 13 * 16, 32)[:4])


def test_a_checkpoint_copied_beside_an_older_one_goes_on_there_with_the_data_under_another_path(
        finished, resume, data_dir, eight_steps):
    shutil.copytree(data_dir, "moved")
    Path("other").mkdir()
    for step in (2, 6):
        shutil.copy(finished / f"step_{step:06d}.pt", "other")
    shutil.rmtree("out")
    result = resume("--resume=other", "--data_dir=moved")
    assert result.code == 0 and "no longer the same run" not in result.out
    assert_same_bits("other/step_000008.pt", eight_steps / "step_000008.pt", aside=["data_dir"])
    assert untimed("other") == untimed(eight_steps)[6:] and not Path("out").exists()
    refused(resume("--resume=other", "--out_dir=o2"), "other", "o2")


# --------------------------------------------------------------------------------------- what --resume does, and not


def test_from_an_older_checkpoint_the_steps_repeat_and_later_files_are_set_aside(finished, resume, eight_steps):
    with open(finished / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 9, "lo')  # torn by a kill
    assert resume("--resume=out/step_000004.pt").code == 0
    assert_same_end(finished, eight_steps)
    assert sorted(p.name for p in (finished / "superseded").iterdir()) == ["step_000006.pt", "step_000008.pt"]


def test_a_finished_run_stays_as_it_is_unless_it_is_to_be_overwritten(finished, resume, run_train):
    before = snapshot(finished)
    for result in (resume(), run_train("--resume=auto", "--max_steps=8")):
        assert result.code == 0 and "finished: step 8 of 8" in result.out and "--max_steps=" in result.out
    refused(run_train(), "out holds a run", "--resume", "--out_dir", "--overwrite")
    assert snapshot(finished) == before
    assert run_train("--overwrite", "--max_steps=3").code == 0
    assert [p.name for p in train.checkpoints("out")] == ["step_000003.pt"]
    assert [line["step"] for line in metrics("out")] == [1, 2, 3]


def test_a_longer_run_keeps_the_learning_rate_horizon_and_other_intervals_are_no_change(finished, resume, eight_steps):
    state = read(finished / "step_000008.pt")
    del state["config"]["grad_clip"]  # as if train.py had it only since then
    train.write_checkpoint(finished / "step_000008.pt", state)
    result = resume("--max_steps=12", "--eval_interval=6", "--sample_interval=0", "--keep_checkpoints=1")
    assert result.code == 0 and "no longer the same run" not in result.out, result
    lines = untimed(finished)
    assert lines[:8] == untimed(eight_steps) and [line["step"] for line in lines[8:]] == [9, 10, 11, 12]
    assert [line["lr"] for line in lines[8:]] == [3e-5] * 4 and lines[7]["lr"] > 3e-5
    assert [p.name for p in train.checkpoints("out")] == ["step_000012.pt"] and "val_loss" in lines[11]
    assert read(finished / "step_000012.pt")["config"]["lr_decay_steps"] == 8


def test_a_change_that_bends_the_run_is_made_and_named(finished):
    threads = torch.get_num_threads()
    result = run_main(train.main, "--resume", "--max_steps=10", "--batch_size=2", "--seed=7", "--dtype=float32",
                      threads=threads + 1)
    assert result.code == 0
    line = next(line for line in result.out.splitlines() if "no longer the same run" in line)
    for change in ("batch_size 4 → 2", "seed 1337 → 7", f"threads {threads} → {threads + 1}"):
        assert change in line
    assert ("dtype bfloat16 → float32" in line) == M.native_bf16() and "max_steps" not in line
    assert read("out/step_000010.pt")["config"]["batch_size"] == 2


@pytest.mark.parametrize("key, old, new", [("hidden_size", 32, 64), ("vocab_size", 49152, 50000),
                                            ("rope_theta", 1e5, 1e4), ("optimizer", "adamw", "muon")])
def test_another_model_is_refused(finished, resume, key, old, new):
    refused(resume(f"--{key}={new}", "--max_steps=10"), f"{key} = {old}", str(new), code=1)


def test_other_data_are_refused_unless_named(finished, resume, data_dir):
    write_data("other", range(1007))
    state = read(finished / "step_000008.pt")
    state["data"]["train"] = "0" * 16
    train.write_checkpoint(finished / "step_000008.pt", state)
    refused(resume("--max_steps=9"), "not the data", "--data_dir", code=1)
    result = resume("--max_steps=9", f"--data_dir={data_dir}")
    assert result.code == 0 and "data 00000000" in result.out, result
    refused(resume("--max_steps=10", "--data_dir=other"), "another tokenizer", code=1)


# ------------------------------------------------------------------------------------------------ damaged checkpoints


DAMAGES = {"short": lambda p: os.truncate(p, p.stat().st_size - 1), "1000 bytes": lambda p: os.truncate(p, 1000),
           "empty": lambda p: os.truncate(p, 0), "html": lambda p: p.write_bytes(b"<html>404</html>" * 100)}
DAMAGES |= {f"bit at {at}": lambda p, at=at: flip(p, at)  # of 19 MB
            for at in (0, 100, 1_000_000, 15_000_000, -5000, -200, -41, -33, -1)}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_used(damage, finished, resume, eight_steps):
    damage(finished / "step_000008.pt")
    result = resume()
    assert result.code == 0, result
    assert any("step_000008.pt" in line and "damaged" in line and "trying the one before" in line
               for line in result.err.splitlines()), result.err
    assert "going on from out/step_000006.pt" in result.out
    assert_same_end(finished, eight_steps)


def test_where_no_whole_checkpoint_is_left_nothing_is_started(finished, resume, run_train):
    for path in train.checkpoints(finished):
        flip(path, 5000)
    for result in (resume(), run_train("--resume=auto")):
        expect_end(result, [1], "no whole checkpoint in out", "--overwrite")
    assert len(train.checkpoints(finished)) == 4


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("write, word", [(lambda path, state: train.write_checkpoint(path, state), "refused"),
                                         (lambda path, state: torch.save(state, path), "damaged"),
                                         (lambda path, state: path.write_bytes(pickle.dumps(Hostile())), "damaged")],
                         ids=["with a digest", "without", "a pickle"])
def test_a_checkpoint_with_code_in_it_is_refused_and_does_not_run(write, word, resume, finished):
    path = finished / "step_000008.pt"
    state = {**read(path), "more": Hostile()}
    for old in train.checkpoints(finished):
        old.unlink()
    write(path, state)
    for result in (resume(), resume(f"--resume={path}")):
        expect_end(result, [1])
        assert word in result.err and not Path("ran").exists()


def test_a_checkpoint_is_written_whole_or_not_at_all(finished, resume, eight_steps):
    """A disk that is full in the middle of a save of 19 MB: one line, and what was there stays."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        result = resume("--max_steps=12")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(result, "File too large", "are whole", "--resume", code=1)
    assert train.checkpoints(finished)[-1].name == "step_000008.pt"
    assert_same_bits(finished / "step_000008.pt", eight_steps / "step_000008.pt")
    assert resume("--max_steps=12").code == 0


def test_a_checkpoint_reaches_the_disk_before_its_name_and_the_name_after(finished, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append(stat.S_ISDIR(os.fstat(f).st_mode)), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append((a.name, b.name)), replace(a, b)))
    train.write_checkpoint(finished / "step_000009.pt", read(finished / "step_000008.pt"))
    assert calls == [False, ("step_000009.tmp", "step_000009.pt"), True]  # the file, its name, the folder


# ------------------------------------------------------------------------------------ readers, terminals and folders


@pytest.mark.parametrize("hangup, signums, code", [
    (signal.SIG_DFL, [signal.SIGINT], 130), (signal.SIG_DFL, [signal.SIGHUP], 129),
    (signal.SIG_IGN, [signal.SIGHUP, signal.SIGTERM], 143)], ids=["Ctrl-C", "closed terminal", "nohup"])
def test_a_vanished_reader_loses_lines_and_no_steps(hangup, signums, code, data_dir):
    """`train.py 2>&1 | tee log`, of which tee goes first."""
    command = [sys.executable, ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--max_steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup))
    try:
        while b"step 2/" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        for signum in signums:
            step = last_step("out")
            while last_step("out") < step + 5:  # it goes on
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signum)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
        process.wait()
    assert train.step_of(train.checkpoints("out")[-1]) == last_step("out")


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", ">/dev/full 2>&1"])
def test_without_any_output_it_trains_all_the_same(redirection, data_dir):
    command = [sys.executable, ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--max_steps=2"]
    assert subprocess.run(f"{shlex.join(map(str, command))} {redirection}", shell=True).returncode == 0
    assert [p.name for p in train.checkpoints("out")] == ["step_000002.pt"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples/step_000001.txt", "tensorboard/theirs"])
@pytest.mark.parametrize("argv", [[], ["--overwrite"], ["--resume=auto"]])
def test_files_of_anyone_else_are_left_alone(name, argv, run_train):
    file = Path("mine", name)
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    refused(run_train("--out_dir=mine", "--max_steps=1", *argv), "mine", "holds files of something else")
    assert file.read_text() == "mine" and [p for p in Path("mine").rglob("*") if p.is_file()] == [file]


def test_a_path_is_what_a_shell_takes_it_for_and_what_is_printed_can_be_pasted(run_train, resume, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    Path("r.py").write_text('out_dir = "~/by recipe"')
    assert run_train("r.py", "--max_steps=1").code == 0 and Path("home/by recipe/step_000001.pt").exists()
    result = run_train("--out_dir=~/it's & \"mine\"/", "--max_steps=1")
    out = Path("home/it's & \"mine\"")
    command = shlex.split(result.out.partition("Next: ")[2].splitlines()[0])
    assert command[:2] == ["python", "sample.py"] and (out / "step_000001.pt").exists()
    assert run_main(sample.main, *command[2:], "--max_new_tokens=1").code == 0
    finished = resume(f"--resume={out}/../{out.name}").out
    command = shlex.split(finished.partition("Longer: ")[2].splitlines()[0])
    assert command[:2] == ["python", "train.py"] and run_main(train.main, *command[2:-1], "--max_steps=2").code == 0


def test_the_run_is_a_whole_whatever_became_of_its_data(data_dir, run_train, resume, monkeypatch):
    """Another tokenizer in the data's folder, or no data: the run samples with its own, and no hub is asked."""
    def ask(*args, **kwargs):
        pytest.fail(f"the network was asked: {args} {kwargs}")
    for name in ("snapshot_download", "hf_hub_download", "get_hf_file_metadata", "try_to_load_from_cache"):
        monkeypatch.setattr(huggingface_hub, name, ask)
    monkeypatch.setattr(socket, "getaddrinfo", ask)

    def sampled():
        return run_main(sample.main, "--prompt=To be", "--max_new_tokens=8")
    shutil.copytree(data_dir, "data")
    assert run_train("--data_dir=data", "--max_steps=2").code == 0
    wanted = sampled()
    assert wanted.code == 0
    Path("text.txt").write_text("To be, or not to be, that is the question. " * 20)
    make_tokenizer(Path("bytes"))
    assert run_main(prepare.main, "--input=text.txt", "--tokenizer=bytes", "--out_dir=data").code == 0
    assert sampled() == wanted
    for argv in ([], ["--data_dir=data"]):
        refused(resume("--max_steps=4", *argv), "another tokenizer", "new run", code=1)
    Path("out/tokenizer").rename("kept")
    assert sampled().code == 1  # the data's is another, and not taken
    Path("kept").rename("out/tokenizer")
    shutil.rmtree("data")
    assert sampled() == wanted
    refused(resume("--max_steps=4"), "no prepared data")
    shutil.copytree(data_dir, "data")
    shutil.rmtree("out/tokenizer")
    assert sampled() == wanted  # the data's fits: an older run, or a checkpoint copied alone
    shutil.rmtree("data")
    assert_refused(sampled(), "sample.py", "out/tokenizer", "data/tokenizer", code=1)
