"""Trains SmolLM2 from scratch, and resumes after any stop as if nothing had happened.

    python train.py config/smollm2.py                  # starts a run; prepares the data if missing
    python train.py config/tiny.py --max_steps=100     # any key: --key=value or --key value
    python train.py --resume                           # from the newest whole checkpoint in out/
    python train.py --resume --max_steps=5050          # extends a finished run
    torchrun --standalone --nproc_per_node=4 train.py config/smollm2.py --resume=auto
"""
import argparse
import ast
import difflib
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save

import prepare  # isort: skip (first: it tells an older Python, in one line)
import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from model import (SmolLM2, SmolLM2Config, compiler_problem, from_pretrained, generate,
                   is_out_of_memory, keep_freed_memory, key, model_of, pick_device)


@dataclass
class RunControl:
    """Keys that may change on a resume: it is still the same run."""
    out_dir: str = key("out", "where checkpoints, metrics and samples are written")
    data_dir: str = key("data/shakespeare", "made by prepare.py or tools.corpus")
    max_steps: int = key(5000, "optimizer steps of the whole run")
    log_interval: int = key(10, "steps between lines, where no progress bar is shown")
    eval_interval: int = key(250, "steps between held-out losses (0: never)")
    eval_tokens: int = key(1_000_000, "most held-out tokens read for one; changed: a new best")
    sample_interval: int = key(500, "steps between texts in out_dir/samples (0: never)")
    checkpoint_interval: int = key(250, "steps between checkpoints (0: at the end alone)")
    keep_checkpoints: int = key(2, "newest kept besides the best (0: all)")


@dataclass
class TrainConfig(RunControl, SmolLM2Config):
    """Every key of a recipe and of the command line: those above, the model's sizes, and these."""
    init_from: str = key("", "start from these weights: a folder or a hub name")
    seed: int = key(1337, "of the first weights, the order of the data, the samples")
    # the batch
    batch_size: int = key(4, "sequences in one optimizer step, over all processes")
    micro_batch_size: int = key(0, "sequences one process runs at once (0: all)")
    block_size: int = key(256, "tokens in a sequence")
    # the optimizer
    optimizer: str = key("adamw", "adamw; muon: Muon for the layers' matrices, AdamW for the rest",
                         choices=("adamw", "muon"))
    learning_rate: float = key(3e-4, "of AdamW, after the warm-up")
    muon_learning_rate: float = key(0.02, "of Muon, after the warm-up; it follows the same curve")
    lr_schedule: str = key("cosine", "cosine; wsd: constant, then linear decay in the last fifth",
                           choices=("cosine", "wsd"))
    min_lr: float = key(3e-5, "at the end of the decay, and after it; Muon's falls likewise")
    warmup_steps: int = key(100, "steps of linear warm-up")
    lr_decay_steps: int = key(0, "step at which the decay ends (0: max_steps)")
    weight_decay: float = key(0.1, "on matrices, not on norms")
    beta1: float = key(0.9, "decay of the gradient's running mean: Muon's momentum, too")
    beta2: float = key(0.95, "of AdamW: decay of its square's running mean")
    grad_clip: float = key(1.0, "largest norm of the gradient (0: no clipping)")
    share_spelling: bool = key(False, "tokens learn from those alike in letters or capitals, too")
    # the machine
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = key("auto", "of matrix products; weights and optimizer stay float32",
                     choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(True, "torch.compile, where it works")
    deterministic: bool = key(True, "the same bits in every run; costs speed on a GPU")


RANK = int(os.environ.get("RANK", 0))  # which of WORLD_SIZE processes this is, by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
KEYS = TrainConfig.__dataclass_fields__
FREE = RunControl.__dataclass_fields__.keys()
SIZES = [name for name in SmolLM2Config.__dataclass_fields__ if name != "initializer_range"]
fail = partial(prepare.fail, "train.py")  # code 1; 2 for a wrong command line

# ---------------------------------------------------------------------------- the order of the data

def blocks_per_epoch(n, T):
    return max(1, n // T - 1)  # one less than fit, to leave room for the offset


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n, T):
    """The starts of an epoch's blocks of T tokens, out of n: every block once, shuffled.

    An offset moves the cuts from epoch to epoch, so that the tail is read, too."""
    rng = np.random.default_rng((seed, epoch))
    blocks = blocks_per_epoch(n, T)
    return rng.integers(n - blocks * T) + T * rng.permutation(blocks)


def on_device(ids, run):
    """Token ids as a tensor where the run's model is."""
    return torch.from_numpy(ids.astype(np.int64)).to(run.device)


def get_batch(run):
    """This process's rows of the next batch, (count, T + 1): T ids to read, each with its next.

    A function of the seed and of the sequences seen before, so that nothing can shift it."""
    ids, T = run.data.train, run.config.block_size
    count = run.config.batch_size // WORLD_SIZE
    first = run.sequence + RANK * count
    rows = []
    for i in range(first, first + count):
        epochs, block = divmod(i, blocks_per_epoch(len(ids), T))  # it may reach into the next epoch
        start = epoch_order(run.config.seed, run.epoch + epochs, len(ids), T)[block]
        rows.append(ids[start:start + T + 1])
    return on_device(np.stack(rows), run)


# ------------------------------------------------------------------- optimizer, step, held-out loss

# Odd polynomials a x + b x^3 + c x^5, each the best for what the one before leaves, that together
# bring singular values in [0.01, 1] to [0.68, 1.32]. Amsel et al. 2025 (arXiv:2505.16932). Each
# bears 5 % beyond its interval: further out it explodes, and rounding in bf16 gets there.
POLYNOMIALS = [(7.726, -20.47, 13.72), (3.516, -2.394, 0.4274), (2.657, -1.821, 0.3744)]


def orthogonal(x, dtype):
    """x (n, rows, columns) with all singular values brought near one, by products in dtype.

    Each polynomial multiplies x by a factor made of gram = x x^T. For a long x the factors are
    multiplied first, and each gram is made of the one before, since all these, (rows, rows),
    commute: (f x) (f x)^T = f gram f. In bf16 that is good for three polynomials, not for four:
    rounding grows with each."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT, dtype).mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)  # (last: fp16 loses small ones)
    is_long, product = x.size(2) > 1.5 * x.size(1), None
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT if product is None else factor @ gram @ factor
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if is_long:
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
        else:
            x = torch.baddbmm(x, factor, x, beta=a)
    return product @ x if is_long else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: Jordan 2024 (kellerjordan.github.io/posts/muon).

    A group is one matrix of each layer: they are stacked. dtype: of the products."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # (in an older checkpoint a group has no beta1: it was 0.95)
            params, lr, part = group["params"], group["lr"], 1 - group.get("beta1", 0.95)
            grad = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            momentum = state["momentum"].lerp_(grad, part)
            # Nesterov: as this gradient, once more, would leave the momentum
            update = orthogonal(momentum.lerp(grad, part), group["dtype"])
            _, rows, columns = update.shape
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            # A tall update has columns of norm one: this brings its rows there.
            torch._foreach_add_(params, update.unbind(), alpha=-lr * max(1, rows / columns) ** 0.5)


def make_optimizers(model, config, dtype):
    """The optimizers, named as in a checkpoint. Their rates are the highest: train scales them."""
    optimizers = {}
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    if config.optimizer == "muon":
        alike = zip(*[layer.parameters() for layer in model.model.layers])
        groups = [{"params": params} for params in alike if params[0].dim() == 2]
        optimizers["muon"] = Muon(groups, {"lr": config.muon_learning_rate, "dtype": dtype,
                                           "weight_decay": config.weight_decay,
                                           "beta1": config.beta1})
        taken = {p for group in groups for p in group["params"]}
        matrices = [p for p in matrices if p not in taken]  # the embedding, and what else there is
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizers["optimizer"] = torch.optim.AdamW(groups, config.learning_rate,
                                                (config.beta1, config.beta2), fused=True)
    return optimizers


def spelling(tokenizer, V, device):
    """Yields embedding_bag's arguments twice: a bag of tokens for each feature, then a bag of
    features for each of V tokens: its shape ("Xxx" for "The"), its trigrams in lower case."""
    pairs, ids = [], {}
    for i in range(V):
        token = tokenizer.id_to_token(i) or ""  # "Ġ" is a space
        shape = re.sub("[a-z]", "x", re.sub("[A-Z]", "X", token))
        pairs += [(i, ids.setdefault(feature, len(ids)))  # ("xxx" can be both)
                  for feature in (shape, *re.findall("(?=(...))", f"^{token.lower()}$"))]
    tokens, features = torch.tensor(pairs, device=device).T
    for bags, members in (features, tokens), (tokens, features):
        bags, order = bags.sort(stable=True)  # (none is empty: each token has a shape)
        yield {"input": members[order], "offsets": torch.searchsorted(bags, bags.unique())}


def share_gradient(grad, of_feature, of_token):
    """Adds to each token's gradient, in grad (V, hidden_size), for each of its features the mean
    gradient of the tokens that have it. So rare words learn from those that are spelt alike."""
    means = F.embedding_bag(weight=grad, **of_feature)  # (its mode is the mean)
    grad += F.embedding_bag(weight=means, **of_token, mode="sum")


def lr_factor(config, step):
    """The factor in [0, 1] by which the highest rates are scaled after `step` steps.

    Linear warm-up, decay to min_lr at lr_decay_steps, then min_lr."""
    lowest = config.min_lr / config.learning_rate
    end = config.lr_decay_steps
    warmup = min(config.warmup_steps, end)
    if step < warmup:
        return (step + 1) / warmup
    if step >= end:
        return lowest
    if config.lr_schedule == "wsd":
        part = min(1, (end - step) / (end - max(0.8 * end, warmup)))
    else:
        part = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))
    return lowest + part * (1 - lowest)


def of_all(thing):
    """What each process has of a thing, in a list."""
    things = [thing] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(things, thing)
    return things


def train_step(run, batch):
    """One optimizer step on this process's part of a batch.

    Returns the mean loss over all processes, nats a token, and the gradient's norm before
    clipping. Raises FloatingPointError before anything is changed if they are not finite."""
    run.model.train()
    micro_batches = batch.split(run.config.micro_batch_size or len(batch))
    pieces, loss = WORLD_SIZE * len(micro_batches), 0.0
    for rows in micro_batches:
        with run.autocast:
            _, mean = run.model(rows[:, :-1], rows[:, 1:])
        run.scaler.scale(mean / pieces).backward()
        loss += mean.detach() / pieces
    if WORLD_SIZE > 1:
        # Not by DDP: it groups gradients otherwise in a process's first step, and three processes
        # then add in another order, so that a resume would not give the same bits.
        grads = [p.grad for p in run.model.parameters()]
        vector = parameters_to_vector(grads)
        dist.all_reduce(vector)
        vector_to_parameters(vector, grads)
    for optimizer in run.optimizers.values():
        run.scaler.unscale_(optimizer)
    norm = clip_grad_norm_(run.model.parameters(), run.config.grad_clip or math.inf).item()
    loss = sum(of_all(loss.item()))
    # In fp16 a gradient that overflows is no failure: the step is skipped, the scale lowered. (The
    # scale is 1 where no fp16 is.)
    if not math.isfinite(loss) or not (math.isfinite(norm) or run.scaler.get_scale() > 1):
        raise FloatingPointError(
            f"step {run.step + 1}: loss {loss}, gradient norm {norm}; try a lower --learning_rate")
    if run.spelling:  # (what it adds is neither in the norm nor clipped)
        share_gradient(run.model.lm_head.weight.grad, *run.spelling)
    for optimizer in run.optimizers.values():
        if math.isfinite(norm):  # (the scaler asks each optimizer for its own part alone)
            run.scaler.step(optimizer)
        optimizer.zero_grad()
    run.scaler.update()
    return loss, norm


@torch.no_grad()
def evaluate(run):
    """The mean loss, nats a token, of the first eval_tokens held-out ids, in fixed windows of T."""
    run.model.eval()
    config, ids = run.config, run.data.val[:run.config.eval_tokens + 1]
    n, T = len(ids) - 1, config.block_size
    B = config.micro_batch_size or config.batch_size // WORLD_SIZE
    total = 0.0
    for first in range(RANK * B * T, n, WORLD_SIZE * B * T):
        window = on_device(ids[first:first + B * T + 1], run)
        count = len(window) - 1
        missing = 0, B * T - count  # at the end: one shape for all, and -100 does not count
        x, y = F.pad(window[:-1], missing), F.pad(window[1:], missing, value=-100)
        with run.autocast:
            _, loss = run.model(x.view(B, T), y.view(B, T))
        total += loss.item() * count
    return min(math.inf, sum(of_all(total)) / n)  # inf in place of NaN, to which fp16 can overflow


# ----------------------------------------------------------------------------------------- the loop

def train(run, signals):
    """From run.step to max_steps, or to the end of the step in which a signal came."""
    config, is_over = run.config, False
    bar = tqdm(total=config.max_steps, initial=run.step, dynamic_ncols=True,
               bar_format="{percentage:3.0f}%|{bar}| {n}/{total}, {remaining} left{postfix}",
               disable=RANK > 0 or None)  # None: where there is no terminal
    while not is_over:
        began = time.perf_counter()
        factor = lr_factor(config, run.step)
        for optimizer in run.optimizers.values():
            for group in optimizer.param_groups:
                # (under the name that torch's schedulers give to a group's own rate)
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        loss, norm = train_step(run, get_batch(run))
        run.advance()
        seconds = time.perf_counter() - began
        run.seconds += seconds
        row = {"step": run.step, "loss": loss, "lr": factor * config.learning_rate,
               "grad_norm": norm if math.isfinite(norm) else None,
               "tokens": run.tokens, "seconds": run.seconds,
               "tokens_per_sec": config.batch_size * config.block_size / seconds}
        must_save = run.is_due(config.checkpoint_interval)
        if run.is_due(config.eval_interval):
            row["val_loss"] = evaluate(run)
            if not run.best or row["val_loss"] < run.best["val_loss"]:
                run.best = {"step": run.step, "val_loss": row["val_loss"]}
                must_save = config.checkpoint_interval  # (if the run makes checkpoints at all)
        if RANK == 0:
            if run.is_due(config.sample_interval):
                show(f"--- sample at step {run.step}\n{write_sample(run)}\n---")
            log_step(run, row, bar)  # (whoever reads a row finds its sample)
        is_over = run.step >= config.max_steps or any(of_all(signals))
        if is_over or must_save:
            save(run)
    bar.close()


@dataclass
class Run:
    """The config, data and device of a run, and all that a checkpoint has to hold of it."""
    # (asdict gives these six, which begin as they are here: what __init__ sets is no field.)
    step: int = 0  # optimizer steps done
    epoch: int = 0  # the place in the data: the epoch,
    sequence: int = 0  # and how many sequences of it were read
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # spent in steps
    best: dict = None  # {"step", "val_loss"} of the lowest held-out loss

    def __init__(self, config, model, data, device, dtype, machine):
        self.config, self.data, self.out = config, data, Path(config.out_dir)
        self.device, self.machine = device, machine
        torch.manual_seed(config.seed)
        self.model = (model or SmolLM2(config)).to(device)
        self.size = sum(p.numel() for p in self.model.parameters())
        self.optimizers = make_optimizers(self.model, config, dtype)
        self.spelling = config.share_spelling and [
            *spelling(data.tokenizer, config.vocab_size, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        seed = config.seed + RANK
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def advance(self):
        """Counts a step: the next batch begins where this one ended, whatever its size."""
        size, T, n = self.config.batch_size, self.config.block_size, len(self.data.train)
        epochs, self.sequence = divmod(self.sequence + size, blocks_per_epoch(n, T))
        self.epoch += epochs
        self.tokens += size * T
        self.step += 1

    def is_due(self, interval):
        return interval and self.step % interval == 0

    def state(self):
        """All that a checkpoint holds but for the random generators, see save."""
        return {**asdict(self), "model": self.model.state_dict(),
                **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "scaler": self.scaler.state_dict(), "config": asdict(self.config),
                "data": self.data.fingerprint, "machine": self.machine}

    def load(self, state):
        """Takes over a checkpoint's dict, but for what the config says of rates and decays.

        Says which changes since then change the bits; ends the program for some others."""
        # The keys, over them what the machine made of some ("auto" tells nothing), and the data.
        old = state["config"] | state["machine"] | state["data"]
        new = asdict(self.config) | self.machine | self.data.fingerprint
        changed = {name for name in new if old.get(name) != new[name]}
        if "tokenizer" in changed:
            fail(f"{self.config.data_dir} has another tokenizer: restore it or use a new --out_dir")
        if changed & {"train", "val"} and "data_dir" not in changed:
            fail(f"{self.config.data_dir} holds other data: restore them or use another --data_dir")
        changes = [f"{name} {old.get(name)} → {new[name]}" for name in sorted(changed - FREE)]
        if changes:
            show(f"no longer the same run to the bit, since these differ: {', '.join(changes)}")
        self.model.load_state_dict(state["model"])
        for name in asdict(self):
            setattr(self, name, state[name])
        for name, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state[name])  # raises where other parameters are grouped
            if changes:  # (else what an optimizer counts in a group stays)
                optimizer.load_state_dict(optimizer.state_dict() | {"param_groups": groups})
        if state["scaler"]:  # fp16 was used
            self.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == WORLD_SIZE:
            set_rng_state(state["rng"][RANK])
        if changed & {"train", "block_size"}:
            self.epoch += self.sequence > 0  # a place among other blocks: a new epoch begins
            self.sequence = 0
        if changed & {"val", "eval_tokens", "block_size"}:
            self.best = None  # losses of other texts or windows do not compare


# ------------------------------------------------------------------------------------- log and stop

def show(text):
    """Prints above the progress bar; of several processes only the first one does."""
    if RANK == 0:
        tqdm.write(text)


def write_sample(run):
    """Continues the first held-out tokens; writes the text to out_dir/samples and returns it."""
    # Its own generator: a dropout may draw from the others. (No top_p: its sums fail on a GPU.)
    generator = torch.Generator(run.device).manual_seed(run.config.seed + run.step)
    prompt = on_device(run.data.val[:16], run)[None]  # (1, T)
    run.model.eval()
    with run.autocast:
        ids = torch.cat([prompt[0], *generate(run.model, prompt, 100, temperature=0.8, top_k=50,
                                              generator=generator)])
    text = run.data.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    path = run.out / "samples" / f"step_{run.step:06d}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


def cut_metrics(run):
    """Cuts from metrics.jsonl, an object a step, what is after run.step or was torn by a kill."""
    with open(run.out / "metrics.jsonl", "a+b") as file:
        size = file.seek(0)
        for step in re.finditer(rb'.*?"step": (\d+).*\n', file.read()):
            if int(step[1]) > run.step:
                break
            size = step.end()
        file.truncate(size)


def log_step(run, row, bar):
    """Writes a row to metrics.jsonl, and shows it in the bar or, without a terminal, in lines."""
    with open(run.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    if "val_loss" in row:
        loss = row["val_loss"]
        bits = loss / math.log(2) * run.data.tokens_per_byte
        note = " (on STAND-IN data)" if run.data.meta["stand_in"] else ""
        show(f"step {run.step}: held-out loss {loss:.4f}, {bits:.4f} bits per byte, perplexity "
             f"{math.exp(min(loss, 99)):.2f}; best {run.best['val_loss']:.4f} at step "
             f"{run.best['step']}{note}")
    text = f"loss {row['loss']:.4f}, {row['tokens_per_sec']:,.0f} tok/s"
    bar.set_postfix_str(text)
    bar.update()
    if bar.disable and (run.step == 1 or run.is_due(run.config.log_interval)):
        if run.step > 1:  # (the first one compiles, and tells nothing of the rest)
            tokens_left = (run.config.max_steps - run.step) * row["tokens"] / run.step
            text += f", {tqdm.format_interval(tokens_left / row['tokens_per_sec'])} left"
        show(f"step {run.step}/{run.config.max_steps}: {text}")


def catch_signals(signals):
    """Appends to a list what asks for a stop after the step; a second Ctrl-C leaves at once."""
    def handle(signum, frame):
        if signals and signum == signal.SIGINT and WORLD_SIZE == 1:  # (torchrun repeats it)
            os._exit(128 + signum)
        with suppress(OSError):  # whoever read it may be gone
            os.write(2, b"\ntrain.py: saves after this step; Ctrl-C again (no torchrun) ends now\n")
        signals.append(signum)
    for signum in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(signum) != signal.SIG_IGN:  # (nohup has SIGHUP ignored)
            signal.signal(signum, handle)


# -------------------------------------------------------------------------------------- checkpoints
# A checkpoint is a file of torch.save, then the digest of all before it. torch.load ignores that,
# and by itself would notice few flipped bytes.

TAIL = 39  # bytes of a digest: "sha256:" and 32
# What read_checkpoint makes sure of: the type of each value ("best" stands for its step).
CONTENT = {name: f.type for name, f in (KEYS | Run.__dataclass_fields__).items()}
CONTENT |= {"machine": dict, "tokenizer": str, "best": int, "val_loss": float}


def digest(raw):
    """b"sha256:" and the sha256 of the sha256s of an array's pieces, which all cores make."""
    pieces = np.split(raw, range(2**26, len(raw), 2**26))
    with ThreadPoolExecutor() as pool:
        parts = [part.digest() for part in pool.map(hashlib.sha256, pieces)]
    return b"sha256:" + hashlib.sha256(b"".join(parts)).digest()


def write_checkpoint(path, state):
    """Writes under a temporary name, flushes to disk, renames: the file is whole or not there."""
    temporary = path.with_name("checkpoint.tmp")
    with open(temporary, "w+b") as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:  # torch hides why it cannot write behind an error of its own
            raise e.__context__ or e
        f.flush()
        f.write(digest(np.memmap(f, np.uint8, "r")))
    prepare.fsync(temporary)
    os.replace(temporary, path)
    prepare.fsync(path.parent)  # the new name must reach the disk, too


def read_checkpoint(path, **kwargs):
    """The dict of a checkpoint, on the CPU. Raises ValueError where it is damaged or is none.

    It is loaded with weights_only: a stranger's file holds tensors and plain values, no code."""
    with prepare.explaining(f"{path} is damaged, or no checkpoint of this train.py"):
        raw = np.memmap(path, np.uint8, "r")
        if raw[-TAIL:].tobytes() != digest(raw[:-TAIL]):
            raise ValueError("its sha256 does not fit")
        state = torch.load(path, map_location="cpu", weights_only=True, **kwargs)
        config = TrainConfig(**state["config"])
        model_of(config, state["model"])  # raises for other names or shapes
        state["config"] = asdict(config)  # (a key that is new since has its default)
        best = state["best"] or {"step": 0, "val_loss": 0.0}
        found = best | state | state["data"] | state["config"] | {"best": best["step"]}
        for name, kind in CONTENT.items():
            if kind(found[name]) != found[name] or kind is int and found[name] < 0:
                raise TypeError(f"{name} = {found[name]!r:.60}")
    return state


def step_of(path):
    return int(path.stem[5:])


def checkpoints(folder):
    """The checkpoint files of a folder, oldest first."""
    return sorted([path for path in Path(folder).glob("step_*.pt") if path.stem[5:].isdecimal()],
                  key=step_of)


def load_checkpoint(source, **kwargs):
    """(path, dict) of a file, of the newest whole checkpoint in a folder, or of FOLDER/best.

    Damaged files are named on the way. Raises ValueError where there is none, or none is whole."""
    source = Path(source)
    if source.name == "best" and not source.exists():
        source, state = load_checkpoint(source.parent, mmap=True)
        if state["best"]:  # else nothing was evaluated, and the newest is as good as any
            source = source.with_name(f"step_{state['best']['step']:06d}.pt")
    paths = checkpoints(source)[::-1] or [source]
    if not paths[0].is_file():
        raise ValueError(
            f"no checkpoint {source}: name another, or begin by python train.py config/smollm2.py")
    for path in paths:
        try:
            return path, read_checkpoint(path, **kwargs)
        except ValueError as e:
            prepare.log(e)
    raise ValueError(f"no whole checkpoint in {source}: name another, or use another --out_dir")


def hint_of_best(folder, state):
    """Where a checkpoint's run had its lowest held-out loss, in brackets; "" if it is the last."""
    best = state["best"]
    if (not best or best["step"] + state["config"]["eval_interval"] > state["step"]  # none since
            or not (folder / f"step_{best['step']:06d}.pt").exists()):
        return ""
    return (f" (the held-out loss was lowest at step {best['step']}: "
            f"--checkpoint {shlex.quote(str(folder / 'best'))})")


def rng_state():
    """The states of all random generators of this process, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def set_rng_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][:torch.cuda.device_count()])


def save(run):
    """Writes a checkpoint, then deletes all but keep_checkpoints of the newest, and the best."""
    rng = of_all(rng_state())
    if RANK == 0:
        prepare.fsync(run.out / "metrics.jsonl")  # its rows come before their checkpoint
        path = run.out / f"step_{run.step:06d}.pt"
        write_checkpoint(path, run.state() | {"rng": rng})
        read_checkpoint(path, mmap=True)  # raises before an older one is gone
        for path in checkpoints(run.out)[:-run.config.keep_checkpoints]:  # (0: all)
            if not run.best or step_of(path) != run.best["step"]:
                path.unlink()


# -------------------------------------------------------------------------------------- the machine

def set_up_machine(config):
    """Chooses the device, joins the other processes, makes sums repeatable.

    Returns (device, dtype, what the bits of a run depend on besides its config and its data)."""
    try:
        device, dtype, reason = pick_device(config.device, config.dtype)
    except ValueError as e:
        fail(e, 2)
    machine = {"torch": torch.version.__version__, "numpy": np.__version__, "dtype": str(dtype)[6:],
               "threads": torch.get_num_threads(), "processes": WORLD_SIZE}
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        machine["device"] = f"cuda {torch.version.cuda} ({torch.cuda.get_device_name(device)})"
    else:
        keep_freed_memory()
        facts = torch.cpu.get_capabilities()  # (different processors can have one name)
        machine["processor"] = f"{facts.get('cpu_name')} #{zlib.crc32(repr(facts).encode()):x}"
        machine["device"] = f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"
    if config.deterministic and device.type != "mps":  # (there some operations cannot be)
        # NCCL asks when it starts; NVLS adds in no fixed order.
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory that it did not write: filling it would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if WORLD_SIZE > 1:
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart, with the addresses of the dead (pytorch #135712;
            # the count is each machine's own: for several the README has torchrun not share it).
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=RANK,
                                world_size=WORLD_SIZE, device_id=device if on_gpu else None)
    problem = compiler_problem(device) if config.compile else "as asked"
    machine["compile"] = not problem
    compiled = f"not compiled ({problem})" if problem else "compiled (up to a minute at first)"
    if not (problem or on_gpu):  # (there it is Triton, which comes with torch)
        machine["compiler"] = prepare.first_line(subprocess.getoutput(
            f"{os.environ.get('CXX', 'g++')} --version"))
    show(f"device   {device}, threads {machine['threads']}, processes {WORLD_SIZE}, "
         f"{machine['dtype']} ({reason}), {compiled}")
    return device, dtype, machine


# --------------------------------------------------------------------------------- the command line

# What makes a value of a text, by the type of its key. The choices refuse what is no bool.
READERS = {bool: lambda text: {"true": True, "false": False}.get(text.lower(), text),
           int: prepare.number(int, 0, 2**31), float: prepare.number(float, 0, 2e14),
           str: prepare.typed_path}


def read_recipe(path):
    """The plain assignments of a recipe as words of the command line. It is read, never run."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except Exception as e:  # a file can be wrong in any way
        fail(f"cannot read the recipe {path} (keys begin with --): {prepare.first_line(e)}", 2)
    words = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        try:
            [target] = node.targets
            words.append(f"--{target.id}={ast.literal_eval(node.value)}")
        except Exception:  # of anything else
            fail(f"{path}, line {node.lineno}: only key = VALUE, like batch_size = 4", 2)
    return words


def parse_args(argv):
    """(overrides, resume): the keys set by the recipe and, over it, by argv; what to resume from:
    True for out_dir, auto, a path, or None."""
    parser = prepare.new_parser("train.py", __doc__)
    add = parser.add_argument
    add("recipe", nargs="?", type=read_recipe, default=[],
        help="a file of plain assignments to the keys below")
    add("--resume", nargs="?", const=True, type=prepare.typed_path, metavar="PATH",
        help="continue the newest checkpoint of out_dir, or PATH: a folder, a file; auto: if any")
    for f in KEYS.values():
        choices = (True, False) if f.type is bool else f.metadata["choices"]
        add(f"--{f.name}", type=READERS[f.type], default=argparse.SUPPRESS, choices=choices,
            metavar=f.type.__name__.upper(),
            help=f"{f.metadata['help'].replace('%', '%%')} [{f.default}]")
    args, _ = parser.parse_known_args(argv)  # finds the recipe
    args, rest = parser.parse_known_args(args.recipe + argv)  # later words win
    if rest:
        name = rest[0].strip("-").partition("=")[0]
        near = difflib.get_close_matches(name, KEYS, 1) or ["help"]
        fail(f"there is no option {rest[0]}: did you mean --{near[0]}?", 2)
    overrides = vars(args)
    del overrides["recipe"]
    return overrides, overrides.pop("resume")


# What the keys obey together: expressions in their names, shown as they are tested.
RULES = """min(max_steps, batch_size, block_size, eval_tokens, learning_rate) > 0
min(vocab_size, hidden_size, intermediate_size, num_hidden_layers, rope_theta) > 0
num_attention_heads and hidden_size % (2 * num_attention_heads) == 0
num_key_value_heads and num_attention_heads % num_key_value_heads == 0
block_size <= max_position_embeddings
max_position_embeddings >= 16 + 100 or not sample_interval
batch_size % (processes * (micro_batch_size or 1)) == 0
min_lr <= learning_rate
max(beta1, beta2) < 1"""


def check(config, processes=WORLD_SIZE):
    """Ends the program where values do not fit each other: names them and the rule they break."""
    found = asdict(config) | {"processes": processes}
    for rule in RULES.splitlines():
        if not eval(rule, {}, found):
            names = re.findall(r"\w+", rule)
            values = ", ".join(f"{name} = {found[name]}" for name in found if name in names)
            fail(f"{values}: {rule} must hold", 2)


# ------------------------------------------------------------------------------------ start and end

def find_run(overrides, resume):
    """(out, source): the folder of the run, and what to resume from (None: nothing)."""
    named = overrides.get("out_dir")
    out = source = Path(named or TrainConfig.out_dir)
    if resume not in (None, True, "auto"):
        source = Path(resume)
        if source.suffix == ".py":
            fail(f"--resume {source}: that is a recipe; write train.py {source} --resume", 2)
        out = source if source.is_dir() else source.parent
        if named and out.resolve() != Path(named).resolve():
            fail(f"--resume={source} continues in {out}, not in out_dir = {named}: give one", 2)
    overrides["out_dir"] = str(out)
    is_run = checkpoints(out)
    if not resume or resume == "auto" and not is_run:
        source = None
    for name in "metrics.jsonl", "samples", "tokenizer":
        if (out / name).exists() and not is_run and not (out / "run.json").exists():
            fail(f"out_dir = {out} holds {name} of something else: choose another", 2)
    return out, source


def load_run(source, overrides):
    """(config, model, state): model has the weights of init_from, state is a checkpoint's dict;
    None where there is no such thing to begin from."""
    out, start = overrides["out_dir"], overrides.get("init_from")
    model, state, base = None, None, {}
    if os.path.isdir(start or ""):  # elsewhere its name could be one of the hub's
        overrides["init_from"] = os.path.abspath(start)
    if source:
        try:
            source, state = load_checkpoint(source)
        except ValueError as e:
            fail(e, 1 if checkpoints(out) else 2)
        base = state["config"]
        show(f"resuming from {source} (step {state['step']})")
    elif checkpoints(out):
        fail(f"{out} holds a run: --resume it, use another --out_dir, or delete it", 2)
    elif source := start:
        try:
            model = from_pretrained(source)
        except ValueError as e:
            fail(f"init_from: {e} (of a run: the folder that tools.export makes)")
        base = asdict(model.config)
    for name in *SIZES, "optimizer":
        if name in base and overrides.get(name, base[name]) != base[name]:
            fail(f"{source} has {name} = {base[name]}, not {overrides[name]}: leave it out, or "
                 "start in another --out_dir")
    config = TrainConfig(**base | overrides)
    config.lr_decay_steps = config.lr_decay_steps or config.max_steps  # (kept when extended)
    return config, model, state


def open_data(config):
    """Opens data_dir; makes the default one where it is missing. Ends the program if unfit."""
    folder, T = Path(config.data_dir), config.block_size
    try:
        if RANK == 0 and folder == Path(prepare.DEFAULT_OUT_DIR) and not folder.exists():
            show(f"{folder} is missing: preparing it")
            prepare.prepare(prepare.parse_args([]))
        of_all(None)  # the others wait for it
        data = prepare.Data(folder)
    except (OSError, ValueError) as e:
        fail(f"data_dir = {folder} cannot be used: {e}. Name another, or prepare it: as the recipe "
             f"says, or python prepare.py --input FILE --out_dir {shlex.quote(str(folder))}",
             2 if isinstance(e, FileNotFoundError) else 1)
    needed, n = data.meta["vocab_size"], len(data.train)
    if needed > config.vocab_size:
        fail(f"vocab_size = {config.vocab_size}, but {folder} needs {needed}: start a run with it")
    if n <= T:
        fail(f"block_size = {T} needs {T + 1} tokens, {folder} has {n}: lower it, or use more text")
    return data


def set_up(source, overrides):
    """The Run that the loop needs, as the checkpoint left it."""
    config, model, state = load_run(source, overrides)
    check(config)
    if state and state["step"] >= config.max_steps:
        show(f"the run is finished: step {state['step']} of {config.max_steps}. Longer: python "
             f"train.py --resume={shlex.quote(config.out_dir)} --max_steps={state['step'] + 1000}")
        raise SystemExit
    place = set_up_machine(config)
    run = Run(config, model, open_data(config), *place)
    try:
        if state:
            run.load(state)
    except Exception as e:  # a stranger's file can be wrong in any way
        if is_out_of_memory(e):
            raise
        fail(f"the checkpoint does not hold a run: {e!r}")
    mine = (run.step, run.data.fingerprint, run.machine["dtype"],
            asdict(config) | {"out_dir": "", "data_dir": ""})
    starts = of_all(mine)
    if starts != [mine] * WORLD_SIZE:
        fail(f"the processes are at steps {[step for step, *_ in starts]}, or data, dtypes or "
             "keys differ: each machine needs the same command, data_dir and (to resume) out_dir")
    if run.machine["compile"]:
        run.model.compile_for_training(config.batch_size * config.block_size if WORLD_SIZE == 1
                                       and config.micro_batch_size in (0, config.batch_size) else 0)
    if WORLD_SIZE > 1:
        for p in run.model.parameters():
            dist.broadcast(p.data, 0)  # another machine's random numbers may be rounded otherwise
    return run


def set_up_folder(run, lock):
    """Readies out_dir, shows what will be done. Checkpoints later than run.step are set aside."""
    config, data, saved = run.config, run.data, checkpoints(run.out)
    kept = sum(step_of(path) <= run.step for path in saved)
    count = max(1, config.keep_checkpoints + 2 - kept)  # two: the best, and one being written
    size = 12 * run.size / 1e9  # GB of one: a weight and two means (Muon: one), in fp32
    disk = next(path for path in (run.out, *run.out.parents) if path.exists())
    room = shutil.disk_usage(disk).free / 1e9
    if room < count * size:
        fail(f"{count} more checkpoints need {count * size:.1f} GB, but {run.out} has room for "
             f"{room:.1f}: free some, lower keep_checkpoints, or use another --out_dir")
    lock.acquire()  # (makes the folder)
    for path in saved[kept:]:
        path.rename(f"{path}.{time.time_ns()}.superseded")  # (nor does one replace another)
    (run.out / "run.json").write_text(json.dumps({
        "command": shlex.join(sys.argv), "config": asdict(config),
        "git": subprocess.getoutput(  # "" without git
            f"git -C {shlex.quote(str(Path(__file__).parent))} rev-parse HEAD 2>{os.devnull}"),
        **run.machine, "python": sys.version}, indent=2))
    (run.out / "tokenizer").mkdir(exist_ok=True)
    for file in (data.folder / "tokenizer").glob("*.*"):  # (without rights: it may be another's)
        shutil.copyfile(file, run.out / "tokenizer" / file.name)
    cut_metrics(run)
    B, T, steps = config.batch_size, config.block_size, config.max_steps
    epochs = steps * B / blocks_per_epoch(len(data.train), T)
    stand_in = f", STAND-IN {data.meta['stand_in']}" if data.meta["stand_in"] else ""
    show(f"""\
data     {data.folder}{stand_in}: {len(data.train):,} training and {len(data.val):,} held-out tokens
         of {data.meta['source']}
model    {run.size:,} parameters
run      steps {run.step} to {steps}, {B} x {T} = {B * T:,} tokens a step, {epochs:.1f} epochs
rates    reach min_lr at step {config.lr_decay_steps}
writes   {run.out}/: checkpoints of up to {size:.2f} GB, metrics, samples""")


def main(argv):
    prepare.protect_streams()  # a closed pipe or a full disk loses lines, not steps
    overrides, resume = parse_args(argv)
    try:
        out, source = find_run(overrides, resume)
    except OSError as e:  # a folder that nobody may read, a name that is too long
        fail(e, 2)
    again = f"python train.py --resume={shlex.quote(str(out))}"
    if WORLD_SIZE > 1:
        again = "the same command with --resume=auto"
    signals = []  # in the order in which they came
    lock = filelock.FileLock(out / ".lock", timeout=0)  # until this process ends, in any way
    try:
        if RANK == 0 and (out / ".lock").exists():
            lock.acquire()
            (out / "checkpoint.tmp").unlink(missing_ok=True)  # what a killed save left takes room
        run = set_up(source, overrides)
        catch_signals(signals)
        if RANK == 0:
            set_up_folder(run, lock)
        train(run, signals)
    except filelock.Timeout:
        fail(f"another process is training in {out}: wait for it, or choose another --out_dir "
             f"(if there is none: its machine broke down, delete {out}/.lock)")
    except (FloatingPointError, OSError) as e:
        saved = checkpoints(out)
        fail(f"{e}. {saved[-1]} is whole: {again} continues from it" if saved else e)
    except Exception as e:
        if signals:  # Ctrl-C reaches the C++ compiler, too, and torchrun ends other processes
            fail(f"stopped in a step; {again} continues the last save, if any", 128 + signals[0])
        if not is_out_of_memory(e):
            raise
        fail("out of memory: try --micro_batch_size=1, or a lower --block_size")
    code = 0
    written = f"{out}/step_{run.step:06d}.pt is written{hint_of_best(out, run.state())}"
    if run.step < run.config.max_steps:
        code = 128 + (signals or [signal.SIGTERM])[0]  # (another process had one)
        show(f"stopped at step {run.step}; {written}. Resume with: {again}")
    else:
        show(f"done at step {run.step}; {written}. "
             f"Next: python sample.py --prompt \"ROMEO:\" --checkpoint {shlex.quote(str(out))}")
    if WORLD_SIZE > 1:
        # It would hang, or abort: its end waits for gloo, and gloo for Python (pytorch #190489).
        dist.barrier()
        lock.release()  # (where there is no flock, it is a file)
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
