"""A page in the browser that writes text with a trained model, as it comes.

    python -m tools.demo                                          # the runs out*/ and the exported folders found here
    python -m tools.demo --checkpoint HuggingFaceTB/SmolLM2-135M --port 8000

It listens on this machine only and reports nothing to anyone. As a Hugging Face Space: a repository with this project's
files, `sdk: gradio` and `app_file: tools/demo.py` in the front matter of its README.md, the lines of both
requirements.txt in the one at its top, and the Space's variable CHECKPOINT set to the model's hub name.
"""
import argparse
import html
import os
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a Space runs this file, not the module
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")

CSS = """main.fillable {max-width: 1160px !important; margin: auto; padding: 16px !important}
#text textarea {font-family: Georgia, 'Times New Roman', serif; font-size: 17px; line-height: 1.6}
#speed {min-height: 1.6em; opacity: .7}"""
SLIDERS = [("Length", 1, 2000, 200, 1, "New tokens, at most"),
           ("Temperature", 0, 2, 0.8, 0.05, "Below 1 likelier, above 1 wilder; 0: always the likeliest"),
           ("Top-k", 0, 500, 50, 1, "Among the k likeliest tokens; 0: all"),
           ("Top-p", 0, 1, 1, 0.01, "Among the likeliest that together have this probability"),
           ("Repetition penalty", 0.5, 2, 1, 0.01, "Above 1: what was there becomes less likely")]
LOADING = threading.Lock()


def fail(message, code=1):
    print(f"tools.demo: {message}", file=sys.stderr)
    raise SystemExit(code)


def found(asked):
    """The names to choose from: those asked for; else the checkpoints in out*/, newest first, and exported folders."""
    from train import checkpoints
    runs = [str(p) for out in sorted(Path().glob("out*")) for p in checkpoints(out)[::-1]]
    return asked or runs + [str(p.parent) for p in sorted(Path().glob("*/config.json"))]


@lru_cache(maxsize=2)
def load(name, changed):
    """(model, tokenizer, device), loaded once for all. changed: when the folder was. Raises ValueError."""
    import sample
    model, tokenizer, _ = sample.load(name, print)
    device, dtype = sample.pick_device()
    return model.to(device, dtype).eval(), tokenizer, device


def write(asked, name, prompt, seed, *values):
    """Yields the text so far and a line on the speed; values: of the sliders. What is wrong is said on the page."""
    import gradio as gr
    import torch

    from model import generate
    from sample import Streamer
    try:
        if name not in found(asked):
            raise ValueError(f"There is no {name} (any more): reload the page to see what there is")
        for value, (label, low, high, *_) in zip((seed, *values), [("Seed", 0, 2**53), *SLIDERS]):
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{label}: must be from {low} to {high:,}")
        length, temperature, top_k, top_p, repetition = values
        with LOADING:  # two people who come at once load it once
            model, tokenizer, device = load(name, os.path.getmtime(name) if os.path.exists(name) else 0)
        prompt = prompt or "\n"
        ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id]
        tokens = generate(model, torch.tensor([ids], device=device), int(length), temperature=temperature,
                          top_k=min(int(top_k), model.config.vocab_size), top_p=top_p, repetition_penalty=repetition,
                          generator=torch.Generator(device).manual_seed(int(seed)))
        stream, text, begin, shown, n = Streamer(tokenizer, ids, []), prompt, time.perf_counter(), 0.0, 0
        for n, token in enumerate(tokens, 1):
            if token.item() == tokenizer.eos_token_id:
                break
            text += stream.push(token.item())
            if (now := time.perf_counter()) - shown > 0.04:  # as often as an eye can see
                shown = now
                yield text, f"{n} tokens, {n / (now - begin):,.0f} per second"
        text += stream.push(None, last=True)
        yield text, f"{n} tokens, {n / (time.perf_counter() - begin):,.0f} per second: done"
    except ValueError as e:
        raise gr.Error(html.escape(str(e)), print_exception=False) from None


def page(asked):
    import gradio as gr

    with gr.Blocks(title="SmolLM2", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown("# SmolLM2\nWrite a beginning, and the model goes on.")
        with gr.Row():
            with gr.Column(scale=5):
                prompt = gr.Textbox("ROMEO:", label="Prompt", lines=3, elem_id="prompt")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go")
                    stop = gr.Button("Stop", elem_id="stop")
                text = gr.Textbox(label="Text", lines=20, max_lines=20, buttons=["copy"], elem_id="text")
                speed = gr.Markdown(elem_id="speed")
            with gr.Column(scale=3):
                name = gr.Dropdown(found(asked), label="Checkpoint", elem_id="checkpoint")
                sliders = [gr.Slider(low, high, value, step=step, label=label, info=info, elem_id=label.lower()[:6])
                           for label, low, high, value, step, info in SLIDERS]
                seed = gr.Number(1337, label="Seed", info="The same seed gives the same text again", elem_id="seed")
        inputs = [name, prompt, seed, *sliders]
        # Four texts at a time; who comes later waits in line, and the page shows the place.
        event = go.click(lambda *values: (yield from write(asked, *values)), inputs, [text, speed], concurrency_limit=4,
                         show_progress="minimal", show_progress_on=speed)
        stop.click(None, cancels=[event])
        blocks.load(lambda old: gr.Dropdown(now := found(asked), value=old if old in now else now[0] if now else None),
                    name, name)
    return blocks


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(message, 2)
    parser.add_argument("--checkpoint", nargs="+", default=os.environ.get("CHECKPOINT", "").split(), metavar="NAME",
                        help="as for sample.py; several become a choice [the variable CHECKPOINT, else all found here]")
    parser.add_argument("--port", type=int, help="of the page [the first free one from 7860 on]")
    parser.add_argument("--host", help="0.0.0.0 lets other machines in [the variable GRADIO_SERVER_NAME, else 127.0.0.1]")
    args = parser.parse_args(argv)
    try:
        import gradio as gr
    except ImportError:
        fail("gradio is missing: pip install -r tools/requirements.txt")
    if not found(args.checkpoint):
        fail("there is no checkpoint here: python train.py config/smollm2.py makes one, or name one with --checkpoint")
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none from the web
    try:
        page(args.checkpoint).queue().launch(server_name=args.host, server_port=args.port, share=False, theme=theme,
                                             css=CSS, footer_links=[], ssr_mode=False, show_error=True)
    except OSError as e:
        fail(e)


if __name__ == "__main__":
    main()
