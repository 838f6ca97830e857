"""What prepare.py promises."""
import hashlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import prepare
from conftest import ROOT, run_main

PROSE = "The quick brown fox jumps over the lazy dog; it's 42 times, they said.\n" * 40


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A tokenizer with SmolLM2's special tokens and pre-tokenizer, and a token for every byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    prepare.stand_in_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(stand_in, monkeypatch):
    """run(*argv): prepare.py in this process, with the stand-in tokenizer unless argv names one."""
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)

    def run(*argv):
        if "--tokenizer" not in argv:
            argv = (*argv, "--tokenizer", stand_in)
        return run_main(prepare.main, *argv)
    return run


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def texts_of(folder="data/shakespeare"):
    """What the two sides say, decoded."""
    data = prepare.open_data(folder)
    backend = prepare.load_tokenizer(Path(folder, "tokenizer")).backend_tokenizer
    return [backend.decode(ids.tolist(), skip_special_tokens=False) for ids in (data.train, data.val)]


def encode_whole(folder, text):
    """The ids of the text in one piece, "<|endoftext|>" and the like being text."""
    from tokenizers import Tokenizer
    backend = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def snapshot(folder="."):
    """Every file and folder, with what the files hold."""
    return {str(path): path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


# ---- the real text and tokenizer ----

GOLDEN = "1895d231cbeb99f9f1323205e5a2da9471553a0960d16d5a3a685d9dac4e4729"  # of the whole text's ids


def test_the_whole_real_text_has_the_golden_ids(real_data):
    text, tokenizer = prepare.read_text(str(real_data / "input.txt")), prepare.load_tokenizer(real_data / "tokenizer")
    (ids,), (lost,) = prepare.encode([text], tokenizer.backend_tokenizer)
    assert ids[:16].tolist() == [5345, 32062, 42, 198, 6121, 392, 7219, 750, 2030, 28, 4875, 549, 3287, 30, 198, 198]
    assert len(ids) == 341_094 and hashlib.sha256(ids.tobytes()).hexdigest() == GOLDEN and not lost


def check_golden(text):
    data = prepare.open_data("data/shakespeare")
    assert (len(data.train), len(data.val)) == (305_111, 35_983)
    assert texts_of() == [text[:1_003_854], text[1_003_854:]]  # nanoGPT's int(0.9 * len(text))
    assert len(np.unique(data.train)) == 11_066 and np.isin(data.val, data.train, invert=True).sum() == 894
    expected = {"vocab_size": 49_152, "eos_token_id": 0, "tokens": 341_094, "characters": 1_115_394, "bytes": 1_115_394,
                "val_bytes": 111_540, "val_characters": 111_540, "stand_in": None, "val_fraction": 0.1}
    assert data.meta | expected == data.meta


def test_real_text_is_cut_where_nanogpt_cuts_it(run, real_data):
    code, out, err = run("--input", real_data / "input.txt", "--tokenizer", real_data / "tokenizer")
    text = (real_data / "input.txt").read_text()
    assert code == 0 and "prepare.py" not in err
    check_golden(text)
    assert str(real_data) not in Path("data/shakespeare/meta.json").read_text()
    for shown in ("1,115,394", "341,094", "3.27", "of 49,152", "305,111 and 35,983", text[:300], "next: "):
        assert shown in out
    args = prepare.parse_args(["--input", str(real_data / "input.txt"), "--tokenizer", str(real_data / "tokenizer")])
    assert "next:" not in run_main(lambda argv: prepare.prepare(args)).out  # which is for train.py


def test_default_takes_text_from_its_address_and_tokenizer_from_the_cache(real_data, monkeypatch):
    from huggingface_hub import constants
    content = (real_data / "input.txt").read_bytes()
    cache = Path("hub", "models--HuggingFaceTB--SmolLM2-135M", "snapshots", prepare.TOKENIZER_REVISION)
    shutil.copytree(real_data / "tokenizer", cache)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("hub").absolute()))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content))
    code, _, err = run_main(prepare.main)
    assert code == 0 and "STAND-IN" not in err
    check_golden(content.decode())


def test_the_saved_tokenizer_encodes_as_the_published_file(run, real_data):
    """By AutoTokenizer, too, which on the published folder loses Digits (transformers 5.23)."""
    from transformers import AutoTokenizer
    run("--input", write("text.txt", PROSE), "--tokenizer", real_data / "tokenizer")
    saved = AutoTokenizer.from_pretrained("data/shakespeare/tokenizer")
    for text in ("a  1", "x\n\n1234 56", "In 2024:  3.14"):
        assert saved.encode(text) == encode_whole(real_data / "tokenizer", text)


# ---- the ids are those of each side in one piece, and nothing is lost ----

ATOMS = [
    " ", " ", "\n", "\n\n", "\r\n", "\t", "  ", "\u00a0", "\u2028", "\x1c", "\x85", "'", "'s", "'ll", "'LL", "\u2019s",
    "a", "don't", "Word", "\u00e9", "e\u0301", "\u00df", "1", "42", "3.14", "\u00bd", "\u0663", "\u216b",
    "\u4e00\u4e8c", "\u3002", "\uff0c", "!", "...", "_", "-", "<|endoftext|>", "<|im_start|>", "<repo_name>",
    "\U0001f600", "\U0001f468\u200d\U0001f469", "\x00", "\x7f", "\ufeff", "\ufffd"]


@pytest.mark.parametrize("which", ["stand_in", "real_data"])
def test_pieces_have_the_ids_of_the_whole_text(which, request, monkeypatch):
    from tokenizers import Tokenizer
    folder = request.getfixturevalue(which) / ("tokenizer" if which == "real_data" else ".")
    backend, choose, cuts = Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(0), 0
    backend.encode_special_tokens = True
    assert prepare.is_cuttable(backend)
    for trial in range(2500):
        text = "".join(choose.choices(ATOMS, k=choose.randint(0, 60)))
        monkeypatch.setattr(prepare, "PIECE", choose.randint(1, 12))
        places, pieces = zip(*prepare.cut(text))
        assert "".join(pieces) == text and all(text.startswith(*pair) for pair in zip(pieces, places))
        cuts += len(pieces) - 1
        ids = [i for code in backend.encode_batch_fast(pieces, add_special_tokens=False) for i in code.ids]
        assert ids == backend.encode(text, add_special_tokens=False).ids, (trial, text, pieces)
    assert cuts > 10_000


def test_a_file_cut_into_many_batches_has_the_ids_of_its_sides(run, stand_in, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 64)
    monkeypatch.setattr(prepare, "BATCH", 7)
    text = "".join(random.Random(1).choices(ATOMS + ["some longer words, too "] * 9, k=20_000))
    assert run("--input", write("text.txt", "\ufeff" + text), "--val_fraction", 0.3)[0] == 0
    data, end = prepare.open_data("data/shakespeare"), int(0.7 * len(text))
    assert data.train.tolist() == encode_whole(stand_in, text[:end])
    assert data.val.tolist() == encode_whole(stand_in, text[end:])
    assert texts_of() == [text[:end], text[end:]] and 0 not in data.train  # "<|endoftext|>" is text
    assert data.meta["bytes"] == len(text.encode()) and data.meta["val_bytes"] == len(text[end:].encode())


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
    assert prepare.open_data("data/shakespeare").train.tolist() == encode_whole("other", PROSE[:int(0.9 * len(PROSE))])


def test_every_byte_is_kept_but_the_byte_order_mark(run):
    text = "\ufeffline\r\nend\rtab\t\x00\x01\x7f \u00e9\u20ac\U0001f600 \ufeff  \n\n"
    text += "".join(map(chr, range(0x80, 0x250)))
    code, out, _ = run("--input", write("text.txt", b"\xef\xbb\xbf" + text.encode()))
    assert code == 0 and "".join(texts_of()) == text and "\x00" not in out and "\x7f" not in out


def test_characters_without_a_token_are_an_error_unless_allowed(run, stand_in):
    spec = json.loads((stand_in / "tokenizer.json").read_text())
    for byte in "\u0104\u0106":  # how the byte-level alphabet spells 0x04 and 0x06
        del spec["model"]["vocab"][byte]
    write("poor/tokenizer.json", json.dumps(spec))
    write("text.txt", PROSE + "\x04" + PROSE * 9 + "\x06\x06\u0104")  # the last one is C4 84
    code, _, err = run("--input", "text.txt", "--tokenizer", "poor")
    assert code == 1 and err.count("\n") == 1 and not Path("data/shakespeare").exists()
    assert "text.txt, 3 in all: U+0004 at character 2,840; U+0006 at character 28,401" in err
    code, _, err = run("--input", "text.txt", "--tokenizer", "poor", "--allow_unrepresentable")
    assert code == 0 and "dropped:" in err and "".join(texts_of()) == PROSE * 10 + "\u0104"
    assert prepare.open_data("data/shakespeare").meta["unrepresentable"] == 3


def test_the_real_tokenizer_has_no_token_for_21_bytes(run, real_data):
    write("text.txt", PROSE + "".join(map(chr, (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D))) + "\U00040000")
    code, _, err = run("--input", "text.txt", "--tokenizer", real_data / "tokenizer")
    assert code == 1 and "7 in all" in err and "U+0004 at character 2,840" in err


# ---- without a network ----

def test_without_a_network_the_stand_in_is_made_announced_and_the_same_each_time(tmp_path):
    env = {key: value for key, value in os.environ.items() if key.lower() not in ("no_proxy", "hf_hub_offline")}
    env |= {"HF_HOME": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    jobs = [subprocess.Popen([sys.executable, ROOT / "prepare.py", "--out_dir", name], env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in "ab"]
    for job in jobs:
        _, err = job.communicate(timeout=100)
        assert job.returncode == 0 and err.count("STAND-IN") == 1 and "the text and tokenizer could not be" in err
    assert list(snapshot("a").values()) == list(snapshot("b").values())
    data, tokenizer = prepare.open_data("a"), prepare.load_tokenizer("a/tokenizer")
    assert data.meta["stand_in"] == "text and tokenizer" and data.meta["vocab_size"] == len(tokenizer) <= 8192
    assert tokenizer.convert_ids_to_tokens(range(17)) == prepare.SPECIAL_TOKENS and tokenizer.eos_token_id == 0
    assert tokenizer.encode("12") == tokenizer.encode("1") + tokenizer.encode("2")


def test_an_error_page_is_no_data_and_a_stand_in_never_replaces_real_data(run, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>404</html>"))
    code, _, err = run()
    assert code == 0 and err.count("not Tiny Shakespeare") == 3 and "STAND-IN DATA: the text could" in err
    assert prepare.open_data("data/shakespeare").meta["stand_in"] == "text" and "html" not in texts_of()[0][:100]
    assert run("--input", write("text.txt", PROSE))[0] == 0 and "".join(texts_of()) == PROSE
    before = snapshot("data")
    code, _, err = run()
    assert code == 1 and "its real data stay" in err and snapshot("data") == before


# ---- opening what was prepared ----

@pytest.mark.parametrize("damage, words", [
    (lambda: write("d/train.bin", Path("d/train.bin").read_bytes()[:-2]), "train_tokens is"),
    (lambda: write("d/val.bin", Path("d/val.bin").read_bytes()[:-1] + b"\1"), "val_sha256 is"),
    (lambda: write("d/val.bin", ""), "empty"),
    (lambda: os.unlink("d/train.bin"), "No such file"),
    (lambda: write("d/tokenizer/tokenizer.json", "{}"), "tokenizer_sha256 is"),
    (lambda: write("d/meta.json", Path("d/meta.json").read_text().replace("0.1", "0.2")), "meta.json was changed"),
    (lambda: write("d/meta.json", "[" * 100_000), "recursion"),
    (lambda: write("d/meta.json", "[]"), "'list'"),
    (lambda: write("d/meta.json", b"\xff"), "utf-8"),
    (lambda: sign(vocab_size=5), "not below vocab_size 5"),
    (lambda: sign(val_bytes="9"), "val_bytes in meta.json is no whole number"),
])
def test_damage_is_told_in_one_line(run, damage, words):
    assert run("--input", write("text.txt", PROSE), "--out_dir", "d")[0] == 0
    assert [len(part) for part in prepare.open_data("d").fingerprint().values()] == [16, 16, 16]
    damage()
    with pytest.raises(ValueError, match="d is damaged: ") as error:
        prepare.open_data("d")
    assert words in str(error.value) and "\n" not in str(error.value)


def sign(**changes):
    """Changes meta.json as someone would who knows how it is signed."""
    meta = json.loads(Path("d/meta.json").read_text()) | changes
    write("d/meta.json", json.dumps(meta | {"sha256": prepare.meta_digest(meta)}))


def test_what_is_not_there_is_not_asked_of_a_hub(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare.open_data("nowhere")
    with pytest.raises(ValueError, match="tokenizer.json"):
        prepare.load_tokenizer("HuggingFaceTB/SmolLM2-135M")


def test_a_tokenizer_from_a_stranger_runs_no_code(run, stand_in):
    shutil.copytree(stand_in, "stranger")
    config = json.loads(Path("stranger/tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    write("stranger/tokenizer_config.json", json.dumps(config))
    write("stranger/evil.py", "open('ran', 'w'); Evil = None")
    assert run("--input", write("good.txt", PROSE), "--tokenizer", "stranger")[0] == 0
    assert prepare.load_tokenizer("data/shakespeare/tokenizer").encode("fox") and not list(Path().rglob("ran"))


# ---- what a user can get wrong ----

NOT_TEXT = {"utf16.txt": PROSE.encode("utf-16"), "utf32.txt": PROSE.encode("utf-32"), "g.txt": b"\x1f\x8b\x08...",
            "p.txt": b"PAR1...", "arrow.txt": b"ARROW1...", "d.txt": b"PK\3\4...", "pdf.txt": b"%PDF-1.7...",
            "latin 1.txt": PROSE.encode() + b"caf\xe9 ol\xe9", "torn.txt": b"x\xe2\x82"}


@pytest.mark.parametrize("argv, code, words", [
    (["--input", "none.txt"], 1, "--input none.txt: no such file"),
    (["--input", "/dev/null"], 1, "--input /dev/null: no such file, or not a regular one"),
    (["--input", "empty.txt"], 1, "empty.txt is too short: 0 tokens to train and 0 held out"),
    (["--input", "short.txt"], 1, "short.txt is too short: 1 tokens to train and 1 held out"),
    (["--input", "good.txt", "--val_fraction", "1e-9"], 1, "too short"),
    (["--input", "utf16.txt"], 1, "UTF-16: iconv -f UTF-16 -t UTF-8 utf16.txt > new.txt\n"),
    (["--input", "utf32.txt"], 1, "UTF-32: iconv -f UTF-32 -t UTF-8 utf32.txt > new.txt\n"),
    (["--input", "g.txt"], 1, "gzip: gunzip < g.txt > new.txt\n"),
    (["--input", "p.txt"], 1, "Parquet"), (["--input", "arrow.txt"], 1, "Arrow"),
    (["--input", "d.txt"], 1, "a zip archive"), (["--input", "pdf.txt"], 1, "PDF: pdftotext pdf.txt new.txt\n"),
    (["--input", "latin 1.txt"], 1, "0xE9 at offset 2,843; if it is Latin-1: iconv -f LATIN1 -t UTF-8 'latin 1.txt' >"),
    (["--input", "torn.txt"], 1, "--input torn.txt: not UTF-8: byte 0xE2 at offset 1"),
    (["--input", "good.txt", "--tokenizer", "hollow"], 1, "hollow has no tokenizer.json"),
    (["--input", "good.txt", "--tokenizer", "broken"], 1, "the tokenizer in broken does not load"),
    (["--input", "good.txt", "--tokenizer", "a b"], 1, "--tokenizer a b: no such folder"),
    (["--input", "good.txt", "--tokenizer", "huge"], 1, "65,537 tokens do not fit uint16"),
    (["--input", "good.txt", "--out_dir", "full"], 1, "full: holds mine.txt, not made by prepare.py"),
    (["--input", "good.txt", "--out_dir", "nano"], 1, "nano: holds train.bin, not made by prepare.py"),
    (["--input", "good.txt", "--out_dir", "."], 1, "this is where you are"),
    (["--input", "good.txt", "--out_dir", "/"], 1, "this is where you are"),
    (["--input", "good.txt", "--out_dir", "good.txt"], 1, "Not a directory"),
    (["--input", "good.txt", "--out_dir", "x" * 300], 1, "File name too long"),
    (["--input", "good.txt", "--out_dir", ""], 2, "argument --out_dir: '' is not a name"),
    (["--input", "good.txt", "--out_dir", "a\0b"], 2, "is not a name"),
    (["--input"], 2, "argument --input: expected at least one argument"),
    (["--inp", "good.txt"], 2, "unrecognized arguments: --inp good.txt"),
    *[(["--input", "good.txt", f"--val_fraction={value}"], 2, f"--val_fraction: {value} is not between 0 and 1")
      for value in ("nan", "0.0", "1.0", "-0.1", "inf", "7.0")],
    (["--input", "good.txt", "--val_fraction", "some"], 2, "argument --val_fraction: invalid"),
])
def test_every_mistake_gets_its_line_and_leaves_everything_as_it_was(run, stand_in, argv, code, words):
    for name, content in NOT_TEXT.items():
        write(name, content)
    for name, content in {"good.txt": PROSE, "empty.txt": "\ufeff", "short.txt": "!?", "full/mine.txt": "mine",
                          "nano/train.bin": "ids", "hollow/x": "", "broken/tokenizer.json": "{}"}.items():
        write(name, content)
    if "huge" in argv:
        spec = json.loads((stand_in / "tokenizer.json").read_text())
        spec["model"]["vocab"] |= {f"token {i}": i for i in range(len(spec["model"]["vocab"]), 2**16 + 1)}
        write("huge/tokenizer.json", json.dumps(spec))
    Path("data").mkdir()
    before = snapshot()
    got, out, err = run(*argv)
    assert (got, out, err.count("\n")) == (code, "", 1) and err.startswith("prepare.py: ") and words in err
    assert "error:" not in err and ("LATIN1" in err) == ("not UTF-8: byte" in err) and snapshot() == before


@pytest.mark.parametrize("argv", [
    ["--input", "a folder", "--out_dir", "it's"], ["--input", "a.txt", "b.txt"], ["--input", "*.text"],
    ["--input", "a.jsonl"], ["--input", "A.PARQUET"], ["--input", "a.json"], ["--input", "a.arrow"],
    ["--dataset", "x/y:z", "--max_tokens", "9"]])
def test_more_than_one_text_is_answered_with_the_command_to_type(argv):
    Path("a folder").mkdir()
    code, _, err = run_main(prepare.main, *argv)
    assert code == 2 and err.count("\n") == 1
    assert shlex.split(err[err.index("python -m"):]) == ["python", "-m", "tools.corpus", *argv]


def test_paths_mean_what_they_mean_in_a_shell(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a b/it's [1].txt", PROSE)
    Path("link").symlink_to("real folder")
    for out_dir in ("~/x y/", "./x y/../x y", "link", "~/link/"):
        code, out, _ = run("--input=~/a b/it's [1].txt", f"--out_dir={out_dir}")
        last = shlex.split(out.splitlines()[-1])
        assert code == 0 and prepare.open_data(last[-1].removeprefix("--data_dir=")).meta["source"] == "it's [1].txt"
    assert Path("link").is_symlink() and sorted(os.listdir()) == ["a b", "link", "real folder", "x y"]


def test_any_command_line_ends_in_success_or_in_one_line(run, monkeypatch):
    fixed = prepare.stand_in_tokenizer()
    for name, instead in {"hub_folder": lambda *_: 1 / 0, "download_text": lambda: 1 / 0,
                          "stand_in_tokenizer": lambda: fixed, "stand_in_text": lambda: PROSE}.items():
        monkeypatch.setattr(prepare, name, instead)
    choose, top, ends = random.Random(2), Path.cwd(), set()
    write("good.txt", PROSE)
    words = ["--input", "good.txt", "--out_dir", "out", "--val_fraction", "0.2", "--tokenizer", "--dataset", "--split",
             "train", "--max_tokens", "9", "--allow_unrepresentable", "", "\0", "\udcff", "-1", "nan", "1e999", "--",
             "-", "=", "--help", "9" * 5000, "*", "[", "..", "~", "a" * 5000, "--val_fraction=0", "\n", "-\u0663"]
    for _ in range(200):
        argv = choose.choices(words, k=choose.randint(1, 5)) + choose.choice([[], ["--input", "good.txt"]])
        code, out, err = run(*argv)
        ends.add(code)
        lines = [line for line in err.splitlines() if line.startswith("prepare.py: ")]
        assert code in (0, 1, 2) and "Traceback" not in err and len(lines) == (code != 0), argv
        assert Path("good.txt").read_text() == PROSE and Path.cwd() == top
    assert ends == {0, 1, 2}


# ---- real commands, kills and full disks ----

def start(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options):
    argv = [sys.executable, str(ROOT / "prepare.py"), *map(str, argv)]
    return subprocess.Popen(argv, stdout=stdout, stderr=stderr, text=True, **options)


def test_help_is_instant():
    began = time.monotonic()
    assert "(default: 0.1)" in start("--help").communicate()[0] and time.monotonic() - began < 5
    code = "import sys, prepare; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_nothing_that_is_printed_ends_the_work(stand_in):
    for number, output in enumerate(["closed pipe", "/dev/full"]):
        reader, writer = os.pipe()
        os.close(reader)
        if output != "closed pipe":
            writer = os.open(output, os.O_WRONLY)
        argv = ["--input", write("good.txt", PROSE), "--tokenizer", stand_in, "--out_dir", f"{number}"]
        assert start(*argv, stdout=writer, stderr=writer).wait() == 0
        assert prepare.open_data(f"{number}").meta["documents"] == 1


@pytest.mark.parametrize("size", [2000, 600_000])  # the tokenizer's file does not fit; train.bin does not
def test_a_full_disk_costs_one_line_and_no_data(run, stand_in, size):
    import resource
    assert run("--input", write("good.txt", PROSE))[0] == 0
    before = snapshot("data")
    job = start("--input", write("long.txt", PROSE * 1000), "--tokenizer", stand_in,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    _, err = job.communicate()
    assert job.returncode == 1 and err.splitlines()[-1].startswith("prepare.py: ") and "Traceback" not in err
    assert "File too large" in err
    assert snapshot("data") == before


def test_a_second_one_on_the_same_folder_is_refused(run):
    Path("data").mkdir()
    with FileLock("data/.shakespeare.lock"):
        code, _, err = run("--input", write("good.txt", PROSE))
        assert code == 1 and "another process is writing there" in err and os.listdir("data") == [".shakespeare.lock"]
    assert run("--input", "good.txt")[0] == 0 and os.listdir("data") == ["shakespeare"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux tells which file is flushed")
def test_every_file_reaches_the_disk_before_the_folder_takes_its_name(run, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda f: (events.append(Path(os.readlink(f"/proc/self/fd/{f}")).name), fsync(f)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("RENAMED"), rename(a, b)))
    assert run("--input", write("good.txt", PROSE)).code == 0
    before, after = events[:events.index("RENAMED")], events[events.index("RENAMED") + 1:]
    files = [path.name for path in Path("data/shakespeare").rglob("*")]
    assert len(files) > 4 and set(before) >= {*files, ".shakespeare.new"} and after == ["data"]


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupted_it_leaves_what_was_there(run, stand_in, name, code):
    assert run("--input", write("good.txt", PROSE))[0] == 0
    before = snapshot("data")
    job = start("--input", write("long.txt", PROSE * 10_000), "--tokenizer", stand_in)
    while not Path("data/.shakespeare.new/tokenizer/tokenizer.json").exists():
        assert job.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    job.send_signal(getattr(signal, name))
    _, err = job.communicate(timeout=60)
    assert job.returncode == code and "Traceback" not in err and "stopped by" in err and snapshot("data") == before


KILLED = """
import os, signal, sys
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


@pytest.mark.slow
def test_killed_at_any_instant_it_leaves_the_old_data_or_the_new(run, stand_in):
    instants = [("prepare.encode", 1), ("prepare.write_meta", 1), ("prepare.fsync", 1), ("prepare.os.rename", 1),
                ("prepare.os.rename", 2), ("prepare.fsync", 8), ("prepare.recover", 2)]
    old, new, seen, jobs = write("old.txt", PROSE), write("new.txt", PROSE + "new"), set(), []
    for name, (function, call) in enumerate(instants):
        assert run("--input", old, "--out_dir", name)[0] == 0
        argv = ["--input", new, "--tokenizer", str(stand_in), "--out_dir", str(name)]
        program = KILLED.format(root=str(ROOT), function=function, call=call, argv=argv)
        jobs.append(subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL))
    for name, (job, instant) in enumerate(zip(jobs, instants)):
        assert job.wait(timeout=100) == -signal.SIGKILL, instant
        whole = str(name) if Path(str(name)).exists() else f".{name}.old"  # between the two renames
        seen.add((whole[0] == ".", prepare.open_data(whole).meta["source"]))
        assert run("--input", "none.txt", "--out_dir", name)[0] == 1  # the next start repairs, even a failing one
        assert prepare.open_data(str(name)) and not list(Path().glob(f".{name}.*")), instant
        assert run("--input", new, "--out_dir", name)[0] == 0 and prepare.open_data(str(name)).meta["source"] == new
    assert seen == {(False, old), (True, old), (False, new)}
