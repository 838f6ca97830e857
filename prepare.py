"""Turns text into token ids for train.py: a folder with train.bin, val.bin, meta.json and the tokenizer's files.

    python prepare.py                                                    # Tiny Shakespeare, in data/shakespeare
    python prepare.py --input book.txt --out_dir data/book               # one text: its last tenth is held out
    python prepare.py --input notes/ 'more/*.jsonl' --out_dir data/mine  # many documents: whole ones are held out
    python prepare.py --dataset HuggingFaceTB/smollm-corpus:cosmopedia-v2 --max_tokens 100_000_000 --out_dir data/cosmo

The .bin files are raw little-endian uint16, which nanoGPT reads too. The ids are those of encoding each whole text at
once, whatever its size. Text stays text: a "<|endoftext|>" written in it is encoded letter by letter, and the token of
that name stands only where prepare.py puts it, after each of many documents. A byte order mark is dropped; all other
bytes are kept (line ends too), and the ids are decoded and compared with the text to prove it.
"""
import argparse
import codecs
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

DEFAULT_OUT_DIR = "data/shakespeare"
WRITTEN = {"train.bin", "val.bin", "meta.json", "tokenizer"}  # an out_dir that holds anything else is not ours
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
TOKENIZER_REVISION = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
SPECIAL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars>
    <issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output>
    <jupyter_script> <empty_output>""".split()  # ids 0 to 16
SUFFIXES = (".txt", ".md", ".jsonl")
BLOCK = 2**20  # bytes read at once; the first block of a document decides on which side of the split it falls
PIECE = 2**12  # characters encoded as one string: short ones keep the encoder's caches warm and the cores evenly busy
BATCH = 2**22  # characters handed to all cores at once
LONGEST = 2**22  # characters after which a text without a safe place to cut is cut anyway, and a warning says so

Piece = namedtuple("Piece", "document name key position text")  # document: its number; position: in it, in characters


def say(message):
    print(f"prepare.py: {message}", file=sys.stderr, flush=True)


def fail(message, code=1):
    say("error: " + " ".join(str(message).split()))
    raise SystemExit(code)


def reason(error):
    """The first line of an error: libraries like to add paragraphs."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# ---- the command line ----

def fraction(text):
    if not 0 < float(text) < 1:  # nan too
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1 (both excluded); 0.1 holds out a tenth")
    return float(text)


def count(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def name(text):
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name or a path")
    return text


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="prepare.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.error = lambda message: fail(f"{message}; python prepare.py --help lists what there is", 2)
    group = parser.add_argument_group("the text (default: Tiny Shakespeare, downloaded)").add_mutually_exclusive_group()
    group.add_argument("--input", type=name, nargs="+", metavar="PATH",
                       help="files, folders or globs of .txt, .md (a document each), .jsonl (a document a line); UTF-8")
    group.add_argument("--dataset", type=name, metavar="NAME[:CONFIG]",
                       help="a hub name, or a local Parquet, JSONL or Arrow path, streamed by the `datasets` library")
    group = parser.add_argument_group("more on --dataset and .jsonl")
    group.add_argument("--split", type=name, help="split of the dataset (default: train)")
    group.add_argument("--column", type=name, default="text", help="field that holds the text (default: %(default)s)")
    group.add_argument("--max_tokens", type=count, metavar="N",
                       help="stop before the document of the dataset that would pass N tokens (default: take all)")
    group = parser.add_argument_group("the tokenizer")
    group.add_argument("--tokenizer", type=name, metavar="FOLDER_OR_HUB_NAME",
                       help=f"where its tokenizer.json is; at most 65,536 tokens (default: {TOKENIZER})")
    group.add_argument("--allow_unrepresentable", action="store_true",
                       help="drop the characters that the tokenizer has no token for (default: they are an error)")
    group = parser.add_argument_group("what is written")
    group.add_argument("--out_dir", type=name, default=DEFAULT_OUT_DIR, metavar="FOLDER",
                       help="prepared data that it holds are replaced, anything else is not (default: %(default)s)")
    group.add_argument("--val_fraction", type=fraction, default=0.1, metavar="F",
                       help="share held out: of the tokens of one text, of the documents of many (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.dataset and (args.split or args.max_tokens):
        parser.error(f"{'--split' if args.split else '--max_tokens'} goes with --dataset")
    args.split = args.split or "train"
    return args


# ---- downloads, and what stands in for them ----

def tries(what, get):
    """get(), up to three times; raises the last error."""
    for attempt in (1, 2, 3):
        say(f"fetching {what}" + f" (try {attempt} of 3)" * (attempt > 1))
        try:
            return get()
        except Exception as error:  # refused, timed out, an error page, offline mode: whatever it was, try again
            say(f"  that failed: {reason(error)}")
            if attempt == 3:
                raise
            time.sleep(1)


def download_text():
    def get():
        with urllib.request.urlopen(TEXT_URL, timeout=10) as response:
            data = response.read(2**24)
        if hashlib.sha256(data).hexdigest() != TEXT_SHA256:  # an error page, or a log-in page, never becomes data
            raise ValueError(f"what came is not Tiny Shakespeare (sha256 {hashlib.sha256(data).hexdigest()[:12]}...)")
        return data.decode()
    return tries(f"Tiny Shakespeare from {TEXT_URL}", get)


def stand_in_text():
    from pydoc_data.topics import topics  # the language reference, which ships inside every Python
    return "\n".join(topics[key] for key in sorted(topics))


def stand_in_tokenizer():
    """A byte-level BPE with the special tokens and the pre-tokenizer of SmolLM2, trained on the stand-in text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(stand_in_text().splitlines(keepends=True), trainers.BpeTrainer(
        vocab_size=8192, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    eos = SPECIAL_TOKENS[0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=eos, eos_token=eos, unk_token=eos,
                                   extra_special_tokens=SPECIAL_TOKENS, model_max_length=8192)


def hub_folder(name, revision=None):
    """The folder of the hub's cache with a tokenizer's files, fetched if need be. Never any code."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(file, offline):
        return hf_hub_download(name, file, revision=revision, local_files_only=offline)

    with contextlib.suppress(LocalEntryNotFoundError):
        if revision:  # a revision never changes: what the cache has of it is all there is to know
            get("tokenizer_config.json", offline=True)
            return Path(get("tokenizer.json", offline=True)).parent
    try:  # hf_hub_download alone needs 23 s to notice that there is no network
        url = hf_hub_url(name, "tokenizer.json", revision=revision)
        tries(f"the tokenizer {name} from the hub", lambda: get_hf_file_metadata(url, timeout=10))
    except Exception:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(get("tokenizer.json", offline=True)).parent
        raise
    with contextlib.suppress(EntryNotFoundError):  # the names of the special tokens; not every tokenizer has it
        get("tokenizer_config.json", offline=False)
    return Path(get("tokenizer.json", offline=False)).parent


def load_tokenizer(wanted):
    """The tokenizer of a folder or a hub name (None: the default one), where it is from, whether it is a stand-in."""
    from transformers import PreTrainedTokenizerFast
    where, default = wanted or TOKENIZER, wanted in (None, TOKENIZER) and not os.path.isdir(TOKENIZER)
    if os.path.exists(where) and not os.path.isfile(os.path.join(where, "tokenizer.json")):
        fail(f"--tokenizer {where}: no tokenizer.json in it; give the folder of a fast tokenizer, or a hub name")
    try:
        folder = where if os.path.exists(where) else hub_folder(where, TOKENIZER_REVISION if default else None)
        if default and sha256(Path(folder, "tokenizer.json")) != TOKENIZER_SHA256:
            raise ValueError(f"{folder}/tokenizer.json is not the published one; delete it")
    except Exception as error:
        if wanted:
            fail(f"--tokenizer {where}: neither a folder here nor to be had from the hub: {reason(error)}")
        return stand_in_tokenizer(), "stand-in: byte-level BPE trained on pydoc_data.topics", True
    try:  # AutoTokenizer would rebuild the pre-tokenizer from the class's name, and lose Digits (transformers 5.23)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    except Exception as error:
        fail(f"--tokenizer {where}: its files do not load: {reason(error)}")
    if tokenizer.eos_token is None and SPECIAL_TOKENS[0] in tokenizer.get_vocab():
        tokenizer.eos_token = SPECIAL_TOKENS[0]
    return tokenizer, f"{where}@{TOKENIZER_REVISION}" if default else where, False


# ---- reading: every source becomes (name, iterator over the blocks of its text) per document ----

def find_files(inputs):
    files = []
    for given in inputs:
        if os.path.isdir(given):
            found = sorted(os.path.join(folder, file) for folder, _, names in os.walk(given, onerror=stop)
                           for file in names if file.lower().endswith(SUFFIXES))
        else:
            found = [given] if os.path.exists(given) else sorted(filter(os.path.isfile, glob.glob(given, recursive=True)))
        if not found:
            fail(f"--input {given}: " + (f"no {', '.join(SUFFIXES)} file in it" if os.path.isdir(given) else
                                         "no such file; give a file, a folder or a glob that exists"))
        files += found
    for file in files:
        if not os.path.isfile(file):
            fail(f"--input {file}: not a regular file; write its content to a file first")
        open(file, "rb").close()  # better now than after an hour
    return list({os.path.realpath(file): file for file in files}.values())  # a file given twice counts once


def stop(error):
    raise error


def read_text(path, bar):
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open(path, "rb") as file:
        block = True
        while block:
            block = file.read(BLOCK)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = file.tell() - len(error.object) + error.start
                fail(f"--input {path}: not UTF-8 (byte 0x{error.object[error.start]:02X} at offset {offset}); convert it: "
                     f"iconv -f LATIN1 -t UTF-8 {path} > NEW")
            bar.update(len(block))


def read_jsonl(path, column, bar):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    fail(f"--input {path}, line {number}: not a JSON object in UTF-8 ({reason(error)}); correct the line")
                yield from text_of(record, column, f"{path}, line {number}")


def text_of(record, column, where):
    """The document in a record, as (where, iterator over blocks); none where the text is missing or empty."""
    if not isinstance(record, dict) or column not in record:
        fail(f"--column {column}: no such field in {where}; it has: {', '.join(record) if isinstance(record, dict) else 'none'}")
    text = record[column] or ""
    if not isinstance(text, str):
        fail(f"--column {column}: {where} holds {type(text).__name__}, not text; name a field with text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail(f"{where}: half a surrogate pair at character {error.start} is not Unicode text; correct the record")
    yield where, iter([text])
