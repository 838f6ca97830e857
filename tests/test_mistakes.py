"""A mistake gets one line, which says what is wrong and what to do, and leaves all as it was."""
import gzip
import json
import sys

import pytest

import prepare
import sample
import train
from tests.harness import END, PROSE, TINY, refused, run_main, snapshot, write
from tools import bench, corpus, demo, export, plot, space, tensorboard

BEGINNINGS = {"PDF": b"%PDF-1.7", "zip": b"PK\3\4", "Parquet": b"PAR1", "xz": b"\xfd7zXZ",
              "bzip2": b"BZh9", "Zstandard": b"\x28\xb5\x2f\xfd", "UTF-32": b"\xff\xfe\0\0"}
FILES = {"good.txt": PROSE, "empty.txt": "\ufeff", "short.txt": "!?", "gz.txt": b"\x1f\x8b",
    "utf16.txt": PROSE.encode("utf-16"), "bare.txt": PROSE.encode("utf-16-le"), "nano/val.bin": "",
    "latin1.txt": PROSE.encode() + b"caf\xe9 ol\xe9", "one.txt": "one document", "file": "",
    **{f"{kind}.txt": begin + b"..." for kind, begin in BEGINNINGS.items()}, "mine/tokenizer": "",
    "void.parquet": "", "x.parquet": "PAR1", "p.arrow.gz": gzip.compress(b"ARROW1"),
    "torn.txt.gz": gzip.compress(b"text")[:-9], "empty.jsonl": '{"text": ""}\n',
    "two.jsonl": '{"text": "one"}\n{"text": "two"}\n', "bad.jsonl": '{"text": \n',
    "good.jsonl": '{"text": "one two three", "n": 1}\n' * 9, "nano/meta.json": "",
    "broken/tokenizer.json": "{}", "mine/meta.json": "{}", "mine/notes.txt": "", "full/me": "",
    "hollow/x.py": "", "own/tokenizer/notes": "", "texts/a.txt": "one\ntwo\n",
    "bad/metrics.jsonl": "{}\n{}\n", "list/metrics.jsonl": "[1]\n", "w/step_1.pt": "",
    "odd/metrics.jsonl": '{"step": 1, "loss": "x", "tokens": 1, "seconds": 1}\n',
    "binary/metrics.jsonl": b"\xff\n", "empty/metrics.jsonl": "",
    "whole/metrics.jsonl": '{"step": 1, "loss": 1, "tokens": 1, "seconds": 1}\n',
    "theirs/samples/step_000001.txt": "theirs", "cut.json": r'[{"text": "\ud83d"}]',
    "mixed.json": '[{"text": "one"}, {"text": 2}]'}
MISTAKES = {  # (script, exit code): what is typed, and what the line says
    (train, 2): [
        ("--max_steps=1.5", "max_steps, '1.5', int"), ("--learning_rate=nan", "learning_rate, nan"),
        ("--max_steps", "max_steps"), ("max_steps=10", "max_steps=10, --"), ("none.py", "none.py"),
        ("--learning_rate -1e-3", "learning_rate, --key=value"), ("--nope", "--nope, --help"),
        ("--dtype=int8", "dtype, 'int8', float16"), ("--batch_size=0", "batch_size = 0, must hold"),
        ("--device=tpu9", "device, 'tpu9'"), ("--micro_batch_size=3", "micro_batch_size = 3"),
        ("--resume=", "--resume, empty"), ("--resume", "out, python train.py config/smollm2.py"),
        ("--resume config/tiny.py", "train.py config/tiny.py --resume"), ("--beta2=1", "beta2 = 1"),
        ("--hidden_size=34", "hidden_size = 34, num_attention_heads = 4"),
        ("--block_size=300", "block_size = 300, max_position_embeddings = 256"),
        ("--num_key_value_heads=3", "num_key_value_heads = 3"), ("--out_dir=", "out_dir, empty"),
        ("--num_hidden_layers=0", "num_hidden_layers = 0"), ("--out_dir=" + 300 * "x", "long"),
        ("--out_dir=own", "own, tokenizer"),
        ("--data_dir=nowhere", "nowhere, python prepare.py --input, --out_dir"),
        ("--out_dir=bad", "bad, metrics.jsonl"), ("--out_dir=theirs", "theirs, samples"),
        ("--out_dir=bad --resume=auto", "bad, metrics.jsonl"), ("--sed=1", "did you mean --seed?"),
        # With a line end, a recipe, which is never run. Of the last one Python itself would warn.
        ("max_stepz = 5\n", "max_steps?"), ("seed = 1\nimport os\nos.mkdir('x')\n", "r.py, line 2"),
        ("batch_size = __import__('os').mkdir('x')\n", "r.py, line 1"), ("seed = 4and\n", "r.py")],
    (prepare, 1): [
        ("none.txt", "none.txt"), ("empty.txt", "empty.txt, 0"), ("short.txt", "short.txt, 1"),
        ("utf16.txt", "UTF-16, iconv, utf16.txt"), ("bare.txt", "zero, UTF-16LE, bare.txt"),
        ("latin1.txt", "0xe9, 2843, iconv, CP1252, latin1.txt"),
        *((f"{kind}.txt", f"{kind}, {kind}.txt") for kind in BEGINNINGS),
        ("gz.txt", "gzip, gunzip, gz.txt"), ("good.txt --tokenizer=a:b", "--tokenizer a:b"),
        ("good.txt --tokenizer=huge", "65,537, uint16"), ("good.txt --tokenizer=broken", "broken"),
        ("good.txt --tokenizer=hollow", "hollow, tokenizer.json"),
        ("good.txt --tokenizer=/nope/a", "/nope/a, folder, hub"),
        ("good.txt --out_dir=nano", "nano, meta.json"), ("good.txt --out_dir=full", "full, me"),
        ("good.txt --out_dir=mine", "mine, notes.txt"), ("good.txt --out_dir=file", "directory"),
        ("good.txt --out_dir=own", "own, tokenizer"), ("good.txt --out_dir=.", "--out_dir")],
    (prepare, 2): [
        ("good.txt --out_dir=", "--out_dir, ''"), ("full", "python -m tools.corpus, --input full"),
        ("good.txt --val_fraction=1.0", "--val_fraction, 1.0"), ("good.txt --inp x", "--inp"),
        ("A.PARQUET", "python -m tools.corpus, A.PARQUET"),
        ("good.txt gz.txt", "python -m tools.corpus, --input good.txt gz.txt"),
        ("x --dataset=y:z", "python -m tools.corpus, --dataset=y:z")],
    (corpus, 1): [("--input none.txt", "none.txt"), ("--input hollow", "hollow"),
        ("--input /dev/null", "/dev/null"), ("--input one.txt", "prepare.py --input"),
        ("--input two.jsonl", "one side"), ("--input good.jsonl --max_tokens 2", "--max_tokens"),
        ("--input empty.jsonl", "no text"), ("--input good.jsonl --column body", "--column body"),
        ("--input bad.jsonl", "bad.jsonl"), ("--input good.jsonl --column n", "--column n"),
        ("--input torn.txt.gz", "torn.txt.gz"), ("--input void.parquet", "void.parquet, empty"),
        ("--input p.arrow.gz", "p.arrow.gz, gunzip"), ("--input mixed.json", "record 2, int"),
        ("--input cut.json", "record 1"), ("--input two.jsonl --tokenizer endless", "end-of-text"),
        ("--dataset some/thing", "datasets, tools/requirements.txt"),
        ("--input x.parquet", "datasets, tools/requirements.txt"), ("--dataset texts", "--input")],
    (corpus, 2): [("", "--input"), ("--input good.jsonl --max_tokens 0", "--max_tokens"),
                  ("--dataset good.jsonl", "good.jsonl"), ("--input x --dataset x", "--dataset")],
    (sample, 1): [(f"--checkpoint={name}", "python train.py config/smollm2.py") for name in
                  "out best /no/such wdata ./wdata none/step_000001.pt".split()],
    (sample, 2): [(word, word.partition("=")[0]) for word in """--temperature=-1 --temperature=nan
        --temperature=hot --temprature=1 --top_k=1.5 --top_p=1.1 --max_new_tokens=0 --num_samples=0
        --seed=-1 --stop= --dtype=int8 --device=tpu9 --prompt=\udcff --prompt=-""".split()],
    (export, 1): [("nowhere x", "nowhere")], (tensorboard, 1): [("nowhere", "nowhere")],
    (export, 2): [("x", "folder"), ("out x --push_to_hub name", "USER/NAME"),
                  ("out file --overwrite", "file"), ("out full", "full is not empty"),
                  ("x bad --overwrite", "bad holds a run")],
    (plot, 1): [("nowhere", "nowhere"), ("bad", "line 1"), ("list", "line 1"), ("empty", "nothing"),
                ("odd", "line 1"), ("binary", "binary"), ("whole", "matplotlib, tools/requirements.txt")],
    (plot, 2): [("", "RUN"), ("x --output plot.jpg", "plot.jpg")],
    (bench, 2): [("nonsense", "nonsense"), ("train --shapes=4", "BxT"), ("--runs=0", "--runs"),
                 ("--what", "--what"), ("exact --data_dir=none", "none, python prepare.py")],
    (space, 2): [("full bad", "full is there"), ("x no/run/x", "no/run/x"), ("x", "checkpoint"),
                 ("x bad bad", "of its own"), ("x nano", "nano, no model")],
    (demo, 2): [("--checkpoint=no/run/x", "no/run/x"), ("--checkpoint=out-bestt", "out-bestt")],
    (demo, 1): [("", "gradio, tools/requirements.txt")], (bench, 1): [("fast --output=bad", "bad")]}


@pytest.mark.parametrize("script, code, typed, words", [
    (*kind, *row) for kind, rows in MISTAKES.items() for row in rows])
def test_a_mistake_is_a_line_and_changes_nothing(script, code, typed, words, stand_in, monkeypatch):
    for name, content in FILES.items():
        write(name, content)
    spec = json.loads((stand_in / "tokenizer.json").read_text())
    vocab, argv = spec["model"]["vocab"], typed.split()
    if "huge" in typed:
        vocab |= {f"token {i}": i for i in range(len(vocab), 2**16 + 1)}
        write("huge/tokenizer.json", json.dumps(spec))
    if "endless" in typed:
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"]]
        vocab["none"] = vocab.pop(END)
        write("endless/tokenizer.json", json.dumps(spec))
    if "\n" in typed:
        argv = [write("r.py", typed)]
    if script is corpus:
        pytest.importorskip("datasets")
    if script is sample:  # no hub is asked
        monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    for package in ("datasets", "gradio", "matplotlib"):
        if package in words:  # the line says that it is missing
            monkeypatch.setitem(sys.modules, package, None)
    first = {train: [*TINY, "--data_dir=d"], corpus: ["--tokenizer", stand_in],
             prepare: ["--tokenizer", stand_in, "--input"]}
    before = snapshot()
    done = run_main(script.main, *first.get(script, []), *argv, stdin=b"caf\xe9")
    refused(done, *words.split(", "), code=code)
    assert snapshot() == before and (script is train or not done.out)
