"""A page in the browser that writes text with a trained model, or with two side by side.

    python -m tools.demo                                # the runs out*/ and exported folders here
    python -m tools.demo --checkpoint HuggingFaceTB/SmolLM2-135M --port 8000

It listens on this machine only and reports nothing to anyone. Programs call /generate.
"""
import html
import os
import random
import re
import shlex
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
ONE_STEP = threading.Lock()  # two at once would take as long, and compile the same thing twice
RUNNING = {}  # session: what it shows now; Stop takes it out, a later click replaces it

fail = partial(prepare.fail, "tools.demo")


def found(asked):
    """The choices, {name: what is shown}: those asked for, else the runs out*/, the newest first,
    and exported folders. Of a run all checkpoints, the newest first, with their held-out loss."""
    from tools.plot import read_metrics
    from train import checkpoints, step_of
    runs = [folder for folder in Path().glob("out*") if checkpoints(folder)]
    runs.sort(key=lambda run: checkpoints(run)[-1].stat().st_mtime, reverse=True)
    exported = [file.parent for file in sorted(Path().glob("*/config.json"))]
    choices = {}
    for name in asked or [*runs, *exported]:
        files, losses = checkpoints(name)[::-1], {}
        with suppress(ValueError):  # no run, or one without evaluations
            rows = read_metrics(Path(name, "metrics.jsonl"))
            losses = {row["step"]: row["val_loss"] for row in rows if row.get("val_loss")}
        for file in files:
            step = step_of(file)
            choices[str(file)] = f"{file.parent.name}, step {step:,}"
            if step in losses:
                best = " (best)" if losses[step] == min(losses.values()) else ""
                choices[str(file)] += f": held-out loss {losses[step]:.3f}{best}"
        if not files:
            choices[str(name)] = str(name)
    return choices


@lru_cache(maxsize=4)
def load(name, changed):
    """(model, tokenizer, eos), loaded once for all. changed: when. Raises ValueError."""
    import sample
    from model import pick_device
    device, dtype, _ = pick_device()
    model, folder, _ = sample.load(name)
    return model.to(device, dtype).eval(), *prepare.open_tokenizer(folder)


def stream(name, prompt, stops, seed, length, temperature, top_k, top_p):
    """Yields (text after the prompt, tokens, seconds they took) as they come; as sample.py's."""
    from sample import write
    with ONE_STEP:
        loaded = load(name, os.path.exists(name) and os.path.getmtime(name))
    pieces = write(*loaded, prompt, 1, int(length), stops, int(seed), temperature=temperature,
                   top_k=int(top_k), top_p=top_p)
    text, n, seconds = "", 0, 0.0
    while True:
        with ONE_STEP:
            began = time.perf_counter()
            piece = next(pieces, None)
            seconds += time.perf_counter() - began
        if piece is None:
            return
        text, n = text + piece[1], min(n + 1, int(length))  # (the end has a piece, and no token)
        yield text, n, seconds


def start(asked, names, prompt, stop_texts, *numbers):
    """A stream for each name. Raises ValueError for what cannot be."""
    for name in names:
        if name not in found(asked):
            raise ValueError(f"There is no {name} (any more): reload the page")
    limits = {"Seed": (0, 2**53), **SLIDERS}
    for value, (label, (low, high, *_)) in zip(numbers, limits.items()):
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{label}: must be from {low} to {high:,}")
    stops = [stop.replace("\\n", "\n") for stop in stop_texts.splitlines() if stop]
    return [stream(name, prompt or "\n", stops, *numbers) for name in names]


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

    def run(request: gr.Request, *values):
        yield from show(asked, request.session_hash, *values)

    def stop_it(request: gr.Request):
        RUNNING.pop(request.session_hash, None)

    def refresh(left, right):
        now = found(asked)
        choices = [(text, name) for name, text in now.items()]
        return (gr.Dropdown(choices, value=left if left in now else next(iter(now), None)),
                gr.Dropdown([("none", ""), *choices], value=right if right in now else ""))

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
                left = gr.Dropdown(label="Checkpoint", elem_id="checkpoint")
                right = gr.Dropdown(label="Beside it", info="From the same prompt and seed",
                                    elem_id="beside")
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


@prepare.command("tools.demo")
def main(argv=None):
    parser = prepare.new_parser("tools.demo", __doc__)
    add = parser.add_argument
    names = shlex.split(os.environ.get("CHECKPOINT", ""))
    add("--checkpoint", nargs="+", type=prepare.typed_path, default=names, metavar="NAME",
        help="as for sample.py; several become a choice [the variable CHECKPOINT, else all here]")
    add("--port", type=int, help="of the page [the first free one from 7860 on]")
    add("--host", help="0.0.0.0 lets others in [the variable GRADIO_SERVER_NAME, else 127.0.0.1]")
    args = parser.parse_args(argv)
    for name in args.checkpoint:
        if not Path(name).exists() and "best" not in name and not re.fullmatch(HUB_NAME, name):
            fail(f"--checkpoint {name}: no such file or folder", 2)
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
