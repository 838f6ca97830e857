"""Three processes (a sum of two has the same bits in any order): losses, stops, ends for all."""
import contextlib
import os
import signal
from pathlib import Path

import pytest

import train
from tests.harness import (ROOT, Process, descendants, differences, expect, free_port, intact,
                           keys_of_run, last_step, lost_bits, metrics, proc, train_here, write)

STEPS = 40  # of a RUN


@contextlib.contextmanager
def processes(argv, folders=("", "", ""), script=ROOT / "train.py"):
    """One process of a script in each folder, connected as torchrun's are."""
    port, started = free_port(), []
    with contextlib.ExitStack() as stack:
        for rank, folder in enumerate(folders):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(folders)),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            started.append(stack.enter_context(Process([script, *argv], folder, **env)))
        yield started


def torchrun(argv, agent=("--standalone", "--nproc_per_node=3"), script=ROOT / "train.py"):
    """A torchrun of a script; ends with all its workers when its block ends."""
    return Process(["-m", "torch.distributed.run", *agent, script, *argv], OMP_NUM_THREADS="1")


def run_three(argv, folder=""):
    """Runs three processes to their end; returns what they printed."""
    with processes(argv, [folder] * 3) as started:
        expect(all(p.end().code == 0 for p in started), *(p.text for p in started))
        return [p.text for p in started]


@pytest.fixture(scope="module")
def undisturbed(data):
    """The out_dir of a run of three processes, and what they printed."""
    out = data.parent / "three"
    return out, run_three(keys_of_run(data, out, "--batch_size=3"), data.parent)


@pytest.mark.parametrize("optimizer, rel", [("adamw", 2e-4), ("muon", 1e-3)])  # (Muon is in bf16)
def test_three_processes_have_the_losses_of_one(optimizer, rel, data):
    argv = [f"--optimizer={optimizer}", "--max_steps=12", "--micro_batch_size=1", "--batch_size=6"]
    assert train_here(data, "one", *argv).code == 0
    run_three(keys_of_run(data, "three", *argv))
    for a, b in zip(metrics("one"), metrics("three"), strict=True):
        for key in a.keys() & {"loss", "grad_norm", "val_loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-6 if a["step"] == 1 else rel), (a, b)


def test_one_process_writes_and_prints_and_each_has_random_numbers_of_its_own(undisturbed):
    out, (first, *others) = undisturbed
    assert "processes 3" in first and f"step {STEPS}/{STEPS}: " in first and not any(others), others
    files = {path.name for path in out.iterdir() if path.suffix != ".pt"}
    assert files == {".lock", "metrics.jsonl", "run.json", "tokenizer"}
    last = train.load_checkpoint(out)[1]
    assert len(last["rng"]) == last["machine"]["processes"] == 3 and differences(*last["rng"][1:])


def test_killed_and_then_stopped_by_a_signal_to_one_all_end_with_the_same_bits(data, undisturbed):
    argv = keys_of_run(data, "out", "--batch_size=3")
    with processes(argv) as three:
        three[0].until(lambda: last_step("out") >= 12)
        for p in three:
            p.kill()
    assert 10 <= intact("out")[-1] < STEPS
    with processes(argv) as three:
        three[0].until(lambda: last_step("out") >= 24)
        three[1].signal(signal.SIGTERM)
        assert [p.end(60).code for p in three] == [143] * 3
        last = three[0].text.splitlines()[-1]
    assert f"{intact('out')[-1]:06d}.pt" in last and "the same command with --resume=auto" in last
    assert 24 <= last_step("out") == intact("out")[-1] < STEPS
    text, *_ = run_three(argv)
    assert "resuming from" in text and "→" not in text
    assert lost_bits(undisturbed[0], "out") == 0


def test_one_process_three_and_one_again_are_named_and_skip_no_data(data):
    keep = ["--batch_size=3", "--lr_decay_steps=12", "--eval_interval=0"]
    assert train_here(data, "out", *keep, max_steps=4).code == 0
    assert "processes 1 → 3" in run_three(keys_of_run(data, "out", "--max_steps=8", *keep))[0]
    done = train_here(data, "out", *keep, max_steps=12, resume="auto")
    assert done.code == 0 and "processes 3 → 1" in done.out
    state = train.read_checkpoint("out/step_000012.pt")
    assert (state["epoch"], state["sequence"], state["tokens"]) == (0, 12 * 3, 12 * 3 * 32)
    assert [line["step"] for line in metrics("out")] == list(range(1, 13))


@pytest.mark.slow
def test_killed_worker_is_restarted_and_goes_on_by_itself(data, undisturbed):
    agent = ("--standalone", "--nproc_per_node=3", "--max-restarts=3")
    with torchrun(keys_of_run(data, "out", "--batch_size=3"), agent) as p:
        worker, *_ = p.until(lambda: [  # known before the step is there: forty steps are soon over
            pid for pid in descendants(p.pid) if "\0RANK=0\0" in "\0" + proc(pid, "environ")])
        p.until(lambda: last_step("out") >= 12)
        os.kill(worker, signal.SIGKILL)
        expect(p.end().code == 0 and "resuming from" in p.text, p.text)
    assert lost_bits(undisturbed[0], "out") == 0


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_two_nodes_go_on(data, undisturbed):
    argv = keys_of_run(data, "out", "--batch_size=3")
    with torchrun(argv) as p:
        p.until(lambda: last_step("out") >= 12)
        os.kill(p.pid, signal.SIGTERM)  # to this process alone
        assert p.end(60).code != 0
        assert f"{intact('out')[-1]:06d}.pt is written" in p.text, p.text
    assert 12 <= last_step("out") == intact("out")[-1] < STEPS
    nodes = ["--nnodes=2", "--rdzv_backend=static", f"--master_port={free_port()}"]
    with (torchrun(argv, [*nodes, "--nproc_per_node=1", "--node_rank=0"]) as first,
          torchrun(argv, [*nodes, "--nproc_per_node=2", "--node_rank=1"]) as second):
        expect(all(p.end().code == 0 for p in (first, second)), first.text, second.text)
        assert "resuming from" in first.text and "step " not in second.text
    assert lost_bits(undisturbed[0], "out") == 0


LATE = """\
import os, time
from torch import device, distributed as dist
import train
time.sleep(3 * (os.environ["RANK"] == "0"))
train.set_up_machine(train.TrainConfig(device="cpu", compile=False))
gloo, c10d = dist.group.WORLD._get_backend(device("cpu")), dist.distributed_c10d
os.write(1, f"{c10d._get_default_store().timeout} {gloo.options._timeout}\\n".encode())
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", [processes, torchrun])
def test_the_others_wait_for_a_first_process_that_is_late(start):
    """It may be preparing the data. NCCL asks the store itself, by the store's own timeout."""
    with start([], script=write("late.py", LATE)) as started:
        started = [started] if start is torchrun else started
        expect(all(p.end(60).code == 0 for p in started), *(p.text for p in started))
        assert "".join(p.text for p in started).count("0:30:00 0:30:00") == 3


@pytest.mark.parametrize("second, argv, word", [
    ("first", ["--batch_size=3"], "batch_size = 3"), ("no data", [], "python prepare.py"),
    ("no checkpoints", [], "steps [2, 0]")])
def test_where_one_process_cannot_start_all_end(second, argv, word, data):
    for folder in {"first", second} - {"no data"}:
        Path(folder).mkdir()
        Path(folder, "data").symlink_to(data)
    if second == "no checkpoints":
        assert train_here(data, "first/out", "--max_steps=2").code == 0
    before = intact("first/out")
    with processes(keys_of_run("data", "out", *argv), ["first", second]) as both:
        codes, texts = [p.end(60).code for p in both], [p.text for p in both]
        assert all(codes) and any(word in text for text in texts), texts
    assert intact("first/out") == before and not intact(f"{second}/out")
