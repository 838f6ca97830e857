"""Writes a trained model as a folder that transformers, llama.cpp, sample.py and the Hugging Face hub can read.

    python -m tools.export out/ exported/                            # the newest checkpoint, in fp32
    python -m tools.export out/best exported/ --dtype bfloat16       # the lowest held-out loss, half the size
    python -m tools.export out/ exported/ --push_to_hub USER/NAME    # and uploads it (log in first: hf auth login)

The folder holds model.safetensors, config.json, generation_config.json, the tokenizer, and a model card README.md with
the recipe, the data, the losses and, where matplotlib is installed, the curve.
"""
import argparse
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

REPO = r"[\w.-]+/[\w.-]+"  # USER/NAME on the hub
CARD = """---
{front}
---

# {name}

{summary}
{warning}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = AutoModelForCausalLM.from_pretrained("{place}")
ids = model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=100)
print(tokenizer.decode(ids[0]))
```

or, with the `sample.py` of the project that trained it: `python sample.py --checkpoint {place} --prompt "ROMEO:"`.

## Data

{data}

## Losses

{losses}

## Recipe

```python
{recipe}
```

Made with {machine}.
"""


def fail(message, code=1):
    print(f"tools.export: {message}", file=sys.stderr)
    raise SystemExit(code)


def read_meta(state):
    """The meta.json of the data that the checkpoint was trained on; {} where they are gone or others by now."""
    from train import Data

    folder = Path(state["config"]["data_dir"])
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta if Data(None, None, meta, folder).fingerprint() == state["data"] else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def losses_of(state, meta, name, folder):
    """The card's part on losses, in Markdown; draws plot.png into the folder where matplotlib is installed."""
    from tools.plot import draw, read_metrics

    try:
        rows = [row for row in read_metrics(state["file"].parent) if row["step"] <= state["step"]]
    except ValueError:
        rows = []
    parts = [f"The last training loss is {rows[-1]['loss']:.4f} (step {rows[-1]['step']})."] if rows else []
    if state["best"]:
        parts.append(f"The lowest held-out loss of the run up to here is **{state['best']['val_loss']:.4f}** (step "
                     f"{state['best']['step']}); these are the weights of step {state['step']}.")
    parts = [" ".join(parts) or "None were kept."]
    tests = [row for row in rows if row.get("val_loss") is not None]
    tests = tests if len(tests) <= 12 else [tests[round(i * (len(tests) - 1) / 11)] for i in range(12)]
    bits = meta.get("val_tokens", 0) / meta.get("val_bytes", 1) / math.log(2)  # times nats a token: bits a byte
    if tests:
        parts.append("\n".join(["| step | training loss | held-out loss | perplexity | bits per byte |", "|" + " ---: |" * 5, *(
            f"| {row['step']} | {row['loss']:.4f} | {row['val_loss']:.4f} | {math.exp(min(row['val_loss'], 99)):.2f} | "
            f"{round(row['val_loss'] * bits, 4) or '?'} |" for row in tests)]))
    if rows:
        try:
            draw({name: rows}, folder / "plot.png")
            parts.append("![Loss, learning rate, gradient norm and speed](plot.png)")
        except ImportError:
            pass  # the table says it, too
    return "\n\n".join(parts)


def write_card(folder, state, parameters, dtype, name):
    """README.md, and plot.png beside it. name: how others will call the model."""
    config, meta, step = state["config"], read_meta(state), state["step"]
    config = {key: os.path.basename(os.path.normpath(value)) if os.path.isabs(str(value)) else value
              for key, value in config.items() if key != "out_dir"}  # this machine's folders are nobody's business
    init = config["init_from"]
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- llama", "- smollm2"]
    front += [f"base_model: {init}"] if re.fullmatch(REPO, init) and not os.path.exists(init) else []
    data = f"Source: `{meta.get('source', 'unknown (the data are gone, or others by now)')}`"
    if meta:
        seen = step * config["batch_size"] * config["block_size"]
        data += (f", tokenizer: `{meta['tokenizer']}`. " if "tokenizer" in meta else ". ") + \
            f"{meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} held out; " \
            f"{seen:,} tokens ({seen / meta['train_tokens']:.2f} epochs) were trained on."
    (folder / "README.md").write_text(CARD.format(
        front="\n".join(front), name=name.split("/")[-1], place=name, data=data,
        summary=f"A language model with {parameters:,} parameters in the architecture of SmolLM2 (Llama), "
                f"{'fine-tuned from ' + init if init else 'trained from random weights'} for {step:,} steps. The weights "
                f"are stored in {dtype}.",
        warning="\n> [!WARNING]\n> **STAND-IN DATA.** The real " + meta["stand_in"] + " could not be fetched when the data "
                "were prepared. This model is a try, not a result.\n" if meta.get("stand_in") else "",
        losses=losses_of(state, meta, name, folder),
        recipe="\n".join(f"{key} = {value!r}" for key, value in config.items()),
        machine=", ".join(f"{key} {value}" for key, value in state["machine"].items())), encoding="utf-8")


def export(args, say):
    """Writes the folder. Raises ValueError where the checkpoint does not load."""
    import torch

    from model import save_pretrained
    from sample import load

    model, tokenizer, state = load(args.checkpoint, say)
    if not state:
        raise ValueError(f"{args.checkpoint} is no checkpoint of train.py")
    name = args.push_to_hub or args.folder.resolve().name
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=args.folder.parent) as folder:  # nothing half written
        folder = Path(folder, "model")
        save_pretrained(model, folder, getattr(torch, args.dtype), **tokens)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(
            {**tokens, "do_sample": True, "temperature": 0.8, "top_k": 50}, indent=2))  # as sample.py
        write_card(folder, state, sum(p.numel() for p in model.parameters()), args.dtype, name)
        args.folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors shuts others out
        for file in folder.iterdir():
            os.replace(file, args.folder / file.name)


def push(folder, name, private):
    """Uploads the folder. Raises what huggingface_hub raises."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    return api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model and its card")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(message, 2)
    parser.add_argument("checkpoint", help="a checkpoint file, an out_dir (its newest), 'best' or OUT_DIR/best")
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights [float32]")
    parser.add_argument("--overwrite", action="store_true", help="replace files in a folder that is not empty")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="then upload the folder as this model")
    parser.add_argument("--private", action="store_true", help="with --push_to_hub: make it visible to you alone")
    args = parser.parse_args(argv)
    say = lambda text: print(f"tools.export: {text}", file=sys.stderr, flush=True)  # noqa: E731
    if args.push_to_hub and not re.fullmatch(REPO, args.push_to_hub):
        fail(f"--push_to_hub {args.push_to_hub}: must be USER/NAME", 2)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())) and not args.overwrite:
        fail(f"{args.folder} is not empty: choose another folder, or replace its files with --overwrite", 2)
    try:
        export(args, say)
    except ValueError as e:
        fail(e)
    except OSError as e:
        fail(f"cannot write {args.folder}: {e.strerror or e}")
    say(f"{args.folder} is written")
    if args.push_to_hub:
        try:
            say(f"uploaded: {push(args.folder, args.push_to_hub, args.private)}")
        except Exception as e:  # whatever the network or the hub has to say
            fail(f"the upload failed: {(str(e).strip().splitlines() or [type(e).__name__])[0]} (logged in? hf auth login)")


if __name__ == "__main__":
    main()
