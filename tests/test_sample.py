"""sample.py: the prompt and what follows it on standard output, whole characters, the same text for the same seed."""
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import LlamaForCausalLM

import model as M
import sample
import train
from sample import Streamer
from tests.harness import TINY, assert_refused, expect_end, flip, read, run_main, run_script
from tests.test_model import lively, transformers_config

PROMPT = "ROMEO:"


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The out_dir of a short run, with checkpoints after 4 and 8 steps."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert run_main(train.main, f"--data_dir={data_dir}", *TINY, "--max_steps=8", "--checkpoint_interval=4",
                    f"--out_dir={out}").code == 0
    return out


@pytest.fixture(scope="module")
def hf_folder(tokenizer, tmp_path_factory):
    """A folder that transformers wrote: random weights whose greedy text does not repeat itself, and a tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    ours = lively(M.SmolLM2(M.SmolLM2Config(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96,
                                            num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                                            max_position_embeddings=128)))
    theirs = LlamaForCausalLM(transformers_config(ours.config))
    theirs.load_state_dict(ours.state_dict())
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_sample(*argv, checkpoint=None, stdin=b""):
    return run_main(sample.main, *([f"--checkpoint={checkpoint}"] if checkpoint else []), *argv, stdin=stdin)


def refused(result, *fragments, code):
    assert_refused(result, "sample.py", *fragments, code=code)


def text_of(result):
    assert result.code == 0, result.err
    return result.out


# ---------------------------------------------------------------------------------------------------------- the text


def test_standard_output_is_the_prompt_and_the_text_and_nothing_else(trained, tokenizer):
    """The text is that of the same tokens drawn by hand from the checkpoint's weights."""
    result = run_sample(f"--prompt={PROMPT}", "--max_new_tokens=30", "--seed=5", "--dtype=float32", checkpoint=trained)
    state = read(trained / "step_000008.pt")
    model = M.SmolLM2(train.TrainConfig(**state["config"]))
    model.load_state_dict(state["model"])
    ids = tokenizer.encode(PROMPT)
    tokens = M.generate(model, torch.tensor([ids]), 30, temperature=0.8, top_k=50,
                        generator=torch.Generator().manual_seed(5))
    assert text_of(result) == tokenizer.decode(ids + [t.item() for t in tokens]) + "\n"
    assert result.err.splitlines() == [f"{trained}/step_000008.pt: step 8"]


def test_a_real_process_writes_the_same(trained):
    keys = [f"--prompt={PROMPT}", "--max_new_tokens=12", f"--checkpoint={trained}"]
    result = run_script("sample.py", *keys)
    assert result == run_sample(*keys) and result.code == 0 and result.out.startswith(PROMPT)
    refused(run_script("sample.py"), "python train.py config/smollm2.py", code=1)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(trained):
    def texts(*keys):
        return [text_of(run_sample("--prompt=To be", f"--seed={seed}", "--max_new_tokens=40", *keys,
                                   checkpoint=trained)) for seed in (1, 1, 2)]
    drawn, greedy = texts(), texts("--temperature=0")
    assert drawn[0] == drawn[1] != drawn[2] and greedy[0] == greedy[1] == greedy[2]


def test_a_folder_in_hugging_faces_format_gives_the_greedy_tokens_of_transformers(hf_folder, tokenizer):
    result = run_sample(f"--prompt={PROMPT}", "--temperature=0", "--max_new_tokens=60", "--dtype=float32",
                        checkpoint=hf_folder)
    theirs = LlamaForCausalLM.from_pretrained(hf_folder)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        for _ in range(60):
            ids = torch.cat((ids, theirs(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert text_of(result) == tokenizer.decode(ids[0].tolist()) + "\n"
    assert len(ids[0].unique()) > 20


@pytest.mark.parametrize("prompt", ["To be, or not\nto bé: ", ""], ids=["two lines", "empty"])
def test_the_prompt_comes_from_standard_input(trained, prompt):
    piped = run_sample("--prompt", "-", "--max_new_tokens=10", checkpoint=trained, stdin=prompt.encode())
    assert text_of(piped) == text_of(run_sample(f"--prompt={prompt}", "--max_new_tokens=10", checkpoint=trained))
    assert piped.out.startswith(prompt) and len(piped.out) > len(prompt) + 1


def test_several_samples_are_several_texts(trained):
    lines = text_of(run_sample("--prompt=And", "--num_samples=3", "--max_new_tokens=30", checkpoint=trained))
    texts = lines.split("--- ")
    assert texts[0] == "" and [t[:2] for t in texts[1:]] == ["1\n", "2\n", "3\n"]
    assert len({t[2:] for t in texts[1:]}) == 3 and all(t[2:].startswith("And") for t in texts[1:])


def test_stop_ends_before_the_text(trained):
    whole = text_of(run_sample("--prompt=And", "--max_new_tokens=60", checkpoint=trained))
    stop = whole[len(whole) // 2:len(whole) // 2 + 6]  # a text that comes, cut anywhere in its tokens
    cut = text_of(run_sample("--prompt=And", "--max_new_tokens=60", f"--stop={stop}", "--stop=not in it",
                             checkpoint=trained))
    assert cut == whole[:whole.index(stop, 3)] + "\n"


@pytest.mark.parametrize("num_samples", [1, 2])
def test_it_ends_at_endoftext(num_samples, trained, tokenizer, monkeypatch):
    ids = tokenizer.encode(" word one") + [tokenizer.eos_token_id] + tokenizer.encode(" beyond")
    made = []

    def generate(model, idx, *args, **kwargs):
        for i in ids:
            made.append(i)
            yield torch.tensor([i] * len(idx))
    monkeypatch.setattr(M, "generate", generate)
    out = text_of(run_sample("--prompt=A", f"--num_samples={num_samples}", checkpoint=trained))
    assert out == ("A word one\n" if num_samples == 1 else "--- 1\nA word one\n--- 2\nA word one\n")
    assert made[-1] == tokenizer.eos_token_id  # and nothing is made after it


# ------------------------------------------------------------------------------------------------------- the streamer


def stream(tokenizer, prompt, text, stops=()):
    """The pieces in which text comes after prompt, and the ids of text."""
    before, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    if ids[:len(before)] != before:  # the last token of the prompt grew: take the two apart
        ids = before + tokenizer.encode(text)
    streamer, pieces = Streamer(tokenizer, before, list(stops)), []
    for token in ids[len(before):]:
        if not streamer.ended:
            pieces.append(streamer.push(token))
    return [*pieces, streamer.finish()], ids[len(before):]


@pytest.mark.parametrize("text", ["naïve café, déjà vu", "🙂🙃 and 👩‍👩‍👧‍👦", "日本語のテキスト。",
                                  "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Ω≈ç√∫˜µ", "plain ASCII\n\n  text "])
@pytest.mark.parametrize("prompt", ["", "Say: ", "🙂"])
def test_characters_split_over_tokens_come_out_whole(real_tokenizer, prompt, text):
    pieces, ids = stream(real_tokenizer, prompt, text)
    assert "".join(pieces) == text == real_tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)
    if text.startswith("🙂"):
        assert any("\ufffd" in real_tokenizer.decode([i]) for i in ids)  # they are split, indeed
    assert sum(bool(piece) for piece in pieces) > 1  # and it does stream


def test_a_character_that_never_becomes_whole_does_not_hold_up_the_end(real_tokenizer):
    ids = real_tokenizer.encode("a🙂")
    streamer = Streamer(real_tokenizer, real_tokenizer.encode("x"), [])
    pieces = [streamer.push(i) for i in ids[:-1]]
    assert "".join(pieces) == "a" and "a" not in streamer.finish()


@pytest.mark.parametrize("prompt, text, stops, shown", [
    ("ROMEO:", "\nGood morrow.\n\nJULIET: Good night", ["\n\nJULIET:"], "\nGood morrow."),
    ("ROMEO:", "\nGood.\n\nJULIA: Good night.\n\nJUL", ["\n\nJULIET:"], "\nGood.\n\nJULIA: Good night.\n\nJUL"),
    ("STOP here, ", "one two STOP three END", ["END", "STOP"], "one two "),
    ("Say: ", "a 🙂 b 🙃 c", ["🙃"], "a 🙂 b ")],
    ids=["it comes", "it only begins", "in the prompt, and the first of two", "of split characters"])
def test_a_stop_text_over_several_tokens_is_never_shown_not_even_its_beginning(real_tokenizer, prompt, text, stops,
                                                                               shown):
    pieces, _ = stream(real_tokenizer, prompt, text, stops)
    assert "".join(pieces) == shown
    assert all(shown.startswith("".join(pieces[:n])) for n in range(len(pieces)))


# ------------------------------------------------------------------------------------------------- which checkpoint


def test_the_newest_checkpoint_of_out_is_the_default_and_best_the_one_with_the_lowest_held_out_loss(trained):
    shutil.copytree(trained, "out")
    state = {**read("out/step_000008.pt"), "best": {"step": 4, "val_loss": 5.0}}
    train.write_checkpoint(Path("out/step_000008.pt"), state)
    for checkpoint, step in ((None, 8), ("out/", 8), ("out/step_000004.pt", 4), ("best", 4), ("out/best", 4)):
        assert f"step_00000{step}.pt: step {step}" in run_sample("--max_new_tokens=1", checkpoint=checkpoint).err
    assert run_sample("--max_new_tokens=1").err.endswith(
        "step 8 (the held-out loss was lowest at step 4: --checkpoint out/best)\n")
    Path("out/step_000004.pt").unlink()
    refused(run_sample(checkpoint="best"), "the checkpoint of the best step is gone: out/step_000004.pt", code=1)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(trained):
    flip(Path(shutil.copytree(trained, "out"), "step_000008.pt"), 3_000_000)
    result = run_sample("--max_new_tokens=1")
    assert result.code == 0 and "step_000008.pt is damaged" in result.err and "step_000004.pt: step 4" in result.err


# ----------------------------------------------------------------------------------------------------------- refusals


BAD = {word: word.partition("=")[0] for word in """
    --temperature=-1 --temperature=nan --temperature=hot --top_k=-1 --top_k=1.5 --top_p=1.1 --repetition_penalty=0
    --max_new_tokens=0 --num_samples=0 --seed=-1 --stop= --dtype=int8 --device=tpu9 --temprature=1 --prompt ROMEO:
    """.split()} | {"--prompt=\udcff": "not UTF-8", "--prompt=-": "not UTF-8"}


@pytest.mark.parametrize("word", BAD, ids=ascii)
def test_bad_values_are_one_line_and_exit_2(word):
    refused(run_sample(word, stdin=b"caf\xe9"), BAD[word], code=2)


@pytest.mark.parametrize("argv", [[], ["--checkpoint=best"], ["--checkpoint=out/best"]])
def test_without_a_checkpoint_it_says_which_command_makes_one(argv):
    refused(run_sample(*argv), "no checkpoint", "python train.py config/smollm2.py", code=1)


def test_more_tokens_than_the_model_has_positions_are_a_clear_error(trained):
    result = run_sample("--prompt=And so", "--max_new_tokens=256", checkpoint=trained)
    expect_end(result, [1], "do not fit into the model's 256 positions")
    assert result.out == ""


@pytest.mark.parametrize("change, named", [
    ({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type")])
def test_a_folder_of_another_architecture_is_refused_by_name(hf_folder, change, named, tmp_path):
    folder = Path(shutil.copytree(hf_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    refused(run_sample(checkpoint=folder), named, code=1)


def test_what_is_no_checkpoint_is_refused_and_no_hub_is_asked(monkeypatch):
    def ask(*args, **kwargs):
        pytest.fail(f"the hub was asked: {args}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
    Path("empty").mkdir()
    Path("text.pt").write_text("not a checkpoint")
    refused(run_sample(checkpoint="empty"), "no checkpoint", "empty", code=1)
    result = run_sample(checkpoint="text.pt")
    expect_end(result, [1], "no whole checkpoint in text.pt")
    assert "text.pt is damaged" in result.err
    for typed in ("no/such/place", "/no/such", "wdata", "./wdata", "none/step_000001.pt"):
        refused(run_sample(checkpoint=typed), "no checkpoint", Path(typed).name, code=1)
