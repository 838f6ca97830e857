"""What goes out into the world, and what there is to look at: exports, plots, the demo page."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch

import sample
import train
from model import MLP
from tests.harness import (ROOT, TINY, Process, expect_end, free_port, metrics, refused, run_main,
                           snapshot, write)
from tools import bench, demo, export, plot, space, tensorboard

HARD_TEXTS = ["2024 is 3.14159", "\N{ROCKET}\N{FAMILY} e\u0301t\xe9 \u4f60\u597d",
    "def f(x):\n\treturn x**2  # {}\n", "a\r\nb\rc\n\n  d ", "a\0b",
    "First Citizen:\n  To be \u2026\n\n<|endoftext|><|im_start|>x"]
VALUES = {"Seed": 7, "Length": 20, "Temperature": 0.9, "Top-k": 30, "Top-p": 0.95}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    """An export of that run, with its title."""
    folder = tmp_path_factory.mktemp("export") / "bard"
    expect_end(run_main(export.main, run_dir, folder, licence="mit", language="en"))
    return folder


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.03)])
@patch("huggingface_hub.snapshot_download", lambda name, **_: "exported")
def test_transformers_gives_an_export_the_same_logits(run_dir, tokenizer, dtype, tolerance):
    from tokenizers.processors import BertProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer
    assert run_main(export.main, run_dir, "exported", dtype=dtype).code == 0
    theirs = AutoModelForCausalLM.from_pretrained("exported").eval()
    assert theirs.dtype == getattr(torch, dtype) and theirs.config.max_position_embeddings == 8192
    ours = sample.load(str(run_dir))[0].to(theirs.dtype)
    for name, p in ours.named_parameters():
        assert torch.equal(p, theirs.get_parameter(name)), name
    texts = [run_main(sample.main, checkpoint=source, max_new_tokens=9, dtype=dtype).out
             for source in (run_dir, "exported", "me/model")]
    assert texts == 3 * texts[:1] and texts[0]  # (nothing after an error)
    idx = torch.randint(0, 49152, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(idx)[0].float(), theirs(idx).logits.float()
    assert (a - b).abs().max() <= tolerance * b.abs().max()
    written = AutoTokenizer.from_pretrained("exported")
    assert all(written.encode(text) == tokenizer.encode(text) for text in HARD_TEXTS)
    written.backend_tokenizer.post_processor = BertProcessing(("a", 2), ("b", 1))
    export.save_tokenizer(written, Path("exported"))  # training had nothing before or after a text
    assert AutoTokenizer.from_pretrained("exported").encode("To be") == tokenizer.encode("To be")
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    config = json.loads(Path("exported/config.json").read_text())
    assert config.keys() & train.KEYS.keys() == train.SmolLM2Config.__dataclass_fields__.keys()


def test_a_changed_architecture_is_not_exported_as_llama(run_dir, monkeypatch):
    real = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda mlp, x: 1.1 * real(mlp, x))  # a few percent
    refused(run_main(export.main, run_dir, "exported"), "changed architecture", code=1)
    assert os.listdir() == []


IN_TRANSFORMERS_4 = """
import json, sys, transformers
assert transformers.__version__ == "4.57.6", transformers.__version__
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
text = tokenizer("To be", return_tensors="pt")
new = model.generate(**text, max_new_tokens=24, do_sample=False)
ids = [tokenizer.encode(t) for t in json.loads(sys.argv[2])]
print(json.dumps([ids, tokenizer.decode(new[0])]))
"""


@pytest.mark.slow
def test_transformers_4_reads_an_export(exported, tokenizer):
    """In an environment of its own, with this one's torch. (lm-eval, MLX and others have it.)"""
    venv.create("old", with_pip=True)
    install = ["old/bin/python", "-m", "pip", "install", "-q", "transformers==4.57.6"]
    if subprocess.run(install, check=False).returncode:
        pytest.skip("pip cannot install transformers 4.57.6 here")
    site = next(Path("old/lib").iterdir()) / "site-packages"
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # after its own
    command = ["old/bin/python", "-c", IN_TRANSFORMERS_4, exported, json.dumps(HARD_TEXTS)]
    ids, text = json.loads(subprocess.check_output(command))
    assert ids == [tokenizer.encode(t) for t in HARD_TEXTS]
    ours = run_main(sample.main, checkpoint=exported, prompt="To be", temperature=0,
                    max_new_tokens=24, dtype="float32")
    assert ours.code == 0 and text + "\n" == ours.out


def test_training_goes_on_from_an_export(run_dir, exported, data_dir):
    recipe = (ROOT / "config" / "finetune_shakespeare.py").read_text()
    Path("recipe.py").write_text(recipe.replace("HuggingFaceTB/SmolLM2-135M", str(exported)))
    expect_end(run_main(train.main, "recipe.py", data_dir=data_dir, out_dir="fine", max_steps=1,
                        compile=False, batch_size=2, block_size=16, eval_tokens=64, log_interval=1))
    first, last = metrics(run_dir)[0]["loss"], metrics("fine")[0]["loss"]
    assert first > 11 and last < first - 0.3  # it went on from what had been learned


def test_the_card_tells_the_run_and_no_folder(run_dir, exported, data_dir):
    import yaml
    _, front, rest = (exported / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front, meta = yaml.safe_load(front), json.loads((data_dir / "meta.json").read_text())
    loss, tokens = (metrics(run_dir)[-1][name] for name in ("val_loss", "tokens"))
    assert (front["license"], front["language"]) == ("mit", "en")
    figures = {m["type"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert figures["perplexity"] == pytest.approx(2.718281828**loss, rel=1e-4)
    bits = loss / 0.693147 * meta["val_tokens"] / meta["val_bytes"]
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    git = json.loads((run_dir / "run.json").read_text())["git"]
    for told in ("learning_rate = 0.01", "max_steps = 12", "1,591,456 parameters", f"{loss:.4f}",
                 git[:12], f"{meta['train_tokens']:,}", f"{tokens:,}", "--checkpoint bard"):
        assert told in rest, told
    assert ("STAND-IN" in rest) == bool(meta["stand_in"])
    folders = [str(path) for path in (run_dir.parent, data_dir.parent, exported.parent, ROOT)]
    for file in [*exported.glob("*.json"), exported / "README.md"]:
        assert not any(folder in file.read_text(encoding="utf-8") for folder in folders), file
    if importlib.util.find_spec("matplotlib"):
        assert "![" in rest and (exported / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_card_without_its_data_or_metrics(run_dir, monkeypatch):
    shutil.copytree(run_dir, "out", ignore=shutil.ignore_patterns("metrics.jsonl", "run.json"))
    book = {"source": "/home/me/secret/book.txt", "stand_in": "text", "train_tokens": 9,
            "val_tokens": 9, "val_bytes": 9}
    stories = {**book, "source": "me/stories:small, split train"}
    for meta, *told in [({}, "the data are gone", "not evaluated"),
                        (book, "STAND-IN DATA", "book.txt"), (stories, "datasets: me/stories\n")]:
        monkeypatch.setattr(export, "read_meta", lambda state, meta=meta: meta)
        assert run_main(export.main, "out", "bard", "--overwrite").code == 0
        card = Path("bard/README.md").read_text(encoding="utf-8")
        assert all(words in card for words in told) and "secret" not in card


def test_an_export_leaves_other_files_alone(run_dir):
    write("mine/precious", "")
    assert run_main(export.main, run_dir, "mine", "--overwrite").code == 0
    assert os.path.exists("mine/precious")
    weights, config = (os.stat(f"mine/{name}") for name in ("model.safetensors", "config.json"))
    assert weights.st_mode == config.st_mode
    refused(run_main(export.main, "mine", "x"), "mine", code=1)
    assert os.listdir() == ["mine"]  # nothing half written is left


def test_push_to_hub_uploads_the_folder(run_dir, monkeypatch):
    hub = Mock(**{"upload_folder.return_value": "https://example.org/me/bard"})
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    argv = [run_dir, "exported", "--overwrite", "--push_to_hub=me/bard", "--private"]
    write("exported/mine", "not for the hub")
    done = run_main(export.main, *argv)
    assert done.code == 0 and "example.org/me/bard" in done.err
    hub.create_repo.assert_called_once_with("me/bard", private=True, exist_ok=True)
    sent = hub.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["folder_path"]) == ("me/bard", Path("exported"))
    assert set(sent["allow_patterns"]) == {*os.listdir("exported")} - {"mine"}
    hub.model_info.return_value.private = False
    expect_end(run_main(export.main, *argv), [1], "public")
    assert os.path.exists("exported/generation_config.json")  # the other files are read above
    assert "pretrained=me/bard" in Path("exported/README.md").read_text(encoding="utf-8")
    hub.create_repo.side_effect = OSError("no login")
    expect_end(run_main(export.main, *argv), [1], "no login")


def test_plot_draws_png_and_svg_of_runs_that_go_on(run_dir):
    pytest.importorskip("matplotlib")
    from PIL import Image
    write("other/metrics.jsonl", (run_dir / "metrics.jsonl").read_text() + '{"step": 13, "lo')
    assert run_main(plot.main, run_dir).code == 0
    assert run_main(plot.main, run_dir, "other", x="time", output="time.svg").code == 0
    assert "<svg" in Path("time.svg").read_text(encoding="utf-8")[:1000]
    image = Image.open(run_dir / "plot.png")
    assert image.size == (1600, 992) and len(image.convert("RGB").getcolors(2**20)) > 100


def test_a_plot_says_what_it_shows_from_the_first_step_on(run_dir, monkeypatch):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures, rows = [], plot.read_metrics(run_dir)
    monkeypatch.setattr(Figure, "savefig", lambda self, to, **_: figures.append(self) or to.touch())
    plot.draw({"a": rows[:1]}, "x.png")
    plot.draw({"a": rows, "b": rows[:5]}, "x.png")
    assert all(axis.lines[0].get_marker() == "o" for axis in figures[0].axes[1:])
    for figure, both in zip(figures, (False, True)):
        loss = figure.axes[0]
        legend = [text.get_text() for text in loss.get_legend().get_texts()]
        assert sum("training" in text for text in legend) == 1 + both
        assert sum("held-out" in text for text in legend) == 2 * both
        assert all(float(at).is_integer() for at in loss.get_xticks())
        assert "steps" in loss.get_xlabel()


def test_tensorboard_gets_every_step_once_however_often_it_is_asked(run_dir):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        assert run_main(tensorboard.main, run_dir).code == 0
    events = reader.EventAccumulator(str(run_dir / "tensorboard" / "out")).Reload()
    assert [event.step for event in events.Scalars("loss/training")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("loss/held-out")] == [4, 8, 12]
    assert "recipe/text_summary" in events.Tags()["tensors"]
    raw = b"".join(path.read_bytes() for path in (run_dir / "tensorboard").rglob("event*"))
    assert str(run_dir.parent).encode() not in raw and b"data_dir" not in raw


@pytest.mark.slow
def test_the_benchmark_tells_whether_runs_have_the_same_bits(data_dir, monkeypatch):
    Path("r.py").write_text("\n".join(key[2:].replace("false", "False") for key in TINY[:-1]))
    keys = ["exact", "--recipe=r.py", f"--data_dir={data_dir}", "--output=report.json"]
    done = run_main(bench.main, *keys)
    assert done.code == 0 and done.out.count("the same bits") == 2, done
    assert json.loads(Path("report.json").read_text())["exact"] == {"second": True, "resumed": True}
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    assert run_main(bench.main, *keys).out.count("OTHER BITS") == 2


@pytest.mark.slow
def test_bench_shows_why_a_contestant_failed_and_goes_on_with_the_next_part(tmp_path):
    write(tmp_path / "meta.json", "{}")
    done = run_main(bench.main, "prepare", "exact", data_dir=tmp_path)
    expect_end(done, [1], "failed", "prepare, exact")
    for reason in ("prepare: all cores failed: ", "tokenizer.json", "exact: train.py: data_dir"):
        assert reason in done.err


def test_demo_finds_runs_and_exports_and_writes_what_sample_writes(run_dir, exported):
    pytest.importorskip("gradio")
    refused(run_main(demo.main), "train.py", code=1)  # nothing is here yet
    for name in ("out-a", "out-new"):
        shutil.copytree(run_dir, name)
    os.utime("out-new/step_000012.pt", (2e9, 2e9))
    shutil.copytree(exported, "bard")
    steps = [path.name for path in train.checkpoints(run_dir)[::-1]]
    files = [f"{run}/{step}" for run in ("out-new", "out-a") for step in steps]
    choices = {name: shown for shown, name in demo.found([])}
    assert list(choices) == [*files, "bard"] and demo.found(["x"]) == [("x", "x")]
    loss = metrics(run_dir)[-1]["val_loss"]
    assert choices["out-a/step_000012.pt"].startswith(f"out-a, step 12: held-out loss {loss:.3f}")
    *_, (body, plain, stop) = demo.show([], {}, "bard", files[1], "To be", "", *VALUES.values())
    done = run_main(sample.main, checkpoint="bard", prompt="To be", seed=7, max_new_tokens=20,
                    temperature=0.9, top_k=30, top_p=0.95)
    assert plain + "\n" == done.out
    lines = re.findall(r'<p class="speed">done: 20 tokens, [\d,]+ per second</p>', body)
    left, right = re.findall(r'<p class="written"><span>To be</span>(.*?)</p>', body, re.DOTALL)
    assert len(lines) == 2 and right != left and not stop.visible
    *_, (_, stopped, _) = demo.show([], {}, "bard", "", "To be", plain[-3:], *VALUES.values())
    assert plain.startswith(stopped) and plain[-3:] not in stopped  # a stop text


@pytest.mark.parametrize("name, prompt, change, told", [
    ("bard", "", {"Seed": None}, "Seed"), ("/etc", "", {}, "/etc"),
    ("bard", "", {"Temperature": 99}, "Temperature"), ("bard", "to " * 9000, {}, "do not fit")])
def test_demo_tells_a_bad_value_and_clears_the_old_text(exported, name, prompt, change, told):
    gradio = pytest.importorskip("gradio")
    shutil.copytree(exported, "bard")
    shown = []
    with pytest.raises(gradio.Error, match=told):
        shown.extend(demo.show([], {}, name, "", prompt, "", *{**VALUES, **change}.values()))
    body, plain, stop = shown[-1]
    assert (body, plain) == ("", "") and not stop.visible


def test_a_space_is_a_new_folder_and_tells_nothing_of_this_machine(run_dir):
    done = run_main(space.main, "sp ace", run_dir)
    assert done.code == 0 and done.out.endswith(" 'sp ace'\n") and os.listdir() == ["sp ace"]
    copied = Path("sp ace", run_dir.name)
    assert {path.name for path in copied.iterdir() if path.suffix != ".pt"} == {
        "metrics.jsonl", "tokenizer"} and train.checkpoints(copied)
    assert not any(str(run_dir.parent).encode() in (raw or b"") for raw in snapshot().values())
    damaged = write("bad/step_000001.pt", "damaged")
    refused(run_main(space.main, "new", "bad"), damaged, code=1)
    assert sorted(os.listdir()) == ["bad", "sp ace"]


@pytest.mark.slow
def test_a_space_starts_from_its_folder_and_programs_call_generate(run_dir, tmp_path):
    gradio = pytest.importorskip("gradio")
    from gradio_client import Client
    folder, file = tmp_path / "space", f"{run_dir.name}/step_000012.pt"
    assert run_main(space.main, folder, run_dir).code == 0
    assert f"sdk_version: {gradio.__version__}" in (folder / "README.md").read_text()
    needed = (folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in needed] == ["torch", "transformers", "numpy"]
    port = free_port()
    with Process(["app.py"], folder, GRADIO_SERVER_PORT=port, PYTHONPATH="") as process:
        process.until(lambda: "open http://127.0.0.1:" in process.text)
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        asked = {"prompt": "To be", "temperature": 0}
        text = client.predict(checkpoint=file, length=20, api_name="/generate", **asked)
        with pytest.raises(Exception, match="no x"):
            client.predict(checkpoint="x", prompt="", api_name="/generate")
    done = run_main(sample.main, checkpoint=run_dir, max_new_tokens=20, **asked)
    assert f"To be{text}\n" == done.out


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
def test_demo_in_a_browser(run_dir):
    """Text streams; two side by side; they stop, and one goes on; nothing comes from elsewhere."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    port = free_port()
    demo_url = f"http://127.0.0.1:{port}"
    command = ["-m", "tools.demo", "--port", port, "--checkpoint", run_dir]
    with Process(command) as process, playwright.sync_playwright() as p:
        process.until(lambda: "open http://127.0.0.1:" in process.text)
        page = p.chromium.launch(executable_path=CHROMIUM, args=flags).new_page()
        page.set_default_timeout(60_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        prompt, length = page.get_by_label("Prompt"), page.get_by_label("number input for Length")
        lines, texts = page.locator(".speed"), page.locator(".written")
        stop = page.get_by_role("button", name="Stop")
        def wait(words, side=0):
            playwright.expect(lines.nth(side)).to_contain_text(words, timeout=60_000)
        page.goto(demo_url)
        playwright.expect(page.get_by_label("Checkpoint")).not_to_have_value("")  # it is loaded
        length.fill("1000")  # long enough to be seen on the way
        prompt.fill("To be, or not")
        prompt.press("Control+Enter")
        wait("tokens")
        seen = set()
        while "done" not in lines.inner_text():
            seen.add(texts.inner_text())
        assert len(seen) > 3 and all(text.startswith("To be, or not") for text in seen)
        stop.wait_for(state="hidden")
        page.get_by_label("Beside it").click()
        page.get_by_role("option").nth(1).click()  # the first is "none"
        length.fill("2000")
        page.get_by_role("button", name="New seed").click()
        wait("tokens", side=1)
        stop.click()
        for side in (0, 1):
            wait("stopped at", side)
        assert page.get_by_label("number input for Seed").input_value() != "1337"
        stopped = texts.first.inner_text()
        page.wait_for_timeout(500)
        assert texts.first.inner_text() == stopped and not stop.is_visible()
        length.fill("20")
        page.get_by_role("button", name="Continue").click()
        wait("done: 20 tokens")
        longer = texts.first.inner_text()
        assert longer.startswith(stopped.rstrip()) and len(longer) > len(stopped)
        length.fill("9999")
        length.press("Control+Enter")
        page.get_by_text("Length: must be from 1 to 2,000").wait_for()
        playwright.expect(lines).to_have_count(0)  # no figures of the run before
        assert not stop.is_visible()
        assert all(url.startswith((demo_url, "data:", "blob:")) for url in asked), asked
