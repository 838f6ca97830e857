"""What prepare.py and tools.corpus promise."""
import ast
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
from functools import partial
from pathlib import Path
from unittest.mock import ANY, Mock

import pytest
from filelock import FileLock

import prepare
from tests.harness import (END, PROSE, ROOT, Process, expect_end, refused, run_main, snapshot,
                           watch_disk, write)
from tools import corpus


@pytest.fixture
def run(stand_in):
    """run(*argv, **keys): prepare.py in this process, with the stand-in tokenizer; later win."""
    return partial(run_main, prepare.main, "--tokenizer", stand_in)


@pytest.fixture
def prepared(run):
    """data/shakespeare, made of good.txt."""
    assert run("--input", write("good.txt", PROSE)).code == 0
    return snapshot("data")


def texts_of(folder="data/shakespeare"):
    """What the two sides say, decoded."""
    data = prepare.Data(folder)
    return [data.tokenizer.decode(ids.tolist(), False) for ids in (data.train, data.val)]


def encode_whole(folder, text):
    """The ids of the text in one piece, "<|endoftext|>" and the like being text."""
    backend, _ = prepare.open_tokenizer(folder)
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def test_the_real_text_has_the_golden_ids_and_nanogpts_cut(real_data, data_dir, tokenizer):
    data, text = prepare.Data(data_dir), (real_data / "input.txt").read_text()
    golden = "1895d231cbeb99f9f1323205e5a2da9471553a0960d16d5a3a685d9dac4e4729"  # of the real ids
    assert hashlib.sha256(data.train.tobytes() + data.val.tobytes()).hexdigest() == golden
    assert texts_of(data_dir) == [text[:1_003_854], text[1_003_854:]]  # int(0.9 * len(text))
    expected = {"vocab_size": 49_152, "eos_token_id": 0, "stand_in": None, "val_fraction": 0.1,
                "train_tokens": 305_111, "train_characters": 1_003_854, "train_bytes": 1_003_854,
                "val_tokens": 35_983, "val_characters": 111_540, "val_bytes": 111_540}
    assert data.meta | expected == data.meta and str(real_data) not in str(data.meta)
    # AutoTokenizer loses Digits on the published folder (transformers 5.23), not on ours.
    for text in ("a  1", "x\n\n1234 56", "In 2024:  3.14"):
        assert tokenizer.encode(text) == encode_whole(real_data / "tokenizer", text)


def test_default_text_comes_from_its_address_tokenizer_from_cache(real_data, data_dir, monkeypatch):
    snapshots = Path("hub", "models--HuggingFaceTB--SmolLM2-135M", "snapshots")
    shutil.copytree(real_data / "tokenizer", snapshots / prepare.TOKENIZER.partition("@")[2])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("hub").absolute()))
    get = Mock(**{"return_value.content": (real_data / "input.txt").read_bytes()})
    monkeypatch.setattr("huggingface_hub.utils.http_backoff", get)
    done = run_main(prepare.main)
    assert done.code == 0 and "STAND-IN" not in done.err and "305,111" in done.out
    assert prepare.Data("data/shakespeare").fingerprint == prepare.Data(data_dir).fingerprint


@pytest.mark.parametrize("fixture, below", [("stand_in", ""), ("real_data", "tokenizer")])
def test_every_byte_is_kept_but_the_byte_order_mark(run, fixture, below, request, monkeypatch):
    """In a text cut wherever it can be, whose sides have the ids of each in one piece."""
    folder = request.getfixturevalue(fixture) / below
    pattern = prepare.PIECES.pattern.replace("4096", "1")
    monkeypatch.setattr(prepare, "PIECES", re.compile(pattern, re.DOTALL))
    monkeypatch.setattr(prepare, "BATCH", 70)
    backend, _ = prepare.open_tokenizer(folder)
    atoms = [" ", " ", "\n", "\n\n", "\r\n", "\t", "  ", "\u00a0", "\u2028", "\x1c", "\x85"]
    atoms += """' 's 'll 'LL \u2019s a don't Word \u00e9 e\u0301 \u00df 1 42 3.14 \u00bd \u0663
        \u216b \u4e00\u4e8c \u3002 \uff0c ! ... _ - <|endoftext|> <|im_start|> <repo_name>
        \U0001f600 \U0001f468\u200d\U0001f469 \x00 \x7f \ufeff \ufffd""".split()
    atoms = [*atoms * 9, *["some longer words, too "] * 9, *map(chr, range(256))]
    if below:  # the real one has no tokens for 21 bytes
        atoms = [a for a in atoms if backend.decode(backend.encode(a).ids, False) == a]
    text = "".join(random.Random(1).choices(atoms, k=50_000))
    assert len(prepare.cut(text, backend)) > 5_000
    assert run(input=write("a.txt", "\ufeff" + text), val_fraction=0.3, tokenizer=folder).code == 0
    data, end = prepare.Data("data/shakespeare"), int(0.7 * len(text))
    sides = [text[:end], text[end:]]
    ids = [encode_whole(folder, side) for side in sides]
    assert [data.train.tolist(), data.val.tolist()] == ids and texts_of() == sides
    sizes = [len(side.encode()) for side in sides]
    assert [data.meta["train_bytes"], data.meta["val_bytes"]] == sizes


def test_a_tokenizer_of_another_kind_encodes_texts_uncut(run, monkeypatch):
    from tokenizers import SentencePieceBPETokenizer
    other = SentencePieceBPETokenizer()  # its words are no GPT-2's
    other.normalizer = None
    other.train_from_iterator([PROSE], 200, special_tokens=["</s>"], show_progress=False)
    write("other/tokenizer.json", other.to_str())
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
    done = run(*argv, "--allow_unrepresentable")
    assert done.code == 0 and "U+0004" in done.err
    assert "".join(texts_of()) == PROSE * 10 + "\u0104"


@pytest.mark.slow
def test_without_a_network_the_stand_in_is_made_announced_and_the_same_each_time(stand_in):
    from transformers import AutoTokenizer
    nowhere = "http://127.0.0.1:9"
    how = {"HF_HUB_OFFLINE": "0", "HF_HOME": "none", "NO_PROXY": "", "no_proxy": "",
           "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
    with Process(["-m", "prepare", "--out_dir=a"], **how) as process:
        expect_end(process.end(300))
        assert "STAND-IN" in process.text
    meta, tokenizer = prepare.Data("a").meta, AutoTokenizer.from_pretrained("a/tokenizer")
    assert meta["stand_in"] == "text and tokenizer"
    assert "".join(texts_of("a")) == prepare.stand_in_text()
    made, again = (json.loads(Path(folder, "tokenizer.json").read_bytes())
                   for folder in ("a/tokenizer", stand_in))
    assert made["model"] == again["model"] and made["added_tokens"] == again["added_tokens"]
    assert tokenizer.convert_ids_to_tokens(range(17)) == prepare.SPECIAL_TOKENS
    assert tokenizer.eos_token_id == 0 and meta["vocab_size"] == len(tokenizer) <= 8192
    assert tokenizer.encode("12") == tokenizer.encode("1") + tokenizer.encode("2")


def test_an_error_page_is_no_data_and_a_stand_in_never_replaces_real_data(run, monkeypatch):
    get = Mock(**{"return_value.content": b"<html>404"})
    monkeypatch.setattr("huggingface_hub.utils.http_backoff", get)
    done = run()
    assert done.code == 0 and "STAND-IN" in done.err and "html" not in texts_of()[0][:100]
    assert prepare.Data("data/shakespeare").meta["stand_in"] == "text"
    assert run("--input", write("text.txt", PROSE)).code == 0 and "".join(texts_of()) == PROSE
    before = snapshot("data")
    expect_end(run(), [1], "data/shakespeare")
    assert snapshot("data") == before


@pytest.mark.parametrize("damage, word", [
    (lambda d: write(d / "val.bin", (d / "val.bin").read_bytes()[:-1] + b"\xff"), "val_sha256"),
    (lambda d: write(d / "meta.json", json.dumps(prepare.Data(d).meta | {"source": 0})), "changed"),
    (lambda d: prepare.write_meta(d, prepare.Data(d).meta | {"val_bytes": 0}), "zero"),
    (lambda d: prepare.write_meta(d, prepare.Data(d).meta | {"vocab_size": 5}), "vocab_size 5")])
def test_damage_is_told_in_one_line(prepared, damage, word):
    """Also by someone who knows how meta.json is sealed."""
    damage(prepare.Data("data/shakespeare").folder)
    with pytest.raises(ValueError, match="data/shakespeare is damaged: ") as error:
        prepare.Data("data/shakespeare")
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("module", """prepare train sample tools.bench tools.corpus tools.demo
    tools.export tools.plot tools.tensorboard""".split())
def test_an_older_python_without_packages_gets_one_line(module):
    file = module.replace(".", "/") + ".py"
    ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))  # it can read on
    code = (f"import runpy, sys; sys.version_info = (3, 10); sys.argv = ['{file}']; "
            f"runpy.run_module('{module}', run_name='__main__')")
    with Process(["-S", "-c", code]) as process:
        assert process.end(60).code == 1
        assert process.text.startswith("Python 3.11 or newer") and process.text.count("\n") == 1


def test_paths_mean_what_they_mean_in_a_shell(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a b/it's [1].txt", PROSE)
    Path("link").symlink_to("real folder")
    for out_dir in ("~/x y/", "./x y/../x y", "link", "~/link/"):
        done = run(input="~/a b/it's [1].txt", out_dir=out_dir)
        folder = shlex.split(done.out.splitlines()[-1])[-1].removeprefix("--data_dir=")
        assert done.code == 0 and prepare.Data(folder).meta["source"] == "it's [1].txt"
    assert Path("link").is_symlink()
    assert sorted(os.listdir()) == ["a b", "link", "real folder", "x y"]


def test_nothing_that_is_printed_ends_the_work(stand_in):
    argv = ["--input", write("good.txt", PROSE), "--tokenizer", stand_in, "--out_dir=d"]
    with Process(["-m", "prepare", *argv], stream="/dev/full") as process:
        assert process.end().code == 0
    assert prepare.Data("d").meta["source"] == "good.txt"


@pytest.mark.parametrize("size", [2000, 600_000])  # too small for the tokenizer, for train.bin
def test_a_full_disk_costs_one_line_and_no_data(prepared, stand_in, size):
    write("long.txt", "12345\n" * 60_000)
    command = [ROOT / "prepare.py", "--input", "long.txt", "--tokenizer", stand_in]
    with Process(command, limits=[(resource.RLIMIT_FSIZE, (size, size))]) as process:
        expect_end(process.end(), [1], "File too large")
    assert snapshot("data") == prepared


def test_a_second_one_on_the_same_folder_is_refused(run):
    with FileLock("data/.shakespeare.part/lock"):
        refused(run("--input", write("good.txt", PROSE)), "another process", code=1)
        assert os.listdir("data/.shakespeare.part") == ["lock"]
    assert run("--input", "good.txt").code == 0 and os.listdir("data") == ["shakespeare"]


def test_every_file_reaches_the_disk_before_the_folder_takes_its_name(run, monkeypatch):
    real = os.fsync  # of a folder: EINVAL, as on some disks
    monkeypatch.setattr(os, "fsync", lambda n: os.ftruncate(n, 0) if os.path.isdir(n) else real(n))
    events = watch_disk(monkeypatch)
    assert run("--input", write("good.txt", PROSE)).code == 0
    at = events.index(("new", "shakespeare"))
    files = [path.name for path in Path("data/shakespeare").rglob("*")]
    assert len(files) > 4 and set(events[:at]) >= {*files, "new"} and events[at + 1:] == ["data"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_what_was_there(run, prepared, monkeypatch, signum):
    monkeypatch.setattr(prepare, "encode", lambda *_: os.kill(os.getpid(), signum))
    result = run("--input", write("new.txt", PROSE + "new"))
    assert result.code == 128 + signum and "Traceback" not in result.err
    assert snapshot("data") == prepared


@pytest.mark.parametrize("module, name, call, left, source", [
    (prepare, "encode", 1, "d", "good.txt"), (prepare, "write_meta", 1, "d", "good.txt"),
    (os, "rename", 1, "d", "good.txt"), (os, "rename", 2, ".d.part/old", "good.txt"),
    (prepare, "fsync", 8, "d", "new.txt"), (shutil, "rmtree", 3, "d", "new.txt")])
def test_killed_at_any_instant_it_leaves_old_data_or_new(run, module, name, call, left, source):
    argv = ["--input", write("new.txt", PROSE + "new"), "--out_dir", "d"]
    assert run("--input", write("good.txt", PROSE), "--out_dir", "d").code == 0
    pid = os.fork()
    if not pid:
        calls = [getattr(module, name)] * call
        calls[-1] = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        setattr(module, name, lambda *args, **kwargs: calls.pop(0)(*args, **kwargs))
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


@pytest.fixture
def many(stand_in):
    """The same of tools.corpus, for many documents."""
    pytest.importorskip("datasets")
    return partial(run_main, corpus.main, "--tokenizer", stand_in)


def documents(n):
    words = PROSE.split()[:14]
    return [f"Document {i}: " + " ".join(random.Random(i).choices(words, k=30)) for i in range(n)]


def jsonl(name, texts, column="text"):
    return write(name, "".join(json.dumps({column: text}) + "\n" for text in texts))


def parquet(name, texts, column="text"):
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), name, row_group_size=50)
    return name


def written():
    """The documents of both sides, [train, val], each without its end."""
    sides = [text.split(END) for text in texts_of("data/corpus")]
    assert [side.pop() for side in sides] == ["", ""]
    return sides


def test_documents_are_held_out_whole_and_none_moves_when_more_are_added(many, monkeypatch):
    monkeypatch.setitem(prepare.sys.modules, "datasets", None)  # lines of JSON need no library
    sides = {}
    for n in (100, 300):
        done = many("--input", jsonl("docs.jsonl", documents(n)))
        assert done.code == 0 and "train.py config/smollm2.py --data_dir=data/corpus" in done.out
        found, meta = written(), prepare.Data("data/corpus").meta
        assert sorted(found[0] + found[1]) == sorted(documents(n))
        assert 0.03 * n < len(found[1]) < 0.2 * n
        assert meta["source"] == "docs.jsonl"
        for side, texts in zip(("train", "val"), found):
            assert meta[f"{side}_bytes"] == meta[f"{side}_characters"] == sum(map(len, texts))
            assert meta[f"{side}_documents"] == len(texts)
            assert all(sides.setdefault(text, side) == side for text in texts)
    held_out = [i for i, text in enumerate(documents(30)) if sides[text] == "val"]
    assert held_out == [2, 13, 15]  # for ever


def test_every_kind_of_file_is_read_and_each_file_counts_once(many):
    texts = documents(70)
    for i, text in enumerate(texts[:10]):
        write(f"notes/deep/[{i}].txt", text + "\r\n\ttext")
        write(f"notes/{i}.md", "\ufeff" + texts[10 + i])
        write(f"odd/{i}.text", texts[20 + i])
    for name in (".hidden/0.txt", "._0.txt", "0.py"):
        write(f"notes/{name}", "not read")
    write("notes/empty.txt", "")
    write("notes/more.txt.gz", gzip.compress(b"zipped " * 9))
    jsonl("more/[1] a.jsonl", [*texts[30:40], "", None])
    write("more/b.jsonl.gz", gzip.compress(Path(jsonl("b", texts[40:50])).read_bytes()))
    write("more/c.json", json.dumps([{"text": texts[50]}, *texts[51:55]], indent=1))
    write("more/e.json.gz", gzip.compress(json.dumps(texts[55:60]).encode()))
    parquet("more/d.parquet", [*texts[60:], None])
    assert many("--input", "notes", "more/", "--input", "odd/*", "notes/0.md").code == 0
    expected = [text + "\r\n\ttext" for text in texts[:10]] + texts[10:] + ["zipped " * 9]
    assert sorted(sum(written(), [])) == sorted(expected)
    assert "notes" not in Path("data/corpus/meta.json").read_text()


def test_readers_give_the_same_and_read_hardly_past_max_tokens(many, stand_in, monkeypatch):
    texts, seen = documents(200), []
    for path in (jsonl("docs.jsonl", texts, "body"), parquet("docs.parquet", texts, "body")):
        assert many("--input", path, "--column", "body").code == 0
        seen.append(written())
    assert seen[0] == seen[1]
    rest = iter(texts)
    opened = Mock(side_effect=lambda *_, **__: ({"text": t} for t in rest))
    monkeypatch.setattr(corpus, "open_stream", opened)
    assert many("--dataset", "a/hub@v1:name", "--max_tokens", 3000).code == 0
    opened.assert_called_once_with(ANY, "a/hub", "name", split="train", revision="v1")
    meta, (train, val) = prepare.Data("data/corpus").meta, written()
    tokens = meta["train_tokens"] + meta["val_tokens"]
    assert 2800 < tokens <= 3000 and meta["source"] == "a/hub@v1:name, split train"
    count, taken = meta["train_documents"] + meta["val_documents"], 200 - len(list(rest))
    assert sorted(train + val) == sorted(texts[:count]) and count < taken <= count + 2
    monkeypatch.setattr(prepare, "choose_tokenizer", lambda *_: (stand_in, "stand-in: another"))
    expect_end(many("--dataset", "a/hub:name", "--out_dir=new"), [1], "--tokenizer", "try again")


def test_a_document_larger_than_a_batch_is_encoded_as_in_one_piece(many, stand_in, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 1000)
    pattern = prepare.PIECES.pattern.replace("4096", "64")
    monkeypatch.setattr(prepare, "PIECES", re.compile(pattern, re.DOTALL))
    texts = [" ".join(documents(40)), *documents(60)[40:], "mentions <|endoftext|> in its text"]
    assert many("--input", jsonl("docs.jsonl", texts)).code == 0
    ids = sorted([*encode_whole(stand_in, text), 0] for text in texts)
    data = prepare.Data("data/corpus")
    joined = [*data.train.tolist(), *data.val.tolist()]
    ends = [i + 1 for i, token in enumerate(joined) if token == 0]
    assert sorted(joined[i:j] for i, j in zip([0, *ends], ends)) == ids


def test_a_lopsided_share_is_said_plainly(many):
    texts = documents(40)
    texts[:9] = [text * 300 for text in texts[:9]]
    for share, is_noted in (0.4, False), (0.05, True), (0.8, True):  # nothing held out; nearly all
        done = many(input=jsonl("docs.jsonl", texts), val_fraction=share)
        assert done.code == 0 and ("of the tokens are held out" in done.err) == is_noted


def test_documents_with_such_characters_are_an_error_unless_allowed(many, real_data):
    docs = jsonl("docs.jsonl", documents(40) + ["bad \x04"])
    start = partial(many, input=docs, tokenizer=real_data / "tokenizer")
    refused(start(), "record 41 of docs.jsonl", "U+0004", code=1)
    done = start("--allow_unrepresentable")
    assert done.code == 0 and "U+" in done.err
