"""Trains SmolLM2 from scratch, and goes on after any stop as if nothing had happened.

    python train.py config/smollm2.py                         # starts a run (and prepares the default data if missing)
    python train.py config/tiny.py --max_steps=100            # any key of TrainConfig: --key=value or --key value
    python train.py --resume                                  # goes on from the newest whole checkpoint in out/
    python train.py --resume --max_steps=5050                 # makes a finished run longer
    torchrun --standalone --nproc_per_node=4 train.py config/smollm2.py --resume=auto
"""
import argparse
import ast
import ctypes
import difflib
import hashlib
import inspect
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import SmolLM2, SmolLM2Config, from_pretrained, generate

# ----------------------------------------------------------------------------------------------------------- config


@dataclass
class TrainConfig:
    # --- the run
    out_dir: str = "out"  # checkpoints, metrics.jsonl and samples are written here
    data_dir: str = "data/shakespeare"  # made by prepare.py
    init_from: str = ""  # start from these weights: a folder in Hugging Face's format or a hub name (empty: random)
    seed: int = 1337  # of the first weights, the order of the data and the samples
    max_steps: int = 5000  # optimizer steps of the whole run
    # --- the batch
    batch_size: int = 4  # sequences in one optimizer step, over all processes
    micro_batch_size: int = 0  # sequences that one process runs at once; fewer take less memory (0: its whole share)
    block_size: int = 256  # tokens in a sequence
    # --- the optimizer
    optimizer: str = "adamw"  # adamw; or muon: Muon for the layers' matrices, AdamW for the embedding and the norms
    learning_rate: float = 3e-4  # of AdamW, after the warm-up
    muon_learning_rate: float = 0.02  # of Muon, after the warm-up; it follows the same curve
    lr_schedule: str = "cosine"  # cosine; or wsd: constant, then linear decay over the last fifth
    min_lr: float = 3e-5  # at the end of the decay, and after it
    warmup_steps: int = 100  # steps of linear warm-up
    lr_decay_steps: int = 0  # step at which the decay ends (0: the max_steps of the run's start)
    weight_decay: float = 0.1  # on matrices, not on norms
    beta1: float = 0.9  # decay of the gradient's running mean
    beta2: float = 0.95  # decay of its square's running mean
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    # --- intervals, in steps (0: never)
    log_interval: int = 10  # a line in metrics.jsonl, and on a screen that shows no bar
    eval_interval: int = 250  # the held-out loss
    eval_tokens: int = 1_000_000  # at most so many held-out tokens
    sample_interval: int = 500  # a generated text, in out_dir/samples
    checkpoint_interval: int = 250  # a checkpoint; the end of a run, Ctrl-C and SIGTERM make one, too
    keep_checkpoints: int = 2  # newest checkpoints that stay, beside the best one (0: all)
    # --- the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16: of the products; weights and optimizer stay float32
    compile: bool = True  # torch.compile, where it works
    deterministic: bool = True  # the same bits in every run; on a GPU this costs some speed
    # --- the model's sizes (the default is SmolLM2-135M)
    vocab_size: int = 49152  # rows of the embedding
    hidden_size: int = 576  # width of the residual stream
    intermediate_size: int = 1536  # width of the MLP
    num_hidden_layers: int = 30  # decoder layers
    num_attention_heads: int = 9  # query heads
    num_key_value_heads: int = 3  # key and value heads, each shared by several query heads
    max_position_embeddings: int = 8192  # longest context
    rope_theta: float = 100_000.0  # base of the rotary angles
    rms_norm_eps: float = 1e-5  # added to the mean square
    initializer_range: float = 576**-0.5  # std of the first weights: 1/24 as published, first loss 11.3 (0.02: 10.95)


CHOICES = {"dtype": ("auto", "float32", "bfloat16", "float16"), "optimizer": ("adamw", "muon"),
           "lr_schedule": ("cosine", "wsd")}
FREE_ON_RESUME = {"out_dir", "max_steps", "log_interval", "eval_interval", "eval_tokens", "sample_interval",
                  "checkpoint_interval", "keep_checkpoints", "device", "dtype", "compile", "deterministic"}
FIXED_ON_RESUME = [*(f.name for f in fields(SmolLM2Config) if f.name != "initializer_range"), "optimizer"]
MODEL_KEYS = [f.name for f in fields(SmolLM2Config)]
MAY_BE_ZERO = {"seed", "micro_batch_size", "min_lr", "warmup_steps", "lr_decay_steps", "weight_decay", "beta1", "beta2",
               "grad_clip", "log_interval", "eval_interval", "sample_interval", "checkpoint_interval", "keep_checkpoints"}


def usage_error(message):
    """Ends the program: what the user typed is wrong. (sys.exit(text), with code 1, is for all other failures.)"""
    print("train.py:", *message.split(), file=sys.stderr)  # in one line, whatever was typed
    raise SystemExit(2)


def unknown_key(key):
    near = difflib.get_close_matches(key, [f.name for f in fields(TrainConfig)], 1, 0.5)
    return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "; --help lists the keys")


def typed(key, value):
    """value (from a recipe, or text from the command line) in the type of the key. Raises ValueError."""
    kind = next(f.type for f in fields(TrainConfig) if f.name == key)
    try:
        if kind is bool:
            result = {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        elif isinstance(value, str) or kind is type(value) or (kind, type(value)) == (float, int):
            result = kind(value)
        else:
            raise ValueError
        if kind is float and not math.isfinite(result):
            raise ValueError
        if kind is str and ("\0" in result or result.splitlines() not in ([], [result])):  # errors name it in one line
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{key} = {value!r}: expected {kind.__name__}{' in one line' * (kind is str)}") from None
    return result


def read_recipe(path):
    """The plain assignments of a recipe as a dict. Ends the program for anything else that is in it."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        usage_error(f"cannot read the recipe {path}: {e.strerror}")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        usage_error(f"the recipe {path} is not Python: {e}")
    values = {}
    for node in tree.body:
        try:
            if isinstance(node, ast.Expr) and isinstance(node.value.value, str):  # a docstring
                continue
            (target,) = node.targets
            key = target.id
            value = ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            usage_error(f"{path}, line {node.lineno}: a recipe holds plain assignments only, like batch_size = 4")
        if key not in {f.name for f in fields(TrainConfig)}:
            usage_error(f"{path}, line {node.lineno}: {unknown_key(key)}")
        try:
            values[key] = typed(key, value)
        except ValueError as e:
            usage_error(f"{path}, line {node.lineno}: {e}")
    return values


def parse_args(argv):
    """Returns (overrides, args): the keys set by the recipe and, over it, the command line; and the other flags."""
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    parser.add_argument("recipe", nargs="?", help="a file of plain assignments, such as config/smollm2.py")
    parser.add_argument("--resume", nargs="?", const="", metavar="PATH", help="go on from a checkpoint: the newest in "
                        "out_dir, or in the folder PATH, or the file PATH; 'auto': where there is one, else start")
    parser.add_argument("--overwrite", action="store_true", help="start anew in an out_dir that holds a run: delete it")
    # A key's help is the comment behind it in TrainConfig, and its group the comment above.
    for line in inspect.getsource(TrainConfig).splitlines():
        if group_line := re.match(r" +# --- (.*)", line):
            group = parser.add_argument_group(group_line[1])
        elif key_line := re.match(r" +(\w+): (\w+) = (.*?)  # (.*)", line):
            key, kind, default, text = key_line.groups()
            group.add_argument(f"--{key}", metavar=kind.upper(), default=argparse.SUPPRESS,
                               help=f"{text} [{default}]".replace("%", "%%"))
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        usage_error(unknown_key(word.lstrip("-").split("=")[0]) if word.startswith("-") else
                    f"{word!r} is one argument too many: one recipe, then --key=value")
    if args.resume and args.resume.endswith(".py"):
        usage_error(f"--resume {args.resume}: that is a recipe, not a checkpoint; write train.py {args.resume} --resume")
    if args.overwrite and args.resume is not None:
        usage_error("--overwrite starts anew and --resume goes on: choose one")
    overrides = read_recipe(args.recipe) if args.recipe else {}
    for key, text in vars(args).items():
        if key not in ("recipe", "resume", "overwrite"):
            try:
                overrides[key] = typed(key, text)
            except ValueError as e:
                usage_error(f"--{e}")
    return overrides, args


def check(config, world_size):
    """Ends the program with all that is wrong with the config's values, at once."""
    wrong = []
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in CHOICES and value not in CHOICES[f.name]:
            wrong.append(f"{f.name} = {value!r}: one of {', '.join(CHOICES[f.name])}")
        elif f.type in (int, float) and (value < 0 or value == 0 and f.name not in MAY_BE_ZERO):
            wrong.append(f"{f.name} = {value}: must be {'0 or more' if f.name in MAY_BE_ZERO else 'more than 0'}")
        elif f.type is int and value >= 2**48:
            wrong.append(f"{f.name} = {value}: too large")
    if not wrong:
        wrong += [f"{key} = {getattr(config, key)}: must be less than 1" for key in ("beta1", "beta2")
                  if getattr(config, key) >= 1]
        for a, b in [("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")]:
            if getattr(config, a) % getattr(config, b):
                wrong.append(f"{a} = {getattr(config, a)}: not a multiple of {b} = {getattr(config, b)}")
        if config.hidden_size // config.num_attention_heads % 2:
            wrong.append("hidden_size / num_attention_heads: must be even, for the rotary pairs")
        if config.block_size > config.max_position_embeddings:
            wrong.append(f"block_size = {config.block_size}: more than max_position_embeddings = "
                         f"{config.max_position_embeddings}")
        if config.batch_size % world_size:
            wrong.append(f"batch_size = {config.batch_size}: not a multiple of the {world_size} processes")
        elif config.micro_batch_size and config.batch_size // world_size % config.micro_batch_size:
            wrong.append(f"micro_batch_size = {config.micro_batch_size}: does not divide the "
                         f"{config.batch_size // world_size} sequences of a process")
        c, tokens = config, (config.micro_batch_size or config.batch_size // world_size) * config.block_size
        layer = 3 * c.hidden_size * c.intermediate_size + 4 * c.hidden_size**2
        if 16 * (c.vocab_size * c.hidden_size + c.num_hidden_layers * layer) + 4 * tokens * c.hidden_size > 2**43:
            wrong.append("the model or the micro-batch needs more than 8 TiB: lower the sizes")
    if wrong:
        usage_error("; ".join(wrong))


# ------------------------------------------------------------------------------------------------------ the machine


@dataclass
class Machine:
    device: torch.device
    dtype: torch.dtype
    compile: bool
    reason: str  # why these
    rank: int = 0
    world_size: int = 1

    @property
    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def fingerprint(self, config):
        """What the bits of a run depend on, beside its config."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else \
            torch.backends.cpu.get_cpu_capability()
        return {"torch": str(torch.__version__), "device": f"{self.device.type} ({name})", "dtype": str(self.dtype)[6:],
                "compile": self.compile, "threads": torch.get_num_threads(), "processes": self.world_size,
                "deterministic": config.deterministic}


def native_bf16():
    """True where this processor multiplies bf16 itself; elsewhere it is emulated, slower than fp32."""
    get = getattr(torch.cpu, "get_capabilities", dict)
    caps = get() or {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
    return any(caps.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def compiler_problem(device):
    """Compiles and runs one small function; returns why that does not work, or None."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as e:  # whatever it is, training goes on without the compiler
        return re.sub(r"\s+", " ", str(e)).strip()[:90] or type(e).__name__
    finally:
        torch._dynamo.reset()


def fresh_store(rank):
    """A TCPStore of this attempt's own: torchrun's outlives a restart, and with it the addresses of the dead.

    Source: https://github.com/pytorch/pytorch/issues/135712"""
    addr, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchruns = dist.TCPStore(addr, port)
    if rank == 0:
        store = dist.TCPStore(addr, 0, is_master=True, wait_for_workers=False)
        torchruns.set("port", str(store.port))
        return store
    while True:
        try:
            return dist.TCPStore(addr, int(torchruns.get("port")), timeout=timedelta(seconds=2))
        except dist.DistError:  # the port of an attempt before: process 0 has not set its own yet
            time.sleep(0.1)


def set_up_machine(config):
    """Chooses device, dtype and compilation, joins the other processes, and makes the arithmetic repeatable."""
    rank, local_rank, world_size = (int(os.environ.get(key, default)) for key, default in
                                    [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = config.device if config.device != "auto" else "cuda" if has_cuda else "mps" if has_mps else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        usage_error(f"device = {name!r} is not to be had here: {(str(e) or repr(e)).splitlines()[0]}")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        best, why = ("bfloat16", "") if major >= 8 else ("float16", f"compute capability {major}.{minor} emulates bf16")
        torch.cuda.set_device(device)
    elif device.type == "cpu" and native_bf16():
        best, why = "bfloat16", "the processor has it"
    else:
        best, why = "float32", "no native bf16"
    dtype = best if config.dtype == "auto" else config.dtype
    reason = "as asked" if config.dtype != "auto" else why
    if world_size > 1:
        store = fresh_store(rank) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory it did not write
    if device.type == "cpu":
        keep_memory()
    problem = compiler_problem(device) if config.compile else "as asked"
    compiled = "compiled" if problem is None else f"not compiled ({problem})"
    return Machine(device, getattr(torch, dtype), problem is None, f"{dtype} ({reason}), {compiled}" if reason else
                   f"{dtype}, {compiled}", rank, world_size)


def keep_memory():
    """Lets glibc keep freed memory: by default each step gives hundreds of MB back and pays the page faults again."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
    except (AttributeError, OSError, TypeError):  # another C library
        pass


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    train: np.ndarray  # uint16 ids, on disk
    val: np.ndarray
    meta: dict
    folder: Path

    def fingerprint(self):
        return f"{self.meta['train_sha256'][:12]}+{self.meta['val_sha256'][:12]}"


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_data(config, is_first):
    """Opens data_dir, preparing it where it is the default and missing. Ends the program unless all is as prepared."""
    import prepare

    folder = Path(config.data_dir)
    if is_first and folder == Path(prepare.DEFAULT_OUT_DIR) and not (folder / "meta.json").exists():
        print(f"{folder} is missing: preparing it", flush=True)
        prepare.main([])
    if dist.is_initialized():
        dist.barrier()
    if not (folder / "meta.json").exists():
        usage_error(f"data_dir = {config.data_dir!r} holds no prepared data: python prepare.py --input FILE "
                    f"--out_dir {config.data_dir}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rest = json.dumps({k: v for k, v in meta.items() if k != "sha256"}, sort_keys=True)
        wrong = [] if hashlib.sha256(rest.encode()).hexdigest() == meta["sha256"] else ["meta.json was changed"]
        wrong += [f"{key} in meta.json is no number" for key in ("vocab_size", "train_tokens", "val_tokens", "val_bytes")
                  if type(meta[key]) is not int]
        for name in ("train", "val") if not wrong else ():
            path, ids = folder / f"{name}.bin", meta[f"{name}_tokens"]
            if path.stat().st_size != 2 * ids:
                wrong.append(f"{name}.bin has {path.stat().st_size:,} bytes, meta.json says {2 * ids:,}")
            elif sha256(path) != meta[f"{name}_sha256"]:
                wrong.append(f"{name}.bin is not the file that meta.json describes (sha256)")
        if wrong:
            raise ValueError("; ".join(wrong))
        train, val = (np.memmap(folder / f"{name}.bin", dtype="<u2", mode="r") for name in ("train", "val"))
        largest = max(int(ids[i:i + 2**24].max()) for ids in (train, val) for i in range(0, len(ids), 2**24))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        sys.exit(f"train.py: {folder} is damaged: {e}; make it again with prepare.py")
    if max(largest + 1, meta["vocab_size"]) > config.vocab_size:
        sys.exit(f"train.py: {folder} has ids up to {max(largest, meta['vocab_size'] - 1)}, but vocab_size = "
                 f"{config.vocab_size}: raise it, or prepare with another tokenizer")
    if len(train) <= config.block_size or len(val) < 2:
        sys.exit(f"train.py: {folder} has {len(train)} training tokens, but block_size = {config.block_size} needs "
                 f"{config.block_size + 1}: lower it, or prepare more text")
    return Data(train, val, meta, folder)


def blocks_per_epoch(n, T):
    return max(1, n // T - 1)  # one less than fit, to leave room for the offset


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n, T):
    """The starts of an epoch's blocks of T tokens, out of n: every block once, shuffled, the cuts moved each epoch."""
    rng, blocks = np.random.default_rng((seed, epoch)), blocks_per_epoch(n, T)
    return rng.integers(n - blocks * T) + T * rng.permutation(blocks)


def get_batch(data, config, machine, step):
    """This process's part of the batch of a step (from 0): x, y (share, block_size), a function of seed and step."""
    n, T, share = len(data.train), config.block_size, config.batch_size // machine.world_size
    first = step * config.batch_size + machine.rank * share
    places = (divmod(i, blocks_per_epoch(n, T)) for i in range(first, first + share))
    starts = [epoch_order(config.seed, epoch, n, T)[i] for epoch, i in places]
    rows = torch.from_numpy(np.stack([data.train[s:s + T + 1] for s in starts]).astype(np.int64))
    if machine.device.type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(machine.device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


# ------------------------------------------------------------------------------------------------------ checkpoints
# A checkpoint is a file of torch.save, then DIGEST_MARK and the sha256 of all before it: torch.load reads over them.

DIGEST_MARK = b"sha256:"
CHECKPOINT_TYPES = {"step": int, "model": dict, "optimizer": dict, "scaler": dict, "rng": list, "config": dict,
                    "machine": dict, "data": str, "seconds": float, "best": (dict, type(None))}


class HashingFile:
    """A file for torch.save that hashes what passes, and remembers an error that torch would hide behind its own."""

    def __init__(self, file):
        self.file, self.hash, self.error = file, hashlib.sha256(), None

    def write(self, part):
        try:
            self.hash.update(part)
            return self.file.write(part)
        except OSError as e:
            self.error = e
            raise

    def flush(self):
        self.file.flush()


def write_checkpoint(path, state):
    """Writes under a temporary name, flushes to disk, renames: at any instant the file is whole or not there."""
    tmp = path.with_suffix(".tmp")
    with open(tmp, "wb") as f:
        hashing = HashingFile(f)
        try:
            torch.save(state, hashing)
        except RuntimeError:
            raise hashing.error or OSError(f"cannot write {tmp}") from None
        f.write(DIGEST_MARK + hashing.hash.digest())
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
    if os.name == "posix":  # the new name must reach the disk, too
        fd = os.open(path.parent, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def read_checkpoint(path, **kwargs):
    """The dict of a checkpoint, on the CPU. Raises ValueError where the file is damaged or is none.

    weights_only: a file from a stranger can hold tensors and plain values, and runs no code."""
    tail = len(DIGEST_MARK) + 32
    with open(path, "rb") as f:
        left, digest = os.fstat(f.fileno()).st_size - tail, hashlib.sha256()
        while left > 0 and (part := f.read(min(left, 2**22))):
            digest.update(part)
            left -= len(part)
        if f.read() != DIGEST_MARK + digest.digest():
            raise ValueError(f"{path} is damaged (its sha256 does not fit)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, **kwargs)
        if odd := [key for key, kind in CHECKPOINT_TYPES.items() if not isinstance(state.get(key), kind)]:
            raise ValueError(f"it has no {odd[0]}")
        with torch.device("meta"):
            model = SmolLM2(SmolLM2Config(**{key: typed(key, state["config"][key]) for key in MODEL_KEYS}))
        shapes, wanted = ({k: v.shape for k, v in weights.items()} for weights in (state["model"], model.state_dict()))
        if shapes != wanted or state["step"] < 0:
            raise ValueError("its weights or its step do not fit its config")
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it holds more than tensors and plain values, and could run code") from None
    except Exception as e:
        raise ValueError(f"{path} is not a checkpoint of train.py: {(str(e) or repr(e)).splitlines()[0]}") from None
    return state


def step_of(path):
    return int(path.stem.removeprefix("step_"))


def checkpoints(out_dir):
    """The checkpoint files of a folder, oldest first."""
    found = [p for p in Path(out_dir).glob("step_*.pt") if p.stem.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of)


def load_checkpoint(source, log=print, **kwargs):
    """(path, dict) of a checkpoint file, or of the newest whole one in a folder; (None, None) where there is none.

    Damaged files are named on the way. Raises ValueError where only damaged ones are left."""
    source = Path(source)
    paths = checkpoints(source)[::-1] if source.is_dir() else [source] if source.exists() else []
    for path in paths:
        try:
            return path, read_checkpoint(path, **kwargs)
        except (ValueError, OSError) as e:
            log(f"{e}{', trying the one before' if path != paths[-1] else ''}")
    if paths:
        raise ValueError(f"no whole checkpoint in {source}")
    return None, None


def rng_state():
    """The states of all random generators of this process, as tensors and plain values."""
    numpy_state = np.random.get_state()
    return {"python": random.getstate(), "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def lock(out_dir):
    """Keeps a second process out of out_dir until this one ends, however it ends. Returns the open lock file."""
    f = open(out_dir / ".lock", "a+")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f"train.py: another process is training in {out_dir}: wait for it, or choose another --out_dir")
    return f


# ---------------------------------------------------------------------------------------------------- the procedure


def learning_rate(config, step):
    """Of the step after `step` done ones: linear warm-up, decay down to min_lr at lr_decay_steps, then min_lr."""
    warmup = min(config.warmup_steps, config.lr_decay_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if step >= config.lr_decay_steps:
        return config.min_lr
    if config.lr_schedule == "wsd":
        part = min(1, 5 * (1 - step / config.lr_decay_steps))
    else:
        part = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.lr_decay_steps - warmup)))
    return config.min_lr + part * (config.learning_rate - config.min_lr)


def make_optimizers(model, config):
    """One or two optimizers, by their keys in a checkpoint. Their groups carry `peak`, the rate after the warm-up.

    Muon: Jordan 2024 (kellerjordan.github.io/posts/muon), torch's own: the momentum of a matrix, made orthogonal."""
    muon = config.optimizer == "muon"
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2] if muon else []
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    groups = [{"params": [p for p in others if p.dim() == 2], "weight_decay": config.weight_decay},
              {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    optimizers = {"optimizer": torch.optim.AdamW(groups, config.learning_rate, betas, fused=True)}
    if muon:
        optimizers["muon"] = torch.optim.Muon(hidden, config.muon_learning_rate, weight_decay=config.weight_decay)
    for group in all_groups(optimizers):
        group["peak"] = group["lr"]
    return optimizers


def all_groups(optimizers):
    return [group for optimizer in optimizers.values() for group in optimizer.param_groups]


@torch.no_grad()
def evaluate(net, data, config, machine):
    """The mean loss (nats a token) over the held-out ids, in fixed windows, each token once; shared by all processes."""
    n, T = min(len(data.val) - 1, config.eval_tokens), config.block_size
    B = config.micro_batch_size or config.batch_size // machine.world_size
    starts, total = range(0, n, T), torch.zeros((), dtype=torch.float64)
    for i in range(machine.rank * B, len(starts), machine.world_size * B):
        x, y = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -100)  # one shape for all: -100 does not count
        for row, s in enumerate(starts[i:i + B]):
            ids = torch.from_numpy(data.val[s:min(s + T, n) + 1].astype(np.int64))
            x[row, :len(ids) - 1], y[row, :len(ids) - 1] = ids[:-1], ids[1:]
        with machine.autocast:
            _, loss = net(x.to(machine.device), y.to(machine.device), logits_to_keep=None)
        total += loss.item() * (y >= 0).sum()
    if machine.world_size > 1:
        total = total.to(machine.device, torch.float32)
        dist.all_reduce(total)
    return total.item() / n


def write_sample(model, data, config, machine, step):
    """Continues the first held-out tokens, and writes the text to out_dir/samples; returns it."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(data.folder / "tokenizer")
    except Exception as e:  # no reason to lose a run
        return f"none: no tokenizer in {data.folder / 'tokenizer'}: {(str(e) or repr(e)).splitlines()[0]}"
    generator = torch.Generator(machine.device).manual_seed(config.seed + step)  # its own: training draws from others
    prompt = torch.from_numpy(data.val[:16].astype(np.int64))[None].to(machine.device)
    with machine.autocast:
        new = generate(model, prompt, min(100, config.max_position_embeddings - prompt.size(1)), temperature=0.8,
                       top_k=50, generator=generator)
        text = tokenizer.decode(prompt[0].tolist() + [ids.item() for ids in new])
    path = Path(config.out_dir, "samples", f"step_{step:06d}.txt")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


# Dense bf16 (T4: fp16) peaks from the vendors' datasheets, FLOP/s, for MFU.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12,
         "3090": 71e12, "T4": 65e12}


class Metrics:
    """metrics.jsonl: one JSON object a line, each written whole and at once; and TensorBoard's events, if installed."""

    def __init__(self, path, step):
        """Opens the file for a run at `step`: cuts off what lies beyond, and a line that a kill has torn."""
        self.file = open(path, "a+b", buffering=0)
        self.file.seek(0)
        end = 0
        for line in self.file.read().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        self.file.truncate(end)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.events = SummaryWriter(path.parent / "tensorboard", purge_step=step + 1)  # hides what lies beyond
        except ImportError:
            self.events = None

    def write(self, device, **values):
        self.file.write(json.dumps(values).encode() + b"\n")
        if self.events:
            for key, value in {**values, "memory_gb": peak_memory(device)}.items():
                if key != "step" and value is not None:
                    self.events.add_scalar(key, value, values["step"])
            self.events.flush()


def peak_memory(device):
    """The GB that were held at most so far: on the GPU, or else by this process (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Stop:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the step; a second Ctrl-C leaves at once.

    Before training() there is nothing to save, and the process leaves; one of several by the system's own handler, since
    Python's would wait for the end of a connection."""

    def __init__(self, alone):
        self.signum, self.agreed = None, None  # agreed: all processes know of the signal
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.leave if alone else signal.SIG_DFL)

    def leave(self, signum, frame):
        os.write(2, b"train.py: stopped before the first step\n")
        os._exit(128 + signum)

    def training(self):
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum, frame):
        if self.signum is None:
            self.signum = signum
            os.write(2, b"\ntrain.py: finishing the step, then saving (Ctrl-C again leaves at once)\n")
        elif signum == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats it by itself
            os._exit(128 + signum)


class NotFinite(ArithmeticError):
    """The loss or the gradient is infinite or not a number."""


def train_step(net, optimizers, scaler, batch, config, machine, stop):
    """One optimizer step on this process's batch; returns its mean loss over all processes and the gradient norm.

    Raises NotFinite before anything is changed. (A step that the scaler of fp16 skips is not a failure.)"""
    parts = [t.split(config.micro_batch_size or len(t)) for t in batch]
    loss = torch.zeros((), device=machine.device)
    for i, (x, y) in enumerate(zip(*parts)):
        last = i == len(parts[0]) - 1
        with nullcontext() if last or machine.world_size == 1 else net.no_sync():  # gradients meet once a step
            with machine.autocast:
                _, part = net(x, y, logits_to_keep=None)
            scaler.scale(part / len(parts[0])).backward()
        loss += part.detach() / len(parts[0])
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip or math.inf)
    if machine.world_size > 1:
        shared = torch.stack((loss / machine.world_size, torch.full_like(loss, stop.signum or 0)))
        dist.all_reduce(shared)
        loss = shared[0]
        if shared[1] > 0:  # one has been told to stop: all do, after this step, or the others would wait for it
            stop.agreed = stop.signum = stop.signum or signal.SIGTERM
    loss, norm = loss.item(), norm.item()
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise NotFinite(f"the loss is {loss} and the gradient norm {norm}")
    for optimizer in optimizers.values():
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss, norm


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def build_model(config, state):
    """The model on the CPU: of the checkpoint dict `state`, else of init_from, else with random weights."""
    if config.init_from and not state:
        try:
            return from_pretrained(config.init_from)
        except ValueError as e:
            sys.exit(f"train.py: init_from: {e}")
    torch.manual_seed(config.seed)
    model = SmolLM2(SmolLM2Config(**{key: getattr(config, key) for key in MODEL_KEYS}))
    if state:
        model.load_state_dict(state["model"])
    return model


def restore(state, optimizers, scaler, machine):
    """Puts the checkpoint dict `state` into all that has a state, but for the model. Ends the program if it cannot be."""
    try:
        for key, optimizer in optimizers.items():  # the old state, but the rates and betas of the config
            optimizer.load_state_dict({**state[key], "param_groups": optimizer.state_dict()["param_groups"]})
        scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == machine.world_size:
            set_rng_state(state["rng"][machine.rank])
    except (KeyError, TypeError, ValueError, AttributeError) as e:  # no work of this program
        sys.exit(f"train.py: the checkpoint does not hold a run: {e!r}")


def train(config, machine, model, data, state, stop, say):
    """The loop, from the checkpoint dict `state` or from the start. Returns the step at which it ended."""
    model.to(machine.device)
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    random.seed(config.seed + machine.rank)
    np.random.seed((config.seed + machine.rank) % 2**32)
    torch.manual_seed(config.seed + machine.rank)
    step, seconds, best, saved = 0, 0.0, None, None  # saved: the step that is on disk
    if state:
        restore(state, optimizers, scaler, machine)
        step, seconds, best, saved = state["step"], state["seconds"], state["best"], state["step"]
        state.clear()  # frees its memory
    if machine.compile:
        is_one_pass = machine.world_size == 1 and config.micro_batch_size in (0, config.batch_size)
        model.compile_for_training(config.batch_size * config.block_size if is_one_pass else None)
    net = DistributedDataParallel(model) if machine.world_size > 1 else model

    out = Path(config.out_dir)
    metrics = Metrics(out / "metrics.jsonl", step) if machine.rank == 0 else None
    tokens_per_step = config.batch_size * config.block_size
    peak = next((v for k, v in PEAKS.items() if machine.device.type == "cuda" and k in
                 torch.cuda.get_device_name(machine.device)), None)
    stand_in = f" (on STAND-IN data: {data.meta['stand_in']})" if data.meta.get("stand_in") else ""

    def save():
        nonlocal saved
        rng = [rng_state()]
        if machine.world_size > 1:
            rng = [None] * machine.world_size
            dist.all_gather_object(rng, rng_state())
        if machine.rank == 0:
            os.fsync(metrics.file.fileno())
            write_checkpoint(out / f"step_{step:06d}.pt", {
                "step": step, "model": model.state_dict(), "rng": rng,
                **{key: optimizer.state_dict() for key, optimizer in optimizers.items()},
                "scaler": scaler.state_dict(), "config": asdict(config), "machine": machine.fingerprint(config),
                "data": data.fingerprint(), "seconds": seconds, "best": best})
            files = [p for p in checkpoints(out) if step_of(p) <= step]
            for p in files[:-config.keep_checkpoints] if config.keep_checkpoints else []:
                if not best or step_of(p) != best["step"]:
                    p.unlink()
        saved = step

    def due(interval):
        return interval and step % interval == 0

    bar = tqdm(total=config.max_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1,
               disable=machine.rank > 0 or not sys.stderr.isatty())
    begin_step, spent, tokens = step, 0.0, 0
    while step < config.max_steps and not (stop.agreed if machine.world_size > 1 else stop.signum):
        start, lr = time.perf_counter(), learning_rate(config, step)
        for group in all_groups(optimizers):
            group["lr"] = group["peak"] * lr / config.learning_rate
        try:
            loss, norm = train_step(net, optimizers, scaler, get_batch(data, config, machine, step), config, machine, stop)
        except NotFinite as e:
            newest = checkpoints(out)[-1:] or ["none"]
            sys.exit(f"train.py: {e} in step {step + 1}, at learning rate {lr:.2e}: stopped before the weights were "
                     f"changed. Last good checkpoint: {newest[0]}. A lower --learning_rate or a longer --warmup_steps helps")
        step += 1
        took = time.perf_counter() - start
        seconds, spent, tokens = seconds + took, spent + took, tokens + tokens_per_step
        line = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm if math.isfinite(norm) else None}
        if due(config.eval_interval):
            val_loss = evaluate(net, data, config, machine)
            line["val_loss"] = val_loss
            if is_best := best is None or val_loss < best["val_loss"]:
                best = {"step": step, "val_loss": val_loss}
            bits = val_loss / math.log(2) * data.meta["val_tokens"] / max(1, data.meta["val_bytes"])
            say(f"step {step}: held-out loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 99)):.2f}, {bits:.4f} "
                f"bits per byte; best {best['val_loss']:.4f} at step {best['step']}{stand_in}")
        speed = tokens / spent
        text = f"loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {speed:,.0f} tok/s"
        if peak:
            mfu = speed * model.flops_per_token(config.block_size, causal=True) / machine.world_size / peak
            text += f" | MFU {mfu:.1%}"
        bar.set_postfix_str(text, refresh=False)
        bar.update()
        if step == begin_step + 1 or due(config.log_interval):
            left = (config.max_steps - step) * tokens_per_step / speed
            if bar.disable:
                say(f"step {step}/{config.max_steps} | {text} | {clock(seconds)} trained, {clock(left)} left")
        if machine.rank == 0 and (step == 1 or due(config.log_interval) or "val_loss" in line):
            metrics.write(machine.device, **line, tokens=step * tokens_per_step, tokens_per_sec=speed, seconds=seconds)
        if due(config.log_interval) or step == begin_step + 1:
            spent, tokens = 0.0, 0
        if due(config.sample_interval) and machine.rank == 0:
            sample = write_sample(model, data, config, machine, step)
            say(f"--- sample at step {step}\n{sample}\n---")
            if metrics.events:
                metrics.events.add_text("sample", "    " + sample.replace("\n", "\n    "), step)  # indented: shown as it is
                metrics.events.flush()
        if due(config.checkpoint_interval) or config.checkpoint_interval and due(config.eval_interval) and is_best:
            save()
    bar.close()
    if saved != step:
        save()
    return step


def start_or_resume(overrides, args, say):
    """Returns (config, state, changes): state is the checkpoint's dict or None, changes the keys set anew (old, new)."""
    config = TrainConfig(**overrides)
    if args.resume is None:
        if checkpoints(config.out_dir) and not args.overwrite:
            usage_error(f"{config.out_dir} holds a run: go on with --resume, or choose another --out_dir, or delete it "
                        "with --overwrite")
        return config, None, {}
    source = Path(config.out_dir if args.resume in ("", "auto") else args.resume)
    if args.resume not in ("", "auto") and not source.exists():
        usage_error(f"--resume={source}: there is no such file or folder")
    folder = source if source.is_dir() or not source.exists() else source.parent
    if "out_dir" in overrides and folder.resolve() != Path(config.out_dir).resolve():
        usage_error(f"--resume={source} goes on in {folder}, not in out_dir = {config.out_dir}: give one of them")
    try:
        path, state = load_checkpoint(source, lambda text: say(f"train.py: {text}"))
        known = {f.name for f in fields(TrainConfig)}
        old = state and TrainConfig(**{key: typed(key, value) for key, value in state["config"].items() if key in known})
    except ValueError as e:
        sys.exit(f"train.py: {e}: start anew with --overwrite")
    if not state:
        if args.resume == "auto":
            return config, None, {}
        usage_error(f"--resume: there is no checkpoint in {source}; python train.py config/smollm2.py starts a run")
    config = replace(old, **{**overrides, "out_dir": str(folder)})
    changes = {key: (getattr(old, key), getattr(config, key)) for key in known if getattr(old, key) != getattr(config, key)}
    for key in changes.keys() & FIXED_ON_RESUME:
        sys.exit(f"train.py: {path} holds a run with {key} = {changes[key][0]}, not {changes[key][1]}: leave {key} out "
                 "to go on with it, or start another run in another --out_dir")
    say(f"going on from {path} (step {state['step']})")
    return config, state, {key: pair for key, pair in changes.items() if key not in FREE_ON_RESUME}


def set_up_run(config, overrides, state, changes, say):
    """Returns (config, machine, model, data) for a run from the checkpoint dict `state`, or from the start (None).

    Says what is no longer as the checkpoint had it. Ends the program where the run cannot be what was asked for."""
    if not state and not config.lr_decay_steps:
        config = replace(config, lr_decay_steps=config.max_steps)
    machine = set_up_machine(config)
    model = build_model(config, state)
    sizes = {key: getattr(model.config, key) for key in MODEL_KEYS}
    if other := [key for key in overrides if key in FIXED_ON_RESUME and sizes.get(key, overrides[key]) != overrides[key]]:
        usage_error(f"{other[0]} = {overrides[other[0]]}: init_from has {sizes[other[0]]}; leave the sizes out")
    config = replace(config, **sizes)  # of init_from
    check(config, machine.world_size)
    data = load_data(config, machine.rank == 0)
    if state and state["data"] != data.fingerprint():
        if "data_dir" not in overrides:
            sys.exit(f"train.py: {config.data_dir} is not the data that this run was trained on: restore it, or name "
                     f"it with --data_dir={config.data_dir} to go on with it all the same")
        changes["data"] = (state["data"], data.fingerprint())
    if state:
        now = machine.fingerprint(config)
        changes |= {key: (state["machine"].get(key), now[key]) for key in now if state["machine"].get(key) != now[key]}
    if changes:
        say("no longer the same run to the bit, since these differ: " +
            ", ".join(f"{key} {old} → {new}" for key, (old, new) in sorted(changes.items())))
    if machine.world_size > 1:
        step, starts = state["step"] if state else 0, [None] * machine.world_size
        dist.all_gather_object(starts, (step, data.fingerprint(), {**asdict(config), "out_dir": "", "data_dir": ""}))
        if other := [rank for rank, start in enumerate(starts) if start != starts[0]]:
            sys.exit(f"train.py: process 0 is at step {starts[0][0]}, process {other[0]} at step {starts[other[0]][0]}, or "
                     "data or settings differ: every machine needs the same command, data_dir and (to resume) out_dir")
    return config, machine, model, data


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):  # a log file shows each line at once; what a terminal cannot show ends no run
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    overrides, args = parse_args(argv)
    rank, world_size, held = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), None
    stop = Stop(alone=world_size == 1)
    say = tqdm.write if rank == 0 else lambda text: None
    out = Path(overrides.get("out_dir", "out"))
    try:
        if args.resume not in (None, "", "auto"):
            out = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        again, other_out = "python train.py --resume", ""
        if out != Path(TrainConfig.out_dir):
            again, other_out = f"{again}={out}", f" --checkpoint {out}"
        if rank == 0 and (out.is_dir() or args.resume in (None, "auto")):
            if args.resume is None or not checkpoints(out):  # else the checkpoint has the rest of the config
                check(TrainConfig(**overrides), world_size)
            out.mkdir(parents=True, exist_ok=True)
            held = lock(out)
        config, state, changes = start_or_resume(overrides, args, say)
        check(config, world_size)
        if state and state["step"] >= config.max_steps:
            say(f"the run is finished: step {state['step']} of {config.max_steps}. Longer: {again} --max_steps="
                f"{state['step'] + 1000}; text: python sample.py --prompt \"ROMEO:\"{other_out}")
            return
        config, machine, model, data = set_up_run(config, overrides, state, changes, say)
        step = state["step"] if state else 0
        if rank == 0:
            clear_room(config, step, args.overwrite, model)
            banner(config, machine, model, data, step, say)
        stop.training()
        step = train(config, machine, model, data, state, stop, say)
    except OSError as e:
        sys.exit(f"train.py: {e.strerror or e}{f': {e.filename}' if e.filename else ''}. Checkpoints already in {out} "
                 f"are whole: when there is room or permission to write, {again} goes on exactly")
    except (MemoryError, RuntimeError) as e:
        if stop.signum:  # Ctrl-C reaches the C++ compiler, too, and torchrun ends the other processes
            print(f"train.py: stopped within a step; {again} goes on exactly from the checkpoint before", file=sys.stderr)
            raise SystemExit(128 + stop.signum) from None
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(e):
            raise
        sys.exit("train.py: out of memory: lower micro_batch_size or block_size; checkpoints are whole")
    finally:
        if held:
            held.close()
    where = f"{out / f'step_{step:06d}.pt'} is written"
    if world_size > 1:
        dist.barrier()  # gloo's threads outlive the group, and one still at work aborts a process that ends (#190489)
        dist.destroy_process_group()
    if stop.signum:
        say(f"stopped at step {step}; {where}. Go on with: {again}")
        raise SystemExit(128 + stop.signum)
    say(f"done: {step} steps; {where}. Next: python sample.py --prompt \"ROMEO:\"{other_out}")


def clear_room(config, step, overwrite, model):
    """Readies out_dir for a run at `step`. Later checkpoints move to superseded/, so that nothing is lost.

    Ends the program where the disk has no room for the checkpoints to come."""
    out = Path(config.out_dir)
    for tmp in out.glob("step_*.tmp"):  # left by a killed save
        tmp.unlink()
    if overwrite:
        for p in checkpoints(out):
            p.unlink()
        shutil.rmtree(out / "samples", ignore_errors=True)
    for p in checkpoints(out):
        if step_of(p) > step:
            (out / "superseded").mkdir(exist_ok=True)
            os.replace(p, out / "superseded" / p.name)
    have = shutil.disk_usage(out).free + sum(p.stat().st_size for p in checkpoints(out))
    count = config.keep_checkpoints + 2 if config.checkpoint_interval and config.keep_checkpoints else 2
    need = count * 12 * sum(p.numel() for p in model.parameters())
    if have < need:
        sys.exit(f"train.py: up to {count} checkpoints at a time need {need / 1e9:.1f} GB, but {out} has room for "
                 f"{have / 1e9:.1f}: free some, lower keep_checkpoints, or use another --out_dir")


def banner(config, machine, model, data, step, say):
    n, T, meta = sum(p.numel() for p in model.parameters()), config.block_size, data.meta
    epochs = config.max_steps * config.batch_size / blocks_per_epoch(len(data.train), T)
    threads = f", {torch.get_num_threads()} threads" if machine.device.type == "cpu" else ""
    say(f"device   {machine.device}{threads}, {machine.world_size} process(es), {machine.reason}\n"
        f"data     {data.folder}: {meta['source']}; {len(data.train):,} training and {len(data.val):,} held-out tokens\n"
        f"model    {n:,} parameters\n"
        f"run      steps {step} to {config.max_steps}, {config.batch_size} x {T} = {config.batch_size * T:,} tokens a step, "
        f"{epochs:.1f} epochs, {config.max_steps * config.batch_size * model.flops_per_token(T, True) * T:.2e} FLOPs\n"
        f"writes   {config.out_dir}/: checkpoints of {12 * n / 1e9:.2f} GB, metrics.jsonl, samples/")
    if meta.get("stand_in"):
        say(f"*** STAND-IN DATA ({meta['stand_in']}): fine for a try, not for results. python prepare.py makes the real. ***")
    if machine.compile:
        say("compiling: the first step takes longer" + (" (up to half a minute)" if machine.device.type == "cpu" else ""))


if __name__ == "__main__":
    main()
