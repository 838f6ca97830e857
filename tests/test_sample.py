"""sample.py: the prompt and what follows it, whole characters, the same text for the same seed."""
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

import model as M
import sample
import train
from tests.harness import ROOT, expect_end, refused, run_main

PROMPT = "ROMEO:"
run_sample = partial(run_main, sample.main, device="cpu")


def text(checkpoint, prompt, *argv, **keys):
    """Standard output after a prompt, without the last line end."""
    result = run_sample(*argv, checkpoint=checkpoint, prompt=prompt, **keys)
    assert result.code == 0 and result.out.endswith("\n"), result.err
    return result.out[:-1]


def test_standard_output_is_the_prompt_and_the_text_and_nothing_else(run_dir, tokenizer):
    """The text is that of the same tokens drawn by hand from the checkpoint's weights."""
    keys = ["--max_new_tokens=30", "--seed=5", "--dtype=float32"]
    state = train.read_checkpoint(run_dir / "step_000012.pt")
    model = M.model_of(train.TrainConfig(**state["config"]), state["model"])
    ids = tokenizer.encode(PROMPT)
    tokens = M.generate(model, torch.tensor([ids]), 30, temperature=0.8, top_k=50,
                        generator=torch.Generator().manual_seed(5))
    expected = tokenizer.decode(ids + [t.item() for t in tokens])
    assert text(run_dir, PROMPT, *keys) == expected
    assert text(run_dir, "-", *keys, stdin=PROMPT.encode()) == expected
    command = [sys.executable, ROOT / "sample.py", f"--prompt={PROMPT}", f"--checkpoint={run_dir}"]
    done = subprocess.run([*command, *keys], capture_output=True, check=True)
    assert done.stdout.decode() == expected + "\n" and b"step_000012.pt" in done.stderr
    stop = expected[len(expected) // 2:][:6]  # a text that comes, cut anywhere in its tokens
    stopped = text(run_dir, PROMPT, *keys, "--stop=not in it", stop=stop)
    assert stopped == expected[:expected.index(stop, len(PROMPT))]
    assert text(run_dir, "", max_new_tokens=9, temperature=99)  # an empty prompt begins a text
    _, *texts = text(run_dir, "And", num_samples=3, max_new_tokens=20).split("--- ")
    assert len(texts) == len({t[2:].strip() for t in texts}) == 3  # each after its number
    result = run_sample(prompt="And so", max_new_tokens=8192, checkpoint=run_dir)
    expect_end(result, [1], "8192", "positions")  # more than the model has
    assert result.out == ""


@pytest.mark.slow
def test_text_comes_as_it_is_made_a_reader_may_go_and_a_full_disk_is_an_error(run_dir):
    command = [sys.executable, ROOT / "sample.py", f"--checkpoint={run_dir}", "--prompt=To be"]
    with subprocess.Popen([*command, "--max_new_tokens=8000"], stdout=subprocess.PIPE) as process:
        first = os.read(process.stdout.fileno(), 9999)
        assert first.startswith(b"To be") and len(first) < 4000 and process.poll() is None
        process.stdout.close()
        assert process.wait(60) == 0
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*command, "--max_new_tokens=3"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"No space left" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("num_samples, out", [(1, "A word"), (2, "--- 1\nA word\n--- 2\nA word")])
def test_it_ends_at_endoftext(num_samples, out, run_dir, tokenizer, monkeypatch):
    made = [*tokenizer.encode(" word"), tokenizer.eos_token_id, *tokenizer.encode(" beyond")]
    tokens = (torch.tensor([i] * num_samples) for i in made)
    monkeypatch.setattr(M, "generate", lambda *args, **kwargs: tokens)
    assert text(run_dir, "A", num_samples=num_samples, max_new_tokens=9) == out
    assert next(tokens)[0] == made[-1]  # nothing was made after the end


def stream(tokenizer, prompt, ids, stops=()):
    """The pieces in which the text of ids comes after prompt."""
    return [*sample.stream(ids, tokenizer.backend_tokenizer, None, tokenizer.encode(prompt), stops)]


@pytest.mark.parametrize("text", ["naïve café", "🙂🙃 👩‍👩‍👧‍👦", "日本語。", "𝔘𝔫𝔦 ≈√", "plain\n\n  text "])
@pytest.mark.parametrize("prompt", ["", "Say: ", "🙂"])
def test_characters_split_over_tokens_come_out_whole(tokenizer, prompt, text):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, prompt, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 1  # and it does stream
    if text.startswith("🙂"):
        assert any("\ufffd" in tokenizer.decode([i]) for i in ids)  # they are split, indeed
        *pieces, _ = stream(tokenizer, prompt, ids[:-1])  # the last one never becomes whole
        assert "".join(pieces) == text[:-1]


@pytest.mark.parametrize("prompt, text, stops, shown", [
    ("ROMEO:", "\nGood.\n\nJULIET: Good night", ["\n\nJULIET:"], "\nGood."),
    ("ROMEO:", "\nGood.\n\nJULIA: Good.\n\nJUL", ["\n\nJULIET:"], "\nGood.\n\nJULIA: Good.\n\nJUL"),
    ("STOP here, ", "one two STOP three END", ["END", "STOP"], "one two "),
    ("Say: ", "a 🙂 b 🙃 c", ["🙃"], "a 🙂 b ")],
    ids=["it comes", "it only begins", "in the prompt, and the first of two", "split characters"])
def test_a_stop_text_is_never_shown_not_even_its_beginning(tokenizer, prompt, text, stops, shown):
    pieces = stream(tokenizer, prompt, tokenizer.encode(text), stops)
    assert "".join(pieces) == shown
    assert all(shown.startswith("".join(pieces[:n])) for n in range(len(pieces)))


def test_the_newest_checkpoint_of_out_is_the_default_and_best_the_best(run_dir):
    shutil.copytree(run_dir, "out")
    older, newest = train.checkpoints("out")[-2:]
    best = {"step": train.step_of(older), "val_loss": 5.0}
    train.write_checkpoint(newest, {**train.read_checkpoint(newest), "best": best})
    for checkpoint, file in (("out", newest), (older, older), ("best", older), ("out/best", older)):
        result = run_sample(max_new_tokens=1, checkpoint=checkpoint)
        assert f"{file}: step {train.step_of(file)}" in result.err
        assert ("--checkpoint out/best" in result.err) == (file == newest)  # a hint
    older.write_text("not a checkpoint")
    assert f"{older} is damaged" in run_sample(checkpoint=older).err
    older.unlink()
    refused(run_sample(checkpoint="best"), older, code=1)
