"""Writes text with a trained model, as it comes.

    python sample.py --prompt "ROMEO:"                            # the newest checkpoint in out/
    python sample.py --prompt "Once" --checkpoint best --temperature 0.7 --num_samples 3
    python sample.py --prompt "Gravity is" --checkpoint HuggingFaceTB/SmolLM2-135M
    echo "To be" | python sample.py --prompt -                    # from standard input

The text goes to standard output, all else to standard error. The same seed gives the same text.
"""
import re
import sys
from itertools import tee, zip_longest
from operator import itemgetter
from pathlib import Path

import prepare
from prepare import number


def utf8(text):
    """A text as typed, or for - the one in standard input; argparse tells where it is not UTF-8."""
    content = sys.stdin.buffer.read() if text == "-" else text.encode()
    return content.decode()


def parse_args(argv):
    parser = prepare.new_parser("sample.py", __doc__)
    add = parser.add_argument
    add("--prompt", type=utf8, default="\n",
        help="text to continue; - reads standard input [a line break]")
    add("--checkpoint", type=prepare.typed_path, default="out",
        help="a file, out_dir (newest), best, OUT_DIR/best, an exported folder, a hub name [out]")
    add("--temperature", type=number(float, 0, 1e6), default=0.8,
        help="below 1 likelier, above 1 wilder tokens; 0: always the likeliest [0.8]")
    add("--top_k", type=number(int, 0), default=50, help="of the k likeliest; 0: all [50]")
    add("--top_p", type=number(float, 0, 1), default=1.0,
        help="of the likeliest that together have this probability [1]")
    add("--seed", type=number(int, 0), default=1337, help="of the choices [1337]")
    add("--max_new_tokens", type=number(int, 1, 2**31), default=200, help="at most [200]")
    add("--num_samples", type=number(int, 1, 4096), default=1, help="texts, made in one batch [1]")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="[auto: bfloat16; on older GPUs float16, on Apple's float32]")
    args = parser.parse_args(argv)
    if "" in args.stop:
        parser.error("--stop: an empty text would end at once")
    return args


def load(checkpoint):
    """(model, its tokenizer's folder, state) of a checkpoint, an exported folder or a hub name.

    state: the checkpoint's dict, with its path as "file"; None for the others. Raises ValueError,
    in one line, where there is nothing to load. The hub is asked only for USER/NAME as typed."""
    from model import HUB_NAME, from_pretrained, model_of
    from train import TrainConfig, load_checkpoint
    path = Path("out/best") if checkpoint == "best" else Path(checkpoint)
    if (path / "config.json").is_file():
        return from_pretrained(path), path, None
    is_path = path.parent.exists() or path.suffix == ".pt" or path.name == "best"
    if not is_path and re.fullmatch(HUB_NAME, checkpoint):
        return from_pretrained(checkpoint), prepare.hub_folder(checkpoint), None
    file, state = load_checkpoint(path, mmap=True)
    state["file"] = file
    places = [file.parent / "tokenizer", Path(state["config"]["data_dir"], "tokenizer")]
    for folder in places:
        if prepare.digest(folder / "tokenizer.json").startswith(state["data"]["tokenizer"]):
            return model_of(TrainConfig(**state["config"]), state["model"]), folder, state
    raise ValueError(f"the tokenizer that {file} was trained with is neither in {places[0]} nor in "
                     f"{places[1]}: copy it to the first")


def stream(tokens, tokenizer, eos, prompt, stops):
    """Yields the text that each of the tokens after a prompt makes certain, then what is left.

    Whole characters, and nothing from eos or a stop text on. prompt: its ids."""
    from tokenizers.decoders import DecodeStream
    decoder, waiting = DecodeStream(prompt, skip_special_tokens=False), ""
    held_back = max(map(len, stops), default=1) - 1  # characters: a stop text may begin there
    for token in tokens:
        if token == eos:
            break
        waiting += decoder.step(tokenizer, token) or ""
        found = [waiting.find(stop) for stop in stops if stop in waiting]
        if found:
            waiting = waiting[:min(found)]
            break
        end = max(0, len(waiting) - held_back)
        yield waiting[:end]
        waiting = waiting[end:]
    yield waiting


def write(model, tokenizer, eos, prompt, num_samples, max_new_tokens, stop, seed, **sampling):
    """Yields at each step the next pieces of the texts after a prompt, a tuple.

    stop: a list of texts. sampling: see model.sample_token. Raises ValueError where prompt and new
    tokens are too many."""
    import torch

    from model import generate, worth_compiling
    device = model.lm_head.weight.device
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [eos or 0]
    idx = torch.tensor([ids] * num_samples, device=device)  # (num_samples, T)
    tokens = generate(model, idx, max_new_tokens, worth_compiling(device, max_new_tokens),
                      generator=torch.Generator(device).manual_seed(seed), **sampling)
    rows = tee(map(torch.Tensor.tolist, tokens), num_samples)  # all ids of each step, for each text
    texts = [stream(map(itemgetter(i), row), tokenizer, eos, ids, stop)
             for i, row in enumerate(rows)]
    yield from zip_longest(*texts, fillvalue="")


@prepare.command("sample.py")
def main(argv=None):
    options = vars(parse_args(argv))
    from model import is_out_of_memory, keep_freed_memory, pick_device
    from train import hint_of_best
    try:
        device, dtype, _ = pick_device(options.pop("device"), options.pop("dtype"), True)
    except ValueError as e:
        prepare.fail("sample.py", f"--{e}", 2)
    model, folder, state = load(options.pop("checkpoint"))
    if state:
        prepare.log(f"{state['file']}: step {state['step']}"
                    + hint_of_best(state["file"].parent, state))
    keep_freed_memory()
    texts = [f"--- {i + 1}\n{options['prompt']}" for i in range(options["num_samples"])]
    if len(texts) == 1:
        texts = [options["prompt"]]
    stdout = sys.stdout.stream  # the bare one: here, what cannot be written is an error
    stdout.reconfigure(encoding="utf-8")
    try:
        for pieces in write(model.to(device, dtype), *prepare.open_tokenizer(folder), **options):
            texts = [text + piece for text, piece in zip(texts, pieces)]
            print(texts[0], end="", file=stdout, flush=True)  # as it comes; the rest at the end
            texts[0] = ""
        print(*texts, sep="\n", file=stdout, flush=True)
    except BrokenPipeError:
        return  # the reader, such as `head`, has seen enough
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        raise ValueError("out of memory: lower --num_samples or --max_new_tokens")


if __name__ == "__main__":
    main()
