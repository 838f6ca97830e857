"""What prepare.py promises."""
import ast
import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

import prepare
from tests.harness import (ROOT, Process, edit_meta, expect_end, flip, refused, run_main, snapshot,
                           watch_disk)

PROSE = "The quick brown fox jumps over the lazy dog; it's 42 times, they said.\n" * 40
GOLDEN = "1895d231cbeb99f9f1323205e5a2da9471553a0960d16d5a3a685d9dac4e4729"  # of the real ids


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A tokenizer with SmolLM2's special tokens and pre-tokenizer, and a token for every byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    prepare.stand_in_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(stand_in, monkeypatch):
    """run(*argv): prepare.py in this process, with the stand-in tokenizer; later options win."""
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    return partial(run_main, prepare.main, "--tokenizer", stand_in)


@pytest.fixture
def prepared(run):
    """data/shakespeare, made of good.txt."""
    assert run("--input", write("good.txt", PROSE)).code == 0
    return snapshot("data")


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def texts_of(folder="data/shakespeare"):
    """What the two sides say, decoded."""
    data = prepare.Data(folder)
    tokenizer, _ = prepare.open_tokenizer(Path(folder, "tokenizer"))
    return [tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            for ids in (data.train, data.val)]


def encode_whole(folder, text):
    """The ids of the text in one piece, "<|endoftext|>" and the like being text."""
    from tokenizers import Tokenizer
    backend = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def test_the_real_text_has_the_golden_ids_and_is_cut_where_nanogpt_cuts_it(
        real_data, data_dir, tokenizer):
    data, text = prepare.Data(data_dir), (real_data / "input.txt").read_text()
    assert len(data.train) == 305_111
    assert hashlib.sha256(data.train.tobytes() + data.val.tobytes()).hexdigest() == GOLDEN
    assert texts_of(data_dir) == [text[:1_003_854], text[1_003_854:]]  # int(0.9 * len(text))
    expected = {"vocab_size": 49_152, "eos_token_id": 0, "stand_in": None, "val_fraction": 0.1,
                "train_tokens": 305_111, "train_characters": 1_003_854, "train_bytes": 1_003_854,
                "val_tokens": 35_983, "val_characters": 111_540, "val_bytes": 111_540}
    assert data.meta | expected == data.meta and str(real_data) not in str(data.meta)
    # AutoTokenizer loses Digits on the published folder (transformers 5.23), not on ours.
    for text in ("a  1", "x\n\n1234 56", "In 2024:  3.14"):
        assert tokenizer.encode(text) == encode_whole(real_data / "tokenizer", text)


def test_default_takes_text_from_its_address_and_tokenizer_from_the_cache(
        real_data, data_dir, monkeypatch):
    from huggingface_hub import constants
    content = (real_data / "input.txt").read_bytes()
    model = Path("hub", "models--HuggingFaceTB--SmolLM2-135M")
    revision = prepare.TOKENIZER.partition("@")[2]
    shutil.copytree(real_data / "tokenizer", model / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("hub").absolute()))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content))
    done = run_main(prepare.main)
    assert done.code == 0 and "STAND-IN" not in done.err and "305,111" in done.out
    fingerprint = prepare.Data(data_dir).fingerprint()
    assert prepare.Data("data/shakespeare").fingerprint() == fingerprint


@pytest.mark.parametrize("which", ["stand_in", "real_data/tokenizer"])
def test_every_byte_is_kept_but_the_byte_order_mark(run, which, request, monkeypatch):
    """In a text cut wherever it can be, whose sides have the ids of each in one piece."""
    fixture, *below = which.split("/")
    folder = request.getfixturevalue(fixture).joinpath(*below)
    pattern = prepare.PIECES.pattern.replace("4096", "1")
    monkeypatch.setattr(prepare, "PIECES", re.compile(pattern, re.DOTALL))
    monkeypatch.setattr(prepare, "BATCH", 70)
    backend = prepare.load_tokenizer(folder).backend_tokenizer
    atoms = [
        " ", " ", "\n", "\n\n", "\r\n", "\t", "  ", "\u00a0", "\u2028", "\x1c", "\x85", "'", "'s",
        "'ll", "'LL", "\u2019s", "a", "don't", "Word", "\u00e9", "e\u0301", "\u00df", "1", "42",
        "3.14", "\u00bd", "\u0663", "\u216b", "\u4e00\u4e8c", "\u3002", "\uff0c", "!", "...", "_",
        "-", "<|endoftext|>", "<|im_start|>", "<repo_name>", "\U0001f600",
        "\U0001f468\u200d\U0001f469", "\x00", "\x7f", "\ufeff", "\ufffd"]
    atoms = [*atoms * 9, *["some longer words, too "] * 9, *map(chr, range(256))]
    if below:  # the real one has no tokens for 21 bytes
        atoms = [a for a in atoms if backend.decode(backend.encode(a).ids, False) == a]
    text = "".join(random.Random(1).choices(atoms, k=50_000))
    assert len(prepare.cut(text, backend)) > 5_000
    write("text.txt", "\ufeff" + text)
    argv = ["--input", "text.txt", "--val_fraction", 0.3, "--tokenizer", folder]
    assert run(*argv).code == 0
    data, end = prepare.Data("data/shakespeare"), int(0.7 * len(text))
    sides = [text[:end], text[end:]]
    ids = [encode_whole(folder, side) for side in sides]
    assert [data.train.tolist(), data.val.tolist()] == ids and texts_of() == sides
    assert 0 not in ids[0]  # "<|endoftext|>" is text
    sizes = [len(side.encode()) for side in sides]
    assert [data.meta["train_bytes"], data.meta["val_bytes"]] == sizes


def test_a_tokenizer_of_another_kind_encodes_texts_uncut(run, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator([PROSE], trainer)
    Path("other").mkdir()
    backend.save("other/tokenizer.json")
    pattern = prepare.PIECES.pattern.replace("4096", "64")
    monkeypatch.setattr(prepare, "PIECES", re.compile(pattern, re.DOTALL))
    assert run("--input", write("text.txt", PROSE), "--tokenizer", "other").code == 0
    whole = encode_whole("other", PROSE[:int(0.9 * len(PROSE))])
    assert prepare.Data("data/shakespeare").train.tolist() == whole


def test_characters_without_a_token_are_an_error_unless_allowed(run, stand_in):
    spec = json.loads((stand_in / "tokenizer.json").read_text())
    for byte in "\u0104\u0106":  # how the byte-level alphabet spells 0x04 and 0x06
        del spec["model"]["vocab"][byte]
    write("poor/tokenizer.json", json.dumps(spec))
    write("text.txt", PROSE + "\x04" + PROSE * 9 + "\x06\x06\u0104")  # the last one is C4 84
    argv = ["--input", "text.txt", "--tokenizer", "poor"]
    refused(run(*argv), "text.txt", "U+0004", "2,840", "--allow_unrepresentable", code=1)
    assert not Path("data/shakespeare").exists()
    done = run(*argv, "--allow_unrepresentable")
    assert done.code == 0 and "U+0004" in done.err
    assert "".join(texts_of()) == PROSE * 10 + "\u0104"


@pytest.mark.slow
def test_without_a_network_the_stand_in_is_made_announced_and_the_same_each_time(stand_in):
    nowhere = "http://127.0.0.1:9"
    how = {"HF_HUB_OFFLINE": "0", "HF_HOME": "none", "NO_PROXY": "", "no_proxy": "",
           "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
    with Process([ROOT / "prepare.py", "--out_dir=a"], Path.cwd(), **how) as process:
        expect_end(process.end(300))
        assert "STAND-IN" in process.text
    meta, tokenizer = prepare.Data("a").meta, prepare.load_tokenizer("a/tokenizer")
    assert meta["stand_in"] == "text and tokenizer"
    assert "".join(texts_of("a")) == prepare.stand_in_text()
    made = Path("a/tokenizer/tokenizer.json").read_bytes()
    assert made == (stand_in / "tokenizer.json").read_bytes()
    assert tokenizer.convert_ids_to_tokens(range(17)) == prepare.SPECIAL_TOKENS
    assert tokenizer.eos_token_id == 0 and meta["vocab_size"] == len(tokenizer) <= 8192
    assert tokenizer.encode("12") == tokenizer.encode("1") + tokenizer.encode("2")


def test_an_error_page_is_no_data_and_a_stand_in_never_replaces_real_data(run, monkeypatch):
    page = b"<html>404</html>"
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(page))
    done = run()
    assert done.code == 0 and "STAND-IN" in done.err and "html" not in texts_of()[0][:100]
    assert prepare.Data("data/shakespeare").meta["stand_in"] == "text"
    assert run("--input", write("text.txt", PROSE)).code == 0 and "".join(texts_of()) == PROSE
    before = snapshot("data")
    expect_end(run(), [1], "data/shakespeare")
    assert snapshot("data") == before


@pytest.mark.parametrize("file, damage, word", [
    ("val.bin", lambda p: flip(p, -1), "val_sha256"),
    ("tokenizer/tokenizer.json", lambda p: write(p, "{}"), "tokenizer_sha256"),
    ("meta.json", lambda p: write(p, Path(p).read_text().replace("0.1", "0.2")), "changed"),
    ("meta.json", lambda p: edit_meta(Path(p).parent, vocab_size=5), "vocab_size 5"),
])
def test_damage_is_told_in_one_line(prepared, file, damage, word):
    prepare.Data("data/shakespeare")
    damage(f"data/shakespeare/{file}")
    with pytest.raises(ValueError, match="data/shakespeare is damaged: ") as error:
        prepare.Data("data/shakespeare")
    assert word in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_that_is_not_there_is_not_asked_of_a_hub(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(ValueError, match="tokenizer.json"):
        prepare.load_tokenizer("HuggingFaceTB/SmolLM2-135M")


BEGINNINGS = {"PDF": b"%PDF-1.7", "zip": b"PK\3\4", "Parquet": b"PAR1", "xz": b"\xfd7zXZ",
              "bzip2": b"BZh9", "Zstandard": b"\x28\xb5\x2f\xfd", "UTF-32": b"\xff\xfe\0\0"}


@pytest.mark.parametrize("typed, code, words", [
    ("none.txt", 1, "none.txt"),
    ("empty.txt", 1, "empty.txt 0"),
    ("short.txt", 1, "short.txt 1"),
    ("utf16.txt", 1, "UTF-16 iconv utf16.txt"),
    ("gz.txt", 1, "gzip gunzip gz.txt"),
    ("bare.txt", 1, "zero UTF-16LE bare.txt"),
    *((f"{kind}.txt", 1, f"{kind} {kind}.txt") for kind in BEGINNINGS),
    ("latin1.txt", 1, "0xE9 2,843 iconv LATIN1 latin1.txt"),
    ("good.txt --tokenizer=hollow", 1, "hollow tokenizer.json"),
    ("good.txt --tokenizer=broken", 1, "broken"),
    ("good.txt --tokenizer=a:b", 1, "--tokenizer a:b"),
    ("good.txt --tokenizer=/nope/a", 1, "/nope/a no such folder"),
    ("good.txt --tokenizer=huge", 1, "65,537 uint16"),
    ("good.txt --out_dir=full", 1, "full me"),
    ("good.txt --out_dir=nano", 1, "nano train.bin"),
    ("good.txt --out_dir=mine", 1, "mine notes.txt"),
    ("good.txt --out_dir=.", 1, "--out_dir"),
    ("good.txt --out_dir=good.txt", 1, "directory"),
    ("good.txt --out_dir=", 2, "--out_dir ''"),
    ("good.txt --inp x", 2, "--inp"),
    ("good.txt --val_fraction=1.0", 2, "--val_fraction 1.0"),
    ("good.txt gz.txt", 2, "python -m tools.corpus --input good.txt gz.txt"),
    ("A.PARQUET", 2, "python -m tools.corpus A.PARQUET"),
    ("full", 2, "python -m tools.corpus --input full"),
    ("x --dataset=y:z", 2, "python -m tools.corpus --dataset=y:z"),
])
def test_every_mistake_gets_its_line_and_leaves_everything_as_it_was(
        run, stand_in, typed, code, words):
    files = {"good.txt": PROSE, "empty.txt": "\ufeff", "short.txt": "!?", "gz.txt": b"\x1f\x8b",
             "utf16.txt": PROSE.encode("utf-16"), "latin1.txt": PROSE.encode() + b"caf\xe9 ol\xe9",
             **{f"{kind}.txt": begin + b"..." for kind, begin in BEGINNINGS.items()},
             "bare.txt": PROSE.encode("utf-16-le"), "nano/train.bin": "ids",
             "broken/tokenizer.json": "{}", "mine/meta.json": "{}",
             **dict.fromkeys(("hollow/x", "full/me", "mine/notes.txt"), "")}
    for name, content in files.items():
        write(name, content)
    if "huge" in typed:
        spec = json.loads((stand_in / "tokenizer.json").read_text())
        vocab = spec["model"]["vocab"]
        vocab |= {f"token {i}": i for i in range(len(vocab), 2**16 + 1)}
        write("huge/tokenizer.json", json.dumps(spec))
    before = snapshot()
    result = run("--input", *typed.split())
    refused(result, *words.split(), code=code)
    assert result.out == "" and snapshot() == before


@pytest.mark.parametrize("file", [
    "prepare.py", "train.py", "sample.py", *(f"tools/{name}.py" for name in (
        "bench", "corpus", "demo", "export", "plot", "tensorboard"))])
def test_an_older_python_without_packages_gets_one_line(file, tmp_path):
    ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))  # it can read on
    module = file.removesuffix(".py").replace("/", ".")
    code = (f"import runpy, sys; sys.version_info = (3, 10); sys.argv = ['{file}']; "
            f"runpy.run_module('{module}', run_name='__main__')")
    with Process(["-S", "-c", code], tmp_path, PYTHONPATH=str(ROOT)) as process:
        assert process.wait(60) == 1
        assert process.text.startswith("Python 3.11 or newer") and process.text.count("\n") == 1


def test_paths_mean_what_they_mean_in_a_shell(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a b/it's [1].txt", PROSE)
    Path("link").symlink_to("real folder")
    for out_dir in ("~/x y/", "./x y/../x y", "link", "~/link/"):
        done = run("--input=~/a b/it's [1].txt", f"--out_dir={out_dir}")
        folder = shlex.split(done.out.splitlines()[-1])[-1].removeprefix("--data_dir=")
        assert done.code == 0 and prepare.Data(folder).meta["source"] == "it's [1].txt"
    assert Path("link").is_symlink()
    assert sorted(os.listdir()) == ["a b", "link", "real folder", "x y"]


def test_nothing_that_is_printed_ends_the_work(stand_in):
    command = ["-m", "prepare", "--input", write("good.txt", PROSE), "--tokenizer", stand_in,
               "--out_dir", "d"]
    with Process(command, Path.cwd(), stream="/dev/full", PYTHONPATH=str(ROOT)) as process:
        assert process.wait() == 0
    assert prepare.Data("d").meta["source"] == "good.txt"


@pytest.mark.parametrize("size", [2000, 600_000])  # too small for the tokenizer, for train.bin
def test_a_full_disk_costs_one_line_and_no_data(prepared, stand_in, size):
    write("long.txt", "12345\n" * 60_000)
    command = [ROOT / "prepare.py", "--input", "long.txt", "--tokenizer", stand_in]
    with Process(command, Path.cwd(), [(resource.RLIMIT_FSIZE, (size, size))]) as process:
        expect_end(process.end(), [1], "File too large")
    assert snapshot("data") == prepared


def test_a_second_one_on_the_same_folder_is_refused(run):
    Path("data").mkdir()
    with FileLock("data/.shakespeare.part/lock"):
        refused(run("--input", write("good.txt", PROSE)), "another process", code=1)
        assert os.listdir("data/.shakespeare.part") == ["lock"]
    assert run("--input", "good.txt").code == 0 and os.listdir("data") == ["shakespeare"]


def test_every_file_reaches_the_disk_before_the_folder_takes_its_name(run, monkeypatch):
    events = watch_disk(monkeypatch)
    assert run("--input", write("good.txt", PROSE)).code == 0
    at = events.index(("new", "shakespeare"))
    files = [path.name for path in Path("data/shakespeare").rglob("*")]
    assert len(files) > 4 and set(events[:at]) >= {*files, "new"}
    assert events[at + 1:] == ["data"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_what_was_there(run, prepared, monkeypatch, signum):
    monkeypatch.setattr(prepare, "encode", lambda *_: os.kill(os.getpid(), signum))
    result = run("--input", write("new.txt", PROSE + "new"))
    assert result.code == 128 + signum and "Traceback" not in result.err
    assert snapshot("data") == prepared


@pytest.mark.parametrize("module, name, call, left, source", [
    (prepare, "encode", 1, "d", "good.txt"),
    (prepare, "write_meta", 1, "d", "good.txt"),
    (os, "rename", 1, "d", "good.txt"),
    (os, "rename", 2, ".d.part/old", "good.txt"),
    (prepare, "fsync", 8, "d", "new.txt"),
    (shutil, "rmtree", 3, "d", "new.txt"),
])
def test_killed_at_any_instant_it_leaves_the_old_data_or_the_new(
        run, module, name, call, left, source):
    argv = ["--input", write("new.txt", PROSE + "new"), "--out_dir", "d"]
    assert run("--input", write("good.txt", PROSE), "--out_dir", "d").code == 0
    pid = os.fork()
    if not pid:
        calls, real = itertools.count(1), getattr(module, name)
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        setattr(module, name, lambda *args, **kwargs: kill() if next(calls) == call
                else real(*args, **kwargs))
        signal.alarm(60)
        try:
            run(*argv)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert prepare.Data(left).meta["source"] == source
    assert run("--input", "none.txt", "--out_dir", "d").code == 1  # a failing start repairs, too
    assert prepare.Data("d").meta["source"] == source and not list(Path().glob(".d.*"))
    assert run(*argv).code == 0 and prepare.Data("d").meta["source"] == "new.txt"
