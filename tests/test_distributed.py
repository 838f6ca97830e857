"""Many processes: the losses of one, the same bits after every stop, and an end for all when one fails."""
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

import train
from tests.harness import (ROOT, RUN, Process, descendants, differences, expect, intact, last_step, lost_bits,
                           make_data, metrics, proc, train_here)

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
    """Prepared data, and the folder and the log of a run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("distributed")
    data = make_data(folder / "data")
    with torchrun(folder, *RUN, f"--data_dir={data}", f"--out_dir={folder / 'two'}", f"--max_steps={STEPS}") as p:
        expect(p.wait() == 0, p.text)
        return data, folder / "two", p.text


def keys(data, *more):
    return [*RUN, f"--data_dir={data}", "--out_dir=out", f"--max_steps={STEPS}", "--resume=auto", *more]


def test_two_processes_have_the_losses_of_one(shared, tmp_path):
    data, two, _ = shared
    done = train_here(data, tmp_path / "one", f"--max_steps={STEPS}", "--micro_batch_size=1")
    assert done.code == 0, done.err
    of_one, of_two = metrics(tmp_path / "one"), metrics(two)
    one, two = (train.read_checkpoint(out / f"step_{STEPS:06d}.pt") for out in (tmp_path / "one", two))
    for a, b in zip(of_one, of_two, strict=True):
        for key in ("loss", "grad_norm", *(["val_loss"] if "val_loss" in a else [])):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a, b)
    assert of_one[0]["loss"] == pytest.approx(of_two[0]["loss"], rel=1e-6)
    assert [line["step"] for line in of_two] == list(range(1, STEPS + 1))
    assert len(one["rng"]) == 1 and len(two["rng"]) == 2 and differences(two["rng"][0], two["rng"][1])
    assert two["machine"]["processes"] == 2


def test_two_processes_have_the_losses_of_one_with_muon(shared, tmp_path):
    muon = ["--optimizer=muon", "--max_steps=12"]
    assert train_here(shared[0], tmp_path / "one", *muon).code == 0
    with torchrun(tmp_path, *keys(shared[0], *muon, "--out_dir=two")) as p:
        expect(p.wait() == 0, p.text)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # Muon's products are in bf16


def test_one_process_writes_and_prints(shared):
    _, two, text = shared
    assert text.count("device   cpu") == text.count(f"step {STEPS}/{STEPS} |") == text.count("done: ") == 1, text
    assert "processes 2" in text and "Traceback" not in text
    files = {p.name for p in two.iterdir()} - {"tensorboard", ".lock"}
    assert files == {"metrics.jsonl", "run.json", "tokenizer", *intact(two)}


def test_killed_at_two_processes_resumes_to_the_same_bits(shared, tmp_path):
    data, two, _ = shared
    out = tmp_path / "out"
    with torchrun(tmp_path, *keys(data)) as p:
        p.until(lambda: last_step(out) >= 12)
        p.kill()  # the whole of it, as when a machine loses its power
    assert 10 <= train.step_of(train.checkpoints(out)[-1]) < STEPS and not list(descendants(p.pid))
    with torchrun(tmp_path, *keys(data)) as p:
        expect(p.wait() == 0 and "going on from" in p.text and "no longer the same" not in p.text, p.text)
    assert lost_bits(two, out) == 0


def test_killed_worker_is_restarted_and_goes_on_by_itself(shared, tmp_path):
    data, two, _ = shared
    out = tmp_path / "out"
    with torchrun(tmp_path, *keys(data), agent=("--standalone", "--nproc_per_node=2", "--max-restarts=3")) as p:
        for restarts, (rank, step) in enumerate((("1", 7), ("0", 14))):
            found = []

            def is_there():  # known before the step is there: forty steps are soon over
                found[:] = [pid for pid in descendants(p.pid) if f"\0RANK={rank}\0" in "\0" + proc(pid, "environ")]
                return len(found) == 1 and last_step(out) >= step and p.text.count("writes ") > restarts
            p.until(is_there)
            os.kill(found[0], signal.SIGKILL)
        expect(p.wait() == 0, p.text)
        assert p.text.count("going on from") >= 2, p.text
    assert lost_bits(two, out) == 0


def test_sigterm_to_torchrun_saves(shared, tmp_path):
    data, two, _ = shared
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
    data, two, _ = shared
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
    with torchrun(tmp_path, *keys(shared[0], "--batch_size=3")) as p:
        assert p.wait(60) != 0
        assert "batch_size = 3: not a multiple of processes = 2" in p.text, p.text
    assert not train.checkpoints(tmp_path / "out")


def test_error_in_one_process_ends_all_with_it(shared, tmp_path):
    """The second process has another data folder, which lacks a file: it says so, and nobody waits for it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").symlink_to(shared[0], target_is_directory=True)
    script = tmp_path / "worker.py"
    script.write_text(f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "if os.environ['RANK'] == '1':\n    os.chdir('elsewhere')\n"
                      f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    with torchrun(tmp_path, *keys("data"), script=script) as p:
        assert p.wait(50) != 0 and not train.checkpoints(tmp_path / "out")
        assert "'data' holds no prepared data" in p.text, p.text


def test_first_process_may_be_late(monkeypatch):
    """The others reach its store within two seconds or try again; then they wait for it as long as it takes."""
    torchruns = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(torchruns.port))
    torchruns.set("port", str(free_port()))  # of a first process that died
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(train.fresh_store, 1)
        time.sleep(1)
        first = train.fresh_store(0)
        value = pool.submit(second.result().get, "what the first one sets")
        time.sleep(3)
        first.set("what the first one sets", "late")
        assert value.result() == b"late"


def test_nothing_is_left_running():
    """The tests above end what they start, workers in sessions of their own included."""
    commands = [proc(pid, "cmdline") for pid in descendants(os.getpid())]
    assert not [words for words in commands if "torch.distributed.run" in words]
