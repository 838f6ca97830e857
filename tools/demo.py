"""A page in the browser that writes text with a trained model, or with two side by side.

    python -m tools.demo                                # the runs out*/ and exported folders here
    python -m tools.demo --checkpoint HuggingFaceTB/SmolLM2-135M --port 8000

It listens on this machine only and reports nothing to anyone. Programs call /generate.
"""
import os
import re
import socket
import threading
import time
from contextlib import suppress
from contextvars import copy_context
from functools import lru_cache, partial
from html import escape
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path

import prepare
import sample
from model import HUB_NAME, compiler_problem, pick_device
from tools.plot import column, read_metrics
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
    files += sorted(Path().glob("*/config.json"))
    choices = []
    for name in asked or dict.fromkeys(str(file.parent) for file in files):
        notes = {}
        with suppress(ValueError):  # no run, or one without evaluations
            steps, losses = column(read_metrics(Path(name, "metrics.jsonl")), "val_loss", "step")
            notes = {step: f": held-out loss {loss:.3f}" for step, loss in zip(steps, losses)}
            notes[steps[losses.index(min(losses))]] += " (best)"
        saved = [(step_of(file), file) for file in checkpoints(name)[::-1]]
        choices += [(f"{file.parent.name}, step {step:,}{notes.get(step, '')}", str(file))
                    for step, file in saved] or [(name, name)]
    return choices


@lru_cache(maxsize=4)
def load(name, changed):
    """(model, tokenizer, eos), loaded once for all. changed: when. Raises ValueError."""
    model, folder, _ = sample.load(name)
    return model.to(*pick_device(decoding=True)[:2]).eval(), *prepare.open_tokenizer(folder)


@lru_cache
def told_how(device):
    """The context in which torch was told how to compile here: gradio takes each step in another,
    where torch would forget it."""
    compiler_problem(device)
    return copy_context()


def stream(is_on, name, prompt, stops, seed, length, temperature, top_k, top_p):
    """Yields (text after the prompt, a line about it, whether more comes); text as sample.py's."""
    text, line, tokens, seconds = "", "0 tokens", 0, 0.0
    yield text, line, True  # loading and compiling take a while
    with ONE_STEP:
        place = name if os.path.exists(name) else os.path.dirname(name) or "out"  # best is no file
        loaded = load(name, os.path.exists(place) and os.path.getmtime(place))
        context = told_how(loaded[0].lm_head.weight.device)
    pieces = sample.write(*loaded, prompt, 1, int(length), stops, int(seed),
                          temperature=temperature, top_k=int(top_k), top_p=top_p)
    new, count = [""], 1
    while new and is_on():
        with ONE_STEP:
            began = time.perf_counter()
            new = [piece for (piece,) in context.run(list, islice(pieces, count))]
            seconds += time.perf_counter() - began
        text += "".join(new)
        tokens = min(tokens + len(new), int(length))  # (the end has a piece, and no token)
        unit = "token" if tokens == 1 else "tokens"
        line = f"{tokens} {unit}, {tokens / seconds:,.0f} per second"
        yield text, line, True
        count = 1 + int(tokens / seconds / 25)  # 25 times a second is as often as an eye can see
    yield text, f"{'stopped at' if new else 'done:'} {line}", False


def show(asked, running, left, right, prompt, stop_texts, *numbers):
    """Yields what the page shows, the left text to continue, and the Stop button."""
    import gradio as gr
    prompt = prompt or "\n"
    stops = [stop.replace("\\n", "\n") for stop in stop_texts.splitlines() if stop]
    names = [left, right] if right else [left]
    mine = running["now"] = object()  # in the session: Stop takes it out, a later run replaces it
    sides = []
    try:
        gone = set(names) - {name for _, name in found(asked)}
        if gone:
            raise ValueError(f"There is no {gone.pop()} (any more): reload the page")
        for value, (label, (low, high, *_)) in zip(numbers, NUMBERS.items()):
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{label}: must be from {low} to {high:,}")
        streams = [stream(lambda: running.get("now") is mine, name, prompt, stops, *numbers)
                   for name in names]
        for steps in zip_longest(*streams):
            sides = [step or side for step, side in zip_longest(steps, sides)]
            body = "".join(SIDE.format(line, escape(prompt), escape(text))
                           for text, line, _ in sides)
            if running.get("now", mine) is mine:
                yield body, prompt + sides[0][0], gr.Button(visible=any(more for *_, more in sides))
    except ValueError as e:
        yield "", "", gr.Button(visible=False)
        raise gr.Error(escape(str(e), quote=False), print_exception=False) from None


def page(asked):
    import gradio as gr

    def dropdowns():
        choices = found(asked) or [("none", "")]
        return (gr.Dropdown(choices, value=choices[0][1], label="Checkpoint"),
                gr.Dropdown([("none", ""), *choices], label="Beside it",
                            info="From the same prompt and seed"))

    def generate(checkpoint: str, prompt: str, stop: str = "", seed: int = 1337, length: int = 200,
                 temperature: float = 0.8, top_k: int = 50, top_p: float = 1.0) -> str:
        """The text after the prompt. checkpoint: as on the page; stop: texts, one a line."""
        numbers = (seed, length, temperature, top_k, top_p)
        *_, (_, text, _) = show(asked, {}, checkpoint, "", prompt, stop, *numbers)
        return text.removeprefix(prompt or "\n")

    with gr.Blocks(title="SmolLM2") as blocks:
        gr.Markdown("# SmolLM2\nWrite a beginning; with Ctrl-Enter, the model goes on.")
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                prompt = gr.Textbox("ROMEO:", label="Prompt", lines=3, max_lines=8)
                gr.Examples(BEGINNINGS, prompt, label="Beginnings")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", min_width=90, elem_id="go")
                    again = gr.Button("New seed", min_width=90)
                    on = gr.Button("Continue", min_width=90)
                    stop = gr.Button("Stop", variant="stop", min_width=90, visible=False)
                texts = gr.HTML(html_template='<div class="sides">${value}</div>')
            with gr.Column(scale=3, min_width=300):
                left, right = dropdowns()
                numbers = [gr.Slider(low, high, value, step=step, label=label, info=info)
                           for label, (low, high, value, step, info) in NUMBERS.items()]
                stops = gr.Textbox(label="Stop texts", info="One a line; \\n: line break", lines=2)
        running, written = gr.State({}), gr.State("")
        private = {"api_visibility": "private", "show_progress": "hidden"}
        seeded = again.click(numbers[0].get_random_value, None, numbers[0], **private)
        longer = on.click(lambda typed, text: text if text.startswith(typed) else typed,
                          [prompt, written], prompt, **private)
        for event in (go.click, seeded.then, longer.then):  # (show checks the values itself)
            event(partial(show, asked), [running, left, right, prompt, stops, *numbers],
                  [texts, written, stop], concurrency_limit=8, preprocess=False, **private)
        stop.click(lambda running: running.clear(), running, **private)
        blocks.load(dropdowns, None, [left, right], **private)
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
        is_best = Path(name).name == "best"
        if not Path(name).exists() and not is_best and not re.fullmatch(HUB_NAME, name):
            parser.error(f"--checkpoint {name}: no such file or folder")
    if not find_spec("gradio"):
        raise ValueError("gradio is missing: pip install -r tools/requirements.txt")
    if not found(args.checkpoint):
        raise ValueError("there is no checkpoint here: name one with --checkpoint, or make one "
                         "with python train.py config/smollm2.py")
    if args.host:
        with prepare.explaining(f"--host {args.host} is no address of this machine"):
            socket.create_server((args.host, 0)).close()
    blocks = page(args.checkpoint)
    look = {"css": CSS, "head": CTRL_ENTER, "footer_links": ["api"], "show_error": True,
            "max_file_size": 1}  # (gradio takes uploads even where no page asks for one)
    try:
        _, url, _ = blocks.launch(server_name=args.host, server_port=args.port, share=False,
                                  ssr_mode=False, quiet=True, prevent_thread_lock=True, **look)
    except Exception as e:  # gradio tells to call a function otherwise
        raise ValueError("cannot serve there: is the port taken (--port), or a proxy asked (set "
                         f"no_proxy=127.0.0.1)? {prepare.first_line(e)}") from None
    print(f"open {url} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
