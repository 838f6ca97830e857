"""Many processes: the losses of one, the same bits after any stop, an end for all if one fails."""
import contextlib
import os
import signal

import pytest

import train
from tests.harness import (ROOT, RUN, Process, descendants, differences, expect, free_port, intact,
                           last_step, lost_bits, metrics, proc, train_here)

STEPS = 40  # of a RUN
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def keys(data, *more, out="out"):
    return [*RUN, f"--data_dir={data}", f"--out_dir={out}", "--resume=auto", *more]


@contextlib.contextmanager
def processes(*folders, argv, script=ROOT / "train.py"):
    """One process of a script in each folder, connected as torchrun's are."""
    port, started = free_port(), []
    with contextlib.ExitStack() as stack:
        for rank, folder in enumerate(folders):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(folders)),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ENVIRONMENT}
            started.append(stack.enter_context(Process([script, *argv], folder, **env)))
        yield started


def torchrun(folder, *argv, agent=("--standalone", "--nproc_per_node=2"), script=ROOT / "train.py"):
    """A torchrun of a script in folder; ends with all its workers when its block ends."""
    command = ["-m", "torch.distributed.run", *agent, script, *argv]
    return Process(command, folder, **ENVIRONMENT)


def run_two(folder, argv):
    """Runs two processes to their end; returns what they printed."""
    with processes(folder, folder, argv=argv) as both:
        for p in both:
            expect(p.wait() == 0, *(p.text for p in both))
        return [p.text for p in both]


@pytest.fixture(scope="module")
def undisturbed(data):
    """The out_dir of a run of two processes, and what they printed."""
    out = data.parent / "two"
    return out, run_two(data.parent, keys(data, out=out))


@pytest.mark.parametrize("optimizer, rel", [("adamw", 2e-4), ("muon", 1e-3)])  # (Muon is in bf16)
def test_two_processes_have_the_losses_of_one(optimizer, rel, data, tmp_path):
    argv = [f"--optimizer={optimizer}", "--max_steps=12", "--micro_batch_size=1"]
    assert train_here(data, "one", *argv).code == 0
    run_two(tmp_path, keys(data, *argv, out="two"))
    for a, b in zip(metrics("one"), metrics("two"), strict=True):
        for key in a.keys() & {"loss", "grad_norm", "val_loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-6 if a["step"] == 1 else rel), (a, b)


def test_one_process_writes_and_prints_and_each_has_random_numbers_of_its_own(undisturbed):
    out, (first, second) = undisturbed
    assert "processes 2" in first and f"step {STEPS}/{STEPS}: " in first and not second, second
    files = {path.name for path in out.iterdir()} - {".lock"}
    assert files == {"metrics.jsonl", "run.json", "tokenizer", *intact(out)}
    assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 1))
    state = train.read_checkpoint(train.checkpoints(out)[-1])
    assert len(state["rng"]) == state["machine"]["processes"] == 2 and differences(*state["rng"])


def test_killed_and_then_stopped_by_a_signal_to_one_both_end_with_the_same_bits(
        data, undisturbed, tmp_path):
    with processes(tmp_path, tmp_path, argv=keys(data)) as both:
        both[0].until(lambda: last_step("out") >= 12)
        for p in both:
            p.kill()
    assert 10 <= train.step_of(train.checkpoints("out")[-1]) < STEPS
    with processes(tmp_path, tmp_path, argv=keys(data)) as both:
        both[0].until(lambda: last_step("out") >= 24)
        both[1].signal(signal.SIGTERM)
        assert [p.wait(60) for p in both] == [143, 143]
        last = both[0].text.splitlines()[-1]
        assert intact("out")[-1] in last and "Resume with: python train.py --resume" in last
    assert 24 <= last_step("out") == train.step_of(train.checkpoints("out")[-1]) < STEPS
    text, _ = run_two(tmp_path, keys(data))
    assert "resuming from" in text and "→" not in text
    assert lost_bits(undisturbed[0], "out") == 0


def test_one_process_two_and_one_again_are_named_and_skip_no_data(data, tmp_path):
    keep = ["--lr_decay_steps=12", "--eval_interval=0"]
    assert train_here(data, "out", "--max_steps=4", *keep).code == 0
    text, _ = run_two(tmp_path, keys(data, "--max_steps=8", *keep))
    assert "processes 1 → 2" in text
    done = train_here(data, "out", "--max_steps=12", "--resume=auto", *keep)
    assert done.code == 0 and "processes 2 → 1" in done.out
    state = train.read_checkpoint("out/step_000012.pt")
    assert (state["epoch"], state["sequence"], state["tokens"]) == (0, 12 * 4, 12 * 4 * 32)
    assert [line["step"] for line in metrics("out")] == list(range(1, 13))


@pytest.mark.slow
def test_killed_worker_is_restarted_and_goes_on_by_itself(data, undisturbed, tmp_path):
    agent = ("--standalone", "--nproc_per_node=2", "--max-restarts=3")
    with torchrun(tmp_path, *keys(data), agent=agent) as p:
        def first():
            below = descendants(p.pid)
            return [pid for pid in below if "\0RANK=0\0" in "\0" + proc(pid, "environ")]
        p.until(first)
        worker, *_ = first()  # known before the step is there: forty steps are soon over
        p.until(lambda: last_step("out") >= 12)
        os.kill(worker, signal.SIGKILL)
        expect(p.wait() == 0 and "resuming from" in p.text, p.text)
    assert lost_bits(undisturbed[0], "out") == 0


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_two_nodes_go_on(data, undisturbed, tmp_path):
    with torchrun(tmp_path, *keys(data)) as p:
        p.until(lambda: last_step("out") >= 12)
        p.signal(signal.SIGTERM, group=False)
        assert p.wait(60) != 0
        assert intact("out") and f"{intact('out')[-1]} is written" in p.text, p.text
    assert 12 <= last_step("out") == train.step_of(train.checkpoints("out")[-1]) < STEPS
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=static",
             "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    with (torchrun(tmp_path, *keys(data), agent=[*nodes, "--node_rank=0"]) as first,
          torchrun(tmp_path, *keys(data), agent=[*nodes, "--node_rank=1"]) as second):
        for p in (first, second):
            expect(p.wait() == 0, first.text, second.text)
        assert "resuming from" in first.text and "step " not in second.text
    assert lost_bits(undisturbed[0], "out") == 0


LATE = """\
import os, sys, time
import torch
import torch.distributed as dist
import train
time.sleep(3 * (os.environ["RANK"] == "0"))
train.set_up_machine(train.TrainConfig(device="cpu", compile=False))
backend = dist.group.WORLD._get_backend(torch.device("cpu"))
print(dist.distributed_c10d._get_default_store().timeout, backend.options._timeout, flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_torchrun", [False, True])
def test_the_others_wait_for_a_first_process_that_is_late(with_torchrun, tmp_path):
    """It may be preparing the data. NCCL asks the store itself, by the store's own timeout."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    with contextlib.ExitStack() as stack:
        if with_torchrun:
            started = [stack.enter_context(torchrun(tmp_path, script=script))]
        else:
            started = stack.enter_context(processes(tmp_path, tmp_path, argv=[], script=script))
        expect(all(p.wait(60) == 0 for p in started), *(p.text for p in started))
        text = "".join(p.text for p in started)
        assert text.count("0:30:00 0:30:00") == 2, text


@pytest.mark.parametrize("second, argv, word", [
    ("first", ["--batch_size=3"], "batch_size = 3"),
    ("no data", [], "no prepared data"),
    ("no checkpoints", [], "steps [2, 0]")])
def test_where_one_process_cannot_start_all_end(second, argv, word, data, tmp_path):
    """Nobody waits for it, and nothing is trained."""
    first, second = tmp_path / "first", tmp_path / second
    first.mkdir()
    (first / "data").symlink_to(data)
    if second.name == "no checkpoints":
        assert train_here(data, first / "out", "--max_steps=2").code == 0
        second.mkdir()
        (second / "data").symlink_to(data)
    before = intact(first / "out")
    with processes(first, second, argv=keys("data", *argv)) as both:
        assert all(p.wait(60) for p in both) and any(word in p.text for p in both), \
            [p.text for p in both]
    assert intact(first / "out") == before and not intact(second / "out")
