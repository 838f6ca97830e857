"""What goes out into the world, and what there is to look at: export, plots, events, the page, the benchmark."""
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import sample
import train
from model import SmolLM2, SmolLM2Config, config_from_hf, from_pretrained
from tests.harness import ROOT, TINY, Process, metrics, run_main
from tools import bench, demo, export, plot


def needs(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"{package} is not installed: "
                              "pip install -r tools/requirements.txt")


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
    """The out_dir of a short run with evaluations and samples."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = run_main(train.main, *TINY, f"--data_dir={data_dir}", f"--out_dir={out}", "--max_steps=12",
                    "--eval_interval=4", "--sample_interval=6", "--checkpoint_interval=6",
                    "--max_position_embeddings=8192")
    assert done.code == 0, done.err
    return out


# ---- export ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_an_export_and_gives_the_same_logits(run_dir, tokenizer, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    assert run_main(export.main, run_dir, "exported", "--dtype", dtype).code == 0
    theirs = AutoModelForCausalLM.from_pretrained("exported").eval()
    ours = from_pretrained("exported").to(theirs.dtype)
    assert theirs.dtype == getattr(torch, dtype) and theirs.config.max_position_embeddings == 8192
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    trained, _, _ = sample.load(str(run_dir))
    for name, p in trained.named_parameters():
        assert torch.equal(p.to(ours.lm_head.weight.dtype), dict(ours.named_parameters())[name])
    idx = torch.randint(0, 49152, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(idx)[0].float(), theirs(idx).logits.float()
    assert (a - b).abs().max() <= (1e-5 if dtype == "float32" else 0.03) * b.abs().max()
    for text in HARD_TEXTS:
        assert AutoTokenizer.from_pretrained("exported").encode(text) == tokenizer.encode(text)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    config = json.loads(Path("exported/config.json").read_text())
    assert config.keys() & train.KEYS.keys() == SmolLM2Config.__dataclass_fields__.keys()  # sizes, no recipe


HARD_TEXTS = ["2024 is 3.14159", "\N{ROCKET}\N{FAMILY} e\u0301t\xe9 \u4f60\u597d", "def f(x):\n\treturn x**2  # {}\n",
              "a\r\nb\rc\n\n  d ", "a\0b", "First Citizen:\n  To be \u2026\n\n<|endoftext|><|im_start|>x"]
IN_TRANSFORMERS = """
import json, sys, transformers
assert transformers.__version__ == "4.57.6", transformers.__version__
tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
model = transformers.AutoModelForCausalLM.from_pretrained("exported")
text = tokenizer("To be", return_tensors="pt")
new = model.generate(**text, max_new_tokens=24, do_sample=False)
print(json.dumps([[tokenizer.encode(t) for t in json.loads(sys.argv[1])], tokenizer.decode(new[0])]))
"""


@pytest.mark.slow
def test_transformers_4_reads_an_export(run_dir, tokenizer, tmp_path):
    """In an environment of its own, with this one's torch. (lm-eval, MLX and others still have version 4.)"""
    venv.create("old", with_pip=True)
    python = tmp_path / "old" / "bin" / "python"
    site = next((tmp_path / "old" / "lib").iterdir()) / "site-packages"
    if subprocess.run([python, "-m", "pip", "install", "-q", "transformers==4.57.6"], check=False).returncode:
        pytest.skip("pip cannot install transformers 4.57.6 here")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")  # searched after its own
    assert run_main(export.main, run_dir, "exported").code == 0
    done = subprocess.run([python, "-c", IN_TRANSFORMERS, json.dumps(HARD_TEXTS)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ids, text = json.loads(done.stdout)
    assert ids == [tokenizer.encode(t) for t in HARD_TEXTS]
    args = ["--checkpoint=exported", "--prompt=To be", "--max_new_tokens=24", "--temperature=0", "--dtype=float32"]
    assert text + "\n" == run_main(sample.main, *args).out


def test_sample_and_training_go_on_from_an_export(run_dir, data_dir):
    assert run_main(export.main, run_dir, "exported").code == 0
    args = ["--prompt", "To be", "--max_new_tokens", "8", "--temperature", "0", "--dtype", "float32"]
    texts = [run_main(sample.main, "--checkpoint", name, *args).out for name in (run_dir, "exported")]
    assert texts[0].startswith("To be") and texts[0] == texts[1]
    recipe = (ROOT / "config" / "finetune_shakespeare.py").read_text()
    Path("recipe.py").write_text(recipe.replace("HuggingFaceTB/SmolLM2-135M", "exported"))
    done = run_main(train.main, "recipe.py", f"--data_dir={data_dir}", "--max_steps=2", "--compile=false",
                    "--batch_size=2", "--block_size=16", "--eval_tokens=64", "--log_interval=1", "--out_dir=fine")
    assert done.code == 0, done.err
    first, last = metrics(run_dir)[0]["loss"], metrics("fine")[0]["loss"]
    assert first > 11 and last < first - 0.3  # it went on from what had been learned


def test_the_card_tells_the_run_and_no_folder(run_dir, data_dir, tmp_path):
    import yaml
    done = run_main(export.main, run_dir, tmp_path / "bard", "--licence=mit", "--language=en")
    assert done.code == 0, done.err
    card = Path("bard/README.md").read_text(encoding="utf-8")
    front, rest = card.removeprefix("---\n").split("\n---\n", 1)
    front, meta = yaml.safe_load(front), json.loads((data_dir / "meta.json").read_text())
    state = sample.load(str(run_dir))[2]
    loss = metrics(run_dir)[-1]["val_loss"]
    assert (front["license"], front["language"], front["library_name"]) == ("mit", "en", "transformers")
    figures = {m["type"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert figures["perplexity"] == pytest.approx(2.718281828**loss, rel=1e-4)
    bits = loss / 0.693147 * meta["val_tokens"] / meta["val_bytes"]
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    git = json.loads((run_dir / "run.json").read_text())["git"]
    for told in ("learning_rate = 0.01", "max_steps = 12", "1,591,456 parameters", f"{loss:.4f}", git[:12],
                 f"{meta['train_tokens']:,} tokens", f"{state['tokens']:,} tokens", "A base model",
                 "sample.py --checkpoint bard", "lm_eval", "llama.cpp", "ollama"):
        assert told in rest, told
    assert ("STAND-IN" in rest) == bool(meta["stand_in"])
    for file in [*Path("bard").glob("*.json"), Path("bard/README.md")]:
        text = file.read_text(encoding="utf-8")
        assert not any(str(p) in text for p in (run_dir.parent, data_dir.parent, tmp_path, ROOT)), file
    if importlib.util.find_spec("matplotlib"):
        assert "![" in rest and Path("bard/plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_card_without_its_data_or_metrics(run_dir, monkeypatch):
    shutil.copytree(run_dir, "out")
    for name in ("metrics.jsonl", "run.json"):
        os.remove(f"out/{name}")
    monkeypatch.setattr(export, "read_meta", lambda state: {})
    assert run_main(export.main, "out", "bard").code == 0
    card = Path("bard/README.md").read_text(encoding="utf-8")
    assert "the data are gone" in card and "not evaluated" in card and "model-index" not in card
    meta = {"source": "/home/me/secret/book.txt", "stand_in": "text", "train_tokens": 9, "val_tokens": 9, "val_bytes": 9}
    monkeypatch.setattr(export, "read_meta", lambda state: meta)
    assert run_main(export.main, "out", "bard", "--overwrite").code == 0
    card = Path("bard/README.md").read_text(encoding="utf-8")
    assert "**STAND-IN DATA.** The real text could not" in card and "Text: book.txt" in card and "secret" not in card
    monkeypatch.setitem(meta, "source", "me/stories:small, split train")
    assert run_main(export.main, run_dir, "bard", "--overwrite").code == 0
    assert "datasets: me/stories\n" in Path("bard/README.md").read_text(encoding="utf-8")


def test_export_replaces_nothing_unasked_and_names_what_is_wrong(run_dir):
    os.mkdir("mine")
    Path("mine/precious").touch()
    refused = run_main(export.main, run_dir, "mine")
    assert refused.code == 2 and "mine is not empty" in refused.err and os.listdir("mine") == ["precious"]
    assert run_main(export.main, run_dir, "mine", "--overwrite").code == 0 and os.path.exists("mine/precious")
    assert oct(os.stat("mine/model.safetensors").st_mode) == oct(os.stat("mine/config.json").st_mode)
    for argv, code, told in [(("nowhere", "x"), 1, "nowhere"), (("mine", "x"), 1, "no checkpoint of train.py"),
                             ((run_dir, "x", "--push_to_hub", "name"), 2, "USER/NAME"), ((run_dir,), 2, "folder"),
                             ((run_dir, "mine/precious", "--overwrite"), 2, "is a file")]:
        result = run_main(export.main, *argv)
        assert (result.code, result.err.startswith("tools.export: "), result.err.count("\n")) == (code, True, 1)
        assert told in result.err and not os.path.exists("x")
    assert sorted(p.name for p in Path().iterdir()) == ["mine"]  # nothing half written is left


def test_push_to_hub_uploads_the_folder(run_dir, monkeypatch):
    import huggingface_hub
    calls = {}

    class Hub:
        def create_repo(self, name, **how):
            calls["create"] = (name, how["private"])

        def upload_folder(self, repo_id, folder_path, **_):
            calls["upload"] = (repo_id, set(os.listdir(folder_path)))
            return "https://example.org/me/bard"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    done = run_main(export.main, run_dir, "exported", "--push_to_hub", "me/bard", "--private")
    assert done.code == 0 and "example.org/me/bard" in done.err
    assert calls["create"] == ("me/bard", True) and calls["upload"][0] == "me/bard"
    files = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert files <= calls["upload"][1]
    assert "pretrained=me/bard" in Path("exported/README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(Hub, "create_repo", lambda *args, **how: 1 / 0)
    failed = run_main(export.main, run_dir, "exported", "--overwrite", "--push_to_hub", "me/bard")
    assert failed.code == 1 and "upload failed: division by zero" in failed.err


@pytest.mark.parametrize("hidden, mlp, layers, heads, key_heads, theta, parameters", [
    (576, 1536, 30, 9, 3, 100_000, 134_515_008), (960, 2560, 32, 15, 5, 100_000, 361_821_120),
    (2048, 8192, 24, 32, 32, 130_000, 1_711_376_384)])
def test_the_published_sizes_come_in(hidden, mlp, layers, heads, key_heads, theta, parameters):
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": 49152,
             "num_attention_heads": heads, "num_key_value_heads": key_heads, "rope_theta": theta}
    config = config_from_hf({"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": None, **sizes})
    with torch.device("meta"):
        assert sum(p.numel() for p in SmolLM2(config).parameters()) == parameters


# ---- plots ----


@needs("matplotlib")
def test_plot_draws_png_and_svg_of_runs_that_go_on(run_dir):
    os.mkdir("other")
    Path("other/metrics.jsonl").write_text((run_dir / "metrics.jsonl").read_text() + '{"step": 13, "lo')
    assert run_main(plot.main, run_dir).out == f"{run_dir / 'plot.png'} is written\n"
    assert run_main(plot.main, run_dir, "other", "--x=time", "--output=time.svg").code == 0
    assert "<svg" in Path("time.svg").read_text(encoding="utf-8")[:1000]
    from PIL import Image
    image = Image.open(run_dir / "plot.png")
    assert image.size == (1600, 992) and len(image.convert("RGB").getcolors(2**20)) > 100


@needs("matplotlib")
@pytest.mark.parametrize("x", list(plot.AXES))
def test_a_plot_says_what_it_shows_from_the_first_step_on(run_dir, monkeypatch, x):
    """One point is a marker, steps are whole, the legend names both losses, time says what it counts."""
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *at, **how: figures.append(self) or save(self, *at, **how))
    rows = plot.read_metrics(run_dir)
    for runs in ({"a": rows[:1]}, {"a": rows[:3]}, {"a": rows, "b": rows[:5]}):
        plot.draw(runs, "x.png", x)
        loss, *others = figures[-1].axes
        for axis in others if len(runs) == 1 else []:
            line = axis.lines[0]
            assert (line.get_marker() == "o") == (len(line.get_xdata()) == 1)
        labels = [text.get_text() for text in loss.get_legend().get_texts()]
        assert sum("training" in text for text in labels) == len(runs)
        assert sum("held-out" in text for text in labels) == sum(len(rows) > 3 for rows in runs.values())
        if x == "step":
            assert all(float(at).is_integer() for at in loss.get_xticks())
    assert {"step": "steps", "tokens": "trained on", "time": "seconds in training steps"}[x] in loss.get_xlabel()


@pytest.mark.parametrize("argv, code, told", [
    (("nowhere",), 1, "nowhere"), ((), 2, "RUN"), (("x", "--output", "plot.jpg"), 2, "plot.jpg"), (("bad",), 1, "line 1"),
    (("list",), 1, "line 1: is not from train.py"), (("binary",), 1, "not from train.py"), (("empty",), 1, "nothing yet")])
def test_plot_names_what_is_wrong(argv, code, told):
    for name, content in [("bad", b"{}\n{}\n"), ("list", b"[1]\n"), ("binary", b"\xff\n"), ("empty", b"")]:
        os.mkdir(name)
        Path(name, "metrics.jsonl").write_bytes(content)
    result = run_main(plot.main, *argv)
    assert result.code == code and told in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("tool, package", [(plot, "matplotlib"), (demo, "gradio")])
def test_a_missing_package_is_one_line(tool, package, run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = run_main(tool.main, *[run_dir] * (tool is plot))
    assert result.code == 1 and result.err.endswith(f"{package} is missing: pip install -r tools/requirements.txt\n")
    assert len(result.err.splitlines()) == 1


# ---- TensorBoard ----


@needs("tensorboard")
def test_tensorboard_shows_each_point_once_after_a_resume(run_train, resume):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_train("--max_steps=20", "--eval_interval=5", "--sample_interval=5", "--checkpoint_interval=10")
    os.remove("out/step_000020.pt")  # as if killed before
    assert resume().code == 0
    events = EventAccumulator("out/tensorboard/out", size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(train.Log.TAGS.values())
    for key, tag in train.Log.TAGS.items():
        shown = {e.step: e.value for e in events.Scalars(tag)}
        assert len(shown) == len(events.Scalars(tag))
        assert shown == pytest.approx({r["step"]: r[key] for r in metrics("out") if r.get(key) is not None}, rel=1e-6)
    assert {e.step for e in events.Tensors("sample/text_summary")} == {5, 10, 15, 20}  # (texts, TensorBoard keeps)


def test_training_needs_no_tensorboard(run_train, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert run_train("--max_steps=2", "--sample_interval=1").code == 0 and not os.path.exists("out/tensorboard")


# ---- the benchmark ----


@pytest.mark.parametrize("argv, told", [(("nonsense",), "nonsense"), (("train", "--shapes=4"), "BxT"),
                                        (("--runs=0",), "--runs"), (("--what",), "--what")])
def test_bench_answers_nonsense_in_one_line(argv, told):
    result = run_main(bench.main, *argv)
    assert result.code == 2 and told in result.err and not result.out
    assert result.err.startswith("tools.bench: ") and result.err.count("\n") == 1


def test_bench_shows_why_a_contestant_failed(tmp_path):
    result = run_main(bench.main, "prepare", f"--data_dir={tmp_path}")
    assert result.code == 1 and "all cores failed: ValueError: " in result.err.splitlines()[-1]


@pytest.mark.parametrize("room, order", [(99, "a b a b a b a ends b ends"), (12, "a a a a ends b b b b ends")])
def test_contestants_take_turns_unless_the_gpu_is_too_small(room, order, monkeypatch):
    class Stub:
        def __init__(self, label):
            self.label, self.answers = label, []
            self.turn()

        def turn(self, after=""):
            log.append(self.label + after)
            self.answers.append({"memory": 10, "room": room})

        def close(self):
            self.turn(" ends")

    log = []
    monkeypatch.setattr(bench, "Contestant", Stub)
    bench.take_turns([("a",), ("b",)], 1, 1, "test")
    assert " ".join(log) == order


# ---- the page ----


@needs("gradio")
def test_demo_says_what_to_do_without_a_checkpoint():
    result = run_main(demo.main)
    assert result.code == 1 and "train.py config/smollm2.py" in result.err


VALUES = {"Seed": 7, "Length": 20, "Temperature": 0.9, "Top-k": 30, "Top-p": 0.95, "Repetition penalty": 1.1}


@needs("gradio")
def test_demo_finds_runs_and_exports_and_writes_what_sample_writes(run_dir):
    shutil.copytree(run_dir, "out-a")
    shutil.copytree(run_dir, "out-new")
    os.utime("out-new/step_000012.pt", (2e9, 2e9))
    assert run_main(export.main, run_dir, "exported").code == 0
    files = [f"out-{run}/{path.name}" for run in ("new", "a") for path in train.checkpoints(run_dir)[::-1]]
    choices = demo.found([])
    assert list(choices) == [*files, "exported"] and demo.found(["x"]) == {"x": "x"}
    losses = {row["step"]: row["val_loss"] for row in metrics(run_dir) if row.get("val_loss")}
    best = " (best)" if losses[12] == min(losses.values()) else ""
    assert choices["out-a/step_000012.pt"] == f"out-a, step 12: held-out loss {losses[12]:.3f}{best}"
    *_, (left, right, line, line_right, plain, stop) = demo.show([], "me", "exported", files[1], "To be", "", *VALUES.values())
    args = ["--seed=7", "--max_new_tokens=20", "--temperature=0.9", "--top_k=30", "--top_p=0.95",
            "--repetition_penalty=1.1", "--prompt=To be"]
    assert plain + "\n" == run_main(sample.main, "--checkpoint=exported", *args).out
    assert re.fullmatch(r"20 tokens, [\d,]+ per second: done", line) and "done" in line_right and not stop.visible
    assert '<span class="prompt">To be</span>' in left and right != left
    *_, stopped = demo.show([], "me", "exported", "", "To be", plain[-3:], *VALUES.values())
    assert plain.startswith(stopped[4]) and plain[-3:] not in stopped[4]  # a stop text


@needs("gradio")
@pytest.mark.parametrize("name, prompt, change, told", [
    ("exported", "", {"Seed": None}, "Seed"), ("exported", "", {"Seed": -1}, "Seed"), ("/etc", "", {}, "no /etc"),
    ("exported", "", {"Temperature": 99}, "Temperature: must be from 0 to 2"), ("exported", "to " * 9000, {}, "do not fit")])
def test_demo_has_a_message_for_a_bad_value_and_clears_the_old_text(run_dir, name, prompt, change, told):
    import gradio
    assert run_main(export.main, run_dir, "exported").code == 0
    shown = []
    with pytest.raises(gradio.Error, match=told):
        shown.extend(demo.show([], "me", name, "", prompt, "", *{**VALUES, **change}.values()))
    assert shown[-1][:5] == ("", "", "", "", "") and not shown[-1][5].visible


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
                  "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def demo_url(run_dir, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with Process(["-m", "tools.demo", "--port", port, "--checkpoint", run_dir], tmp_path / "page",
                 PYTHONPATH=str(ROOT)) as process:
        process.until(lambda: "open http" in process.text)
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
@needs("gradio")
def test_programs_call_generate(demo_url, run_dir):
    from gradio_client import Client
    client = Client(demo_url, verbose=False)
    file = str(train.checkpoints(run_dir)[-1])
    text = client.predict(checkpoint=file, prompt="To be", length=20, temperature=0, api_name="/generate")
    args = ["--prompt=To be", "--max_new_tokens=20", "--temperature=0"]
    assert f"To be{text}\n" == run_main(sample.main, "--checkpoint", file, *args).out
    with pytest.raises(Exception, match="There is no x"):
        client.predict(checkpoint="x", prompt="", api_name="/generate")


@pytest.mark.slow
@needs("gradio")
@needs("playwright")
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
def test_demo_in_a_browser(demo_url):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        pages, asked = [browser.new_page(viewport={"width": 1440, "height": 900}) for _ in range(2)], []
        for page in pages:
            page.set_default_timeout(60_000)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(demo_url)
            page.fill("#prompt textarea", "To be, or not")

        def text(page=pages[0], at="left-text"):
            return page.inner_text(f"#{at}")

        def wait(words, page=pages[0], side="left"):
            page.wait_for_function(f"document.querySelector('#{side}-speed')?.innerText.includes('{words}')")

        def fill(at, value, page=pages[0]):
            page.fill(at, str(value))
            page.keyboard.press("Tab")

        length = "#length input[type=number]"
        first = pages[0]  # type, generate, see text stream; Stop is there only meanwhile
        assert not first.is_visible("#stop")
        first.press("#prompt textarea", "Control+Enter")
        wait("tokens")
        seen = set()
        while "done" not in text(at="left-speed"):
            seen.add(text())
        assert len(seen) > 3 and all(t.startswith("To be, or not") for t in seen)
        first.wait_for_selector("#stop", state="hidden")
        box, top = first.locator("#left-speed").bounding_box(), first.locator("#left-text").bounding_box()["y"]
        assert box["y"] + box["height"] <= min(top + 1, 900)  # above the text, and in sight
        whole = text()

        for page in pages:  # two at once, the same seed: the same text
            fill(length, 150, page)
            page.click("#go")
        for page in pages:
            wait("150 tokens", page)
            wait("done", page)
            assert whole.startswith(text(page)) and len(text(page)) > 50

        first.click("#beside input")  # two checkpoints side by side, another seed, stop
        for key in ("ArrowDown", "ArrowDown", "Enter"):
            first.keyboard.press(key)
        fill(length, 2000)
        first.click("#again")
        wait("tokens", side="right")
        first.click("#stop")
        wait("stopped at")
        wait("stopped at", side="right")
        assert first.input_value("#seed input") != "1337"
        stopped = text()
        first.wait_for_timeout(500)
        assert text() == stopped and not first.is_visible("#stop")

        fill(length, 5)  # continue
        first.click("#on")
        wait("5 tokens")
        wait("done")
        assert text().startswith(stopped.rstrip()) and len(text()) > len(stopped)

        fill("#seed input", -4)  # a bad value
        first.click("#go")
        first.wait_for_selector("text=Seed: must be from 0")
        first.wait_for_function("!document.querySelector('#left-speed').innerText.includes('tokens')")
        assert all(url.startswith((demo_url, "data:", "blob:")) for url in asked), asked  # nothing from elsewhere
        browser.close()
