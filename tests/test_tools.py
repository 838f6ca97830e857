"""What goes out into the world, and what there is to look at: export, plots, TensorBoard, the demo page."""
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, metrics, run_main, wait_until

import sample
import train
from model import SmolLM2Config, config_from_hf, from_pretrained
from tools import demo, export, plot


def needs(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"{package} is not installed: "
                              "pip install -r tools/requirements.txt")


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
    """The out_dir of a short run with evaluations and samples."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = run_main(train.main, *TINY, f"--data_dir={data_dir}", f"--out_dir={out}", "--max_steps=12", "--eval_interval=4",
                    "--sample_interval=6", "--checkpoint_interval=6", "--max_position_embeddings=8192")
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
    trained, _, _ = sample.load(str(run_dir), print)
    for name, p in trained.named_parameters():
        assert torch.equal(p.to(ours.lm_head.weight.dtype), dict(ours.named_parameters())[name])
    idx = torch.randint(0, 49152, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(idx)[0].float(), theirs(idx).logits.float()
    assert (a - b).abs().max() <= (1e-5 if dtype == "float32" else 0.03) * b.abs().max()
    text = "First Citizen:\n  To be, or not to be? 1234 …été\n\n<|endoftext|>"
    assert AutoTokenizer.from_pretrained("exported").encode(text) == tokenizer.encode(text)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id


def test_sample_and_training_go_on_from_an_export(run_dir, data_dir):
    assert run_main(export.main, run_dir, "exported").code == 0
    args = ["--prompt", "To be", "--max_new_tokens", "8", "--temperature", "0", "--dtype", "float32"]
    texts = [run_main(sample.main, "--checkpoint", name, *args).out for name in (run_dir, "exported")]
    assert texts[0].startswith("To be") and texts[0] == texts[1]
    recipe = (ROOT / "config" / "finetune_shakespeare.py").read_text().replace("HuggingFaceTB/SmolLM2-135M", "exported")
    Path("recipe.py").write_text(recipe)
    done = run_main(train.main, "recipe.py", f"--data_dir={data_dir}", "--max_steps=2", "--compile=false", "--batch_size=2",
                    "--block_size=16", "--eval_tokens=64", "--log_interval=1")
    assert done.code == 0, done.err
    first, last = metrics(run_dir)[0]["loss"], metrics("out-finetune")[0]["loss"]
    assert first > 11 and last < first - 0.3  # it went on from what had been learned


def test_the_card_tells_the_run(run_dir, data_dir):
    assert run_main(export.main, run_dir, "exported").code == 0
    card = Path("exported/README.md").read_text(encoding="utf-8")
    yaml, rest = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: transformers" in yaml
    meta = json.loads((data_dir / "meta.json").read_text())
    state = sample.load(str(run_dir), print)[2]
    for told in ("learning_rate = 0.01", "max_steps = 12", "1,591,456 parameters", f"{state['best']['val_loss']:.4f}",
                 f"{meta['train_tokens']:,} tokens", "AutoModelForCausalLM", "sample.py --checkpoint"):
        assert told in rest
    assert ("STAND-IN" in rest) == bool(meta["stand_in"])
    assert str(run_dir) not in card and str(data_dir.parent) not in card.replace(f"`{meta['source']}`", "").replace(
        f"`{meta['tokenizer']}`", "")
    if importlib.util.find_spec("matplotlib"):
        assert "![" in rest and Path("exported/plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stand_in_is_told_loudly(run_dir, monkeypatch):
    monkeypatch.setattr(export, "read_meta", lambda state: {"source": "pydoc", "stand_in": "text and tokenizer",
                                                            "train_tokens": 9, "val_tokens": 9, "val_bytes": 9})
    assert run_main(export.main, run_dir, "exported").code == 0
    assert "**STAND-IN DATA.** The real text and tokenizer could not" in Path("exported/README.md").read_text(encoding="utf-8")


def test_export_replaces_nothing_unasked_and_names_what_is_wrong(run_dir):
    os.mkdir("mine")
    Path("mine/precious").touch()
    refused = run_main(export.main, run_dir, "mine")
    assert refused.code == 2 and "mine is not empty" in refused.err and os.listdir("mine") == ["precious"]
    assert run_main(export.main, run_dir, "mine", "--overwrite").code == 0 and os.path.exists("mine/precious")
    assert oct(os.stat("mine/model.safetensors").st_mode) == oct(os.stat("mine/config.json").st_mode)
    for argv, code, told in [(("nowhere", "x"), 1, "nowhere"), (("mine", "x"), 1, "no checkpoint of train.py"),
                             ((run_dir, "x", "--push_to_hub", "name"), 2, "USER/NAME"), ((run_dir,), 2, "folder")]:
        result = run_main(export.main, *argv)
        assert (result.code, result.err.splitlines()[-1].startswith("tools.export: ")) == (code, True)
        assert told in result.err and "Traceback" not in result.err and not os.path.exists("x")


def test_push_to_hub_uploads_the_folder(run_dir, monkeypatch):
    import huggingface_hub
    calls = []

    class StandIn:
        def create_repo(self, name, **kwargs):
            calls.append(("create_repo", name, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload_folder", sorted(os.listdir(kwargs["folder_path"])), kwargs))
            return "https://example.org/me/bard"

    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    done = run_main(export.main, run_dir, "exported", "--push_to_hub", "me/bard", "--private")
    assert done.code == 0 and "example.org/me/bard" in done.err
    (create, repo, how), (upload, files, what) = calls
    assert (create, repo, how["private"], upload, what["repo_id"]) == ("create_repo", "me/bard", True, "upload_folder", "me/bard")
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert 'from_pretrained("me/bard")' in Path("exported/README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(StandIn, "create_repo", lambda *args, **kwargs: 1 / 0)
    failed = run_main(export.main, run_dir, "exported", "--overwrite", "--push_to_hub", "me/bard")
    assert failed.code == 1 and "upload failed: division by zero" in failed.err


# ---- weights that come in ----


def published(**changes):
    return {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True,
            "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_scaling": None, **changes}


@pytest.mark.parametrize("sizes, parameters", [
    (dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
          rope_theta=100_000), 134_515_008),
    (dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
          rope_theta=100_000), 361_821_120),
    (dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
          rope_theta=130_000), 1_711_376_384)])
def test_the_published_sizes_come_from_config_json(sizes, parameters):
    from model import SmolLM2
    config = config_from_hf(published(**sizes))
    assert config == SmolLM2Config(**sizes, initializer_range=config.initializer_range)
    with torch.device("meta"):
        assert sum(p.numel() for p in SmolLM2(config).parameters()) == parameters


@pytest.mark.parametrize("change, told", [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type"), ({"model_type": "gpt2"}, "model_type"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"), ({"head_dim": 128}, "head_dim"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"), ({"hidden_size": None}, "hidden_size")])
def test_an_unsupported_config_is_refused_by_name(change, told):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match=told):
        config_from_hf(published(**{**sizes, **change}))


# ---- plots ----


@needs("matplotlib")
def test_plot_draws_png_and_svg_of_several_runs(run_dir, run_train):
    assert run_train("--max_steps=3", "--out_dir=other").code == 0  # no evaluations
    assert run_main(plot.main, run_dir).out == f"{run_dir / 'plot.png'} is written\n"
    for x in plot.AXES:
        assert run_main(plot.main, run_dir, "other", f"--x={x}", f"--output={x}.svg").code == 0
        assert "<svg" in Path(f"{x}.svg").read_text(encoding="utf-8")[:1000]
    with open("other/metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # a run that goes on
    assert run_main(plot.main, "other").code == 0
    from PIL import Image
    for path in (run_dir / "plot.png", "other/plot.png"):
        image = Image.open(path)
        assert image.size == (1600, 992) and len(image.convert("RGB").getcolors(2**20)) > 100


@pytest.mark.parametrize("argv, code, told", [
    (("nowhere",), 1, "nowhere"), ((), 2, "RUN"), (("x", "--output", "plot.jpg"), 2, "plot.jpg"), (("bad",), 1, "line 1")])
def test_plot_names_what_is_wrong(argv, code, told):
    os.mkdir("bad")
    Path("bad/metrics.jsonl").write_text("{}\n{}\n")
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
def test_tensorboard_shows_each_point_once_after_kill_and_resume(start_train, resume):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    process = start_train("--max_steps=40", "--out_dir=out", "--eval_interval=5", "--sample_interval=5",
                          "--checkpoint_interval=10")
    wait_until(lambda: os.path.exists("out/metrics.jsonl") and len(metrics("out")) >= 17, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert resume().code == 0
    events = EventAccumulator("out/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    rows = metrics("out")
    assert set(events.Tags()["scalars"]) == rows[-1].keys() - {"step"} | {"memory_gb"}
    memory = events.Scalars("memory_gb")  # of the process, not of the run: it is not in metrics.jsonl
    assert [e.step for e in memory] == [row["step"] for row in rows] and all(0.05 < e.value < 50 for e in memory)
    for key in rows[-1].keys() - {"step"}:
        points = {row["step"]: row[key] for row in rows if row.get(key) is not None}
        shown = [(e.step, e.value) for e in events.Scalars(key)]
        assert [step for step, _ in shown] == list(points), key
        assert all(value == pytest.approx(points[step], rel=1e-6) for step, value in shown), key
    assert [e.step for e in events.Tensors("sample/text_summary")] == [5, 10, 15, 20, 25, 30, 35, 40]


def test_training_needs_no_tensorboard(run_train, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert run_train("--max_steps=2", "--sample_interval=1").code == 0 and not os.path.exists("out/tensorboard")


# ---- the demo ----


def test_demo_says_what_to_do_without_a_checkpoint():
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -r tools/requirements.txt")
    result = run_main(demo.main)
    assert result.code == 1 and "train.py config/smollm2.py" in result.err


@needs("gradio")
def test_demo_finds_runs_and_exports_and_writes_what_sample_writes(run_dir):
    shutil.copytree(run_dir, "out-a")
    assert run_main(export.main, run_dir, "exported").code == 0
    files = [str(path) for path in train.checkpoints("out-a")]
    assert len(files) > 1 and demo.found([]) == [*files[::-1], "exported"] and demo.found(["x"]) == ["x"]
    values = {"seed": 7, "Length": 20, "Temperature": 0.9, "Top-k": 30, "Top-p": 0.95, "Repetition penalty": 1.1}
    text, line = list(demo.write([], "exported", "To be", *values.values()))[-1]
    args = ["--seed=7", "--max_new_tokens=20", "--temperature=0.9", "--top_k=30", "--top_p=0.95", "--repetition_penalty=1.1"]
    assert text + "\n" == run_main(sample.main, "--checkpoint=exported", "--prompt=To be", *args).out
    assert "20 tokens" in line and "done" in line


@needs("gradio")
@pytest.mark.parametrize("name, prompt, change, told", [
    ("exported", "", {"seed": None}, "Seed"), ("exported", "", {"seed": -1}, "Seed"), ("/etc", "", {}, "no /etc"),
    ("exported", "", {"Temperature": 99}, "Temperature: must be from 0 to 2"), ("exported", "to " * 9000, {}, "do not fit")])
def test_demo_has_a_message_for_a_bad_value(run_dir, name, prompt, change, told):
    import gradio
    assert run_main(export.main, run_dir, "exported").code == 0
    values = {"seed": 7, "Length": 20, "Temperature": 1, "Top-k": 0, "Top-p": 1, "Repetition penalty": 1, **change}
    with pytest.raises(gradio.Error, match=told):
        list(demo.write([], name, prompt, *values.values()))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
CHROMIUM_FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage""".split()


@pytest.fixture
def demo_url(run_dir):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "tools.demo", "--port", str(port), "--checkpoint", str(run_dir)],
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.mark.slow
@needs("gradio")
@needs("playwright")
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
def test_demo_in_a_browser(demo_url):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        pages = [browser.new_page() for _ in range(2)]
        asked = []
        for page in pages:
            page.set_default_timeout(60_000)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(demo_url)
            page.fill("#prompt textarea", "To be, or not")
        text, speed = (lambda page=pages[0], at=at, get=get: getattr(page, get)(at) for at, get in
                       [("#text textarea", "input_value"), ("#speed", "inner_text")])
        done = "document.querySelector('#speed').innerText.includes('done')"

        pages[0].click("#go")  # type, generate, see text stream
        seen, end = set(), time.monotonic() + 60
        while "done" not in speed() and time.monotonic() < end:
            seen.add(text())
        assert len(seen - {""}) > 3 and all(t.startswith("To be, or not") for t in seen - {""})
        pages[0].wait_for_timeout(500)
        whole = text()

        for page in pages:  # two at once, the same seed: the same text
            page.fill("#length input[type=number]", "150")
            page.keyboard.press("Tab")
            page.click("#go")
        for page in pages:
            page.wait_for_function("document.querySelector('#speed').innerText.startsWith('150 tokens') && " + done)
            page.wait_for_timeout(500)
            assert whole.startswith(text(page)) and len(text(page)) > 50

        pages[0].fill("#length input[type=number]", "2000")  # stop
        pages[0].keyboard.press("Tab")
        pages[0].click("#go")
        pages[0].wait_for_function("document.querySelector('#speed').innerText.match(/^\\d+ tokens, [\\d,]+ per second$/)")
        pages[0].click("#stop")
        pages[0].wait_for_timeout(1500)
        stopped = text()
        pages[0].wait_for_timeout(1000)
        assert text() == stopped and "done" not in speed()

        pages[0].fill("#seed input", "-4")  # a bad value
        pages[0].keyboard.press("Tab")
        pages[0].click("#go")
        pages[0].wait_for_selector("text=Seed: must be from 0")
        assert all(url.startswith((demo_url, "data:", "blob:")) for url in asked), asked  # nothing from elsewhere
        browser.close()
