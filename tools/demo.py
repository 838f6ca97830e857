"""A page in the browser that writes text with a trained model, or with two side by side.

    python -m tools.demo                                # the runs out*/ and exported folders here
    python -m tools.demo --checkpoint HuggingFaceTB/SmolLM2-135M --port 8000

It listens on this machine only and reports nothing to anyone. Programs call /generate.
"""
import html
import os
import random
import re
import threading
import time
from contextlib import suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import count, zip_longest
from pathlib import Path

import prepare
import sample
from model import HUB_NAME, pick_device
from tools.plot import read_metrics
from train import checkpoints, step_of

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")

CSS = """.sides {display: grid; grid: auto / repeat(auto-fit, minmax(280px, 1fr)); gap: 1em}
.written {white-space: pre-wrap; overflow-wrap: anywhere; font: 17px/1.6 Georgia, serif}
.written span, .speed {opacity: .6}"""
SIDE = '<div><p class="speed">{}</p><p class="written"><span>{}</span>{}</p></div>'
CTRL_ENTER = """<script>document.addEventListener('keydown', e => {
  if (e.key == 'Enter' && (e.ctrlKey || e.metaKey)) document.querySelector('#go').click()
})</script>"""
BEGINNINGS = ["ROMEO:", "First Citizen:\n", "To be, or not to be", "Once upon a time"]
NUMBERS = {"Seed": (0, 2**31 - 1, 1337, 1, "The same seed gives the same text again"),
           "Length": (1, 2000, 200, 1, "New tokens, at most"),  # lowest, highest, default, step
           "Temperature": (0, 2, 0.8, 0.05, "Below 1 likelier, above 1 wilder; 0: the likeliest"),
           "Top-k": (0, 500, 50, 1, "Among the k likeliest tokens; 0: all"),
           "Top-p": (0, 1, 1, 0.01, "Among the likeliest that together have this probability")}
ONE_STEP = threading.Lock()  # two at once would take as long, and compile the same thing twice


def found(asked):
    """The choices, (what is shown, name): those asked for, else the runs out*/, the newest first,
    and exported folders. Of a run all checkpoints, the newest first, with their held-out loss."""
    files = sorted(Path().glob("out*/step_*.pt"), key=os.path.getmtime, reverse=True)
    exported = sorted(Path().glob("*/config.json"))
    choices = []
    for name in asked or dict.fromkeys(str(file.parent) for file in [*files, *exported]):
        notes = {}
        with suppress(ValueError):  # no run, or one without evaluations
            rows = read_metrics(Path(name, "metrics.jsonl"))
            losses = {row["step"]: row["val_loss"] for row in rows if row.get("val_loss")}
            notes = {step: f": held-out loss {loss:.3f}" for step, loss in losses.items()}
            notes[min(losses, key=losses.get)] += " (best)"
        files = checkpoints(name)[::-1]
        for file in files:
            step = step_of(file)
            choices.append((f"{file.parent.name}, step {step:,}{notes.get(step, '')}", str(file)))
        if not files:
            choices.append((name, name))
    return choices


@lru_cache(maxsize=4)
def load(name, changed):
    """(model, tokenizer, eos), loaded once for all. changed: when. Raises ValueError."""
    device, dtype, _ = pick_device()
    model, folder, _ = sample.load(name)
    return model.to(device, dtype).eval(), *prepare.open_tokenizer(folder)


def stream(name, prompt, stops, seed, length, temperature, top_k, top_p):
    """Yields (text after the prompt, a line about it) as they come; the text is sample.py's."""
    with ONE_STEP:
        loaded = load(name, os.path.exists(name) and os.path.getmtime(name))
    pieces = sample.write(*loaded, prompt, 1, int(length), stops, int(seed),
                          temperature=temperature, top_k=int(top_k), top_p=top_p)
    text, line, seconds = "", "", 0.0
    for n in count(1):
        with ONE_STEP:
            began = time.perf_counter()
            _, piece = next(pieces, (0, None))
            seconds += time.perf_counter() - began
        if piece is None:
            break
        n = min(n, int(length))  # (the end has a piece, and no token)
        text += piece
        line = f"{n} tokens, {n / seconds:,.0f} per second"
        yield text, line
    yield text, f"done: {line}"


def streams(asked, names, prompt, stop_texts, numbers):
    """A stream for each name. Raises ValueError for what cannot be."""
    gone = set(names) - {name for _, name in found(asked)}
    if gone:
        raise ValueError(f"There is no {gone.pop()} (any more): reload the page")
    for value, (label, (low, high, *_)) in zip(numbers, NUMBERS.items()):
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{label}: must be from {low} to {high:,}")
    stops = [stop.replace("\\n", "\n") for stop in stop_texts.splitlines() if stop]
    return [stream(name, prompt, stops, *numbers) for name in names]


def show(asked, running, left, right, prompt, stop_texts, *numbers):
    """Yields what the page shows, the left text to continue, and the Stop button.

    running: a session's dict; Stop takes the run out of it, a later click replaces the run."""
    import gradio as gr
    prompt = prompt or "\n"
    names = [left, right] if right else [left]
    sides, shown = [("", "0 tokens")] * len(names), 0.0  # loading and compiling take a while
    mine = running["now"] = object()

    def page(is_running):
        body = "".join(SIDE.format(line, html.escape(prompt), html.escape(text))
                       for text, line in sides)
        plain = prompt + sides[0][0] if sides else ""
        return f'<div class="sides">{body}</div>', plain, gr.Button(visible=is_running)

    try:
        yield page(True)
        for steps in zip_longest(*streams(asked, names, prompt, stop_texts, numbers)):
            sides = [step or side for step, side in zip_longest(steps, sides)]  # ended: its last
            if running.get("now") is not mine:
                break
            if time.perf_counter() - shown > 0.04:  # as often as an eye can see
                shown = time.perf_counter()
                yield page(True)
        sides = [(text, line if line.startswith("done") else f"stopped at {line}")
                 for text, line in sides]
        if running.get("now", mine) is mine:
            yield page(False)
    except ValueError as e:
        sides = []
        yield page(False)
        raise gr.Error(html.escape(str(e), quote=False), print_exception=False) from None


def page(asked):
    import gradio as gr

    def refresh():
        choices = found(asked) or [("none", "")]
        return gr.Dropdown(choices, value=choices[0][1]), gr.Dropdown([("none", ""), *choices])

    def generate(checkpoint: str, prompt: str, seed: int = 1337, length: int = 200,
                 temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0,
                 stop: str = "") -> str:
        """The text after the prompt. checkpoint: as on the page; stop: texts, one a line."""
        numbers = (seed, length, temperature, top_k, top_p)
        *_, (_, text, _) = show(asked, {}, checkpoint, "", prompt, stop, *numbers)
        return text.removeprefix(prompt or "\n")

    with gr.Blocks(title="SmolLM2") as blocks:
        gr.Markdown("# SmolLM2\nWrite a beginning, and the model goes on.")
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                prompt = gr.Textbox("ROMEO:", label="Prompt", info="Ctrl-Enter generates", lines=3,
                                    max_lines=8)
                gr.Examples(BEGINNINGS, prompt, label="Beginnings")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", min_width=90, elem_id="go")
                    again = gr.Button("New seed", min_width=90)
                    on = gr.Button("Continue", min_width=90)
                    stop = gr.Button("Stop", variant="stop", min_width=90, visible=False)
                texts = gr.HTML()
            with gr.Column(scale=3, min_width=300):
                left = gr.Dropdown(found(asked), label="Checkpoint")
                right = gr.Dropdown([("none", ""), *found(asked)], label="Beside it",
                                    info="From the same prompt and seed")
                numbers = [gr.Slider(low, high, value, step=step, label=label, info=info)
                           for label, (low, high, value, step, info) in NUMBERS.items()]
                stops = gr.Textbox(label="Stop texts", info="One a line; \\n: line break", lines=2)
        running, written = gr.State({}), gr.State("")
        private = {"api_visibility": "private", "show_progress": "hidden"}
        write_it = {"fn": partial(show, asked), "concurrency_limit": 8, **private,
                    "preprocess": False,  # the values are checked here, so that an error clears
                    "inputs": [running, left, right, prompt, stops, *numbers],
                    "outputs": [texts, written, stop]}
        go.click(**write_it)
        again.click(lambda: random.randrange(2**31), None, numbers[0], **private).then(**write_it)
        on.click(lambda old, new: new or old, [prompt, written], prompt, **private).then(**write_it)
        stop.click(lambda running: running.clear(), running, **private)
        blocks.load(refresh, None, [left, right], **private)
        gr.api(generate)
    return blocks


@prepare.command("tools.demo")
def main(argv=None):
    parser = prepare.new_parser("tools.demo", __doc__)
    add = parser.add_argument
    add("--checkpoint", nargs="+", type=prepare.typed_path, default=[], metavar="NAME",
        help="as for sample.py; several become a choice [all that are here]")
    add("--port", type=prepare.number(int, 1, 65535), help="[the first free one from 7860 on]")
    add("--host", help="0.0.0.0 lets others in [the variable GRADIO_SERVER_NAME, else 127.0.0.1]")
    args = parser.parse_args(argv)
    for name in args.checkpoint:
        if not Path(name).exists() and "best" not in name and not re.fullmatch(HUB_NAME, name):
            parser.error(f"--checkpoint {name}: no such file or folder")
    if not find_spec("gradio"):
        raise ValueError("gradio is missing: pip install -r tools/requirements.txt")
    if not found(args.checkpoint):
        raise ValueError("there is no checkpoint here: name one with --checkpoint, or make one "
                         "with python train.py config/smollm2.py")
    blocks = page(args.checkpoint)
    look = {"css": CSS, "head": CTRL_ENTER, "footer_links": ["api"], "show_error": True}
    try:
        _, url, _ = blocks.launch(server_name=args.host, server_port=args.port, share=False,
                                  ssr_mode=False, quiet=True, prevent_thread_lock=True, **look)
    except OSError:  # gradio tells to call a function otherwise
        raise ValueError("the port is taken: name another --port") from None
    print(f"open {url} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
