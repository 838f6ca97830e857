"""What prepare.py promises. The real text and tokenizer are looked for in the folder $SMOLLM2_TEST_DATA."""
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402

GOLDEN = "1895d231cbeb99f9f1323205e5a2da9471553a0960d16d5a3a685d9dac4e4729"
PROSE = "The quick brown fox jumps over the lazy dog; it's 42 times, they said.\n" * 40


@pytest.fixture(scope="session")
def real():
    folder = os.environ.get("SMOLLM2_TEST_DATA")
    if not folder or not Path(folder, "input.txt").is_file():
        pytest.skip("SMOLLM2_TEST_DATA does not name a folder with input.txt and tokenizer/")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The stand-in: the same special tokens and pre-tokenizer as SmolLM2's, and a token for every byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    prepare.stand_in_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, tokenizer):
    """run(*argv): prepare.main() in an empty folder, with the stand-in tokenizer -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)

    def run(*argv, default_tokenizer=False):
        argv = [str(arg) for arg in argv]
        if not default_tokenizer and "--tokenizer" not in argv:
            argv += ["--tokenizer", str(tokenizer)]
        code = 0
        try:
            assert prepare.main(argv) is None
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())
    return run


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def ids_of(out_dir="data/shakespeare"):
    return [np.fromfile(Path(out_dir, f"{side}.bin"), "<u2") for side in ("train", "val")]


def meta_of(out_dir="data/shakespeare"):
    return json.loads(Path(out_dir, "meta.json").read_text())


def load(folder):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder)


def decode(ids, out_dir="data/shakespeare"):
    return load(Path(out_dir, "tokenizer")).backend_tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def encode_whole(folder, text):
    """The ids of the whole text at once, "<|endoftext|>" and the like being text."""
    from tokenizers import Tokenizer
    backend = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def is_whole(out_dir):
    """As train.py checks it: everything there, and as meta.json describes it."""
    meta, digest = meta_of(out_dir), lambda path: hashlib.sha256(Path(out_dir, path).read_bytes()).hexdigest()
    rest = json.dumps({key: value for key, value in meta.items() if key != "sha256"}, sort_keys=True)
    return (meta["sha256"] == hashlib.sha256(rest.encode()).hexdigest() and meta["train_sha256"] == digest("train.bin")
            and meta["val_sha256"] == digest("val.bin")
            and meta["tokenizer_sha256"] == digest("tokenizer/tokenizer.json"))


def snapshot(folder="."):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# ---- the real text and tokenizer ----

def check_golden():
    ids, meta = np.concatenate(ids_of()), meta_of()
    assert ids[:16].tolist() == [5345, 32062, 42, 198, 6121, 392, 7219, 750, 2030, 28, 4875, 549, 3287, 30, 198, 198]
    assert len(ids) == 341_094 and hashlib.sha256(ids.tobytes()).hexdigest() == GOLDEN
    assert [len(side) for side in ids_of()] == [306_984, 34_110] == [meta["train_tokens"], meta["val_tokens"]]
    assert meta["characters"] == meta["bytes"] == 1_115_394 and meta["tokens"] == 341_094 and meta["stand_in"] is None
    assert meta["vocab_size"] == 49_152 and meta["eos_token_id"] == 0
    assert meta["distinct_tokens"] == len(set(ids.tolist()))
    assert is_whole("data/shakespeare")


def test_real_text_gives_the_golden_ids(run, real):
    code, out, err = run("--input", real / "input.txt", "--tokenizer", real / "tokenizer")
    assert (code, err) == (0, "")
    check_golden()
    text = (real / "input.txt").read_text()
    assert decode(np.concatenate(ids_of())) == text
    held = decode(ids_of()[1])
    assert text.endswith(held) and meta_of()["val_bytes"] == meta_of()["val_characters"] == len(held)
    for shown in ("1,115,394", "341,094", "3.27", "of 49,152", "306,984 and 34,110", text[:300], "python train.py"):
        assert shown in out


def test_default_takes_text_from_its_address_and_tokenizer_from_the_cache(run, real, tmp_path, monkeypatch):
    from huggingface_hub import constants
    cache = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / prepare.TOKENIZER_REVISION
    shutil.copytree(real / "tokenizer", cache)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO((real / "input.txt").read_bytes()))
    code, _, err = run(default_tokenizer=True)
    assert code == 0 and "STAND-IN" not in err
    check_golden()


def test_the_saved_tokenizer_encodes_as_the_published_file(run, real):
    """AutoTokenizer on the published folder loses Digits (transformers 5.23); on what prepare.py saves it must not."""
    run("--input", real / "input.txt", "--tokenizer", real / "tokenizer")
    for text in ("a  1", "x\n\n1234 56", "In 2024:  3.14"):
        assert load("data/shakespeare/tokenizer").encode(text) == encode_whole(real / "tokenizer", text)


# ---- the same ids as encoding the whole text at once ----

ATOMS = [
    " ", " ", "\n", "\n\n", "\r\n", "\t", "  ", "\u00a0", "\u2028", "\x1c", "\x85", "'", "'s", "'ll", "'LL", "\u2019s",
    "a", "don't", "Word", "\u00e9", "e\u0301", "\u00df", "1", "42", "3.14", "\u00bd", "\u0663", "\u216b",
    "\u4e00\u4e8c", "\u3002", "\uff0c", "!", "...", "_", "-", "<|endoftext|>", "<|im_start|>", "<repo_name>",
    "\U0001f600",
    "\U0001f468\u200d\U0001f469", "\x00", "\x7f", "\ufeff", "\ufffd"]


@pytest.mark.parametrize("which", ["stand-in", "real"])
def test_pieces_have_the_ids_of_the_whole_text(which, request, monkeypatch):
    from tokenizers import Tokenizer
    folder = request.getfixturevalue("tokenizer" if which == "stand-in" else "real")
    folder = folder if which == "stand-in" else folder / "tokenizer"
    backend, choose = Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(0)
    backend.encode_special_tokens = True
    assert prepare.is_cuttable(backend)
    cuts = 0
    for trial in range(2500):
        text = "".join(choose.choices(ATOMS, k=choose.randint(0, 60)))
        size = choose.randint(1, 20)
        monkeypatch.setattr(prepare, "PIECE", choose.randint(1, 12))
        pieces = list(prepare.cut(text[i:i + size] for i in range(0, len(text), size)))
        assert "".join(pieces) == text
        cuts += len(pieces) - 1
        ids = [i for code in backend.encode_batch_fast(pieces, add_special_tokens=False) for i in code.ids]
        assert ids == backend.encode(text, add_special_tokens=False).ids, (trial, text, pieces)
    assert cuts > 10_000


def test_a_streamed_file_has_the_ids_of_the_whole_text(run, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1001)  # odd, so that it falls inside of characters
    monkeypatch.setattr(prepare, "PIECE", 64)
    text = "".join(random.Random(1).choices(ATOMS + ["some longer words, too "] * 9, k=20_000))
    assert run("--input", write("text.txt", text))[0] == 0
    ids = np.concatenate(ids_of())
    assert ids.tolist() == encode_whole(tokenizer, text) and decode(ids) == text
    assert 0 not in ids  # a "<|endoftext|>" in the text is text
    assert meta_of()["characters"] == len(text) and meta_of()["bytes"] == len(text.encode())


def test_a_text_without_a_place_to_cut_is_cut_all_the_same_and_says_so(run, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST", 5000)
    code, _, err = run("--input", write("dna.txt", "ACGT" * 3000))
    assert code == 0 and err.count("5,000 characters without space") == 1
    assert decode(np.concatenate(ids_of())) == "ACGT" * 3000


def test_a_tokenizer_of_another_kind_encodes_texts_uncut(run, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator([PROSE], trainer)
    Path("other").mkdir()
    backend.save("other/tokenizer.json")
    monkeypatch.setattr(prepare, "PIECE", 64)
    assert run("--input", write("text.txt", PROSE), "--tokenizer", "other")[0] == 0
    assert np.concatenate(ids_of()).tolist() == encode_whole("other", PROSE)


# ---- nothing is lost ----

@pytest.mark.parametrize("block", [1, 2, 3, 2**20])
def test_every_byte_is_kept_but_the_byte_order_mark(run, monkeypatch, block):
    monkeypatch.setattr(prepare, "BLOCK", block)
    text = "line\r\nend\rtab\t\x00\x01\x7f \u00e9\u20ac\U0001f600 \ufeff  \n\n" + "".join(map(chr, range(0x80, 0x250)))
    code, out, _ = run("--input", write("text.txt", b"\xef\xbb\xbf" + text.encode()))
    assert code == 0 and decode(np.concatenate(ids_of())) == text and "\x00" not in out


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.61, 0.99])
def test_the_split_never_falls_inside_a_character_and_val_bytes_are_exact(run, fraction):
    text = "\U0001f600\U0001f601\u4e00x" * 200
    assert run("--input", write("text.txt", text), "--val_fraction", fraction)[0] == 0
    train, val = map(decode, ids_of())
    assert train + val == text
    assert meta_of()["val_bytes"] == len(val.encode()) and meta_of()["val_characters"] == len(val)
    assert abs(meta_of()["val_tokens"] / meta_of()["tokens"] - fraction) < 0.01


def test_unrepresentable_characters_are_an_error_unless_allowed(run, tokenizer):
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    gone = [spec["model"]["vocab"].pop(c) for c in "\u0104\u0106"]  # how the byte-level alphabet spells 0x04 and 0x06
    assert gone
    write("poor/tokenizer.json", json.dumps(spec))
    run("--input", write("old.txt", PROSE))
    before = snapshot("data")
    write("text.txt", PROSE + "\x04" + PROSE * 9 + "\x06\x06\u0104")  # the last one is U+0104: bytes C4 84
    code, _, err = run("--input", "text.txt", "--tokenizer", "poor")
    assert code == 1 and err.count("\n") == 1 and snapshot("data") == before
    assert "3 characters of text.txt have no token: U+0004 at character 2,840; U+0006 at character 28,401" in err
    assert "--allow_unrepresentable" in err
    code, _, err = run("--input", "text.txt", "--tokenizer", "poor", "--allow_unrepresentable")
    assert code == 0 and "dropped: 3 characters" in err and meta_of()["unrepresentable"] == 3
    assert decode(np.concatenate(ids_of())) == PROSE * 10 + "\u0104"


def test_the_real_tokenizer_has_no_token_for_21_bytes(run, real):
    write("text.txt", PROSE + "".join(map(chr, (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D))) + "\U00040000")
    code, _, err = run("--input", "text.txt", "--tokenizer", real / "tokenizer")
    assert code == 1 and "7 characters" in err and "U+0004 at character 2,840" in err


# ---- many documents ----

def documents(n):
    return [f"Document {i}: " + " ".join(random.Random(i).choices(PROSE.split(), k=30)) for i in range(n)]


def jsonl(name, texts, column="text"):
    return write(name, "".join(json.dumps({column: text}) + "\n" for text in texts))


def test_documents_are_held_out_whole_and_none_moves_when_more_are_added(run):
    sides = {}
    for n in (100, 300):
        assert run("--input", jsonl("docs.jsonl", documents(n)))[0] == 0
        found = [decode(ids).split("<|endoftext|>") for ids in ids_of()]
        assert all(side.pop() == "" for side in found) and sorted(sum(found, [])) == sorted(documents(n))
        assert 0.03 * n < len(found[1]) < 0.2 * n and meta_of()["documents"] == n
        assert meta_of()["val_bytes"] == sum(len(text.encode()) for text in found[1])
        for side, texts in enumerate(found):
            for text in texts:
                assert sides.setdefault(text, side) == side


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_side_is_ever_empty(run, n, fraction):
    texts = [text * 200 for text in documents(n)]
    assert run("--input", jsonl("docs.jsonl", texts), "--val_fraction", fraction)[0] == 0
    train, val = map(decode, ids_of())
    assert train and val and is_whole("data/shakespeare")
    assert sorted((train + val).split("<|endoftext|>")) == ["", *sorted(texts)]
    assert meta_of()["val_bytes"] == len(val.replace("<|endoftext|>", "").encode())
    assert meta_of()["tokens"] == sum(map(len, ids_of())) and meta_of()["documents"] == n


def test_folders_globs_and_lines_are_documents_and_a_file_counts_once(run):
    texts = documents(40)
    for i, text in enumerate(texts[:10]):
        write(f"notes/deep/{i}.txt", text)
        write(f"notes/{i}.md", texts[10 + i])
        write(f"notes/{i}.py", "not text")
    jsonl("more/lines.jsonl", [*texts[20:30], "", texts[30]], "body")
    for i in range(31, 40):
        write(f"odd/{i}.text", texts[i])
    write("notes/empty.txt", "")
    inputs = "notes", "more/*.jsonl", "odd/*", "notes/0.md"
    assert run("--input", *inputs[:2], "--input", *inputs[2:], "--column", "body", "--out_dir", "data/mine")[0] == 0
    found = "".join(decode(ids, "data/mine") for ids in ids_of("data/mine"))
    assert sorted(found.split("<|endoftext|>")) == ["", *sorted(texts)]


def test_datasets_library_reads_parquet_and_jsonl_and_stops_at_max_tokens(run):
    pytest.importorskip("datasets", reason="`datasets` is not installed (tools/requirements.txt)")
    import pyarrow
    import pyarrow.parquet
    texts = documents(200)
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), "docs.parquet", row_group_size=50)
    assert run("--input", jsonl("docs.jsonl", texts, "body"), "--column", "body")[0] == 0
    expected = [ids.tolist() for ids in ids_of()]
    for path in ("docs.parquet", "docs.jsonl"):
        assert run("--dataset", path, "--column", "body")[0] == 0
        assert [ids.tolist() for ids in ids_of()] == expected
    assert run("--dataset", "docs.parquet", "--column", "body", "--max_tokens", 5000)[0] == 0
    meta = meta_of()
    assert 4800 < meta["tokens"] <= 5000 and sum(map(len, ids_of())) == meta["tokens"] and 0 < meta["documents"] < 200
    assert "".join(map(decode, ids_of())).count("<|endoftext|>") == meta["documents"]
    assert run("--dataset", "docs.parquet", "--column", "body", "--max_tokens", 100)[0] == 0  # room for only one
    train, val = map(decode, ids_of())
    assert meta_of()["documents"] == 1 and train + val == texts[0] + "<|endoftext|>"
    assert meta_of()["val_bytes"] == len(val) - len("<|endoftext|>")
    code, _, err = run("--dataset", "docs.parquet")
    assert code == 1 and "--column text: not in docs.parquet, record 1, which has body" in err
    code, _, err = run("--dataset", write("torn.parquet", Path("docs.parquet").read_bytes()[:-100]), "--column", "body")
    assert code == 1 and "--dataset torn.parquet" in err and is_whole("data/shakespeare")


def test_without_the_datasets_library_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = run("--dataset", "some/thing")
    assert code == 1 and err.count("\n") == 1 and "pip install -r tools/requirements.txt" in err


# ---- without a network ----

def test_without_a_network_the_stand_in_is_made_announced_and_the_same_each_time(tmp_path):
    from transformers import AutoTokenizer
    env = {key: value for key, value in os.environ.items() if key.lower() not in ("no_proxy", "hf_hub_offline")}
    env |= {"HF_HOME": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    began = time.monotonic()
    jobs = [subprocess.Popen([sys.executable, ROOT / "prepare.py", "--out_dir", tmp_path / name], env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in "ab"]
    for job in jobs:
        _, err = job.communicate(timeout=100)
        assert job.returncode == 0 and "STAND-IN DATA: the text and tokenizer could not be fetched" in err
    assert time.monotonic() - began < 60
    a, b = ([data for _, data in sorted(snapshot(tmp_path / name).items())] for name in "ab")
    assert a == b and is_whole(tmp_path / "a") and meta_of(tmp_path / "a")["stand_in"] == "text and tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "tokenizer")
    assert tokenizer.convert_ids_to_tokens(range(17)) == prepare.SPECIAL_TOKENS and tokenizer.eos_token_id == 0
    assert len(tokenizer) <= 8192 and max(map(max, ids_of(tmp_path / "a"))) < len(tokenizer)
    assert tokenizer.encode("12") == tokenizer.encode("1") + tokenizer.encode("2")


def test_an_error_page_never_becomes_data(run, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>404</html>"))
    code, _, err = run()
    assert code == 0 and err.count("not Tiny Shakespeare") == 3 and "STAND-IN DATA: the text could" in err
    assert meta_of()["stand_in"] == "text" and "html" not in decode(ids_of()[0])[:100]


def test_a_stand_in_never_replaces_real_data_and_real_data_replace_a_stand_in(run, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>404</html>"))
    assert run()[0] == 0 and meta_of()["stand_in"] == "text"
    assert run("--input", write("text.txt", PROSE))[0] == 0 and meta_of()["stand_in"] is None
    before = snapshot("data")
    code, _, err = run()
    assert code == 1 and "stays as it was" in err and snapshot("data") == before


# ---- what a user can get wrong ----

@pytest.mark.parametrize("argv, code, words", [
    (["--input", "none.txt"], 1, "--input none.txt: no such file"),
    (["--input", "*.none"], 1, "--input *.none: no such file"),
    (["--input", "hollow"], 1, "--input hollow: no .txt, .md, .jsonl in this folder"),
    (["--input", "empty.txt"], 1, "empty.txt: no text in it"),
    (["--input", "mark.txt"], 1, "mark.txt: no text in it"),
    (["--input", "short.txt"], 1, "short.txt: too short: 1 training and 1 held-out tokens"),
    (["--input", "good.txt", "--val_fraction", "1e-9"], 1, "too short"),
    (["--input", "latin.txt"], 1, "--input latin.txt: not UTF-8: byte 0xE9 at offset 2,843"),
    (["--input", "torn.txt"], 1, "--input torn.txt: not UTF-8: byte 0xE2 at offset 1"),
    (["--input", "/dev/null"], 1, "--input /dev/null: not a regular file"),
    (["--input", "bad.jsonl"], 1, "--input bad.jsonl, line 2: not JSON"),
    (["--input", "deep.jsonl"], 1, "--input deep.jsonl, line 1: not JSON"),
    (["--input", "list.jsonl"], 1, "--column text: not in list.jsonl, line 1"),
    (["--input", "good.jsonl", "--column", "body"], 1, "--column body: not in good.jsonl, line 1, which has text, n"),
    (["--input", "good.jsonl", "--column", "n"], 1, "--column n: good.jsonl, line 1 has int there"),
    (["--input", "half.jsonl"], 1, "half.jsonl, line 1: half a surrogate pair"),
    (["--input", "good.txt", "--tokenizer", "hollow"], 1, "--tokenizer hollow: has no tokenizer.json"),
    (["--input", "good.txt", "--tokenizer", "good.txt"], 1, "--tokenizer good.txt: has no tokenizer.json"),
    (["--input", "good.txt", "--tokenizer", "broken"], 1, "--tokenizer broken: its files do not load"),
    (["--input", "good.txt", "--tokenizer", "a b"], 1, "--tokenizer a b: no such folder"),
    (["--input", "good.txt", "--tokenizer", "huge"], 1, "--tokenizer huge: 65,537 tokens do not fit uint16"),
    (["--input", "good.jsonl", "--tokenizer", "endless"], 1, "--tokenizer endless: has no end-of-text token"),
    (["--input", "good.txt", "--out_dir", "full"], 1, "--out_dir {}/full: holds mine.txt, not made by prepare.py"),
    (["--input", "good.txt", "--out_dir", "nano"], 1, "--out_dir {}/nano: holds data without meta.json"),
    (["--input", "good.txt", "--out_dir", "good.txt"], 1, "good.txt: Not a directory"),
    (["--input", "good.txt", "--out_dir", "good.txt/x"], 1, "Not a directory"),
    (["--input", "good.txt", "--out_dir", "x" * 300], 1, "File name too long"),
    (["--input", "good.txt", "--out_dir", ""], 2, "'' is not a name"),
    (["--input", "good.txt", "--out_dir", "a\0b"], 2, "is not a name"),
    (["--input"], 2, "argument --input: expected at least one argument"),
    (["--inptu", "good.txt"], 2, "unrecognized arguments: --inptu good.txt"),
    (["--inp", "good.txt"], 2, "unrecognized arguments: --inp good.txt"),
    (["--input", "good.txt", "--dataset", "x"], 2, "argument --dataset: not allowed with argument --input"),
    (["--input", "good.txt", "--split", "x"], 2, "argument --split: goes with --dataset only"),
    (["--input", "good.txt", "--max_tokens", "5"], 2, "argument --max_tokens: goes with --dataset only"),
    (["--dataset", "x", "--max_tokens", "0"], 2, "argument --max_tokens: 0 is not above 0"),
    (["--dataset", "x", "--max_tokens", "1e6"], 2, "argument --max_tokens: invalid int value: '1e6'"),
    *[(["--input", "good.txt", f"--val_fraction={value}"], 2, f"--val_fraction: {value} is not between 0 and 1")
      for value in ("nan", "0.0", "1.0", "-0.1", "inf", "-inf", "7.0")],
    (["--input", "good.txt", "--val_fraction", "some"], 2, "argument --val_fraction: invalid float value: 'some'"),
])
def test_every_mistake_gets_its_line_and_leaves_everything_as_it_was(run, tmp_path, tokenizer, argv, code, words):
    Path("hollow").mkdir()
    write("good.txt", PROSE)
    write("good.jsonl", '{"text": "one two three", "n": 1}\n' * 9)
    write("empty.txt", "")
    write("mark.txt", b"\xef\xbb\xbf")
    write("short.txt", "!?")
    write("latin.txt", PROSE.encode() + b"caf\xe9 ol\xe9")
    write("torn.txt", b"x\xe2\x82")
    write("bad.jsonl", '{"text": "x"}\n{"text": \n')
    write("deep.jsonl", "[" * 100_000)
    write("list.jsonl", "[1]\n")
    write("half.jsonl", '{"text": "\\ud800"}\n')
    write("full/mine.txt", "mine")
    write("nano/train.bin", "ids")
    write("broken/tokenizer.json", "{}")
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    if "endless" in argv:
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"]]
        spec["model"]["vocab"]["none"] = spec["model"]["vocab"].pop("<|endoftext|>")
        write("endless/tokenizer.json", json.dumps(spec))
    if "huge" in argv:
        spec["model"]["vocab"] |= {f"token {i}": i for i in range(len(spec["model"]["vocab"]), 2**16 + 1)}
        write("huge/tokenizer.json", json.dumps(spec))
    before = snapshot()
    got, out, err = run(*argv)
    assert (got, out) == (code, "") and err.startswith("prepare.py: error: ") and err.count("\n") == 1
    assert words.format(tmp_path) in err
    assert snapshot() == before and not list(tmp_path.glob("**/.*"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything")
def test_what_may_not_be_read_or_written_is_named(run):
    write("secret.txt", PROSE)
    os.chmod("secret.txt", 0)
    assert run("--input", "secret.txt")[0] == 1
    Path("fixed").mkdir(mode=0o500)
    code, _, err = run("--input", write("good.txt", PROSE), "--out_dir", "fixed/data")
    assert code == 1 and "Permission denied" in err and err.count("\n") == 1


def test_any_command_line_ends_in_success_or_in_one_error(run, monkeypatch):
    monkeypatch.setattr(prepare, "hub_folder", lambda name, revision: 1 / 0)
    monkeypatch.setattr(prepare, "read_dataset", lambda args: prepare.fail("no network here"))
    choose = random.Random(2)
    write("good.txt", PROSE)
    words = [
        "--input", "good.txt", "--out_dir", "out", "--val_fraction", "0.2", "--tokenizer", "--dataset", "--split",
        "train", "--max_tokens", "9", "--column", "--allow_unrepresentable", "", "\0", "\udcff", "-1", "nan", "1e999",
        "--", "-", "=", "--help", "9" * 5000, "*", "[", "**", "..", "~", "a" * 5000, "--val_fraction=0",
        "\n", "x:y:z", "-\u0663"]
    for _ in range(300):
        argv = choose.choices(words, k=choose.randint(1, 5)) + choose.choice([[], ["--input", "good.txt"]])
        monkeypatch.chdir(Path("good.txt").absolute().parent)
        code, out, err = run(*argv)
        assert code in (0, 1, 2, None) and "Traceback" not in err and err.count("error:") == (code in (1, 2)), argv
        assert Path("good.txt").read_text() == PROSE


def test_a_tokenizer_from_a_stranger_runs_no_code(run, tokenizer):
    shutil.copytree(tokenizer, "stranger")
    config = json.loads(Path("stranger/tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    write("stranger/tokenizer_config.json", json.dumps(config))
    write("stranger/evil.py", "open('ran', 'w'); Evil = None")
    assert run("--input", write("good.txt", PROSE), "--tokenizer", "stranger")[0] == 0
    assert load("data/shakespeare/tokenizer").encode("fox") and not Path("ran").exists()


# ---- real commands, kills and full disks ----

def command(*argv, **options):
    argv = [sys.executable, str(ROOT / "prepare.py"), *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, **options)


def test_help_is_instant_and_grouped():
    began = time.monotonic()
    out = command("--help").stdout
    assert time.monotonic() - began < 5 and "what is written" in out and "(default: 0.1)" in out
    code = "import sys, prepare; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_commands_exit_with_their_codes(tmp_path):
    for argv, code in (["--input", "none.txt"], 1), (["--val_fraction", "2"], 2):
        done = command(*argv, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)


@pytest.mark.skipif(os.name != "posix", reason="POSIX limits and locks")
def test_a_full_disk_costs_one_line_and_no_data(run, tmp_path, tokenizer):
    import resource
    assert run("--input", write("good.txt", PROSE))[0] == 0
    before = snapshot("data")
    for size in (2000, 600_000):  # the tokenizer's file does not fit; train.bin does not
        done = command("--input", write("long.txt", PROSE * 1000), "--tokenizer", tokenizer, cwd=tmp_path,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("prepare.py: error: ")
        assert "File too large" in done.stderr and "Traceback" not in done.stderr and snapshot("data") == before
        assert not list(tmp_path.glob("data/.*"))


@pytest.mark.skipif(os.name != "posix", reason="POSIX limits and locks")
def test_a_second_one_on_the_same_folder_is_refused(run):
    import fcntl
    Path("data/.shakespeare.new").mkdir(parents=True)
    handle = os.open("data/.shakespeare.new", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    code, _, err = run("--input", write("good.txt", PROSE))
    assert code == 1 and "another prepare.py is writing there" in err
    os.close(handle)
    assert run("--input", "good.txt")[0] == 0 and os.listdir("data") == ["shakespeare"]


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupted_it_leaves_what_was_there(run, tmp_path, tokenizer, name, code):
    assert run("--input", write("good.txt", PROSE))[0] == 0
    before = snapshot("data")
    argv = ["--input", write("long.txt", PROSE * 10_000), "--tokenizer", tokenizer]
    job = subprocess.Popen([sys.executable, ROOT / "prepare.py", *argv], stderr=subprocess.PIPE, text=True)
    while not Path("data/.shakespeare.new/train.bin").exists():
        assert job.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    job.send_signal(getattr(signal, name))
    _, err = job.communicate(timeout=60)
    assert job.returncode == code and "Traceback" not in err and "error: stopped by" in err
    assert snapshot("data") == before and os.listdir("data") == ["shakespeare"]


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import prepare
calls, real = [0], {function}
def killed(*args, **kwargs):
    calls[0] += 1
    if calls[0] == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{function} = killed
prepare.main({argv!r})
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_any_instant_it_leaves_the_old_data_or_the_new(run, tmp_path, tokenizer):
    instants = [("prepare.write_ids", 1), ("prepare.fill_empty_side", 1), ("prepare.fsync", 1),
                ("prepare.os.rename", 1), ("prepare.os.rename", 2), ("prepare.recover", 2)]
    old = write("old.txt", PROSE)
    new = write("new.txt", PROSE + "new")
    for name in map(str, range(len(instants))):
        assert run("--input", old, "--out_dir", name)[0] == 0
    argvs = [["--input", new, "--tokenizer", str(tokenizer), "--out_dir", str(name)] for name in range(len(instants))]
    programs = [KILLED.format(root=str(ROOT), function=function, call=call, argv=argv)
                for (function, call), argv in zip(instants, argvs)]
    jobs = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    seen = set()
    for name, (job, instant, argv) in enumerate(zip(jobs, instants, argvs)):
        assert job.wait(timeout=100) == -signal.SIGKILL, instant
        there = str(name) if Path(str(name)).exists() else f".{name}.old"  # between the two renames
        assert is_whole(there), instant
        seen.add((there[0] == ".", meta_of(there)["source"]))
        assert run("--input", "none.txt", "--out_dir", name)[0] == 1  # the next start makes it good, even a failing one
        assert is_whole(str(name)) and not list(tmp_path.glob(f".{name}.*")), instant
        assert run(*argv)[0] == 0 and meta_of(str(name))["source"] == new and is_whole(str(name))
    assert seen == {(False, old), (True, old), (False, new)}


def test_nothing_of_this_machine_is_written_into_the_source():
    assert not re.search(r"/(home|root|work|tmp|Users)/", (ROOT / "prepare.py").read_text())
