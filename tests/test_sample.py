"""sample.py: the prompt and what follows it on standard output, whole characters, the same text for the same seed."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import model as M
import sample
import train
from sample import Streamer
from tests.harness import TINY, assert_refused, flip, read, run_main, run_script
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


def test_the_same_seed_gives_the_same_text_and_another_seed_another(trained):
    texts = [text_of(run_sample("--prompt=To be", f"--seed={seed}", "--max_new_tokens=40", checkpoint=trained))
             for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_text_does_not_depend_on_the_seed(trained):
    texts = {text_of(run_sample("--temperature=0", f"--seed={seed}", "--max_new_tokens=20", checkpoint=trained))
             for seed in (1, 2, 3)}
    assert len(texts) == 1


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


def test_the_prompt_comes_from_standard_input(trained):
    prompt = "To be, or not\nto bé: "
    piped = run_sample("--prompt", "-", "--max_new_tokens=10", checkpoint=trained, stdin=prompt.encode())
    assert text_of(piped) == text_of(run_sample(f"--prompt={prompt}", "--max_new_tokens=10", checkpoint=trained))
    assert piped.out.startswith(prompt)


def test_an_empty_prompt_starts_a_text(trained):
    assert len(text_of(run_sample("--prompt=", "--max_new_tokens=10", checkpoint=trained))) > 1


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
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    if text.startswith("🙂"):
        assert any("\ufffd" in real_tokenizer.decode([i]) for i in ids)  # they are split, indeed
    assert sum(bool(piece) for piece in pieces) > 1  # and it does stream


def test_a_character_that_never_becomes_whole_does_not_hold_up_the_end(real_tokenizer):
    ids = real_tokenizer.encode("a🙂")
    streamer = Streamer(real_tokenizer, real_tokenizer.encode("x"), [])
    pieces = [streamer.push(i) for i in ids[:-1]]
    assert "".join(pieces) == "a" and "a" not in streamer.finish()


def test_a_stop_text_over_several_tokens_is_never_shown_not_even_its_beginning(real_tokenizer):
    pieces, _ = stream(real_tokenizer, "ROMEO:", "\nGood morrow.\n\nJULIET: Good night", ["\n\nJULIET:"])
    assert "".join(pieces) == "\nGood morrow."


def test_what_only_began_like_a_stop_text_is_shown(real_tokenizer):
    text = "\nGood morrow.\n\nJULIA: Good night.\n\nJUL"
    pieces, _ = stream(real_tokenizer, "ROMEO:", text, ["\n\nJULIET:"])
    assert "".join(pieces) == text


def test_a_stop_text_in_the_prompt_does_not_count_and_the_first_of_several_does(real_tokenizer):
    pieces, _ = stream(real_tokenizer, "STOP here, ", "one two STOP three END", ["END", "STOP"])
    assert "".join(pieces) == "one two "


# ------------------------------------------------------------------------------------------------- which checkpoint


def test_the_newest_checkpoint_of_out_is_the_default(trained):
    shutil.copytree(trained, "out")
    assert "step_000008.pt: step 8" in run_sample("--max_new_tokens=1").err
    assert "step_000004.pt: step 4" in run_sample("--max_new_tokens=1", checkpoint="out/step_000004.pt").err


def test_best_is_the_checkpoint_with_the_lowest_held_out_loss(trained):
    shutil.copytree(trained, "out")
    state = {**read("out/step_000008.pt"), "best": {"step": 4, "val_loss": 5.0}}
    train.write_checkpoint(Path("out/step_000008.pt"), state)
    assert "step_000004.pt: step 4" in run_sample("--max_new_tokens=1", checkpoint="best").err
    Path("out").rename("other")
    assert "step_000004.pt: step 4" in run_sample("--max_new_tokens=1", checkpoint="other/best").err


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(trained):
    flip(Path(shutil.copytree(trained, "out"), "step_000008.pt"), 3_000_000)
    result = run_sample("--max_new_tokens=1")
    assert result.code == 0 and "step_000008.pt is damaged" in result.err and "step_000004.pt: step 4" in result.err


# ----------------------------------------------------------------------------------------------------------- refusals


def refused(result, *fragments, code):
    assert_refused(result, "sample.py", *fragments, code=code)


@pytest.mark.parametrize("argv, fragment", [
    (["--temperature=-1"], "--temperature"), (["--temperature=nan"], "--temperature"),
    (["--temperature=hot"], "--temperature"),
    (["--top_k=-1"], "--top_k"), (["--top_k=1.5"], "--top_k"), (["--top_p=1.1"], "--top_p"),
    (["--repetition_penalty=0"], "--repetition_penalty"), (["--max_new_tokens=0"], "--max_new_tokens"),
    (["--num_samples=0"], "--num_samples"), (["--seed=-1"], "--seed"), (["--stop="], "--stop"),
    (["--dtype=int8"], "int8"),
    (["--device=tpu9"], "tpu9"), (["--temprature=1"], "--temprature"), (["--prompt"], "--prompt"),
    (["ROMEO:"], "ROMEO:"), (["--prompt=\udcff"], "not UTF-8"),
], ids=lambda value: value[0].encode("utf-8", "replace").decode() if isinstance(value, list) else "")
def test_bad_values_are_one_line_and_exit_2(argv, fragment):
    refused(run_sample(*argv), fragment, code=2)


def test_a_prompt_that_is_not_utf8_is_refused():
    refused(run_sample("--prompt=-", stdin=b"caf\xe9"), "UTF-8", code=2)


@pytest.mark.parametrize("argv", [[], ["--checkpoint=best"], ["--checkpoint=out/best"]])
def test_without_a_checkpoint_it_says_which_command_makes_one(argv):
    refused(run_sample(*argv), "no checkpoint", "python train.py config/smollm2.py", code=1)


def test_without_a_checkpoint_a_real_process_says_so_without_a_traceback():
    result = run_script("sample.py", "--prompt", PROMPT)
    refused(result, "python train.py config/smollm2.py", code=1)
    assert result.out == ""


def test_more_tokens_than_the_model_has_positions_are_a_clear_error(trained):
    result = run_sample("--prompt=And so", "--max_new_tokens=256", checkpoint=trained)
    assert result.code == 1 and "do not fit into the model's 256 positions" in result.err
    assert "Traceback" not in result.err
    assert result.out.strip() in ("", "And so")


@pytest.mark.parametrize("change, named", [
    ({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type")])
def test_a_folder_of_another_architecture_is_refused_by_name(hf_folder, change, named, tmp_path):
    folder = Path(shutil.copytree(hf_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    refused(run_sample(checkpoint=folder), named, code=1)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    Path("text.pt").write_text("not a checkpoint")
    refused(run_sample(checkpoint=tmp_path / "empty"), "no checkpoint", "empty", code=1)
    result = run_sample(checkpoint="text.pt")
    assert result.code == 1 and "text.pt is damaged" in result.err and "Traceback" not in result.err
    refused(run_sample(checkpoint="./no/such/place"), "no/such/place", code=1)
