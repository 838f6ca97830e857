"""train.py: recipes and keys, the learning rate, the order of the data, what a run writes, and when it refuses."""
import dataclasses
import json
import math
import os
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as M
import prepare
import train
from model import SmolLM2, SmolLM2Config
from prepare import Data
from tests.harness import (ROOT, TINY, assert_refused, assert_same_bits, differences, flip, metrics, read, run_main,
                           run_script, seal, untimed, write_data)
from train import Machine, Run, TrainConfig, epoch_order, get_batch, lr_factor

RECIPES = sorted((ROOT / "config").glob("*.py"))
TYPES = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
CPU = Machine(torch.device("cpu"), torch.float32, compile=False)
SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1}


def refused(result, *fragments, code=2):
    assert_refused(result, "train.py", *fragments, code=code)


# ------------------------------------------------------------------------------------------------- recipes and keys


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_every_recipe_loads(recipe):
    overrides, _ = train.parse_args([str(recipe)])
    assert overrides
    assert all(type(value) is TYPES[key] for key, value in overrides.items()), overrides
    for world_size in (1, 8, 16) if "torchrun" in recipe.read_text() else (1,):
        train.check(TrainConfig(**overrides), world_size)


def test_the_recipe_is_the_published_setting():
    config = TrainConfig(**train.parse_args([str(ROOT / "config" / "smollm2.py")])[0])
    assert (config.max_steps, config.batch_size, config.block_size, config.warmup_steps, config.grad_clip) == (
        5000, 4, 256, 100, 1.0)
    assert (config.learning_rate, config.min_lr, config.lr_decay_steps) == (3e-4, 3e-5, 0)
    assert all(getattr(config, f.name) == f.default for f in dataclasses.fields(SmolLM2Config))


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults():
    Path("r.py").write_text('"""A docstring."""\n# a comment\nmax_steps = 7\nseed = 5\nlearning_rate = 1\n')
    overrides, args = train.parse_args(["r.py", "--seed=6", "--batch_size", "12", "--compile=False",
                                        "--rope_theta=1e4"])
    assert overrides == {"max_steps": 7, "seed": 6, "learning_rate": 1.0, "batch_size": 12, "compile": False,
                         "rope_theta": 1e4}
    assert type(overrides["learning_rate"]) is float and args.resume is None and not args.overwrite


@pytest.mark.parametrize("argv, fragments", [
    (["--learning_rat=1"], ["learning_rat", "did you mean learning_rate?"]),
    (["--batchsize", "4"], ["did you mean batch_size?"]),
    (["--xyzzy=1"], ["unknown key xyzzy", "--help"]),
    (["--max_steps=ten"], ["max_steps", "'ten'", "expected int"]),
    (["--max_steps=1.5"], ["expected int"]), (["--max_steps="], ["expected int"]),
    (["--compile=maybe"], ["compile", "expected bool"]),
    (["--learning_rate=nan"], ["learning_rate = nan", "0 or more"]),
    (["--learning_rate=1e999"], ["learning_rate = inf", "less than"]),
    (["--max_steps"], ["max_steps", "expected a value, as in --key=value"]),
    (["--learning_rate", "-1e-3"], ["learning_rate", "expected a value, as in --key=value"]),
    (["--learning_rate=1e-5", "--min_lr=3e-4"], ["min_lr = 0.0003", "more than learning_rate = 1e-05"]),
    (["max_steps=10"], ["did you mean --max_steps=10?"]),
    (["--out_dir="], ["out_dir", "expected str"]), (["--data_dir="], ["data_dir", "expected str"]),
    (["--dtype=int8"], ["dtype", "'int8'", "auto, float32, bfloat16, float16"]),
    (["--batch_size=0"], ["batch_size = 0", "more than 0"]),
    (["--grad_clip=-1"], ["grad_clip = -1.0", "0 or more"]),
    (["--batch_size=0", "--beta1=-1"], ["batch_size", "beta1"]),  # all at once
    (["--micro_batch_size=3"], ["micro_batch_size = 3", "sequences of a process = 4"]),
    (["--num_attention_heads=5"], ["hidden_size = 32", "not a multiple of num_attention_heads = 5"]),
    (["--block_size=300"], ["block_size = 300", "max_position_embeddings = 256"]),
    (["--beta2=1"], ["beta2 = 1.0", "more than its limit"]),
    (["--seed=99999999999999999999"], ["seed", "less than 2**48"]),
    (["--device=tpu9"], ["device = 'tpu9'", "not available here"]),
    (["none.py"], ["cannot read the recipe none.py"]),
    (["a.py", "b.py"], ["'b.py'", "one recipe"]),
    (["--resume=config/tiny.py"], ["that is a recipe", "train.py config/tiny.py --resume"]),
    (["--resume", "config/tiny.py"], ["that is a recipe", "train.py config/tiny.py --resume"]),
    (["--resume=nowhere"], ["nowhere", "no such file or folder"]),
    (["--resume"], ["no checkpoint out", "python train.py config/smollm2.py"]),
    (["--resume", "--overwrite"], ["--overwrite", "--resume", "choose one"]),
    (["--data_dir=nowhere"], ["nowhere", "python prepare.py --input FILE --out_dir nowhere"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("-") else None)
def test_what_one_types_wrong_is_one_line_and_exit_2(argv, fragments, run_train):
    refused(run_train("--max_steps=1", *argv), *fragments)
    assert not list(Path().iterdir())  # no folder either


@pytest.mark.parametrize("text, fragments", [
    ("max_stepz = 5", ["max_stepz", "did you mean max_steps?"]),
    ("seed = 1\nbatch_size = 4.0", ["batch_size", "'4.0'", "expected int"]),
    ("batch_size = True", ["expected int"]), ("batch_size = '4x'", ["expected int"]),
    ("out_dir = 5", ["line 1", "out_dir = 5", "expected str"]),
    ("out_dir = 'a\\nb'", ["out_dir", "expected str"]),
    ("learning_rate = None", ["expected float"]),
    *[(text, ["line 1", "plain assignments only"]) for text in (
        "import os\nos.mkdir('ran')", "batch_size = __import__('os').mkdir('ran')", "batch_size = len([1])",
        "batch_size += 1", "batch_size: int = 1", "batch_size = seed = 1", "batch_size = -1", "a.b = 1",
        "if True:\n    seed = 1")],
    ("batch_size = = 4", ["not Python"]), ("\0", ["not Python"]),
    ("batch_size = " + "(" * 5000, ["r.py"]),
], ids=lambda value: value[:30].replace("\0", "NUL") if isinstance(value, str) else "")
def test_a_recipe_with_anything_but_known_typed_assignments_is_refused_and_never_run(text, fragments, run_train):
    Path("r.py").write_text(text)
    refused(run_train("r.py", "--max_steps=1"), *fragments)
    assert not Path("ran").exists()


def test_a_usage_error_in_a_real_process():
    result = run_script("train.py", str(ROOT / "config" / "tiny.py"), "--learning_rat=3")
    refused(result, "did you mean learning_rate?")
    assert result.out == ""


def test_help_shows_every_key_with_its_meaning_and_default():
    result = run_main(train.main, "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    for f in dataclasses.fields(TrainConfig):
        assert re.search(rf"--{f.name} {f.type.__name__.upper()} \w.*?\[", text), f.name
    assert "after the warm-up [0.0003]" in text and "--resume" in text and "--overwrite" in text


# ------------------------------------------------------------------------------------------------ the learning rate


def test_the_learning_rate_warms_up_follows_a_cosine_and_stays_at_the_minimum():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=10, lr_decay_steps=110)
    rates = [lr_factor(config, step) for step in range(200)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])  # the first step is not lost at rate 0
    assert rates[10] == pytest.approx(1.0) and rates[60] == pytest.approx(0.55)
    assert rates[35] == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi / 4)))
    assert all(a > b for a, b in zip(rates[10:110], rates[11:111]))
    assert rates[109] == pytest.approx(0.1, abs=1e-3) and rates[110:] == pytest.approx([0.1] * 90)
    wsd = [lr_factor(dataclasses.replace(config, lr_schedule="wsd"), step) for step in range(200)]
    assert wsd[:88] == rates[:10] + [1.0] * 78 and wsd[110:] == rates[110:]
    assert wsd[88:110] == pytest.approx([1.0 - 0.9 * i / 22 for i in range(22)])


@pytest.mark.parametrize("steps, warmup", [(1, 100), (2, 100), (99, 100), (100, 100), (101, 100), (5, 0)])
def test_a_warm_up_longer_than_the_run_bends_and_breaks_nothing(steps, warmup):
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=warmup, lr_decay_steps=steps)
    rates = [lr_factor(config, step) for step in range(steps + 2)]
    n = min(steps, warmup)
    assert rates[:n] == pytest.approx([(i + 1) / n for i in range(n)]) and max(rates) == 1.0
    assert rates[steps:] == pytest.approx([0.1, 0.1])


# ------------------------------------------------------------------------------------------------ the order of data


@pytest.mark.parametrize("n, T", [(1000, 16), (1007, 16), (33, 16), (17, 16), (40, 16)])
def test_an_epoch_has_every_block_once(n, T):
    for epoch in range(20):
        starts = sorted(epoch_order(1, epoch, n, T))
        assert len(starts) == train.blocks_per_epoch(n, T) >= max(1, n // T - 1)
        assert {int(b - a) for a, b in zip(starts, starts[1:])} <= {T}
        assert starts[0] >= 0 and starts[-1] + T + 1 <= n  # T inputs and the target of the last


def test_the_order_and_the_cuts_change_from_epoch_to_epoch_and_reach_everything():
    n, T = 1007, 16
    orders = [tuple(epoch_order(1, epoch, n, T)) for epoch in range(200)]
    assert len({min(o) for o in orders}) > 20  # the cuts
    assert len({tuple(np.subtract(o, min(o))) for o in orders}) == 200  # the order
    assert {s + i for o in orders for s in o for i in range(T + 1)} == set(range(n))
    assert tuple(epoch_order(2, 0, n, T)) != orders[0]


def numbers(n=1007):
    """Training data in which each id is its own place."""
    return Data(np.arange(n, dtype="<u2"), np.arange(9, dtype="<u2"), {}, Path())


def batch_at(data, config, machine, step):
    """The batch that follows so many steps."""
    run = types.SimpleNamespace(config=config, step=0, epoch=0, sequence=0, tokens=0)
    for _ in range(step):
        Run.advance(run, data)
    return get_batch(data, config, machine, run)


def test_batches_are_consecutive_tokens_and_an_epoch_of_them_holds_every_block_once():
    data, config = numbers(), TrainConfig(batch_size=5, block_size=16)
    blocks = train.blocks_per_epoch(1007, 16)
    rows = []
    for step in range(math.ceil(2 * blocks / 5)):
        x, y = batch_at(data, config, CPU, step)
        assert x.shape == y.shape == (5, 16) and x.dtype == y.dtype == torch.long
        assert torch.equal(x + 1, y) and torch.equal(x[:, :1] + torch.arange(16), x)
        rows += x[:, 0].tolist()
    for epoch in (0, 1):  # batches may straddle two epochs
        assert sorted(rows[epoch * blocks:(epoch + 1) * blocks]) == sorted(epoch_order(1337, epoch, 1007, 16))


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data, config = numbers(), TrainConfig(batch_size=5, block_size=16)
    steps = [0, 3, 50, 7]
    first = [batch_at(data, config, CPU, s)[0] for s in steps]
    torch.rand(10), np.random.rand(10)
    state = torch.get_rng_state()
    epoch_order.cache_clear()
    again = [batch_at(data, config, CPU, s)[0] for s in reversed(steps)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first[0], batch_at(data, dataclasses.replace(config, seed=2), CPU, 0)[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_all_processes_make_the_batch(world_size):
    data, config = numbers(), TrainConfig(batch_size=8, block_size=16)
    machines = [dataclasses.replace(CPU, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 6, 30):
        parts = [batch_at(data, config, m, step)[0] for m in machines]
        assert torch.equal(torch.cat(parts), batch_at(data, config, CPU, step)[0])


# ----------------------------------------------------------------------------------------------------- what a run does


def test_a_run_writes_its_metrics_its_samples_and_a_whole_checkpoint(run_train):
    result = run_train("--max_steps=6", "--eval_interval=3", "--sample_interval=2", "--checkpoint_interval=4")
    assert result.code == 0, result.err
    lines = metrics("out")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert {"step", "loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_sec"} <= line.keys()
        assert ("val_loss" in line) == (line["step"] in (3, 6)), line
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["tokens_per_sec"] > 0
    assert any(len(repr(line["loss"])) > 10 for line in lines)  # unrounded
    assert sorted(p.name for p in Path("out/samples").iterdir()) == [f"step_00000{i}.txt" for i in (2, 4, 6)]
    best = min((line["val_loss"], line["step"]) for line in lines if "val_loss" in line)[1]
    assert [train.step_of(p) for p in train.checkpoints("out")] == sorted({best, 4, 6})
    state = train.read_checkpoint(Path("out/step_000006.pt"))
    assert {"step", "model", "optimizer", "rng", "config"} <= state.keys() and state["step"] == 6
    assert set(state["rng"][0]) == {"python", "numpy", "torch", "cuda"}
    with torch.device("meta"):
        assert list(state["model"]) == list(SmolLM2(TrainConfig(**state["config"])).state_dict())  # the raw names
    assert {"torch", "device", "dtype", "threads", "processes", "compile", "deterministic"} <= state["machine"].keys()
    assert not list(Path("out").glob("*.tmp"))
    facts = json.loads(Path("out/run.json").read_text())
    assert facts["config"] == state["config"] and facts["torch"] == torch.__version__ and facts["command"]


def test_the_banner_and_the_progress_line_say_what_a_person_wants_to_know(run_train, data_dir):
    result = run_train("--max_steps=2", "--eval_interval=2", "--dtype=float32")
    for piece in ("cpu", f"threads {torch.get_num_threads()}", "float32 (as asked)", "not compiled (as asked)",
                  str(data_dir), "parameters", "4 x 16 = 64 tokens a step", "epochs", "out/", "held-out loss",
                  "perplexity", "bits per byte", "best", 'python sample.py --prompt "ROMEO:"'):
        assert piece in result.out, piece
    line = next(line for line in result.out.splitlines() if line.startswith("step 1/2"))
    assert re.fullmatch(r"step 1/2 \| loss [\d.]+ \| lr [\d.e-]+ \| norm [\d.]+ \| [\d,]+ tok/s \| "
                        r"[\d:]+ trained, [\d:]+ left", line), line
    assert result.err == ""


def test_intervals_of_0_switch_things_off(run_train):
    result = run_train("--max_steps=11", "--log_interval=0")
    assert result.code == 0 and "held-out loss" not in result.out and not Path("out/samples").exists()
    assert "step 11/11" not in result.out and [line["step"] for line in metrics("out")] == list(range(1, 12))
    assert [p.name for p in train.checkpoints("out")] == ["step_000011.pt"]  # the end always makes one


def test_the_first_loss_and_norm_are_those_of_the_first_batch(run_train, data_dir):
    assert run_train("--max_steps=1", "--dtype=float32", "--micro_batch_size=1", "--warmup_steps=100").code == 0
    config = TrainConfig(**train.parse_args(TINY)[0])
    torch.manual_seed(config.seed)
    model = SmolLM2(config)
    x, y = batch_at(prepare.open_data(data_dir), config, CPU, 0)
    loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    line = metrics("out")[0]
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-4) and line["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert line["lr"] == 1e-2 and line["tokens"] == 64  # one step is legal, and its warm-up is as short


def test_micro_batches_change_memory_and_not_the_run(run_train):
    for micro in (0, 1, 2):
        keys = ["--max_steps=5", "--dtype=float32", f"--micro_batch_size={micro}", f"--out_dir=m{micro}"]
        assert run_train(*keys).code == 0
    for key in ("loss", "grad_norm"):
        whole, *parts = [[line[key] for line in metrics(f"m{micro}")] for micro in (0, 1, 2)]
        assert all(part == pytest.approx(whole, rel=1e-4) for part in parts), key


def test_evaluation_and_samples_do_not_touch_the_training(run_train):
    """They draw from no generator that training draws from, and take none of its batches."""
    assert run_train("--max_steps=8", "--out_dir=plain").code == 0
    assert run_train("--max_steps=8", "--out_dir=more", "--eval_interval=3", "--sample_interval=2", "--log_interval=3",
                     "--checkpoint_interval=5").code == 0
    a, b = read("plain/step_000008.pt"), read("more/step_000008.pt")
    for key in ("model", "optimizer", "rng"):
        assert not differences(a[key], b[key])


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_run(run_train):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run_train("--max_steps=4", f"--seed={seed}", f"--out_dir={name}").code == 0
    assert_same_bits("a/step_000004.pt", "b/step_000004.pt")
    assert untimed("a") == untimed("b")
    assert metrics("a")[0]["loss"] != metrics("c")[0]["loss"]


def test_the_held_out_loss_is_the_mean_over_the_whole_split_each_token_once():
    torch.manual_seed(0)
    model = SmolLM2(SmolLM2Config(**SMALL, initializer_range=0.5))
    val = np.random.default_rng(0).integers(50, size=131).astype("<u2")
    data = Data(val, val, {}, Path())
    for eval_tokens, n in ((10_000, 130), (130, 130), (100, 100), (7, 7)):
        losses = []
        for s in range(0, n, 16):
            ids = torch.from_numpy(val[s:min(s + 16, n) + 1].astype(np.int64))[None]
            losses.append(F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:], reduction="none"))
        config = TrainConfig(batch_size=4, block_size=16, eval_tokens=eval_tokens)
        assert len(torch.cat(losses)) == n
        assert train.evaluate(model, data, config, CPU) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_the_best_held_out_loss_is_kept_and_named(run_train, monkeypatch):
    """The loss soon rises: the best checkpoint outlives the newest ones."""
    losses = iter([9.0, 5.0, 7.0, 6.0, 8.0, 8.5])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    result = run_train("--max_steps=12", "--eval_interval=2", "--checkpoint_interval=2", "--keep_checkpoints=2")
    assert result.code == 0 and result.out.count("best 5.0000 at step 4") == 5
    assert [train.step_of(p) for p in train.checkpoints("out")] == [4, 10, 12]
    assert read("out/step_000012.pt")["best"] == {"step": 4, "val_loss": 5.0}
    assert "python sample.py --checkpoint out/best" in result.out.splitlines()[-1]


@pytest.mark.parametrize("keep, left", [(2, [5, 6]), (1, [6]), (0, [1, 2, 3, 4, 5, 6])])
def test_the_newest_checkpoints_are_kept(run_train, keep, left):
    assert run_train("--max_steps=6", "--checkpoint_interval=1", f"--keep_checkpoints={keep}").code == 0
    assert [train.step_of(p) for p in train.checkpoints("out")] == left


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_only_and_the_optimizer_has_every_parameter(optimizer):
    model = SmolLM2(SmolLM2Config(**SMALL))
    optimizers = train.make_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for o in optimizers.values() for group in o.param_groups
             for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert all(decay[id(p)] == (0.3 if p.dim() == 2 else 0.0) for p in model.parameters())
    assert all(group["betas"] == (0.9, 0.95) for group in optimizers["optimizer"].param_groups)
    if optimizer == "muon":  # the layers' matrices, and never the embedding
        in_muon = {id(p) for p in optimizers["muon"].param_groups[0]["params"]}
        assert in_muon == {id(p) for p in model.model.layers.parameters() if p.dim() == 2}


def test_gradients_are_clipped_to_the_norm_and_the_logged_norm_is_that_before():
    def step(clip):
        torch.manual_seed(0)
        model, config = SmolLM2(SmolLM2Config(**SMALL)), TrainConfig(grad_clip=clip)
        run = Run(config, model, CPU)
        run.optimizers = {"sgd": torch.optim.SGD(model.parameters(), lr=1.0)}
        before = [p.detach().clone() for p in model.parameters()]
        ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
        _, norm = train.train_step(model, run, (ids[:, :-1], ids[:, 1:]), config, CPU, None)
        moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(before, model.parameters())))
        return norm, moved
    norm, moved = step(0.0)
    assert moved == pytest.approx(norm, rel=1e-3)
    assert step(norm / 3) == (pytest.approx(norm), pytest.approx(norm / 3, rel=1e-3))
    assert step(norm * 3) == (pytest.approx(norm), pytest.approx(norm, rel=1e-3))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer_step(run_train):
    result = run_train("--max_steps=30", "--learning_rate=1e9", "--min_lr=1e9", "--warmup_steps=0",
                       "--checkpoint_interval=1")
    found = re.search(r"in step (\d+) the loss is .*Last good checkpoint: (\S+)\.", result.err)
    refused(result, "nan", code=1)
    step = int(found[1])
    assert step > 1 and [line["step"] for line in metrics("out")] == list(range(1, step))
    assert Path(found[2]) == Path(f"out/step_{step - 1:06d}.pt") == train.checkpoints("out")[-1]
    assert all(t.isfinite().all() for t in read(found[2])["model"].values())


def test_fp16_has_a_scaler_whose_state_is_saved_and_whose_skipped_steps_are_no_failure(run_train):
    result = run_train("--max_steps=12", "--dtype=float16", "--learning_rate=3e-2")
    assert result.code == 0, result.err
    assert read("out/step_000012.pt")["scaler"]["scale"] > 0
    lines = metrics("out")
    assert len(lines) == 12 and all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["grad_norm"] is None or math.isfinite(line["grad_norm"]) for line in lines)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_infinite_gradient_in_fp16_stops_every_optimizer_and_lowers_the_scale(optimizer):
    """Only the embedding's is infinite, and Muon has no part in it: it must not step either."""
    config = TrainConfig(**train.parse_args([*TINY, f"--optimizer={optimizer}"])[0])
    machine = Machine(torch.device("cpu"), torch.float16, compile=False)
    run = Run(config, SmolLM2(config), machine)
    run.model.model.embed_tokens.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    ids = torch.randint(200, (4, 17))
    loss, norm = train.train_step(run.model, run, (ids[:, :-1], ids[:, 1:]), config, machine, None)
    assert math.isfinite(loss) and not math.isfinite(norm) and run.scaler.get_scale() == 2**15
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_a_run_can_start_from_weights_in_hugging_faces_format(run_train, tmp_path):
    from tools.export import save_pretrained
    model = SmolLM2(TrainConfig(**train.parse_args(TINY)[0]))
    save_pretrained(model, Path("hf"), torch.float32)
    keys = ["--max_steps=1", "--learning_rate=1e-12", "--min_lr=0", "--weight_decay=0", "--init_from=hf"]
    assert run_train(*keys).code == 0
    saved = read("out/step_000001.pt")["model"]
    assert all(torch.allclose(p, saved[name], atol=1e-9) for name, p in model.named_parameters())
    refused(run_train("--init_from=hf", "--hidden_size=64", "--out_dir=o2"), "hidden_size = 64", "init_from has 32")
    refused(run_train(f"--init_from={tmp_path}/none/such", "--out_dir=o2"), "init_from", code=1)
    assert not Path("o2").exists()


# ----------------------------------------------------------------------------------------------------------- the data


def test_the_default_data_is_prepared_when_it_is_missing(monkeypatch):
    calls = []
    monkeypatch.setattr(prepare, "prepare", lambda args: calls.append(args.input) or write_data(
        "data/shakespeare", range(200)))
    result = run_main(train.main, *TINY, "--max_steps=1")
    assert result.code == 0 and calls == [""], result.err
    assert run_main(train.main, *TINY, "--max_steps=1", "--out_dir=o2").code == 0
    assert calls == [""]  # it is there now


@pytest.mark.parametrize("file, damage, fragment", [
    ("train.bin", lambda p: flip(p, 100), "train_sha256"), ("val.bin", lambda p: flip(p, -1), "val_sha256"),
    ("train.bin", lambda p: os.truncate(p, 398), "train_tokens is 199, but meta.json says 200"),
    ("val.bin", Path.unlink, "val.bin"),
    ("meta.json", lambda p: p.write_text(p.read_text().replace('"val_bytes": 100', '"val_bytes": 1')), "meta.json"),
    *[("meta.json", lambda p, text=text: p.write_text(text), "damaged") for text in ("{}", "[]", "{")],
], ids=["train", "val", "short", "gone", "meta", "empty", "list", "torn"])
def test_data_that_are_not_as_prepared_are_refused(file, damage, fragment):
    folder = write_data("d", range(200))
    assert run_main(train.main, *TINY, "--data_dir=d", "--max_steps=1", "--out_dir=o1").code == 0
    damage(folder / file)
    refused(run_main(train.main, *TINY, "--data_dir=d", "--max_steps=1"), fragment, "prepare.py", code=1)


def test_data_that_do_not_fit_the_model_are_refused():
    write_data("big", range(200), vocab_size=60_000)
    refused(run_main(train.main, *TINY, "--data_dir=big"), "ids up to 59999", "vocab_size = 49152", code=1)
    write_data("short", range(16))
    refused(run_main(train.main, *TINY, "--data_dir=short"), "16 training tokens", "block_size = 16", code=1)
    write_data("exact", range(17))
    assert run_main(train.main, *TINY, "--data_dir=exact", "--max_steps=3").code == 0


def test_stand_in_data_are_announced_in_the_banner_and_beside_every_held_out_loss(data_dir):
    meta = Path(shutil.copytree(data_dir, "copy"), "meta.json")
    meta.write_text(seal(json.loads(meta.read_text()) | {"stand_in": "a text that stands in"}))
    result = run_main(train.main, *TINY, "--data_dir=copy", "--max_steps=2", "--eval_interval=1")
    lines = [line for line in result.out.splitlines() if "stand" in line.lower()]
    assert len(lines) == 3 and "python prepare.py" in lines[0]
    assert all("a text that stands in" in line for line in lines)


def test_a_disk_without_room_is_refused_before_the_first_step(run_train, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=30_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(run_train("--max_steps=1"), "room", "GB", code=1)


# ----------------------------------------------------------------------------------------------------------- slow ones


@pytest.mark.slow
def test_overfitting_one_batch_at_full_size_drives_the_loss_from_11_to_under_0_4(data_dir):
    config = TrainConfig(batch_size=1, block_size=64, learning_rate=6e-4)
    machine = Machine(torch.device("cpu"), M.pick_device("cpu")[1], compile=False)
    torch.manual_seed(config.seed)
    run, losses = Run(config, SmolLM2(config), machine), []
    batch = get_batch(prepare.open_data(data_dir), config, machine, run)
    while len(losses) < 60 and (not losses or losses[-1] >= 0.4):
        train.set_rates(run.optimizers, min(1, (len(losses) + 1) / 10))
        losses.append(train.train_step(run.model, run, batch, config, machine, None)[0])
    assert 10.7 < losses[0] < 11.9 and losses[-1] < 0.4, losses
