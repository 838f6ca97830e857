"""Measures this project against its peers and against the machine, side by side.

    python -m tools.bench                          # everything below, about 25 minutes on two cores
    python -m tools.bench train --shapes 4x256     # one part
    python -m tools.bench decode prepare --output bench.json

train    steps of train.py against transformers' LlamaForCausalLM of the same sizes (autocast, torch.compile, fused AdamW,
         clipping), and both against the rate of the machine's matrix products at the model's own shapes
decode   one stream and eight, against transformers' generate and, where llama-cpp-python is installed, llama.cpp
prepare  tokens/s on all cores against one

Each contestant is a process of its own, warmed up; they take turns, step by step, so that a noisy machine is unfair to
all alike. The table shows medians; --output writes every measurement as JSON.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


# ------------------------------------------------------------------------------------------------ in the contestants


def train_ours(args):
    import torch

    import train
    from model import SmolLM2, SmolLM2Config
    B, T = args.shape
    config = train.TrainConfig(batch_size=B, block_size=T, deterministic=args.deterministic, lr_decay_steps=5000)
    machine = train.set_up_machine(config)
    model = SmolLM2(SmolLM2Config()).to(machine.device)
    optimizers = train.make_optimizers(model, config)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=False)
    model.compile_for_training(B * T)

    def step():
        batch = torch.randint(0, 49152, (2, B, T), device=machine.device)
        train.train_step(model, optimizers, scaler, batch, config, machine, None)
    return step


def train_transformers(args):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    B, T = args.shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(LlamaConfig(use_cache=False, **llama_sizes())).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)

    def step():
        ids = torch.randint(0, 49152, (B, T), device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def llama_sizes():
    from dataclasses import asdict

    from model import SmolLM2Config
    return dict(asdict(SmolLM2Config()), tie_word_embeddings=True)


def machine_rates(args):
    """Matrix rates (FLOP/s) over the products of one training step of 1,024 tokens, and the read bandwidth (bytes/s)."""
    import torch
    device, M = ("cuda" if torch.cuda.is_available() else "cpu"), 1024 if not torch.cuda.is_available() else 16384
    layer = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    counts = {shape: 30 * layer.count(shape) for shape in set(layer)} | {(576, 49152): 1}

    def step():
        rates = {}
        for dtype in (torch.bfloat16, torch.float32):
            flops = seconds = 0
            for (K, N), count in counts.items():
                x, w, dy = (torch.randn(*s, device=device).to(dtype) for s in [(M, K), (N, K), (M, N)])
                outs = [torch.empty(*s, device=device, dtype=dtype) for s in [(M, N), (M, K), (N, K)]]
                for product in (lambda: torch.mm(x, w.t(), out=outs[0]), lambda: torch.mm(dy, w, out=outs[1]),
                                lambda: torch.mm(dy.t(), x, out=outs[2])):
                    product()
                    seconds += count * min(timed(product) for _ in range(5))
                    flops += count * 2 * M * K * N
            rates[str(dtype)[6:]] = flops / seconds
        buffer = torch.ones(2**28, device=device)  # 1 GiB
        rates["read"] = buffer.nbytes / min(timed(buffer.sum) for _ in range(5))
        return rates
    return step


def decode_ours(args):
    import torch

    import train
    from model import SmolLM2, SmolLM2Config, generate
    device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    if device == "cpu":
        train.keep_memory()
    model = SmolLM2(SmolLM2Config()).to(device, dtype).eval()
    rows, prompt, new = args.rows

    def step():
        ids = torch.randint(0, 49152, (rows, prompt), device=device)
        return stream(generate(model, ids, new, compile="step" if device == "cpu" else "layer", temperature=0), rows)
    return step


def stream(tokens, rows):
    """Seconds to the first token, and tokens/s after it."""
    start, times = time.perf_counter(), []
    for token in tokens:
        getattr(token, "tolist", list)()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return {"first": times[0], "tokens_per_sec": rows * (len(times) - 1) / (times[-1] - times[0])}


def decode_transformers(args):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    device, (rows, prompt, new) = ("cuda" if torch.cuda.is_available() else "cpu"), args.rows
    model = LlamaForCausalLM(LlamaConfig(**llama_sizes())).to(device, getattr(torch, args.dtype)).eval()

    def step():
        ids = torch.randint(1, 49152, (rows, prompt), device=device)
        kwargs = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=None)
        first = timed(lambda: model.generate(ids, max_new_tokens=1, **kwargs))
        whole = timed(lambda: model.generate(ids, max_new_tokens=new, **kwargs))
        return {"first": first, "tokens_per_sec": rows * (new - 1) / (whole - first)}
    return step


def decode_llama_cpp(args):
    import random

    from llama_cpp import Llama
    rows, prompt, new = args.rows
    llama = Llama(args.gguf, n_ctx=prompt + new + 8, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(), verbose=False)

    def tokens():
        llama.reset()
        for _, token in zip(range(new), llama.generate([random.randrange(1, 49152) for _ in range(prompt)], temp=0.0)):
            yield [token]

    return lambda: stream(tokens(), rows)


def encode_text(args):
    """Tokenizes 50 MB as prepare.py does (its check that nothing was lost aside), on all cores or on one."""
    os.environ["TOKENIZERS_PARALLELISM"] = str(not args.one_core).lower()
    from transformers import PreTrainedTokenizerFast

    import prepare
    backend = PreTrainedTokenizerFast.from_pretrained(Path(args.data_dir, "tokenizer")).backend_tokenizer
    ids = np.fromfile(Path(args.data_dir, "train.bin"), dtype="<u2")
    text = backend.decode(ids.tolist())
    pieces = list(prepare.cut([text * (1 + 50_000_000 // len(text))]))

    def step():
        for i in range(0, len(pieces), prepare.BATCH):
            backend.encode_batch_fast(pieces[i:i + prepare.BATCH], add_special_tokens=False)
        return sum(map(len, pieces))
    return step


def timed(function):
    import torch
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def contestant(args):
    """Serves one contestant: builds it, then runs it once for each line on standard input, answering with JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch
    torch.manual_seed(0)
    step = globals()[args.contestant](args)
    for _ in sys.stdin:
        start = time.perf_counter()
        result = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "result": result, "memory": torch.cuda.max_memory_allocated() if
                          torch.cuda.is_available() else memory}), file=answers, flush=True)


# --------------------------------------------------------------------------------------------------- in the parent


class Contestant:
    """A contestant's process, with an empty compile cache of its own."""

    def __init__(self, name, label, *options):
        self.label, self.seconds, self.results, self.memory = label, [], [], 0
        self.cache = tempfile.TemporaryDirectory()
        self.start = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, "-m", "tools.bench", "--contestant", name, *options],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                        cwd=Path(__file__).resolve().parent.parent,
                                        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": self.cache.name})
        self.run()
        self.first = time.perf_counter() - self.start  # seconds from launch to the end of the first step

    def run(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"bench: {self.label} failed: run python -m tools.bench --contestant to see why")
        answer = json.loads(answer)
        self.seconds.append(answer["seconds"])
        self.results.append(answer["result"])
        self.memory = answer["memory"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.cache.cleanup()


def alternate(starters, runs, warmup, what):
    """Starts the contestants one after the other, runs them in turns, and returns them, closed."""
    bar = tqdm(total=len(starters) * (1 + warmup + runs), desc=what, file=sys.stderr)
    contestants = []
    for starter in starters:
        contestants.append(Contestant(*starter))
        bar.update()
    for _ in range(warmup + runs):
        for c in contestants:
            c.run()
            bar.update()
    bar.close()
    for c in contestants:
        c.close()
        c.seconds, c.results = c.seconds[1 + warmup:], c.results[1 + warmup:]
    return contestants


def bench_train(args, report):
    from model import SmolLM2, SmolLM2Config
    rates = alternate([("machine_rates", "machine")], 1, 0, "machine")[0].results[0]
    report["machine"] = rates
    print(f"\nmachine: bf16 {rates['bfloat16'] / 1e9:,.0f} GFLOP/s, fp32 {rates['float32'] / 1e9:,.0f} GFLOP/s (the model's "
          f"matrix products), reads {rates['read'] / 1e9:.1f} GB/s")
    model = SmolLM2(SmolLM2Config())
    print(f"\n{'train':<34}{'s/step':>8}{'tok/s':>9}{'ratio':>7}{'of bf16 rate':>14}{'memory':>9}{'first step':>12}")
    for shape in args.shapes:
        B, T = map(int, shape.split("x"))
        options = ["--shape", shape] + ([] if args.deterministic else ["--fast"])
        ours, peer = alternate([("train_ours", "ours", *options), ("train_transformers", "transformers", *options)],
                               args.runs, 2, f"train {shape}")
        for c in (ours, peer):
            s = statistics.median(c.seconds)
            share = B * T * model.flops_per_token(T, causal=True) / s / rates["bfloat16"]
            ratio = statistics.median(p / q for p, q in zip(peer.seconds, c.seconds))
            report.setdefault("train", {})[f"{shape} {c.label}"] = {
                "seconds": c.seconds, "tokens_per_sec": B * T / s, "ratio": ratio, "share": share, "memory": c.memory,
                "first_step": c.first}
            print(f"{shape + ' ' + c.label:<34}{s:>8.3f}{B * T / s:>9,.0f}{ratio:>7.2f}{share:>14.0%}"
                  f"{c.memory / 1e9:>6.1f} GB{c.first:>10.0f} s", flush=True)


def bench_decode(args, report):
    print(f"\n{'decode (' + args.dtype + ')':<44}{'first token':>12}{'tok/s':>9}{'ratio':>7}")
    for what, rows, prompt, new in [("one stream, 32 + 256 tokens", 1, 32, 256), ("one stream, at 2,000 tokens", 1, 1970, 64),
                                    ("one stream, prompt of 1,000", 1, 1000, 16), ("eight streams, 32 + 128", 8, 32, 128)]:
        options = ["--rows", str(rows), str(prompt), str(new), "--dtype", args.dtype]
        starters = [("decode_ours", "ours", *options), ("decode_transformers", "transformers", *options)]
        if args.gguf and rows == 1:
            starters.append(("decode_llama_cpp", "llama.cpp", *options, "--gguf", args.gguf))
        for c in (contestants := alternate(starters, args.runs, 1, f"decode {what}")):
            rate, first = (statistics.median(r[key] for r in c.results) for key in ("tokens_per_sec", "first"))
            ratio = statistics.median(r["tokens_per_sec"] / q["tokens_per_sec"]
                                      for r, q in zip(c.results, contestants[1].results))
            report.setdefault("decode", {})[f"{what} {c.label}"] = {"tokens_per_sec": rate, "first": first, "ratio": ratio,
                                                                    "runs": c.results}
            print(f"{what + ' ' + c.label:<44}{first:>10.2f} s{rate:>9.1f}{ratio:>7.2f}", flush=True)


def bench_prepare(args, report):
    options = ["--data_dir", args.data_dir]
    many, one = alternate([("encode_text", "all cores", *options), ("encode_text", "one core", *options, "--one_core")],
                          min(args.runs, 5), 0, "prepare")
    print(f"\n{'prepare (50 MB of text)':<34}{'seconds':>9}{'MB/s':>9}{'ratio':>7}")
    for c in (many, one):
        seconds = statistics.median(c.seconds)
        ratio = statistics.median(p / q for p, q in zip(one.seconds, c.seconds))
        report.setdefault("prepare", {})[c.label] = {"seconds": c.seconds, "characters": c.results[0], "ratio": ratio}
        print(f"{c.label:<34}{seconds:>9.2f}{c.results[0] / seconds / 1e6:>9.1f}{ratio:>7.2f}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="train, decode, prepare [all three]")
    parser.add_argument("--shapes", nargs="+", default=["4x256", "8x1024", "4x2048"], metavar="BxT",
                        help="sequences x tokens of a training step [4x256 8x1024 4x2048]")
    parser.add_argument("--runs", type=int, default=7, help="measured runs of each contestant [7]")
    parser.add_argument("--fast", dest="deterministic", action="store_false", help="train with deterministic = False")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights while decoding [bfloat16]")
    parser.add_argument("--gguf", help="llama.cpp's form of the same model, to measure it where llama-cpp-python is installed")
    parser.add_argument("--data_dir", default="data/shakespeare", help="prepared data, whose text is tokenized again")
    parser.add_argument("--output", help="write all measurements to this JSON file")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--one_core", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split("x"))), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.contestant:
        return contestant(args)
    parts = {"train": bench_train, "decode": bench_decode, "prepare": bench_prepare}
    if unknown := [p for p in args.parts if p not in parts]:
        parser.error(f"unknown part {unknown[0]}: train, decode or prepare")
    report = {}
    for name in args.parts or parts:
        parts[name](args, report)
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
