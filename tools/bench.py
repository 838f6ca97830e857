"""Measures this project against its peers and against the machine, side by side.

    python -m tools.bench                          # train, decode, prepare: half an hour, two cores
    python -m tools.bench train --shapes 4x256     # one part
    python -m tools.bench decode prepare --output bench.json
    python -m tools.bench gpu --output gpu.json    # ten minutes on one card; a CPU: --shapes 2x64

train    steps of train.py against transformers' LlamaForCausalLM of the same sizes (autocast,
         torch.compile, fused AdamW, clipping), as it comes and with our allocator setting lent to
         it, and all against the rate of the machine's matrix products at the model's own shapes
decode   one stream and eight, against transformers' generate and, with --gguf, llama.cpp
prepare  seconds for 50 MB on all cores against one
exact    40 steps of --recipe twice, and once resumed from 20: the same bits?
muon     a step with Muon against one with AdamW
fast     train with deterministic=false against true
gpu      the tests that need a GPU, exact, train, fast, muon and decode, one after the other

Each contestant is a process of its own, warmed up; they take turns, step by step, so that a noisy
machine is unfair to all alike (without room for two, one after the other). The tables show
medians (lowest to highest); the ratio says how many times as long as ours, turn by turn. --output
writes every measurement as JSON, part by part.
"""
import json
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import prepare

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------- in the contestants: each returns its turn, step


def train_ours(shape, deterministic=True, optimizer="adamw"):
    import torch

    import train
    from model import SmolLM2
    B, T = shape
    config = train.TrainConfig(batch_size=B, block_size=T, deterministic=deterministic,
                               optimizer=optimizer, lr_decay_steps=5000)
    machine = train.set_up_machine(config)
    run = train.Run(config, SmolLM2(config), None, *machine)
    if run.machine["compile"]:
        run.model.compile_for_training(B * T)

    def step():
        batch = torch.randint(0, config.vocab_size, (B, T + 1), device=run.device)
        train.train_step(run, batch)
    return step


def train_transformers(shape, lent=False):
    import torch

    from model import keep_freed_memory, pick_device
    device, dtype, _ = pick_device()
    if lent:
        keep_freed_memory()
    model = transformers_model(use_cache=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    compiled = torch.compile(model)

    def step():
        ids = torch.randint(0, 49152, shape, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def transformers_model(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    from model import SmolLM2Config
    options |= asdict(SmolLM2Config())
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **options))


def machine_rates():
    """FLOP/s over the matrix products of a training step, in its dtype ("own") and in float32, and
    the bytes/s read from memory."""
    import torch

    from model import pick_device
    device, own, _ = pick_device()
    M = 1024 if device.type == "cpu" else 16384  # tokens
    counts = {(576, 576): 60, (576, 192): 60, (576, 1536): 60, (1536, 576): 30, (576, 49152): 1}

    def step():
        rates = {}
        for name, dtype in {"own": own, "float32": torch.float32}.items():
            flops = seconds = 0
            for (K, N), count in counts.items():
                x, w, dy = (torch.randn(*shape, device=device).to(dtype)
                            for shape in [(M, K), (N, K), (M, N)])
                y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
                for a, b, out in [(x, w.t(), y), (dy, w, dx), (dy.t(), x, dw)]:
                    seconds += count * seconds_of(partial(torch.mm, a, b, out=out), device)
                    flops += count * 2 * M * K * N
            rates[name] = flops / seconds
        buffer = torch.ones(2**28, device=device)  # 1 GiB
        rates["read"] = buffer.nbytes / seconds_of(buffer.sum, device)
        return rates
    return step


def seconds_of(work, device):
    """Of one piece of work: on a GPU of fifty between two events, else the fastest of five."""
    import torch
    work()
    if device.type != "cuda":
        return min(timed(work) for _ in range(5))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / 50


def timed(work):
    start = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - start


def wait_for_device():
    import torch
    if torch.accelerator.is_available():  # CUDA, MPS
        torch.accelerator.synchronize()


def decode_ours(rows, prompt, new, dtype):
    import torch

    import model
    device, dtype, _ = model.pick_device("auto", dtype, decoding=True)
    model.keep_freed_memory()
    net = model.SmolLM2(model.SmolLM2Config()).to(device, dtype).eval()
    compiled = model.worth_compiling(device, 10**6)  # as for a long text: it is not timed

    def step():
        ids = torch.randint(0, 49152, (rows, prompt), device=device)
        tokens = model.generate(net, ids, new, compiled, temperature=0)
        return stream(tokens, rows) | {"dtype": str(dtype)}
    return step


def stream(tokens, rows):
    """Seconds to the first token, and tokens/s after it."""
    start, times = time.perf_counter(), []
    for token in tokens:
        getattr(token, "tolist", list)()  # waits for a GPU
        times.append(time.perf_counter() - start)
    rate = rows * (len(times) - 1) / (times[-1] - times[0])
    return {"first": times[0], "tokens_per_sec": rate}


def decode_transformers(rows, prompt, new, dtype):
    import torch

    from model import pick_device
    device, dtype, _ = pick_device("auto", dtype, decoding=True)
    model = transformers_model().to(device, dtype).eval()

    def step():
        ids = torch.randint(1, 49152, (rows, prompt), device=device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0,
                   "eos_token_id": None}
        first = timed(lambda: model.generate(ids, max_new_tokens=1, **options))
        whole = timed(lambda: model.generate(ids, max_new_tokens=new, **options))
        return {"first": first, "tokens_per_sec": rows * (new - 1) / (whole - first),
                "dtype": str(dtype)}
    return step


def decode_llama_cpp(prompt, new, gguf):
    import random

    import torch
    from llama_cpp import Llama
    cores = torch.get_num_threads()
    llama = Llama(gguf, n_ctx=prompt + new + 8, n_threads=cores, n_threads_batch=cores,
                  verbose=False)

    def tokens():
        llama.reset()
        ids = [random.randrange(1, 49152) for _ in range(prompt)]
        for _, token in zip(range(new), llama.generate(ids, temp=0.0)):
            yield [token]

    return lambda: stream(tokens(), 1)


def encode_text(data_dir, all_cores):
    """Tokenizes 50 MB as prepare.py does, its check that nothing is lost aside."""
    os.environ["TOKENIZERS_PARALLELISM"] = str(all_cores).lower()
    tokenizer, _ = prepare.open_tokenizer(Path(data_dir, "tokenizer"))
    text = tokenizer.decode(np.fromfile(Path(data_dir, "train.bin"), "<u2", 20_000_000).tolist())
    text *= 1 + 50_000_000 // len(text)
    pieces = prepare.cut(text, tokenizer)

    def step():
        for i in range(0, len(pieces), prepare.BATCH):
            tokenizer.encode_batch_fast(pieces[i:i + prepare.BATCH], add_special_tokens=False)
        return sum(map(len, pieces))
    return step


def serve(contestant, **options):
    """Serves one of the above: a turn for each line on standard input, answered in JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch
    torch.manual_seed(0)
    step = contestant(**options)
    for _ in sys.stdin:
        start = time.perf_counter()
        answer = {"result": step()}
        wait_for_device()
        answer["memory"] = peak_memory()
        answer["room"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if torch.cuda.is_available():
            answer["memory"] = torch.cuda.max_memory_reserved()
            answer["room"] = torch.cuda.mem_get_info()[1]
        answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), file=answers, flush=True)


def peak_memory():
    """Bytes. (On Linux getrusage also counts what the parent held, on a Mac it counts in bytes.)"""
    with suppress(OSError, TypeError):
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --------------------------------------------------------------------------------- in the parent


class Contestant:
    """A contestant's process, with an empty compile cache of its own. work: a partial function."""

    def __init__(self, label, work):
        self.label, self.answers, self.problem = label, [], None
        self.cache, self.errors = tempfile.TemporaryDirectory(), tempfile.TemporaryFile("w+")
        code = f"bench.serve(bench.{work.func.__name__}, **{work.keywords})"
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from tools import bench; {code}"], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": self.cache.name})
        self.turn()
        self.first = time.perf_counter() - start  # seconds from launch to the end of the first turn

    def turn(self):
        if self.problem:
            return
        with suppress(BrokenPipeError):  # it ended: there is no answer
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ["without a word"]
            named = [e for e in lines if re.match(r"[\w.]+(Error|Exception|Compiler)\b", e)]
            self.problem = f"{self.label} failed: {(named or lines)[-1]}"
            return
        self.answers.append(json.loads(answer))

    def close(self):
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.cache.cleanup()

    def get(self, name):
        return [answer[name] for answer in self.answers]


def take_turns(works, runs, warmup, what):
    """Starts the contestants, {label: work}, runs them in turns, and returns them, ended. One that
    fails is told and left out; the first, to which all are compared, raises RuntimeError."""
    contestants, waiting = [], []
    turns = len(works) * (1 + warmup + runs)
    with tqdm(total=turns, desc=what, leave=False, disable=None) as bar:
        for label, work in works.items():
            contestants.append(Contestant(label, work))
            waiting.append(contestants[-1])
            bar.update()
            # Room for another? (What the first turn takes is not yet all that a contestant needs.)
            taken = [max(c.get("memory"), default=0) for c in waiting]
            room = min(contestants[-1].get("room"), default=math.inf)
            if len(contestants) < len(works) and sum(taken) + 2 * taken[-1] < room:
                continue
            for _ in range(warmup + runs):
                for c in waiting:
                    c.turn()
                    bar.update()
            for c in waiting:
                c.close()
                c.answers = c.answers[1 + warmup:]
            waiting = []
    if contestants[0].problem:
        raise RuntimeError(contestants[0].problem)
    for c in contestants:
        if c.problem:
            prepare.log(c.problem)
    return [c for c in contestants if not c.problem]


def spread(values, form="{:.2f}"):
    """The median, with the lowest and the highest."""
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(statistics.median(values))} ({low} to {high})"


def processor():
    """The processor's name, with family and model, which tell what a name hides."""
    facts = {}
    with suppress(OSError):  # not Linux
        text = Path("/proc/cpuinfo").read_text()
        facts = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", text, re.MULTILINE))
    name = facts.get("model name", platform.processor() or platform.machine())
    return (f"{name}, family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}, "
            f"{os.cpu_count()} cores")


def bench_train(args, report):
    [machine] = take_turns({"machine": partial(machine_rates)}, 1, 0, "machine")
    rates = report["rates"] = machine.get("result")[0]
    print(f"\nmatrix products of the model's shapes: {rates['own'] / 1e9:,.0f} GFLOP/s, in float32 "
          f"{rates['float32'] / 1e9:,.0f}; memory reads {rates['read'] / 1e9:.1f} GB/s")
    compare_steps(args, report, "train", {
        "ours": partial(train_ours, deterministic=args.deterministic),
        "transformers": partial(train_transformers),
        "transformers, lent": partial(train_transformers, lent=True)})


def bench_fast(args, report):
    compare_steps(args, report, "fast", {
        "deterministic": partial(train_ours),
        "not deterministic": partial(train_ours, deterministic=False)})


def bench_muon(args, report):
    ours = partial(train_ours, deterministic=args.deterministic)
    compare_steps(args, report, "muon", {"AdamW": ours, "Muon": partial(ours, optimizer="muon")})


def compare_steps(args, report, part, works):
    """Training steps of contestants; the first is what the others' ratios refer to."""
    from model import SmolLM2, SmolLM2Config
    model = SmolLM2(SmolLM2Config())
    print(f"\n{part:<32}{'s/step':>24}{'tok/s':>9}{'ratio':>22}{'TFLOP/s':>9}{'of rate':>9}"
          f"{'memory':>9}{'first':>8}")
    rate = report.get("rates", {}).get("own", math.nan)
    for shape in args.shapes:
        B, T = map(int, shape.split("x"))
        shaped = {label: partial(work, shape=(B, T)) for label, work in works.items()}
        contestants = take_turns(shaped, args.runs, 2, f"{part} {shape}")
        first = contestants[0].get("seconds")
        for c in contestants:
            seconds = c.get("seconds")
            s, ratios = statistics.median(seconds), [p / q for p, q in zip(seconds, first)]
            flops, memory = B * T * flops_per_token(model, T) / s, max(c.get("memory"))
            report[part][f"{shape} {c.label}"] = {
                "seconds": seconds, "tokens_per_sec": B * T / s, "ratios": ratios,
                "flops": flops, "memory": memory, "first": c.first}
            print(f"{shape + ' ' + c.label:<32}{spread(seconds, '{:.3f}'):>24}{B * T / s:>9,.0f}"
                  f"{spread(ratios):>22}{flops / 1e12:>9.3f}{flops / rate:>9.0%}"
                  f"{memory / 1e9:>6.1f} GB{c.first:>6.0f} s", flush=True)


def flops_per_token(model, T):
    """Training FLOPs a token at length T: 6 N + 6 L H D T, as in PaLM (arXiv:2204.02311), but for
    the half of the attention that a causal mask leaves out."""
    N = sum(p.numel() for p in model.parameters())
    return 6 * N + 6 * model.config.num_hidden_layers * model.config.hidden_size * T


def bench_exact(args, report):
    """Trains 40 steps twice and once resumed from 20, and compares what the checkpoints hold."""
    import torch

    import train
    keys = [args.recipe, f"--data_dir={args.data_dir}", f"--deterministic={args.deterministic}",
            "--eval_interval=0", "--sample_interval=0", "--checkpoint_interval=0",
            "--lr_decay_steps=40"]
    tensors = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name, stops in {"first": [40], "second": [40], "resumed": [20, 40]}.items():
            out = Path(folder, name)
            for step in stops:
                command = [sys.executable, ROOT / "train.py", *keys, f"--out_dir={out}",
                           f"--max_steps={step}", "--resume=auto"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    said = done.stderr.strip().splitlines() or [f"ended by {done.returncode}"]
                    raise RuntimeError(said[-1])
            tensors[name] = list(find_tensors(train.read_checkpoint(out / "step_000040.pt")))
            shutil.rmtree(out)
    for name in ("second", "resumed"):
        pairs = zip(tensors["first"], tensors[name], strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        report["exact"][name] = same
        print(f"exact    {name} run of 40 steps: {'the same bits' if same else 'OTHER BITS'}")


def find_tensors(value):
    """All tensors of a checkpoint's dict."""
    import torch
    if isinstance(value, torch.Tensor):
        yield value
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from find_tensors(part)


def bench_tests(args, report):
    """The tests that need a GPU, or say so."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report["tests"] = done.stdout
    print(f"\ntests    {done.stdout.strip()}")
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or "a test failed")


def bench_decode(args, report):
    print(f"\n{'decode':<44}{'first token':>12}{'tok/s':>27}{'ratio':>22}  dtype")
    for what, rows, prompt, new in [("one stream, 32 + 256 tokens", 1, 32, 256),
                                    ("one stream, at 2,000 tokens", 1, 1970, 64),
                                    ("one stream, prompt of 1,000", 1, 1000, 16),
                                    ("eight streams, 32 + 128", 8, 32, 128)]:
        sizes = {"rows": rows, "prompt": prompt, "new": new, "dtype": args.dtype}
        works = {"ours": partial(decode_ours, **sizes),
                 "transformers": partial(decode_transformers, **sizes)}
        if args.gguf and rows == 1:
            works["llama.cpp"] = partial(decode_llama_cpp, prompt=prompt, new=new, gguf=args.gguf)
        contestants = take_turns(works, args.runs, 1, f"decode {what}")
        ours = [result["tokens_per_sec"] for result in contestants[0].get("result")]
        for c in contestants:
            rates = [result["tokens_per_sec"] for result in c.get("result")]
            first = statistics.median(result["first"] for result in c.get("result"))
            ratios = [p / q for p, q in zip(ours, rates)]
            dtype = c.get("result")[0].get("dtype", "of the file")
            report["decode"][f"{what} {c.label}"] = {
                "tokens_per_sec": rates, "first": first, "ratios": ratios, "dtype": dtype}
            print(f"{what + ' ' + c.label:<44}{first:>10.2f} s{spread(rates, '{:.1f}'):>27}"
                  f"{spread(ratios):>22}  {dtype.removeprefix('torch.')}", flush=True)


def bench_prepare(args, report):
    works = {label: partial(encode_text, data_dir=args.data_dir, all_cores=label == "all cores")
             for label in ("all cores", "one core")}
    contestants = take_turns(works, min(args.runs, 5), 0, "prepare")
    print(f"\n{'prepare (50 MB of text)':<34}{'seconds':>22}{'MB/s':>9}")
    for c in contestants:
        seconds, size = c.get("seconds"), c.get("result")[0]
        report["prepare"][c.label] = {"seconds": seconds, "characters": size}
        print(f"{c.label:<34}{spread(seconds):>22}{size / statistics.median(seconds) / 1e6:>9.1f}",
              flush=True)


PARTS = {"train": bench_train, "decode": bench_decode, "prepare": bench_prepare,
         "exact": bench_exact, "fast": bench_fast, "muon": bench_muon, "tests": bench_tests}
STANDARD = ["train", "decode", "prepare"]
GPU = ["tests", "exact", "train", "fast", "muon", "decode"]


def path(text):
    """A path as a shell takes it, from here."""
    return os.path.abspath(prepare.typed_path(text))


@prepare.command("tools.bench")
def main(argv=None):
    parser = prepare.new_parser("tools.bench", __doc__)
    add = parser.add_argument
    add("parts", nargs="*", help=f"{', '.join(PARTS)}, gpu [{' '.join(STANDARD)}]")
    add("--shapes", nargs="+", metavar="BxT", help="sequences x tokens of a training step "
        "[4x256 8x1024 4x2048; for gpu 4x256 16x2048 32x2048]")
    add("--runs", type=prepare.number(int, 1), default=7,
        help="measured turns of each contestant [7]")
    add("--fast", dest="deterministic", action="store_false", help="train with deterministic=false")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto",
        help="of the weights while decoding [as sample.py has them]")
    add("--gguf", type=path, help="the model for llama.cpp, where llama-cpp-python is")
    add("--data_dir", type=path, default=os.path.abspath(prepare.DEFAULT_OUT_DIR),
        help="prepared data, whose text is tokenized again [data/shakespeare]")
    add("--recipe", type=path, default=str(ROOT / "config" / "smollm2.py"),
        help="for exact [config/smollm2.py]")
    add("--output", type=path, help="write all measurements to this JSON file")
    args = parser.parse_args(argv)
    parts, shapes = args.parts or STANDARD, ["4x256", "8x1024", "4x2048"]
    if parts == ["gpu"]:
        parts, shapes = GPU, ["4x256", "16x2048", "32x2048"]
    for part in parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: one of {', '.join(PARTS)}, or gpu alone")
    args.shapes = args.shapes or shapes
    for shape in args.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            parser.error(f"--shapes {shape}: expected BxT, as in 4x256")
    if {"prepare", "exact"} & set(parts) and not Path(args.data_dir, "meta.json").exists():
        parser.error(f"--data_dir {args.data_dir}: nothing is prepared there (python prepare.py)")
    if args.output:
        open(args.output, "a").close()  # raises where it cannot be written
    report, failed = defaultdict(dict), []
    report["machine"] = processor()
    print(report["machine"])
    for part in parts:  # one that fails takes none of the others with it
        try:
            PARTS[part](args, report)
        except (RuntimeError, OSError, ValueError) as e:
            failed.append(part)
            prepare.log(f"\n{part}: {e}")
        if args.output:
            Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise ValueError(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
