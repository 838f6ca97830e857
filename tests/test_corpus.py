"""What python -m tools.corpus promises."""
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import prepare
from conftest import ROOT, run_main
from test_prepare import snapshot, stand_in, texts_of, write  # noqa: F401
from tools import corpus

END = "<|endoftext|>"
WORDS = "The quick brown fox jumps over the lazy dog; it's 42 times, they said.".split()


@pytest.fixture
def run(stand_in):
    """run(*argv): the command in this process, with the stand-in tokenizer unless argv names one."""
    pytest.importorskip("datasets", reason="`datasets` is not installed (tools/requirements.txt)")

    def run(*argv):
        if "--tokenizer" not in argv:
            argv = (*argv, "--tokenizer", stand_in)
        return run_main(corpus.main, *argv)
    return run


def documents(n):
    return [f"Document {i}: " + " ".join(random.Random(i).choices(WORDS, k=30)) for i in range(n)]


def jsonl(name, texts, column="text"):
    return write(name, "".join(json.dumps({column: text}) + "\n" for text in texts))


def parquet(name, texts, column="text"):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), name, row_group_size=50)
    return name


def test_documents_are_held_out_whole_and_none_moves_when_more_are_added(run):
    sides = {}
    for n in (100, 300):
        code, out, _ = run("--input", jsonl("docs.jsonl", documents(n)))
        assert code == 0 and out.endswith("next: python train.py config/smollm2.py --data_dir=data/corpus\n")
        found, meta = [text.split(END) for text in texts_of("data/corpus")], prepare.open_data("data/corpus").meta
        assert [side.pop() for side in found] == ["", ""] and sorted(sum(found, [])) == sorted(documents(n))
        assert 0.03 * n < len(found[1]) < 0.2 * n and meta["documents"] == n
        assert meta["val_bytes"] == meta["val_characters"] == sum(map(len, found[1]))
        assert meta["characters"] == meta["bytes"] == sum(map(len, documents(n))) and meta["source"] == "docs.jsonl"
        for side, texts in enumerate(found):
            for text in texts:
                assert sides.setdefault(text, side) == side
    assert [i for i, text in enumerate(documents(30)) if sides[text]] == [2, 13, 15]  # from version to version


def test_every_kind_of_file_is_read_and_each_file_counts_once(run):
    texts = documents(70)
    for i, text in enumerate(texts[:10]):
        write(f"notes/deep/[{i}].txt", text + "\r\n\ttext")
        write(f"notes/{i}.md", "\ufeff" + texts[10 + i])
        write(f"notes/.hidden/{i}.txt", "hidden")
        write(f"notes/{i}.py", "not text")
        write(f"odd/{i}.text", texts[20 + i])
    write("notes/._0.txt", "hidden")
    write("notes/empty.txt", "")
    write("notes/more.txt.gz", gzip.compress(b"zipped " * 9))
    jsonl("more/[1] a.jsonl", [*texts[30:40], "", None])
    write("more/b.jsonl.gz", gzip.compress(Path(jsonl("b", texts[40:50])).read_bytes()))
    write("more/c.json", json.dumps([{"text": text, "n": 1} for text in texts[50:60]]))
    parquet("more/d.parquet", [*texts[60:], None])
    assert run("--input", "notes", "more/", "--input", "odd/*", "notes/0.md", "--out_dir", "data/mine")[0] == 0
    expected = [text + "\r\n\ttext" for text in texts[:10]] + texts[10:] + ["zipped " * 9, "", ""]
    assert sorted("".join(texts_of("data/mine")).split(END)[:-1] + ["", ""]) == sorted(expected)
    assert "notes" not in (text := Path("data/mine/meta.json").read_text()) and str(Path.cwd()) not in text


def test_every_reader_gives_the_same_and_max_tokens_stops_before_the_document_that_would_pass(run):
    texts, seen = documents(200), []
    for path in (jsonl("docs.jsonl", texts, "body"), parquet("docs.parquet", texts, "body")):
        assert run("--input", path, "--column", "body")[0] == 0
        seen.append(texts_of("data/corpus"))
    assert seen[0] == seen[1]
    assert run("--input", "docs.parquet", "--column", "body", "--max_tokens", 5000)[0] == 0
    meta, sides = prepare.open_data("data/corpus").meta, texts_of("data/corpus")
    assert 4800 < meta["tokens"] <= 5000 and sum(side.count(END) for side in sides) == meta["documents"]
    assert sorted("".join(sides).split(END)[:-1]) == sorted(texts[:meta["documents"]])


def test_hardly_anything_past_max_tokens_is_read(run, monkeypatch):
    taken = []

    def stream():
        for number, text in enumerate(documents(1000)):
            taken.append(number)
            yield {"text": text}
    monkeypatch.setattr(corpus, "open_stream", lambda *args, **options: stream())
    assert run("--dataset", "a/hub:name", "--max_tokens", 3000)[0] == 0
    meta = prepare.open_data("data/corpus").meta
    assert meta["documents"] < len(taken) <= meta["documents"] + 2 and meta["source"] == "a/hub:name, split train"


def test_a_document_larger_than_a_batch_is_encoded_as_in_one_piece(run, stand_in, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 1000)
    monkeypatch.setattr(prepare, "PIECE", 64)
    texts = [" ".join(documents(40)), *documents(60)[40:], "mentions <|endoftext|> in its text"]
    assert run("--input", jsonl("docs.jsonl", texts))[0] == 0
    backend, data = prepare.load_tokenizer(stand_in).backend_tokenizer, prepare.open_data("data/corpus")
    backend.encode_special_tokens = True
    ids = sorted([*backend.encode(text, add_special_tokens=False).ids, 0] for text in texts)
    joined = [*data.train.tolist(), *data.val.tolist()]
    ends = [i + 1 for i, token in enumerate(joined) if token == 0]
    assert sorted(joined[i:j] for i, j in zip([0, *ends], ends)) == ids


def test_a_lopsided_share_is_said_plainly(run):
    code, _, err = run("--input", jsonl("docs.jsonl", [text * 300 for text in documents(9)] + documents(40)[9:]),
                       "--val_fraction", 0.4)
    assert code == 0 and "note: " not in err
    code, _, err = run("--input", "docs.jsonl", "--val_fraction", 0.05)
    assert code == 0 and "of the tokens are held out, and --val_fraction asks for 5.00%" in err


def test_characters_without_a_token_are_an_error_unless_allowed(run, real_data):
    argv = ["--input", jsonl("docs.jsonl", documents(40) + ["bad \x04"]), "--tokenizer", real_data / "tokenizer"]
    code, _, err = run(*argv)
    assert code == 1 and "record 41 of docs.jsonl, 1 in all: U+0004 at character 4" in err
    code, _, err = run(*argv, "--allow_unrepresentable")
    assert code == 0 and "dropped: " in err and prepare.open_data("data/corpus").meta["unrepresentable"] == 1


@pytest.mark.parametrize("argv, code, words", [
    (["--input", "none.txt"], 1, "--input none.txt: no such file"),
    (["--input", "*.none"], 1, "--input *.none: no such file"),
    (["--input", "hollow"], 1, "--input hollow: no such file, or none of a kind that is read here"),
    (["--input", "/dev/null"], 1, "--input /dev/null: not a regular file"),
    (["--input", "one.txt"], 1, "python prepare.py --input"),
    (["--input", "two.jsonl"], 1, "put them on one side; give more documents"),
    (["--input", "empty.jsonl"], 1, "there is no text in it"),
    (["--input", "good.jsonl", "--max_tokens", "2"], 1, "none within --max_tokens"),
    (["--input", "utf16.txt"], 1, "UTF-16: iconv"),
    (["--input", "torn.txt.gz"], 1, "--input torn.txt.gz: broken gzip"),
    (["--input", "bad.jsonl"], 1, "bad.jsonl: after record 0: JSON parse error"),
    (["--input", "half.jsonl"], 1, "surrogate pair"),
    (["--input", "torn.parquet"], 1, "torn.parquet: "),
    (["--input", "good.jsonl", "--column", "body"], 1, "--column body: not in good.jsonl, which has text, n"),
    (["--input", "good.jsonl", "--column", "n"], 1, "--column n: record 1 of good.jsonl has int, not text"),
    (["--input", "good.jsonl", "--tokenizer", "endless"], 1, "it has no end-of-text token"),
    (["--input", "good.jsonl", "--out_dir", "hollow"], 1, "hollow: holds x.py, not made by prepare.py"),
    ([], 2, "one of the arguments --input --dataset is required"),
    (["--input", "good.jsonl", "--dataset", "x"], 2, "not allowed with argument"),
    (["--input", "good.jsonl", "--split", "x"], 2, "argument --split: goes with --dataset only"),
    (["--input", "good.jsonl", "--max_tokens", "0"], 2, "argument --max_tokens: 0 is not above 0"),
    (["--input", "good.jsonl", "--max_tokens", "1e6"], 2, "argument --max_tokens: invalid int value: '1e6'"),
    (["--dataset", "good.jsonl"], 2, "good.jsonl is a file; give it as --input"),
    (["--dataset", ""], 2, "argument --dataset: '' is not a name")])
def test_every_mistake_gets_its_line_and_leaves_everything_as_it_was(run, stand_in, argv, code, words):
    for name, content in {
            "hollow/x.py": "", "one.txt": "one document", "empty.jsonl": '{"text": ""}\n{"text": null}\n',
            "two.jsonl": '{"text": "one"}\n{"text": "two"}\n', "utf16.txt": "text".encode("utf-16"),
            "torn.txt.gz": gzip.compress(b"text")[:-9], "bad.jsonl": '{"text": "x"}\n{"text": \n',
            "half.jsonl": '{"text": "\\ud800"}\n', "torn.parquet": b"PAR1 and no more",
            "good.jsonl": '{"text": "one two three", "n": 1}\n' * 9}.items():
        write(name, content)
    if "endless" in argv:
        spec = json.loads((stand_in / "tokenizer.json").read_text())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"]]
        spec["model"]["vocab"]["none"] = spec["model"]["vocab"].pop(END)
        write("endless/tokenizer.json", json.dumps(spec))
    Path("data").mkdir()
    before = snapshot()
    got, out, err = run(*argv)
    assert (got, out, err.count("\n")) == (code, "", 1) and err.startswith("tools.corpus: ") and words in err
    assert snapshot() == before


def test_without_the_datasets_library_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = run("--dataset", "some/thing")
    assert code == 1 and err.count("\n") == 1 and "pip install -r tools/requirements.txt" in err


def test_the_command_that_prepare_names_does_the_work(stand_in):
    pytest.importorskip("datasets", reason="`datasets` is not installed (tools/requirements.txt)")
    jsonl("my docs/a.jsonl", documents(60))
    code, _, err = run_main(prepare.main, "--input", "my docs", "--tokenizer", stand_in)
    command = err[err.index("python -m"):].replace("python", sys.executable, 1)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert code == 2 and subprocess.run(command, shell=True, env=env, stdout=subprocess.DEVNULL).returncode == 0
    assert prepare.open_data("data/corpus").meta["documents"] == 60
