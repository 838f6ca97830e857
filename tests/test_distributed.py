"""Many processes: the losses of one, the same bits after every stop, and an end for all when one fails."""
import os
import signal
import socket
import time

import pytest

import train
from tests.harness import (ROOT, RUN, Process, descendants, differences, expect, intact, last_step, lost_bits,
                           make_data, metrics, train_here)

STEPS = 40
pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(folder, *argv, agent=("--standalone", "--nproc_per_node=2"), script=ROOT / "train.py", **env):
    """A torchrun of train.py in folder; ends with all its workers when its block ends."""
    return Process(["-m", "torch.distributed.run", *agent, script, *argv], folder, OMP_NUM_THREADS="1", **env)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Prepared data, and the run of two processes that nothing disturbs: its folder and what it has printed."""
    folder = tmp_path_factory.mktemp("distributed")
    data = make_data(folder / "data")
    with torchrun(folder, *RUN, f"--data_dir={data}", f"--out_dir={folder / 'two'}", f"--max_steps={STEPS}") as p:
        expect(p.wait() == 0, p.text)
        text = p.text
    return folder, data, folder / "two", text


def keys(data, *more):
    return [*RUN, f"--data_dir={data}", "--out_dir=out", f"--max_steps={STEPS}", "--resume=auto", *more]


def test_two_processes_have_the_losses_of_one(shared, tmp_path):
    folder, data, two, text = shared
    done = train_here(data, tmp_path / "one", f"--max_steps={STEPS}", "--micro_batch_size=1")
    assert done.code == 0, done.err
    one, two = (train.read_checkpoint(out / f"step_{STEPS:06d}.pt") for out in (tmp_path / "one", two))
    of_one, of_two = metrics(tmp_path / "one"), metrics(folder / "two")
    for a, b in zip(of_one, of_two, strict=True):
        for key in ("loss", "grad_norm", *(["val_loss"] if "val_loss" in a else [])):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a, b)
    assert of_one[0]["loss"] == pytest.approx(of_two[0]["loss"], rel=1e-6)
    assert [line["step"] for line in of_two] == list(range(1, STEPS + 1))
    assert len(one["rng"]) == 1 and len(two["rng"]) == 2 and differences(two["rng"][0], two["rng"][1])
    assert two["machine"]["processes"] == 2


def test_two_processes_have_the_losses_of_one_with_muon(shared, tmp_path):
    muon = ["--optimizer=muon", "--max_steps=12"]
    assert train_here(shared[1], tmp_path / "one", *muon).code == 0
    with torchrun(tmp_path, *keys(shared[1], *muon, "--out_dir=two")) as p:
        expect(p.wait() == 0, p.text)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # Muon's products are in bf16


def test_one_process_writes_and_prints(shared):
    folder, _, two, text = shared
    assert text.count("device   cpu") == text.count(f"step {STEPS}/{STEPS} |") == text.count("done: ") == 1, text
    assert "processes 2" in text and "Traceback" not in text
    files = {p.name for p in two.iterdir()} - {"tensorboard", ".lock"}
    assert files == {"metrics.jsonl", "run.json", "tokenizer", *intact(two)}


def test_killed_at_two_processes_resumes_to_the_same_bits(shared, tmp_path):
    _, data, two, _ = shared
    out = tmp_path / "out"
    with torchrun(tmp_path, *keys(data)) as p:
        p.until(lambda: last_step(out) >= 12)
        p.kill()  # the whole of it, as when a machine loses its power
    assert 10 <= train.step_of(train.checkpoints(out)[-1]) < STEPS and not list(descendants(p.pid))
    with torchrun(tmp_path, *keys(data)) as p:
        expect(p.wait() == 0 and "going on from" in p.text and "no longer the same" not in p.text, p.text)
    assert lost_bits(two, out) == 0


def test_killed_worker_is_restarted_and_goes_on_by_itself(shared, tmp_path):
    _, data, two, _ = shared
    out = tmp_path / "out"
    with torchrun(tmp_path, *keys(data), agent=("--standalone", "--nproc_per_node=2", "--max-restarts=3")) as p:
        for restarts, (rank, step) in enumerate((("1", 7), ("0", 14))):
            found = []

            def worker():  # known before the step is there: forty steps are soon over
                found[:] = [pid for pid in descendants(p.pid) if f"\0RANK={rank}\0" in "\0" + environment(pid)]
                return len(found) == 1 and last_step(out) >= step and p.text.count("writes ") > restarts
            p.until(worker)
            os.kill(found[0], signal.SIGKILL)
        expect(p.wait() == 0, p.text)
        assert p.text.count("going on from") >= 2, p.text
    assert lost_bits(two, out) == 0


def environment(pid):
    try:
        with open(f"/proc/{pid}/environ") as f:
            return f.read()
    except OSError:
        return ""


def test_sigterm_to_torchrun_saves(shared, tmp_path):
    _, data, two, _ = shared
    out = tmp_path / "out"
    with torchrun(tmp_path, *keys(data)) as p:
        p.until(lambda: last_step(out) >= 12)
        at = last_step(out)
        p.signal(signal.SIGTERM, group=False)
        code = p.wait(60)
        newest = train.checkpoints(out)[-1]
        assert code != 0 and "stopped at step" in p.text, p.text
        assert f"{newest.name} is written" in p.text and at <= train.step_of(newest) <= at + 6 and intact(out), p.text
    with torchrun(tmp_path, *keys(data)) as p:
        expect(p.wait() == 0, p.text)
    assert lost_bits(two, out) == 0


def node(folder, rank, port, *argv):
    """One of two machines: a torchrun of its own, which finds the other one by address and port."""
    agent = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=static", f"--node_rank={rank}",
             "--master_addr=127.0.0.1", f"--master_port={port}")
    return torchrun(folder, *argv, agent=agent)


def test_two_nodes_run_and_resume(shared, tmp_path):
    _, data, two, _ = shared
    out, port = tmp_path / "out", free_port()
    with node(tmp_path, 0, port, *keys(data)) as a, node(tmp_path, 1, port, *keys(data)) as b:
        a.until(lambda: last_step(out) >= 12)
        for p in (a, b):
            p.kill()
    port = free_port()
    with node(tmp_path, 0, port, *keys(data)) as a, node(tmp_path, 1, port, *keys(data)) as b:
        expect(a.wait() == 0, a.text, b.text)
        expect(b.wait() == 0, b.text)
        expect("going on from" in a.text and "step " not in b.text, a.text, b.text)
    assert lost_bits(two, out) == 0
    # A second machine that does not see the checkpoints would start at step 0: refused, where it once hung.
    port, more = free_port(), keys(data, f"--max_steps={STEPS + 10}")
    before = intact(out)
    with node(tmp_path, 0, port, *more) as a, node(tmp_path / "without", 1, port, *more) as b:
        assert a.wait(60) != 0 and b.wait(60) != 0
        expect(f"process 0 is at step {STEPS}, process 1 at step 0" in a.text, a.text, b.text)
    assert intact(out) == before


def test_batch_that_does_not_divide_is_an_error(shared, tmp_path):
    _, data, _, _ = shared
    with torchrun(tmp_path, *keys(data, "--batch_size=3")) as p:
        assert p.wait(60) != 0
        assert "batch_size = 3: not a multiple of processes = 2" in p.text, p.text
    assert not train.checkpoints(tmp_path / "out")


def worker(folder, first):
    """A script that runs these lines, then train.py."""
    path = folder / "worker.py"
    path.write_text(f"import os, runpy, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n{first}\n"
                    f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    return path


def test_error_in_one_process_ends_all_with_it(shared, tmp_path):
    """The second process has another data folder, which lacks a file: it says so, and nobody waits for it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").symlink_to(shared[1], target_is_directory=True)
    script = worker(tmp_path, "if os.environ['RANK'] == '1':\n    os.chdir('elsewhere')")
    began = time.monotonic()
    with torchrun(tmp_path, *keys("data"), script=script) as p:
        assert p.wait(60) != 0
        assert "'data' holds no prepared data" in p.text, p.text
        assert time.monotonic() - began < 50 and not train.checkpoints(tmp_path / "out")


def test_first_process_may_be_late(shared, tmp_path):
    """The others wait for it for longer than their connection to its store may take."""
    script = worker(tmp_path, "import torch.distributed as dist\njoin = dist.init_process_group\n"
                    "dist.init_process_group = lambda *a, **k: (os.environ['RANK'] == '0' and time.sleep(4), join(*a, **k))")
    with torchrun(tmp_path, *keys(shared[1], "--max_steps=2"), script=script) as p:
        expect(p.wait(120) == 0 and "Traceback" not in p.text, p.text)
    assert last_step(tmp_path / "out") == 2


def test_nothing_is_left_running():
    """The tests above end what they start, workers in sessions of their own included."""
    mine = [pid for pid in descendants(os.getpid()) if "torch.distributed.run" in " ".join(command(pid))]
    assert not mine, [command(pid) for pid in mine]


def command(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as f:
            return f.read().split("\0")
    except OSError:
        return []
