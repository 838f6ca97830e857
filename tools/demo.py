"""A page in the browser that writes text with a trained model, or with two side by side.

    python -m tools.demo                                # the runs out*/ and exported folders here
    python -m tools.demo --checkpoint HuggingFaceTB/SmolLM2-135M --port 8000
    python -m tools.demo --checkpoint exported/ --space space/    # a folder to push to a Space

It listens on this machine only and reports nothing to anyone. Programs call /generate.
"""
import html
import os
import random
import re
import shlex
import shutil
import threading
import time
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import prepare
from model import HUB_NAME

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")

CSS = """main.fillable {max-width: 1240px !important; margin: auto; padding: 16px !important}
.written {font: 17px/1.6 Georgia, 'Times New Roman', serif; white-space: pre-wrap; min-height: 16em;
  overflow-wrap: anywhere; border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 12px 16px; background: var(--background-fill-primary)}
.written .prompt {opacity: .55} .speed {min-height: 1.6em; opacity: .75}"""
CTRL_ENTER = """() => document.addEventListener('keydown', e => {
  if (e.key == 'Enter' && (e.ctrlKey || e.metaKey)) document.querySelector('#go').click()
})"""
BEGINNINGS = ["ROMEO:", "First Citizen:\n", "To be, or not to be", "Once upon a time"]
SLIDERS = {"Length": (1, 2000, 200, 1, "New tokens, at most"),  # lowest, highest, default, step
           "Temperature": (0, 2, 0.8, 0.05, "Below 1 likelier, above 1 wilder; 0: the likeliest"),
           "Top-k": (0, 500, 50, 1, "Among the k likeliest tokens; 0: all"),
           "Top-p": (0, 1, 1, 0.01, "Among the likeliest that together have this probability")}
LIMITS = {"Seed": (0, 2**53), **SLIDERS}
ONE_STEP = threading.Lock()  # two at once would take as long, and compile the same thing twice
RUNNING = {}  # session: what it shows now; Stop takes it out, a later click replaces it


fail = partial(prepare.fail, "tools.demo")


def describe(file):
    """What the choice says of a checkpoint: its step, its held-out loss, whether it is the best."""
    from tools.plot import read_metrics
    from train import step_of
    step, losses = step_of(file), {}
    with suppress(ValueError):  # a checkpoint alone
        losses = {r["step"]: r["val_loss"] for r in read_metrics(file.parent) if r.get("val_loss")}
    loss = f": held-out loss {losses[step]:.3f}" if step in losses else ""
    best = " (best)" if loss and losses[step] == min(losses.values()) else ""
    return f"{file.parent.name}, step {step:,}{loss}{best}"


def found(asked):
    """The choices, {name: what is shown}: those asked for, else the runs out*/, the newest first,
    and exported folders. Of a run all checkpoints, the newest first."""
    from train import checkpoints
    runs = [folder for folder in Path().glob("out*") if checkpoints(folder)]
    runs.sort(key=lambda run: checkpoints(run)[-1].stat().st_mtime, reverse=True)
    exported = [file.parent for file in sorted(Path().glob("*/config.json"))]
    choices = {}
    for name in asked or [*runs, *exported]:
        files = checkpoints(name)[::-1]
        choices |= {str(file): describe(file) for file in files} or {str(name): str(name)}
    return choices


@lru_cache(maxsize=4)
def load(name, changed):
    """(model, tokenizer, eos, device), loaded once for all. changed: when. Raises ValueError."""
    import sample
    from model import pick_device
    device, dtype, _ = pick_device()
    model, folder, _ = sample.load(name)
    return model.to(device, dtype).eval(), *prepare.open_tokenizer(folder), device


def write(name, prompt, seed, length, temperature, top_k, top_p, stops):
    """Yields (text after the prompt, tokens, seconds they took) as they come; as sample.py's."""
    import torch

    from model import generate, worth_compiling
    from sample import Streamer
    with ONE_STEP:
        model, tokenizer, eos, device = load(name, os.path.exists(name) and os.path.getmtime(name))
        compiled = worth_compiling(device, length)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [eos or 0]
    tokens = generate(model, torch.tensor([ids], device=device), length, compiled,
                      temperature=temperature, top_k=top_k,
                      top_p=top_p, generator=torch.Generator(device).manual_seed(seed))
    stream, text, seconds = Streamer(tokenizer, ids, stops), "", 0.0
    for n in range(1, length + 1):
        with ONE_STEP:
            began = time.perf_counter()
            token = next(tokens).item()
            seconds += time.perf_counter() - began
        if token != eos:
            text += stream.push(token)
        if token == eos or stream.ended:
            break
        yield text, n, seconds
    yield text + stream.finish(), n, seconds


def start(asked, names, prompt, stop_texts, *numbers):
    """A stream of write() for each name. Raises ValueError for what cannot be."""
    for name in names:
        if name not in found(asked):
            raise ValueError(f"There is no {name} (any more): reload the page")
    for value, (label, (low, high, *_)) in zip(numbers, LIMITS.items()):
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{label}: must be from {low} to {high:,}")
    seed, length, temperature, top_k, top_p = numbers
    stops = [stop.replace("\\n", "\n") for stop in stop_texts.splitlines() if stop]
    return [write(name, prompt, int(seed), int(length), temperature, int(top_k), top_p,
                  stops) for name in names]


def show(asked, session, left, right, prompt, stop_texts, *numbers):
    """Yields what the page shows: two texts and their lines, the left text to continue, Stop."""
    import gradio as gr
    prompt = prompt or "\n"
    names = [left, right] if right else [left]
    texts, lines, counts, shown = ["", ""], ["", ""], [0, 0], 0.0
    mine = RUNNING[session] = object()

    def page(is_running):
        bodies = [f'<div class="written"><span class="prompt">{html.escape(prompt)}</span>'
                  f'{html.escape(text)}</div>' if line else "" for text, line in zip(texts, lines)]
        plain = prompt + texts[0] if texts[0] else ""
        return *bodies, *lines, plain, gr.Button(visible=is_running)

    try:
        yield page(True)
        streams = dict(enumerate(start(asked, names, prompt, stop_texts, *numbers)))
        while streams and RUNNING.get(session) is mine:
            for i, stream in list(streams.items()):
                step = next(stream, None)
                if step is None:
                    lines[i] += ": done"
                    del streams[i]
                    continue
                texts[i], counts[i], seconds = step
                lines[i] = f"{counts[i]} tokens, {counts[i] / seconds:,.0f} per second"
            if time.perf_counter() - shown > 0.04:  # as often as an eye can see
                shown = time.perf_counter()
                yield page(True)
        for i in streams:
            lines[i] += f": stopped at {counts[i]}"
        if RUNNING.get(session, mine) is mine:
            yield page(False)
    except ValueError as e:
        texts, lines = ["", ""], ["", ""]
        yield page(False)
        raise gr.Error(html.escape(str(e)), print_exception=False) from None


def page(asked):
    import gradio as gr

    def choices():
        return [(text, name) for name, text in found(asked).items()]

    def run(request: gr.Request, *values):
        yield from show(asked, request.session_hash, *values)

    def stop_it(request: gr.Request):
        RUNNING.pop(request.session_hash, None)

    def refresh(left, right):
        now = found(asked)
        return (gr.Dropdown(choices(), value=left if left in now else next(iter(now), None)),
                gr.Dropdown([("none", ""), *choices()], value=right if right in now else ""))

    def generate(checkpoint: str, prompt: str, seed: int = 1337, length: int = 200,
                 temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0,
                 stop: str = "") -> str:
        """The text after the prompt. checkpoint: as on the page; stop: texts, one a line."""
        values = (seed, length, temperature, top_k, top_p)
        try:
            return list(start(asked, [checkpoint], prompt or "\n", stop, *values)[0])[-1][0]
        except ValueError as e:
            raise gr.Error(str(e), print_exception=False) from None

    with gr.Blocks(title="SmolLM2", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown("# SmolLM2\nWrite a beginning, and the model goes on.")
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                prompt = gr.Textbox("ROMEO:", label="Prompt", info="Ctrl-Enter generates", lines=3,
                                    max_lines=8, elem_id="prompt")
                gr.Examples(BEGINNINGS, prompt, label="Beginnings")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go", min_width=90)
                    again = gr.Button("New seed", elem_id="again", min_width=90)
                    on = gr.Button("Continue", elem_id="on", min_width=90)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=90,
                                     visible=False)
                with gr.Row():
                    with gr.Column(min_width=280):
                        left_line = gr.Markdown(elem_classes="speed", elem_id="left-speed")
                        left_text = gr.HTML(elem_id="left-text")
                    with gr.Column(min_width=280, visible=False) as right_column:
                        right_line = gr.Markdown(elem_classes="speed", elem_id="right-speed")
                        right_text = gr.HTML(elem_id="right-text")
            with gr.Column(scale=3, min_width=300):
                left = gr.Dropdown(choices(), label="Checkpoint", elem_id="checkpoint")
                right = gr.Dropdown([("none", ""), *choices()], value="", elem_id="beside",
                                    label="Beside it", info="From the same prompt and seed")
                seed = gr.Number(1337, label="Seed", info="The same seed gives the same text again",
                                 elem_id="seed")
                sliders = [gr.Slider(low, high, value, step=step, label=label, info=info,
                                     elem_id=label.lower()[:6])
                           for label, (low, high, value, step, info) in SLIDERS.items()]
                stops = gr.Textbox(label="Stop texts", info="One a line; \\n is a line break",
                                   lines=2, elem_id="stops")
        written = gr.State("")
        write_it = {"fn": run, "inputs": [left, right, prompt, stops, seed, *sliders],
                    "outputs": [left_text, right_text, left_line, right_line, written, stop],
                    "concurrency_limit": 8, "show_progress": "hidden", "api_visibility": "private"}
        private = {"api_visibility": "private", "show_progress": "hidden"}
        go.click(**write_it)
        again.click(lambda: random.randrange(2**31), None, seed, **private).then(**write_it)
        on.click(lambda old, new: new or old, [prompt, written], prompt, **private).then(**write_it)
        stop.click(stop_it, **private)
        right.change(lambda name: gr.Column(visible=bool(name)), right, right_column, **private)
        blocks.load(refresh, [left, right], [left, right], **private)
        blocks.load(None, js=CTRL_ENTER)
        gr.api(generate, api_name="generate")
    return blocks


FRONT_MATTER = """\
---
title: SmolLM2, trained from scratch
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
---
"""
APP = """\
import os

os.environ.setdefault("CHECKPOINT", {names!r})
from tools.demo import main

main([])
"""


PRIVATE = shutil.ignore_patterns("run.json", ".lock", "samples", "superseded", "tensorboard")


def write_space(folder, names):
    """Writes a folder that is a Hugging Face Space as it stands: page, scripts, model folders."""
    root = Path(__file__).resolve().parent.parent
    sources = {Path(name).resolve().name: name for name in names if Path(name).is_dir()}
    if len(sources) < sum(os.path.exists(name) for name in names):
        fail("--space: name folders with --checkpoint, each with a name of its own", 2)
    if folder.exists():
        fail(f"--space {folder}: is there already; name another", 2)
    (folder / "tools").mkdir(parents=True)
    for file in ("model.py", "train.py", "prepare.py", "sample.py", "tools/__init__.py",
                 "tools/demo.py", "tools/plot.py"):
        shutil.copy(root / file, folder / file)
    for name, source in sources.items():
        shutil.copytree(source, folder / name, ignore=PRIVATE)
    names = [*sources, *(name for name in names if not os.path.exists(name))]
    pinned = [line.split()[0] for file in ("requirements.txt", "tools/requirements.txt")
              for line in (root / file).read_text().splitlines() if "==" in line]
    versions = dict(line.split("==") for line in pinned)
    needed = [f"{name}=={versions[name]}" for name in ("torch", "transformers", "numpy")]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n")
    (folder / "README.md").write_text(FRONT_MATTER.format_map(versions))
    (folder / "app.py").write_text(APP.format(names=shlex.join(names)))
    print(f"{folder} is written: create a Gradio Space, and push this folder to it, as in\n"
          f"hf upload --repo-type space USER/NAME {shlex.quote(str(folder))}")


@prepare.command("tools.demo")
def main(argv=None):
    parser = prepare.new_parser("tools.demo", __doc__)
    add = parser.add_argument
    names = shlex.split(os.environ.get("CHECKPOINT", ""))
    add("--checkpoint", nargs="+", type=prepare.typed_path, default=names, metavar="NAME",
        help="as for sample.py; several become a choice [the variable CHECKPOINT, else all here]")
    add("--port", type=int, help="of the page [the first free one from 7860 on]")
    add("--host", help="0.0.0.0 lets others in [the variable GRADIO_SERVER_NAME, else 127.0.0.1]")
    add("--space", type=prepare.typed_path, metavar="FOLDER", help="write a Space with --checkpoint")
    args = parser.parse_args(argv)
    for name in args.checkpoint:
        if not Path(name).exists() and "best" not in name and not re.fullmatch(HUB_NAME, name):
            fail(f"--checkpoint {name}: no such file or folder", 2)
    if args.space:
        if not args.checkpoint:
            fail("--space: name exported folders or hub names with --checkpoint", 2)
        return write_space(Path(args.space), args.checkpoint)
    try:
        import gradio as gr
    except ImportError:
        fail("gradio is missing: pip install -r tools/requirements.txt")
    if not found(args.checkpoint):
        fail("there is no checkpoint here: name one with --checkpoint, or make one with python "
             "train.py config/smollm2.py")
    theme = gr.themes.Soft(font="system-ui", font_mono="ui-monospace")  # none from the web
    try:
        blocks = page(args.checkpoint).queue()
        _, url, _ = blocks.launch(server_name=args.host, server_port=args.port, share=False,
                                  theme=theme, css=CSS, footer_links=["api"], ssr_mode=False,
                                  show_error=True, quiet=True, prevent_thread_lock=True)
    except (OSError, OverflowError) as e:
        fail(e)
    print(f"open {url} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
