"""What python -m tools.corpus promises."""
import gzip
import json
import random
import re
import sys
from functools import partial
from pathlib import Path

import pytest

import prepare
from tests.harness import END, refused, run_main, snapshot
from test_prepare import encode_whole, stand_in, texts_of, write  # noqa: F401
from tools import corpus

WORDS = "The quick brown fox jumps over the lazy dog; it's 42 times, they said.".split()


@pytest.fixture
def run(stand_in):
    """run(*argv): the command in this process, with the stand-in tokenizer; later options win."""
    pytest.importorskip("datasets", reason="pip install -r tools/requirements.txt")
    return partial(run_main, corpus.main, "--tokenizer", stand_in)


def documents(n):
    return [f"Document {i}: " + " ".join(random.Random(i).choices(WORDS, k=30)) for i in range(n)]


def jsonl(name, texts, column="text"):
    return write(name, "".join(json.dumps({column: text}) + "\n" for text in texts))


def parquet(name, texts, column="text"):
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), name, row_group_size=50)
    return name


def written(folder="data/corpus"):
    """The documents of both sides, [train, val], each without its end."""
    sides = [text.split(END) for text in texts_of(folder)]
    assert [side.pop() for side in sides] == ["", ""]
    return sides


def test_documents_are_held_out_whole_and_none_moves_when_more_are_added(run):
    sides = {}
    for n in (100, 300):
        done = run("--input", jsonl("docs.jsonl", documents(n)))
        assert done.code == 0 and "train.py config/smollm2.py --data_dir=data/corpus" in done.out
        found, meta = written(), prepare.Data("data/corpus").meta
        assert sorted(found[0] + found[1]) == sorted(documents(n))
        assert 0.03 * n < len(found[1]) < 0.2 * n
        for side, texts in zip(("train", "val"), found):
            size = sum(map(len, texts))
            assert meta[f"{side}_bytes"] == meta[f"{side}_characters"] == size
            assert meta[f"{side}_documents"] == len(texts)
        assert meta["source"] == "docs.jsonl"
        for side, texts in enumerate(found):
            assert all(sides.setdefault(text, side) == side for text in texts)
    assert [i for i, text in enumerate(documents(30)) if sides[text]] == [2, 13, 15]  # for ever


def test_every_kind_of_file_is_read_and_each_file_counts_once(run):
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
    write("more/c.json", json.dumps([{"text": text, "n": 1} for text in texts[50:60]]))
    parquet("more/d.parquet", [*texts[60:], None])
    assert run("--input", "notes", "more/", "--input", "odd/*", "notes/0.md").code == 0
    train, val = written()
    expected = [text + "\r\n\ttext" for text in texts[:10]] + texts[10:] + ["zipped " * 9]
    assert sorted(train + val) == sorted(expected)
    meta = Path("data/corpus/meta.json").read_text()
    assert "notes" not in meta and str(Path.cwd()) not in meta


def test_every_reader_gives_the_same_and_hardly_anything_past_max_tokens_is_read(run, monkeypatch):
    texts, seen, taken = documents(200), [], []
    for path in (jsonl("docs.jsonl", texts, "body"), parquet("docs.parquet", texts, "body")):
        assert run("--input", path, "--column", "body").code == 0
        seen.append(written())
    assert seen[0] == seen[1]

    def stream(*args, **options):
        for text in texts:
            taken.append(text)
            yield {"text": text}
    monkeypatch.setattr(corpus, "open_stream", stream)
    assert run("--dataset", "a/hub:name", "--max_tokens", 3000).code == 0
    meta, (train, val) = prepare.Data("data/corpus").meta, written()
    tokens = meta["train_tokens"] + meta["val_tokens"]
    assert 2800 < tokens <= 3000 and meta["source"] == "a/hub:name, split train"
    count = meta["train_documents"] + meta["val_documents"]
    assert sorted(train + val) == sorted(texts[:count]) and count < len(taken) <= count + 2


def test_a_document_larger_than_a_batch_is_encoded_as_in_one_piece(run, stand_in, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 1000)
    pattern = prepare.PIECES.pattern.replace("4096", "64")
    monkeypatch.setattr(prepare, "PIECES", re.compile(pattern, re.DOTALL))
    texts = [" ".join(documents(40)), *documents(60)[40:], "mentions <|endoftext|> in its text"]
    assert run("--input", jsonl("docs.jsonl", texts)).code == 0
    ids = sorted([*encode_whole(stand_in, text), 0] for text in texts)
    data = prepare.Data("data/corpus")
    joined = [*data.train.tolist(), *data.val.tolist()]
    ends = [i + 1 for i, token in enumerate(joined) if token == 0]
    assert sorted(joined[i:j] for i, j in zip([0, *ends], ends)) == ids


def test_a_lopsided_share_is_said_plainly(run):
    texts = documents(40)
    texts[:9] = [text * 300 for text in texts[:9]]
    for share, is_noted in (0.4, False), (0.05, True), (0.8, True):  # nothing held out; nearly all
        done = run("--input", jsonl("docs.jsonl", texts), "--val_fraction", share)
        assert done.code == 0 and ("of the tokens are held out" in done.err) == is_noted


def test_characters_without_a_token_are_an_error_unless_allowed(run, real_data):
    argv = ["--input", jsonl("docs.jsonl", documents(40) + ["bad \x04"]),
            "--tokenizer", real_data / "tokenizer"]
    refused(run(*argv), "record 41 of docs.jsonl", "U+0004", code=1)
    done = run(*argv, "--allow_unrepresentable")
    assert done.code == 0 and "U+" in done.err


@pytest.mark.parametrize("argv, code, word", [
    ("--input none.txt", 1, "none.txt"), ("--input hollow", 1, "hollow"),
    ("--input /dev/null", 1, "/dev/null"), ("--input one.txt", 1, "prepare.py --input"),
    ("--input two.jsonl", 1, "one side"), ("--input empty.jsonl", 1, "no text"),
    ("--input torn.txt.gz", 1, "torn.txt.gz"), ("--input bad.jsonl", 1, "bad.jsonl"),
    ("--input good.jsonl --max_tokens 2", 1, "--max_tokens"),
    ("--input good.jsonl --max_tokens 0", 2, "--max_tokens"),
    ("--input good.jsonl --column body", 1, "--column body"),
    ("--input good.jsonl --column n", 1, "--column n"),
    ("--input good.jsonl --tokenizer endless", 1, "end-of-text"), ("", 2, "--input"),
    ("--input good.jsonl --dataset x", 2, "--dataset"), ("--dataset good.jsonl", 2, "good.jsonl"),
    ("--dataset some/thing", 1, "tools/requirements.txt")])
def test_every_mistake_gets_its_line_and_leaves_everything_as_it_was(
        run, stand_in, monkeypatch, argv, code, word):
    contents = {
        "hollow/x.py": "", "one.txt": "one document", "empty.jsonl": '{"text": ""}\n',
        "two.jsonl": '{"text": "one"}\n{"text": "two"}\n', "bad.jsonl": '{"text": \n',
        "torn.txt.gz": gzip.compress(b"text")[:-9], "data/mine": "",
        "good.jsonl": '{"text": "one two three", "n": 1}\n' * 9}
    for name, content in contents.items():
        write(name, content)
    if "endless" in argv:
        spec = json.loads((stand_in / "tokenizer.json").read_text())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"]]
        spec["model"]["vocab"]["none"] = spec["model"]["vocab"].pop(END)
        write("endless/tokenizer.json", json.dumps(spec))
    if "some/thing" in argv:
        monkeypatch.setitem(sys.modules, "datasets", None)
    before = snapshot()
    refused(run(*argv.split()), word, code=code)
    assert snapshot() == before
