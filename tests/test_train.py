"""train.py: recipes and keys, learning rate, order of the data, what a run writes and refuses."""
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import train
from tests.harness import ROOT, TINY, differences, intact, metrics, refused, run_main, write_data
from tools.export import save_pretrained
from train import Run, TrainConfig, epoch_order, get_batch, lr_factor

BYTES = [*TINY, "--vocab_size=256", "--dtype=float32"]
CONFIG = TrainConfig(**train.parse_args(BYTES)[0])  # 26 thousand parameters


@pytest.fixture
def tiny():
    """tiny(*argv, **keys): a run on 3,000 random bytes, in this process."""
    write_data("d", np.random.default_rng(0).integers(256, size=3000), vocab_size=256)
    return partial(run_main, train.main, *BYTES, "--data_dir=d")


def new_run(data=None, dtype=torch.float32, **changes):
    """A Run of CONFIG, with the same first weights each time."""
    torch.manual_seed(0)
    config = replace(CONFIG, **changes)
    return Run(config, train.SmolLM2(config), data, torch.device("cpu"), dtype, {})


@pytest.mark.parametrize("recipe", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_recipe_loads(recipe):
    c = TrainConfig(**train.parse_args([str(recipe)])[0])
    for world_size in (1, 8, 16) if "torchrun" in recipe.read_text() else (1,):
        train.check(c, world_size)
    if recipe.name == "smollm2.py":  # the published setting
        assert (c.max_steps, c.batch_size, c.block_size, c.warmup_steps) == (5000, 4, 256, 100)
        assert (c.learning_rate, c.min_lr, c.lr_decay_steps, c.grad_clip) == (3e-4, 3e-5, 0, 1.0)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults():
    Path("r.py").write_text('"""A docstring."""\nmax_steps = 7  # why\nseed = 5\nmin_lr = 1\n')
    argv = ["r.py", "--seed=6", "--batch_size", "12", "--compile=False", "--rope_theta=1e4"]
    overrides, resume = train.parse_args(argv)
    assert overrides == {"max_steps": 7, "seed": 6, "min_lr": 1.0, "batch_size": 12,
                         "compile": False, "rope_theta": 1e4}
    assert type(overrides["min_lr"]) is float and resume is None
    refused(run_main(train.main, "r.py", "max_steps=10"), "max_steps=10", "--max_steps?")
    shown = run_main(train.main, "--help")
    assert shown.code == 0 and all(f"--{name} " in shown.out for name in train.KEYS)


def test_the_learning_rate_warms_up_follows_a_cosine_and_stays_at_the_minimum():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=10, lr_decay_steps=110)
    rates = [lr_factor(config, step) for step in range(200)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])  # the first is not 0
    cosine = [0.55 + 0.45 * math.cos(math.pi * i / 100) for i in range(100)]
    assert rates[10:] == pytest.approx(cosine + [0.1] * 90)
    wsd = replace(config, lr_schedule="wsd")
    expected = rates[:10] + [1.0] * 78 + [1.0 - 0.9 * i / 22 for i in range(22)] + [0.1] * 90
    assert [lr_factor(wsd, step) for step in range(200)] == pytest.approx(expected)
    for steps, warmup in ((1, 100), (99, 100), (5, 0)):  # a warm-up is never longer than the run
        config = replace(config, warmup_steps=warmup, lr_decay_steps=steps)
        rates = [lr_factor(config, step) for step in range(steps + 2)]
        n = min(steps, warmup)
        assert rates[:n] == pytest.approx([(i + 1) / n for i in range(n)]) and max(rates) == 1.0
        assert rates[steps:] == pytest.approx([0.1, 0.1])


def test_a_token_learns_from_those_with_its_shape_and_trigrams(tiny):
    tokens = ["Ġlove", "Love", "LOVE", "abc", "xyz", None]
    shared = torch.eye(6)
    train.share_gradient(shared, *train.spelling(Mock(id_to_token=tokens.__getitem__), 6, "cpu"))
    love = [[5, 1, 1], [1, 3.5, 1.5], [1, 1.5, 3.5]]  # lov, ove, ve$: a third each; ^lo: a half
    three, none = [[4.5, 0.5], [0.5, 4.5]], [[2.0]]  # small letters
    assert torch.allclose(shared, torch.block_diag(*map(torch.tensor, (love, three, none))))
    for on in (True, False):
        assert tiny(max_steps=1, share_spelling=on, out_dir=on).code == 0
    weights = [train.read_checkpoint(Path(f"{on}/step_000001.pt"))["model"] for on in (True, False)]
    assert {*differences(*weights)} == {".model.embed_tokens.weight", ".lm_head.weight"}


@pytest.mark.parametrize("n", [1000, 1007, 17, 33, 40])
def test_an_epoch_has_every_block_once(n):
    for epoch in range(20):
        starts = sorted(epoch_order(1, epoch, n, 16))
        assert len(starts) == train.blocks_per_epoch(n, 16) >= max(1, n // 16 - 1)
        assert set(np.diff(starts)) <= {16} and 0 <= starts[0] and starts[-1] + 17 <= n  # + target


def test_the_order_and_the_cuts_change_from_epoch_to_epoch_and_reach_everything():
    orders = [epoch_order(1, epoch, 1007, 16) for epoch in range(200)]
    assert len({min(o) for o in orders}) > 20  # the cuts
    assert len({tuple(o - min(o)) for o in orders}) == 200  # the order
    assert {s + i for o in orders for s in o for i in range(17)} == set(range(1007))


def test_batches_are_consecutive_tokens_in_the_order_of_the_epochs_shared_by_all_processes():
    run = new_run(Mock(train=np.arange(1007, dtype="<u2")), batch_size=6, seed=7)  # id = place
    starts, random_state = [], torch.get_rng_state()
    for _ in range(20):
        rows = get_batch(run)
        assert rows.shape == (6, 17) and rows.dtype == torch.long
        assert torch.equal(rows[:, :1] + torch.arange(17), rows)
        for rank in range(3):
            with patch.multiple(train, RANK=rank, WORLD_SIZE=3):
                assert torch.equal(get_batch(run), rows[2 * rank:2 * rank + 2])
        starts += rows[:, 0].tolist()
        run.advance()
    order = [*epoch_order(7, 0, 1007, 16), *epoch_order(7, 1, 1007, 16)]
    assert starts == order[:120] and len(order) == 122  # one batch straddles the two epochs
    assert torch.equal(random_state, torch.get_rng_state())  # they depend on the seed alone


def test_a_run_writes_its_metrics_its_samples_and_a_whole_checkpoint(run, data):
    result = run(max_steps=6, eval_interval=3, sample_interval=2, checkpoint_interval=4)
    assert result.code == 0 and result.err == ""
    lines = [json.loads(line) for line in open("out/metrics.jsonl")]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert lines[-1]["seconds"] == pytest.approx(sum(128 / row["tokens_per_sec"] for row in lines))
    samples = sorted(Path("out/samples").iterdir())
    assert [path.name for path in samples] == [f"step_00000{i}.txt" for i in (2, 4, 6)]
    loss, best = min((line["val_loss"], line["step"]) for line in lines[2::3])
    assert intact("out") == sorted({best, 4, 6}) and not list(Path("out").glob("*.tmp"))
    facts = json.loads(Path("out/run.json").read_text())
    assert facts["config"] == train.read_checkpoint("out/step_000006.pt")["config"]
    meta = prepare.Data(data).meta
    bits = loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
    for shown in ("cpu", "float32", data, "84,128 parameters", f"{loss:.4f}", f"{bits:.4f}",
                  f"{math.exp(loss):.2f}", f"{lines[3]['loss']:.4f}",
                  samples[0].read_bytes().decode(), 'python sample.py --prompt "ROMEO:"'):
        assert str(shown) in result.out


def test_micro_batches_change_memory_and_not_the_run(tiny):
    """Which is that of a plain loop around torch's AdamW."""
    keys, runs = {"seed": 0, "warmup_steps": 2, "weight_decay": 3.0, "grad_clip": 0.5}, []
    for micro in (0, 1, 2):
        assert tiny(max_steps=8, micro_batch_size=micro, out_dir=f"m{micro}", **keys).code == 0
        runs.append(metrics(f"m{micro}"))
    for key in ("loss", "grad_norm"):
        whole, *parts = [[line[key] for line in lines] for lines in runs]
        assert all(part == pytest.approx(whole, rel=1e-4) for part in parts), key
    run = new_run(prepare.Data("d"), lr_decay_steps=8, **keys)
    groups = [{"params": [p for p in run.model.parameters() if p.dim() == dim],
               "weight_decay": decay} for dim, decay in ((2, 3.0), (1, 0.0))]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for row in runs[0]:
        rows, lr = get_batch(run), 1e-2 * lr_factor(run.config, run.step)
        for group in adamw.param_groups:
            group["lr"] = lr
        loss = F.cross_entropy(run.model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()
        run.advance()
        wanted = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, "tokens": run.tokens}
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)


def test_evaluation_and_samples_do_not_touch_the_training(run):
    bare = run(max_steps=5, out_dir="bare", log_interval=0, eval_interval=0, checkpoint_interval=0)
    assert run(max_steps=5, eval_interval=2, sample_interval=2, checkpoint_interval=3).code == 0
    a, b = (train.read_checkpoint(f"{out}/step_000005.pt") for out in ("bare", "out"))
    for key in ("model", "optimizer", "rng"):
        assert not differences(a[key], b[key])
    # Intervals of 0 switch things off; the end always makes a checkpoint.
    assert "held-out loss" not in bare.out and "step 5/5" not in bare.out
    assert intact("bare") == [5] and not Path("bare/samples").exists()


def test_only_training_is_in_train_mode(tiny, monkeypatch):
    """All is deterministic and in bf16, and what is compiled is told the tokens of its pass."""
    real, modes, compiled = train.SmolLM2.embed, [], Mock()
    def embed(model, idx):
        assert torch.is_autocast_enabled("cpu") and torch.are_deterministic_algorithms_enabled()
        modes.append(model.training)
        return real(model, idx)
    monkeypatch.setattr(train.SmolLM2, "embed", embed)
    monkeypatch.setattr(train.SmolLM2, "compile_for_training", compiled)
    monkeypatch.setattr(train, "compiler_problem", lambda device: None)
    assert tiny("--dtype=bfloat16", "--compile=true", max_steps=2, eval_interval=1,
                sample_interval=1).code == 0
    assert modes[0] and modes.count(True) == 2 and len(modes) > 100
    compiled.assert_called_once_with(64)
    assert tiny("--dtype=bfloat16", "--compile=true", max_steps=1, micro_batch_size=1,
                out_dir="parts").code == 0
    compiled.assert_called_with(0)


def test_what_could_not_be_loaded_again_ends_the_run_at_its_first_checkpoint(tiny, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda run: np.float64(run.step))
    with pytest.raises(ValueError, match="step_000001"):
        tiny(max_steps=3, eval_interval=1, checkpoint_interval=1)


def test_the_held_out_loss_is_the_mean_over_the_whole_split_each_token_once():
    val = np.random.default_rng(0).integers(256, size=131).astype("<u2")
    run = new_run(Mock(val=val), initializer_range=0.5)
    for eval_tokens, n in ((10_000, 130), (130, 130), (100, 100), (7, 7)):
        losses, run.config.eval_tokens = [], eval_tokens
        for start in range(0, n, 16):
            ids = torch.from_numpy(val[start:min(start + 16, n) + 1].astype(np.int64))
            logits = run.model(ids[None, :-1])[0][0]
            losses += F.cross_entropy(logits, ids[1:], reduction="none").tolist()
        assert train.evaluate(run) == pytest.approx(np.mean(losses), abs=1e-5)
    run.model.model.norm.weight.data.fill_(math.nan)
    assert train.evaluate(run) == math.inf


def test_the_best_held_out_loss_is_kept_and_named(tiny, monkeypatch):
    """The loss soon rises: the best checkpoint outlives the newest ones. Stand-ins are named."""
    prepare.write_meta(Path("d"), prepare.Data("d").meta | {"stand_in": "a text that stands in"})
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=[9.0, 5.0, 7.0, 6.0, 8.0, 8.5]))
    result = tiny(max_steps=12, eval_interval=2, checkpoint_interval=5)
    assert result.code == 0 and result.out.count("best 5.0000 at step 4") == 5
    assert "STAND-IN a text that stands in" in result.out
    assert result.out.count("on STAND-IN data") == 6 and intact("out") == [4, 10, 12]
    assert train.read_checkpoint("out/step_000012.pt")["best"] == {"step": 4, "val_loss": 5.0}
    assert "lowest at step 4: --checkpoint out/best)" in result.out.splitlines()[-1]
    state = {"step": 13, "best": {"step": 12}, "config": {"eval_interval": 2}}
    assert not train.hint_of_best(Path("out"), state)  # nothing after it was evaluated


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_only_and_the_optimizer_has_every_parameter(optimizer):
    run = new_run(optimizer=optimizer, weight_decay=0.3)
    groups = [group for o in run.optimizers.values() for group in o.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() == 2 else 0.0 for p in run.model.parameters()}
    if optimizer == "muon":  # the layers' matrices, and never the embedding
        in_muon = {id(p) for g in run.optimizers["muon"].param_groups for p in g["params"]}
        assert in_muon == {id(p) for p in run.model.model.layers.parameters() if p.dim() == 2}


def test_a_parameter_group_keeps_a_rate_of_its_own_and_what_it_counts(tiny, monkeypatch):
    real = train.make_optimizers
    def make_optimizers(*args):
        optimizers = real(*args)
        matrices, norms = optimizers["optimizer"].param_groups
        norms["lr"] = matrices["count"] = 0
        optimizers["optimizer"].register_step_post_hook(count)
        return optimizers
    def count(optimizer, *_):
        optimizer.param_groups[0]["count"] += 1
    monkeypatch.setattr(train, "make_optimizers", make_optimizers)
    for steps in (2, 4):
        assert tiny("--resume=auto", max_steps=steps).code == 0
        state = train.read_checkpoint(f"out/step_00000{steps}.pt")
        assert all((p == 1).all() == ("norm" in name) for name, p in state["model"].items())
        assert state["optimizer"]["param_groups"][0]["count"] == steps
    monkeypatch.setattr(train, "make_optimizers", lambda model, *_: {
        "optimizer": torch.optim.AdamW(model.parameters())})  # all in one group
    refused(tiny("--resume", max_steps=6), "parameter groups", code=1)


@pytest.mark.parametrize("columns", [64, 160])  # the two ways of orthogonal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_muon_brings_singular_values_near_one_and_none_far_beyond(dtype, columns):
    """Of small gradients, too, and of rank one, whose value rounding can lift above one."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(300, 64, columns), full_matrices=False)
    for values, least in (torch.logspace(0, -1.5, 64), 0.4), (torch.eye(64)[0], -1.0):
        found = torch.linalg.svdvals(train.orthogonal(1e-6 * u * values @ vt, dtype).float())
        assert found.max() < 1.4 and found[:, 0].min() > 0.6 and found.min() > least


def test_muon_moves_each_matrix_by_what_is_near_its_momentums_orthogonal_factor():
    """After it has decayed. The momentum is Nesterov's: here of two gradients, the first larger."""
    run = new_run(optimizer="muon", muon_learning_rate=0.5, weight_decay=1.0, beta1=0.8)
    matrices = {name: p for name, p in run.model.model.layers.named_parameters() if p.dim() == 2}
    for scale in (3, 1):
        before = {name: (p.detach() / 2, p.grad) for name, p in matrices.items()}
        for p in matrices.values():
            p.grad = scale * torch.randn_like(p)
        run.optimizers["muon"].step()
    for name, p in matrices.items():
        decayed, first = before[name]
        moved = (decayed - p.detach()) / 0.5 / max(1, len(p) / p.size(1)) ** 0.5
        values = torch.linalg.svdvals(moved)
        momentum = 0.8 * (0.8 * 0.2 * first + 0.2 * p.grad) + 0.2 * p.grad
        u, _, vt = torch.linalg.svd(momentum, full_matrices=False)
        likeness = (moved * (u @ vt)).sum() / moved.norm() / (u @ vt).norm()
        assert values.median() > 0.7 and values.max() < 1.4 and likeness > 0.95, name


def test_gradients_are_clipped_to_the_norm_and_the_logged_norm_is_that_before():
    norms = []
    for clip in (0.0, 0.1, 100.0):
        run = new_run(grad_clip=clip)
        run.optimizers = {"sgd": torch.optim.SGD(run.model.parameters(), lr=1.0)}
        before = torch.nn.utils.parameters_to_vector(run.model.parameters())
        norms.append(train.train_step(run, torch.randint(256, (4, 17)))[1])
        moved = (torch.nn.utils.parameters_to_vector(run.model.parameters()) - before).norm().item()
        assert moved == pytest.approx(clip if clip == 0.1 else norms[-1], rel=1e-3)
    assert 0.2 < norms[0] < 50 and norms == 3 * norms[:1]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer_step(tiny):
    end = tiny(max_steps=30, learning_rate=1e9, min_lr=1e9, warmup_steps=0, checkpoint_interval=1)
    done = len(metrics("out"))
    last_good = Path(f"out/step_{done:06d}.pt")
    refused(end, f"step {done + 1}", "nan", last_good, code=1)
    assert all(t.isfinite().all() for t in train.read_checkpoint(last_good)["model"].values())


def test_steps_that_fp16_skips_are_no_failure(tiny, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**50))
    assert tiny(dtype="float16", max_steps=2).code == 0
    assert [line["grad_norm"] for line in metrics("out")] == [None, None]
    assert train.read_checkpoint("out/step_000002.pt")["scaler"]["scale"] == 2.0**48


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_infinite_gradient_in_fp16_stops_every_optimizer_and_lowers_the_scale(optimizer):
    """Only the embedding's is infinite, and Muon has no part in it: it must not step either."""
    run = new_run(dtype=torch.float16, optimizer=optimizer)
    run.model.model.embed_tokens.weight.register_hook(lambda grad: grad * math.inf)
    before = [p.detach().clone() for p in run.model.parameters()]
    loss, norm = train.train_step(run, torch.randint(256, (4, 17)))
    assert math.isfinite(loss) and not math.isfinite(norm) and run.scaler.get_scale() == 2**15
    assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), before))
    with pytest.raises(FloatingPointError):  # lowered to one, it has been no accident
        for _ in range(16):
            train.train_step(run, torch.randint(256, (4, 17)))


def test_the_default_data_is_prepared_when_it_is_missing(monkeypatch):
    make = Mock(wraps=lambda args: write_data("data/shakespeare", range(200), vocab_size=256))
    monkeypatch.setattr(prepare, "prepare", make)
    for out in ("first", "second"):
        assert run_main(train.main, *BYTES, max_steps=1, out_dir=out).code == 0
    make.assert_called_once()  # then they are there


@patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
def test_data_weights_and_disks_that_do_not_fit_are_refused_before_a_step(tiny, monkeypatch):
    refused(tiny(vocab_size=255), "255", "vocab_size", code=1)
    write_data("short", range(16), vocab_size=256)
    refused(tiny(data_dir="short"), "16", "block_size", "17", code=1)
    save_pretrained(train.SmolLM2(CONFIG), Path("hf"), torch.float32)
    refused(tiny(init_from="hf", hidden_size=64), "hidden_size", 64, 32, code=1)
    for steps in (1, 2):
        done = tiny("--resume=auto", init_from="hf", max_steps=steps, out_dir="fitting")
        assert done.code == 0 and "same run" not in done.out
    for nowhere in ("none/such", "./such"):
        refused(tiny(init_from=nowhere), "init_from", nowhere, code=1)
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=300_000)))
    Path("mine").mkdir()
    for out in ("out", "mine"):
        refused(tiny(max_steps=1, out_dir=out), "GB", code=1)
    assert not Path("out").exists() and not list(Path("mine").iterdir())
