"""Writes a trained model as a folder that transformers, llama.cpp, sample.py and the hub can read.

    python -m tools.export out/ exported/                         # the newest checkpoint, in fp32
    python -m tools.export out/best exported/ --dtype bfloat16    # the best one, at half the size
    python -m tools.export out/ exported/ --licence mit --push_to_hub USER/NAME    # (hf auth login)

The folder holds the weights, config.json, the tokenizer, and a model card README.md with the data,
the losses, the recipe and, where matplotlib is installed, the curve.
"""
import json
import math
import os
import re
import shlex
import sys
import tempfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import prepare
from model import HUB_NAME

HUB_DATASET = rf"({HUB_NAME})(:[\w.-]+)?, split \S+"  # how tools.corpus names it in meta.json
PATHS = ("out_dir", "data_dir", "init_from")  # folders of this machine are not told
CARD = """---
{front}
---

# {title}

A language model of {parameters:,} parameters in the architecture of SmolLM2 (Llama), {origin} up to
step {step:,}; its weights are {dtype}.
{warning}
A base model: it continues text and follows no instructions; it knows what its training text says,
wrong or not, and may write what is false or offensive.

## Use

```python
from transformers import pipeline

print(pipeline("text-generation", "{place}")("ROMEO:", max_new_tokens=100)[0]["generated_text"])
```

```sh
python sample.py --checkpoint {target} --prompt "ROMEO:"    # in the trainer's own folder
lm_eval --model hf --model_args pretrained={target} --tasks lambada_openai,hellaswag
pip install sentencepiece && python llama.cpp/convert_hf_to_gguf.py {quoted} --outfile {quoted}.gguf
llama-completion -m {quoted}.gguf -p "ROMEO:" -no-cnv
printf 'FROM ./%s.gguf\\nTEMPLATE "{{{{ .Prompt }}}}"\\n' {quoted} > Modelfile
ollama create {quoted} && ollama run {quoted} "ROMEO:"
```

## Data and losses

{data}

{losses}

## Recipe

```python
{recipe}
```

and else the defaults of `train.py`.

Made by the `train.py` of "SmolLM2-135M, trained from scratch" ({machine}).
"""


def save_pretrained(model, folder, dtype, **extra):
    """Writes model.safetensors and config.json as transformers reads them; extra: more fields."""
    from safetensors.torch import save_file

    from model import SmolLM2Config
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to("cpu", dtype).contiguous()
               for name, p in model.named_parameters()}  # the tied matrix is there once
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "attention_bias": False, "mlp_bias": False,
              "tie_word_embeddings": model.lm_head is model.model.embed_tokens,
              "head_dim": model.config.head_dim, "torch_dtype": str(dtype).removeprefix("torch."),
              **{f.name: getattr(model.config, f.name) for f in fields(SmolLM2Config)}, **extra}
    write_json(folder / "config.json", config)
    # safetensors shuts others out
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def write_json(file, content):
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_logits(model, folder):
    """Raises ValueError where transformers makes other logits of a folder than the model does."""
    import torch
    from transformers import LlamaForCausalLM, logging
    logging.disable_progress_bar()
    ids = torch.arange(16)[None] % model.config.vocab_size
    with torch.inference_mode():
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        ours, _ = model(ids)
    if (ours - theirs).norm() > 1e-3 * ours.norm():
        raise ValueError("transformers' Llama computes something else of these weights than "
                         "model.py does: a changed architecture cannot be exported as Llama")


def save_tokenizer(tokenizer, folder):
    """Writes the tokenizer so that transformers 4, and what builds on it, reads it, too.

    It puts nothing before or after a text, since nothing stood there in training."""
    from tokenizers.processors import ByteLevel
    if tokenizer.num_special_tokens_to_add():
        tokenizer.backend_tokenizer.post_processor = ByteLevel()  # (it adds none)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_bytes())
    for name in ("backend", "is_local", "local_files_only", "add_bos_token", "add_eos_token"):
        config.pop(name, None)
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(file, {**config, "tokenizer_class": "PreTrainedTokenizerFast",
                      "model_input_names": ["input_ids", "attention_mask"]})


def read_meta(state):
    """The meta.json of the data that were trained on; {} where they are gone, or others by now."""
    folder = Path(state["config"]["data_dir"])
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if {name: meta[f"{name}_sha256"][:16] for name in prepare.FILES} == state["data"]:
            return meta
    return {}


def read_commit(state):
    """The git commit that the run was made with; "" where nobody wrote it down."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return json.loads((state["file"].parent / "run.json").read_bytes())["git"][:12]
    return ""


def metrics_of(loss, meta):
    """The figures of a held-out loss, nats a token, by their names in a model-index."""
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 99))}
    if meta:
        bytes_per_token = meta["val_bytes"] / meta["val_tokens"]
        figures["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return {name: round(value, 4) for name, value in figures.items()}


def front_matter(args, state, meta, figures, title):
    """The card's YAML: what the hub files the model under."""
    from huggingface_hub import EvalResult, ModelCardData
    source = name_only(meta.get("source", "held-out text"))
    match = re.fullmatch(HUB_DATASET, source)
    dataset = match[1] if match else None
    results = [EvalResult("text-generation", dataset or "text", source, name, value,
                          dataset_split="held out") for name, value in figures.items()]
    init = state["config"]["init_from"]
    is_hub_name = re.fullmatch(HUB_NAME, init) and not os.path.exists(init)
    return ModelCardData(
        license=args.licence, language=args.language, library_name="transformers",
        pipeline_tag="text-generation", tags=["llama", "smollm2"], model_name=title,
        base_model=init if is_hub_name else None, datasets=dataset,
        eval_results=results or None).to_yaml()  # (what is None is left out)


def describe_losses(tests, state, figures):
    """What the card says of the losses, in Markdown. tests: the rows with a held-out loss."""
    here = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
    text = f"Held-out {here}." if here else "These weights were not evaluated."
    best = state["best"]
    if best and best["step"] != state["step"]:
        text += f" The run's lowest loss before was {best['val_loss']:.4f}, at step {best['step']}."
    if not tests:
        return [text]
    table = ["| step | training loss | held-out loss |", "| ---: | ---: | ---: |"]
    for i in sorted({round(i * (len(tests) - 1) / 7) for i in range(8)}):  # a few of all
        table.append("| {step} | {loss:.4f} | {val_loss:.4f} |".format(**tests[i]))
    return [text, "\n".join(table)]


def describe_data(meta, tokens):
    """What the card says of the data."""
    if not meta:
        return f"{tokens:,} tokens were trained on; the data are gone, or others by now."
    source, tokenizer = (name_only(meta.get(name, "?")) for name in ("source", "tokenizer"))
    return (f"Text: {source}; tokenizer: {tokenizer}. {meta['train_tokens']:,} tokens to train on, "
            f"{meta['val_tokens']:,} held out; {tokens:,} tokens "
            f"({tokens / meta['train_tokens']:.2f} epochs) were trained on.")


def name_only(path):
    """Of a path on this machine its last part."""
    return os.path.basename(os.path.normpath(path)) if os.path.isabs(path) else path


def write_card(args, folder, state, parameters, title):
    """README.md and, where matplotlib is installed, plot.png."""
    from tools.plot import draw, read_metrics
    from train import KEYS
    config, meta, step, rows = state["config"], read_meta(state), state["step"], []
    with suppress(ValueError):  # none are there; those of a checkpoint set aside are gone
        if state["file"].suffix == ".pt":
            rows = [row for row in read_metrics(state["file"].parent) if row["step"] <= step]
    tests = [row for row in rows if row.get("val_loss") is not None]
    is_evaluated = tests and tests[-1]["step"] == step
    figures = metrics_of(tests[-1]["val_loss"], meta) if is_evaluated else {}
    losses = describe_losses(tests, state, figures)
    if rows:
        with suppress(ImportError):  # the table says it, too
            draw({title: rows}, folder / "plot.png")
            losses.append("![Loss, learning rate, gradient norm and speed](plot.png)")
    warning, init = "", config["init_from"]
    if meta.get("stand_in"):
        warning = (f"\n> [!WARNING]\n> **STAND-IN DATA.** The real {meta['stand_in']} could not be "
                   "fetched when the data were prepared.\n> This model is a try, not a result.\n")
    machine = {"git": read_commit(state), **state["machine"]}
    (folder / "README.md").write_text(CARD.format(
        front=front_matter(args, state, meta, figures, title), title=title, warning=warning,
        parameters=parameters, step=step, dtype=args.dtype,
        origin=f"fine-tuned from {name_only(init)}" if init else "trained from random weights",
        place=args.push_to_hub or title, target=shlex.quote(args.push_to_hub or title),
        quoted=shlex.quote(title), data=describe_data(meta, state["tokens"]),
        losses="\n\n".join(losses),
        recipe="\n".join(f"{name} = {value!r}" for name, value in config.items()
                         if name not in PATHS and value != KEYS[name].default),
        machine=", ".join(f"{name} {value}" for name, value in machine.items() if value != "")),
        encoding="utf-8", errors="backslashreplace")  # (a file's name can be no UTF-8)


def export(args):
    """Writes the folder; returns the names of the files. Raises ValueError where there is nothing
    to export, or OSError."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from sample import load
    model, tokenizer_folder, state = load(args.checkpoint)
    if not state:
        raise ValueError(f"{args.checkpoint} is no checkpoint of train.py")
    with prepare.explaining(f"the tokenizer in {tokenizer_folder} does not load"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, local_files_only=True)
    title = (args.push_to_hub or args.folder.resolve().name).split("/")[-1]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokenizer.model_max_length = model.config.max_position_embeddings
    folder = args.folder.resolve()  # of a link, what it leads to
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder if folder.is_mount() else folder.parent  # on the same disk, for os.replace
    with tempfile.TemporaryDirectory(prefix=".export-", dir=beside) as new:
        new = Path(new)  # so that nothing half written is left
        dtype = getattr(torch, args.dtype)
        save_pretrained(model, new, dtype, **ids)
        check_logits(model.to(dtype).float(), new)  # (of the weights as they are written)
        save_tokenizer(tokenizer, new)
        generation = {**ids, "do_sample": True, "temperature": 0.8, "top_k": 50}  # as sample.py
        write_json(new / "generation_config.json", generation)
        write_card(args, new, state, sum(p.numel() for p in model.parameters()), title)
        folder.mkdir(exist_ok=True)
        names = os.listdir(new)
        for name in names:
            os.replace(new / name, folder / name)
    return names


@prepare.command("tools.export")
def main(argv=None):
    parser = prepare.new_parser("tools.export", __doc__)
    add = parser.add_argument
    add("checkpoint", type=prepare.typed_path,
        help="a file, an out_dir (its newest), best, OUT_DIR/best")
    add("folder", type=lambda text: Path(prepare.typed_path(text)), help="the folder to write")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="[float32]")
    add("--licence", "--license", metavar="NAME", help="for the card: mit, apache-2.0, cc-by-4.0, "
        "... (not given: the card names none)")
    add("--language", metavar="CODE", help="of the text, for the card: en, de, ...")
    add("--overwrite", action="store_true",
        help="replace files where the folder is not empty, or USER/NAME is there")
    add("--push_to_hub", metavar="USER/NAME", help="then upload what was written as this model")
    add("--private", action="store_true", help="with --push_to_hub: visible to you alone")
    args = parser.parse_args(argv)
    if args.push_to_hub and not re.fullmatch(HUB_NAME, args.push_to_hub):
        parser.error(f"--push_to_hub {args.push_to_hub}: must be USER/NAME")
    if args.folder.exists() and not args.folder.is_dir():
        parser.error(f"{args.folder} is a file")
    if args.folder.exists() and any(args.folder.iterdir()) and not args.overwrite:
        parser.error(f"{args.folder} is not empty: choose another folder, or replace its files "
                     "with --overwrite")
    if (args.folder / "metrics.jsonl").exists():
        parser.error(f"{args.folder} holds a run: choose another folder")
    try:
        names = export(args)
    except OSError as e:
        raise ValueError(f"cannot write {args.folder}: {e.strerror or e}") from None
    print(f"{args.folder} is written", file=sys.stderr)
    if args.push_to_hub:
        with prepare.explaining("the upload failed (not logged in: hf auth login; "
                                f"{args.push_to_hub} is there: --overwrite)"):
            from huggingface_hub import HfApi
            HfApi().create_repo(args.push_to_hub, private=args.private, exist_ok=args.overwrite)
            if args.private and not HfApi().model_info(args.push_to_hub).private:
                raise ValueError(f"{args.push_to_hub} is there already, and public")
            where = HfApi().upload_folder(repo_id=args.push_to_hub, folder_path=args.folder,
                                          allow_patterns=names,
                                          commit_message="Upload a model and its card")
            print(f"uploaded: {where}", file=sys.stderr)


if __name__ == "__main__":
    main()
