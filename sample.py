"""Writes text with a trained model, as it comes.

    python sample.py --prompt "ROMEO:"                                  # the newest checkpoint in out/
    python sample.py --prompt "Once" --checkpoint best --temperature 0.7 --num_samples 3
    python sample.py --prompt "Gravity is" --checkpoint HuggingFaceTB/SmolLM2-135M
    echo "To be" | python sample.py --prompt -                          # the prompt from standard input

The text goes to standard output, all else to standard error. The same seed gives the same text again.
"""
import argparse
import os
import signal
import sys
from pathlib import Path


def fail(message, code=1):
    print("sample.py:", *str(message).split(), file=sys.stderr)  # in one line, whatever was typed
    raise SystemExit(code)


def number(kind, low, high=float("inf")):
    """An argparse type: an int or a float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # not true of nan, too
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
        return value
    convert.__name__ = kind.__name__
    return convert


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(message, 2)
    what = parser.add_argument_group("what to continue, and with which model")
    what.add_argument("--prompt", default="\n", help="text to continue; - reads standard input [a line break]")
    what.add_argument("--checkpoint", default="out", help="a checkpoint file, an out_dir (its newest), 'best' or "
                      "OUT_DIR/best (the lowest held-out loss), a folder in Hugging Face's format, or a hub name [out]")
    how = parser.add_argument_group("how to choose the next token")
    how.add_argument("--temperature", type=number(float, 0, 1e6), default=0.8, help="below 1 likelier, above 1 wilder "
                     "tokens; 0: always the likeliest [0.8]")
    how.add_argument("--top_k", type=number(int, 0, 2**31), default=50, help="among the k likeliest; 0: all [50]")
    how.add_argument("--top_p", type=number(float, 0, 1), default=1.0, help="among the likeliest that together have this "
                     "probability [1]")
    how.add_argument("--repetition_penalty", type=number(float, 1e-6, 1e6), default=1.0, help="above 1: tokens that were "
                     "there become less likely [1: off]")
    how.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="of the choices [1337]")
    much = parser.add_argument_group("how much")
    much.add_argument("--max_new_tokens", type=number(int, 1, 2**31), default=200, help="tokens at most [200]")
    much.add_argument("--num_samples", type=number(int, 1, 4096), default=1, help="texts, made in one batch [1]")
    much.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    where = parser.add_argument_group("the machine")
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    where.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="[auto: "
                       "bfloat16 where the machine has it]")
    args = parser.parse_args(argv)
    if "" in args.stop:
        fail("--stop: an empty text would end at once", 2)
    return args


def load(checkpoint, say):
    """Returns (model, tokenizer, state) of a checkpoint, a folder or a hub name. Raises ValueError where there is none.

    state: the checkpoint's dict, with its path as "file"; None for weights in Hugging Face's format."""
    import torch
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    from model import SmolLM2, SmolLM2Config, from_pretrained
    from train import MODEL_KEYS, checkpoints, load_checkpoint

    logging.set_verbosity_error()
    path = Path(checkpoint)
    is_best = path.name == "best" and not path.exists()
    if is_best:
        path = path.parent if checkpoint != "best" else Path("out")
    if path.is_file() or path.is_dir() and checkpoints(path) or checkpoint == "out" or is_best:
        file, state = load_checkpoint(path, say, mmap=True)
        if state and is_best and state["best"]:
            file, state = load_checkpoint(path / f"step_{state['best']['step']:06d}.pt", say, mmap=True)
        if not state:
            raise ValueError(f"there is no checkpoint in {path}/: python train.py config/smollm2.py makes one")
        with torch.device("meta"):
            model = SmolLM2(SmolLM2Config(**{key: state["config"][key] for key in MODEL_KEYS}))
        model.load_state_dict(state["model"], assign=True)
        model.lm_head.weight = model.model.embed_tokens.weight
        state["file"] = file
        say(f"{file}: step {state['step']}")
        folder = Path(state["config"]["data_dir"], "tokenizer")
    else:
        model, folder, state = from_pretrained(checkpoint), checkpoint, None
    try:
        # (AutoTokenizer of transformers 5 rebuilds this tokenizer in another class, and loses the splitting of digits.)
        return model, PreTrainedTokenizerFast.from_pretrained(folder), state
    except Exception as e:
        raise ValueError(f"no tokenizer in {folder}: {(str(e) or repr(e)).splitlines()[0]}") from None


def pick_device(device="auto", dtype="auto"):
    """The torch.device and the torch.dtype to generate with. Ends the program where the device is not to be had."""
    import torch

    from train import native_bf16
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {device} is not to be had here: {(str(e) or repr(e)).splitlines()[0]}", 2)
    has_bf16 = native_bf16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    return device, getattr(torch, dtype if dtype != "auto" else "bfloat16" if has_bf16 else "float32")


class Streamer:
    """Turns the ids of one text, as they come, into pieces of text: whole characters only, and none of a stop text."""

    def __init__(self, tokenizer, prompt, stops):
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.ids, self.start, self.stops, self.ended = list(prompt), len(self.decode(prompt)), stops, False
        self.sent = self.start

    def push(self, token, last=False):
        """Adds a token (None: nothing more comes); returns the text that is now certain."""
        if token is not None:
            self.ids.append(token)
        text = self.decode(self.ids)
        end = len(text) if last else len(text.rstrip("\ufffd"))  # the bytes of a character still to come
        found = [i for i in (text.find(stop, self.start) for stop in self.stops) if i >= 0]
        if found:
            self.ended, end = True, min(found)
        elif not last:  # a stop text may have begun
            end -= max((n for stop in self.stops for n in range(1, len(stop)) if text[:end].endswith(stop[:n])), default=0)
        piece, self.sent = text[self.sent:end], max(self.sent, end)
        return piece


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C is how one ends a text one has seen enough of
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    try:
        prompt = sys.stdin.buffer.read().decode() if args.prompt == "-" else args.prompt
        prompt.encode()
    except UnicodeError:
        fail("--prompt: not UTF-8 text", 2)
    import torch

    from model import generate
    from train import compiler_problem, keep_memory
    device, dtype = pick_device(args.device, args.dtype)
    try:
        model, tokenizer, _ = load(args.checkpoint, say)
    except ValueError as e:
        fail(f"--checkpoint: {e}")
    model = model.to(device, dtype).eval()
    if device.type == "cpu":
        keep_memory()
    eos = tokenizer.eos_token_id
    ids = tokenizer.encode(prompt, add_special_tokens=False) or [eos]
    generator = torch.Generator(device).manual_seed(args.seed)
    # Compiling takes seconds (the first time ten): it pays for a long text, not for a short answer.
    pays = {"cpu": {2000: "step", 100: "layer"}, "cuda": {1000: "layer"}}.get(device.type, {})
    compile = next((what for tokens, what in pays.items() if args.max_new_tokens >= tokens), None)
    if compile and compiler_problem(device):
        compile = None
    tokens = generate(model, torch.tensor([ids] * args.num_samples, device=device), args.max_new_tokens, compile,
                      temperature=args.temperature, top_k=min(args.top_k, model.config.vocab_size), top_p=args.top_p,
                      repetition_penalty=args.repetition_penalty, generator=generator)
    streams = [Streamer(tokenizer, ids, args.stop) for _ in range(args.num_samples)]
    texts = [""] * args.num_samples  # one is printed as it comes, several each when all are done
    live = args.num_samples == 1
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        if live:
            print(prompt, end="", flush=True)
        for step in tokens:
            for i, (stream, token) in enumerate(zip(streams, step.tolist())):
                if not stream.ended:
                    stream.ended = token == eos
                    texts[i] += (piece := stream.push(None if token == eos else token, last=token == eos))
                    if live:
                        print(piece, end="", flush=True)
            if all(stream.ended for stream in streams):
                break
    except ValueError as e:
        fail(e)
    for i, stream in enumerate(streams):
        if not stream.ended:
            texts[i] += (piece := stream.push(None, last=True))
            if live:
                print(piece, end="")
        if not live:
            print(f"--- {i + 1}\n{prompt}{texts[i]}")
    if live:
        print()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os._exit(0)
