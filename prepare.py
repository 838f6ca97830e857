"""Turns text into token ids for train.py: a folder with train.bin, val.bin, meta.json and the tokenizer's files.

    python prepare.py                                                    # Tiny Shakespeare, in data/shakespeare
    python prepare.py --input book.txt --out_dir data/book               # one text: its last tenth is held out
    python prepare.py --input notes/ 'more/*.jsonl' --out_dir data/mine  # many documents: whole ones are held out
    python prepare.py --dataset HuggingFaceTB/smollm-corpus:cosmopedia-v2 --max_tokens 100_000_000 --out_dir data/cosmo

The .bin files are raw little-endian uint16, which nanoGPT reads too. The ids are those of encoding each whole text at
once, whatever its size. Text stays text: a "<|endoftext|>" written in it is encoded letter by letter; the token of that
name stands only where prepare.py sets it, after each of many documents. A byte order mark is dropped, every other byte
kept (line ends too): the ids are decoded and compared with the text.
"""
import argparse
import bisect
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
WRITTEN = {"train.bin", "val.bin", "meta.json", "tokenizer"}  # an out_dir with anything else is not ours to replace
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
TOKENIZER_REVISION = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
SPECIAL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars>
    <issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output>
    <jupyter_script> <empty_output>""".split()  # ids 0 to 16
SUFFIXES = (".txt", ".md", ".jsonl")
BLOCK = 2**20  # bytes read at once; the hash of a document's first block decides whether it is held out
PIECE = 2**12  # characters encoded as one string; longer ones are slower (the encoder's caches)
BATCH = 2**22  # characters handed to all cores at once
LONGEST = 2**20  # characters after which a text that offers no place to cut is cut anyway, with a note

Piece = namedtuple("Piece", "document name key position text")  # key: the document's hash in [0, 1)


def say(message):
    message = str(message).encode("utf-8", "backslashreplace").decode()  # file names may hold anything
    print(f"prepare.py: {message}", file=sys.stderr, flush=True)


def fail(message, code=1):
    say("error: " + " ".join(str(message).split()))
    raise SystemExit(code)


def reason(error):
    """The first line of an error: libraries like to add paragraphs."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# ---- the command line ----

def parse_args(argv):
    parser = argparse.ArgumentParser(prog="prepare.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (python prepare.py --help explains)", 2)
    group = parser.add_argument_group("the text (default: Tiny Shakespeare, downloaded)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", action="extend", metavar="PATH",
                        help="files, folders, globs: .txt and .md (a document each), .jsonl (a document a line); UTF-8")
    source.add_argument("--dataset", metavar="NAME[:CONFIG]",
                        help="a hub name, or local Parquet, JSONL or Arrow, streamed by the `datasets` library")
    group.add_argument("--split", help="split of the dataset (default: train)")
    group.add_argument("--column", default="text", help="field with the text, of --dataset and .jsonl (default: text)")
    group.add_argument("--max_tokens", type=int, metavar="N",
                       help="stop before the document of the dataset that would pass N tokens (default: take all)")
    group = parser.add_argument_group("the tokenizer")
    group.add_argument("--tokenizer", metavar="NAME",
                       help=f"a hub name, or a folder with tokenizer.json; up to 65,536 tokens (default: {TOKENIZER})")
    group.add_argument("--allow_unrepresentable", action="store_true",
                       help="drop characters that the tokenizer has no token for (default: they are an error)")
    group = parser.add_argument_group("what is written")
    group.add_argument("--out_dir", default=DEFAULT_OUT_DIR, metavar="FOLDER",
                       help=f"prepared data in it are replaced, anything else is refused (default: {DEFAULT_OUT_DIR})")
    group.add_argument("--val_fraction", type=float, default=0.1, metavar="F",
                       help="share held out, of the tokens of one text or of the documents of many (default: 0.1)")
    args = parser.parse_args(argv)
    for value in (args.out_dir, args.tokenizer, args.dataset, *(args.input or ())):
        if value is not None and (not value.strip() or "\0" in value):
            parser.error(f"{value!r} is not a name")
    if not 0 < args.val_fraction < 1:  # nan too
        parser.error(f"argument --val_fraction: {args.val_fraction} is not between 0 and 1; 0.1 holds out a tenth")
    if args.max_tokens is not None and args.max_tokens < 1:
        parser.error(f"argument --max_tokens: {args.max_tokens} is not above 0")
    if not args.dataset and (args.split or args.max_tokens):
        parser.error(f"argument --{'split' if args.split else 'max_tokens'}: goes with --dataset only")
    return args


# ---- downloads, and what stands in for them ----

def tries(what, get):
    """get(), up to three times; raises the last error."""
    for attempt in (1, 2, 3):
        say(f"fetching {what}" + f" (try {attempt} of 3)" * (attempt > 1))
        try:
            return get()
        except Exception as error:  # refused, timed out, an error page, offline mode: whatever it was
            say(f"  failed: {reason(error)}")
            if attempt == 3:
                raise
            time.sleep(1)


def download_text():
    with urllib.request.urlopen(TEXT_URL, timeout=10) as response:
        data = response.read(2**24)
    if hashlib.sha256(data).hexdigest() != TEXT_SHA256:  # an error page or a log-in page never becomes data
        raise ValueError(f"what came is not Tiny Shakespeare (sha256 {hashlib.sha256(data).hexdigest()[:12]}...)")
    return data.decode()


def stand_in_text():
    from pydoc_data.topics import topics  # the language reference: it ships inside every Python
    return "\n".join(topics[key] for key in sorted(topics))


def stand_in_tokenizer():
    """A byte-level BPE with SmolLM2's special tokens and pre-tokenizer, trained on the stand-in text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(stand_in_text().splitlines(keepends=True), trainers.BpeTrainer(
        vocab_size=8192, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    end = SPECIAL_TOKENS[0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end,
                                   extra_special_tokens=SPECIAL_TOKENS, model_max_length=8192)


def hub_folder(name, revision):
    """The folder of the hub's cache with a tokenizer's files, fetched if they are not there. Never any code."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(offline):
        with contextlib.suppress(EntryNotFoundError):  # says which token ends a text; not every tokenizer has it
            hf_hub_download(name, "tokenizer_config.json", revision=revision, local_files_only=offline)
        return Path(hf_hub_download(name, "tokenizer.json", revision=revision, local_files_only=offline)).parent

    with contextlib.suppress(LocalEntryNotFoundError):
        return get(offline=True)
    url = hf_hub_url(name, "tokenizer.json", revision=revision)  # asked first: hf_hub_download needs 23 s to give up
    tries(f"the tokenizer {name} from the hub", lambda: get_hf_file_metadata(url, timeout=10))
    return get(offline=False)


def load_tokenizer(wanted):
    """The tokenizer (None: the default one, or its stand-in), where it is from, and whether it is the stand-in."""
    from transformers import PreTrainedTokenizerFast
    where = wanted or TOKENIZER
    pinned = where == TOKENIZER and not os.path.isdir(where)
    try:
        folder = where if os.path.isdir(where) else hub_folder(where, TOKENIZER_REVISION if pinned else None)
        if pinned and sha256(Path(folder, "tokenizer.json")) != TOKENIZER_SHA256:
            raise ValueError(f"{folder}/tokenizer.json is not the published file; delete it")
    except Exception as error:
        if wanted:
            fail(f"--tokenizer {where}: no such folder, and the hub does not give it: {reason(error)}")
        return stand_in_tokenizer(), "stand-in: byte-level BPE trained on pydoc_data.topics", True
    try:  # as the file says: AutoTokenizer goes by the class's name and so loses Digits (seen with transformers 5.23)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    except Exception as error:
        fail(f"--tokenizer {where}: its files do not load, get them again: {reason(error)}")
    if tokenizer.eos_token is None and SPECIAL_TOKENS[0] in tokenizer.get_vocab():
        tokenizer.eos_token = SPECIAL_TOKENS[0]
    if max(tokenizer.get_vocab().values()) >= 2**16:
        fail(f"--tokenizer {where}: {len(tokenizer):,} tokens do not fit uint16; choose one of at most 65,536")
    return tokenizer, where + f"@{TOKENIZER_REVISION}" * pinned, False


# ---- reading: a document is a pair of its name and an iterator over its text in blocks ----

def find_files(inputs):
    def stop(error):  # os.walk would pass over an unreadable folder in silence
        raise error

    files = []
    for given in inputs:
        if os.path.isdir(given):
            found = sorted(os.path.join(folder, file) for folder, _, names in os.walk(given, onerror=stop)
                           for file in names if file.lower().endswith(SUFFIXES))
        else:
            found = [given] if os.path.exists(given) else sorted(filter(os.path.isfile, glob.glob(given, recursive=1)))
        if not found:
            fail(f"--input {given}: " + (f"no {', '.join(SUFFIXES)} in this folder" if os.path.isdir(given) else
                                         "no such file; give a file, a folder or a glob"))
        files += found
    for file in files:
        if not os.path.isfile(file):  # a pipe or a device could block for ever
            fail(f"--input {file}: not a regular file; copy its content into one")
        open(file, "rb").close()  # unreadable? better now than after an hour
    return list({os.path.realpath(file): file for file in files}.values())  # found twice, taken once


def read_text(path, bar):
    decoder, block = codecs.getincrementaldecoder("utf-8-sig")(), True
    with open(path, "rb") as file:
        while block:
            block = file.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = file.tell() - len(error.object) + error.start
                fail(f"--input {path}: not UTF-8: byte 0x{error.object[error.start]:02X} at offset {offset:,}; "
                     f"convert it, for example: iconv -f LATIN1 -t UTF-8 {path} > new.txt")
            bar.update(len(block))
            if text:
                yield text


def read_jsonl(path, column, bar):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    fail(f"--input {path}, line {number}: not JSON in UTF-8, correct it: {reason(error)}")
                yield text_of(record, column, f"{path}, line {number}")


def text_of(record, column, where):
    """The document in a record; a text that is null is empty."""
    if not isinstance(record, dict) or column not in record:
        has = ", ".join(record) if isinstance(record, dict) else f"no fields ({type(record).__name__})"
        fail(f"--column {column}: not in {where}, which has {has}")
    text = "" if record[column] is None else record[column]
    if not isinstance(text, str):
        fail(f"--column {column}: {where} has {type(text).__name__} there; name one with text")
    if re.search("[\ud800-\udfff]", text):
        fail(f"{where}: half a surrogate pair (\\ud800 to \\udfff) is not Unicode text; correct the record")
    return where, iter([text])


def read_dataset(args):
    """The documents of --dataset, and how many they are (None where that is not known beforehand)."""
    try:
        import datasets
    except ImportError:
        fail("--dataset needs the `datasets` library: pip install -r tools/requirements.txt")
    path, split = args.dataset, args.split or "train"
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}.get(Path(path).suffix)
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True)) if kind else []
    if files and not kind or kind and not files:
        fail(f"--dataset {path}: no Parquet, JSONL or Arrow file; text files go with --input")
    try:
        if files:
            stream = datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=True)
        else:
            name, _, config = (path, "", "") if os.path.exists(path) else path.partition(":")
            stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        total = stream.info.splits[split].num_examples if stream.info.splits else None
        if kind == "parquet":
            from pyarrow.parquet import read_metadata
            total = sum(read_metadata(file).num_rows for file in files)
    except Exception as error:
        fail(f"--dataset {path} (split {split}): {reason(error)}")

    def read():
        number = 0
        try:
            for number, record in enumerate(stream, 1):
                yield text_of(record, args.column, f"{path}, record {number}")
        except Exception as error:  # the network, a broken file: the library has many names for it
            fail(f"--dataset {path}: after record {number}: {reason(error)}")
    return read(), total


def open_text(args):
    """The documents, whether they are one text, what it is, whether it is the stand-in, and a progress bar."""
    from tqdm import tqdm
    look = {"unit_scale": True, "leave": False, "delay": 0.5, "mininterval": 0.2 if sys.stderr.isatty() else 10}
    if args.dataset:
        documents, total = read_dataset(args)
        bar = tqdm(total=args.max_tokens or total, unit="tokens" if args.max_tokens else "documents", **look)
        return documents, False, f"{args.dataset}, split {args.split or 'train'}, column {args.column}", False, bar
    if args.input:
        files = find_files(args.input)
        bar = tqdm(total=sum(map(os.path.getsize, files)), unit="B", **look)
        lines = [file.lower().endswith(".jsonl") for file in files]
        documents = itertools.chain.from_iterable(
            read_jsonl(file, args.column, bar) if jsonl else [(file, read_text(file, bar))]
            for file, jsonl in zip(files, lines))
        what = f"{len(files)} files: " * (len(files) > 1) + ", ".join(files[:3]) + ", ..." * (len(files) > 3)
        return documents, lines == [False], what, False, bar
    try:
        text = tries(f"Tiny Shakespeare from {TEXT_URL}", download_text)
        what, stand_in = f"Tiny Shakespeare ({TEXT_URL})", False
    except Exception:
        text, what, stand_in = stand_in_text(), "stand-in: Python's language reference (pydoc_data.topics)", True
    return [(what, iter([text]))], True, what, stand_in, tqdm(unit="B", **look)


# ---- cutting and encoding ----

# Where a byte-level pre-tokenizer (GPT-2's pattern, with or without Digits before it) always ends one word and begins
# the next, whatever stands around: before a space or line feed that follows no white space, and between a letter or
# digit and a punctuation mark. Of its alternatives 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|
# \s+(?!\S)|\s+ none runs on over such a place, and the only one that looks ahead does so from inside white space.
CUT = re.compile(r"(?<=\S)[ \n]|(?<=[A-Za-z0-9\u4e00-\u9fa5])[!-/:-@\[-`{-~\u3001\u3002\uff0c]")


def is_cuttable(backend):
    """Whether a text cut by CUT has the ids of the whole text. With any other tokenizer texts are encoded uncut."""
    spec = json.loads(backend.to_str())
    steps = spec["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    return (not spec["normalizer"] and [step.get("type") for step in steps] in (["ByteLevel"], ["Digits", "ByteLevel"])
            and steps[-1].get("use_regex", True) and not steps[-1]["add_prefix_space"]
            and all(token["special"] for token in spec["added_tokens"]))


def cut(blocks):
    """Yields a text, which comes in blocks, in pieces of about PIECE characters."""
    rest, start, said = "", 0, False
    for block in blocks:
        rest, start = rest[start:] + block, 0
        while len(rest) - start > PIECE:
            place = CUT.search(rest, start + PIECE)
            if place is None and len(rest) - start < LONGEST:
                break
            if place is None and not said:
                said = True
                say(f"note: {LONGEST:,} characters without space or punctuation: cut, which may change an id there")
            end = place.start() if place else start + LONGEST
            yield rest[start:end]
            start = end
    yield rest[start:]


def in_pieces(documents, cuttable):
    for number, (name, blocks) in enumerate(documents):
        first, position = next(blocks, ""), 0
        key = int(hashlib.sha256(first.encode()).hexdigest()[:13], 16) / 16**13  # evenly spread over [0, 1)
        blocks = itertools.chain([first], blocks)
        for text in cut(blocks) if cuttable else ["".join(blocks)]:
            if text:  # an empty document is none
                yield Piece(number, name, key, position, text)
            position += len(text)


def encode(pieces, backend):
    """Yields (piece, its ids, the characters that got lost). All cores work, two batches ahead of what is yielded."""
    def work(batch):
        try:
            codes = backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            ids = [code.ids for code in codes]
            texts = backend.decode_batch(ids, skip_special_tokens=False)
            return [(piece, i, [] if text == piece.text else lost(piece, text, backend))
                    for piece, i, text in zip(batch, ids, texts)]
        except Exception as error:
            fail(f"--tokenizer: it cannot encode {batch[0].name}: {reason(error)}")

    read = 0

    def batch_number(piece):
        nonlocal read
        read += len(piece.text)
        return read // BATCH

    with ThreadPoolExecutor(2) as pool:  # while one makes Python lists of its ids, the other has the cores
        jobs = []
        for _, batch in itertools.groupby(pieces, batch_number):
            jobs.append(pool.submit(work, list(batch)))
            if len(jobs) > 2:
                yield from jobs.pop(0).result()
        for job in jobs:
            yield from job.result()


def lost(piece, text, backend):
    """The characters of the piece that are not in the text decoded from its ids, with their places."""
    def survives(c):  # in company, since some tokenizers treat the ends of a text differently
        ids = backend.encode(f"a{c}a", add_special_tokens=False).ids
        return backend.decode(ids, skip_special_tokens=False) == f"a{c}a"

    bad = {c for c in set(piece.text) if not survives(c)}
    places = [i for i, c in enumerate(piece.text) if c in bad] or [len(os.path.commonprefix([piece.text, text]))]
    return [f"U+{ord(piece.text[i:i + 1] or ' '):04X} at character {piece.position + i:,}" for i in places]


# ---- writing ----

def write_ids(folder, parts, eos, args, bar):
    """Writes train.bin and val.bin, eos (None: it is all one text) after each document.

    Gives each side's counts, the document of lowest hash as (its first id, its counts), and of each piece of the last
    document (ids, characters, bytes)."""
    total, began = {"train": Counter(), "val": Counter()}, time.monotonic()
    lowest_key, lowest, marks = 2, None, []
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        for _, parts in itertools.groupby(parts, key=lambda part: part[0].document):
            here, pieces, shown = Counter(documents=1), [], []
            for piece, ids, bad in parts:
                side = "val" if piece.key < args.val_fraction and eos is not None else "train"
                files[side].write(np.array(ids, dtype="<u2").tobytes())
                pieces.append((len(ids), len(piece.text), len(piece.text.encode())))
                here.update(tokens=len(ids), characters=len(piece.text), bytes=pieces[-1][2], lost=len(bad))
                shown += bad[:5 - len(shown)]
                tokens = total["train"]["tokens"] + total["val"]["tokens"] + here["tokens"] + (eos is not None)
                documents = total["train"]["documents"] + total["val"]["documents"] + 1
                bar.set_postfix_str(f"{documents:,} documents, {tokens:,} tokens, "
                                    f"{tokens / (time.monotonic() - began + 1e-9):,.0f} tokens/s", refresh=False)
            if shown:
                message = f"{here['lost']:,} characters of {piece.name} have no token: " + "; ".join(shown)
                if not args.allow_unrepresentable:
                    fail(f"{message}. Remove such characters, or drop them with --allow_unrepresentable")
                say(f"dropped: {message}")
            if eos is not None:
                files[side].write(np.array([eos], dtype="<u2").tobytes())
                here["tokens"] += 1
            if args.max_tokens and tokens > args.max_tokens:
                files[side].truncate(2 * total[side]["tokens"])
                break
            if piece.key < lowest_key:
                lowest_key, lowest = piece.key, (total[side]["tokens"], here)
            marks = pieces
            total[side].update(here)
            bar.update({"tokens": here["tokens"], "documents": 1}.get(bar.unit, 0))
    return total, lowest, marks


def last_tokens(path, total, marks, fraction, backend):
    """Of one text: the id at which its held-out end begins (where a character does), and the counts of that end."""
    ends = list(itertools.accumulate(mark[0] for mark in marks))
    first = min(int(total["tokens"] * (1 - fraction)), ends[-1] - 1)
    number = bisect.bisect_right(ends, first)  # the piece in which it lies
    begin = ends[number] - marks[number][0]
    ids = np.fromfile(path, "<u2", marks[number][0], offset=2 * begin).tolist()
    for at in range(first - begin, min(first - begin + 4, len(ids) + 1)):  # a character has at most four tokens
        before, end = (backend.decode(half, skip_special_tokens=False) for half in (ids[:at], ids[at:]))
        if before + end == backend.decode(ids, skip_special_tokens=False):
            break
    _, characters, size = map(sum, zip((0, len(end), len(end.encode())), *marks[number + 1:]))
    return begin + at, Counter(tokens=total["tokens"] - begin - at, characters=characters, bytes=size)


def fill_empty_side(folder, total, lowest, marks, fraction, backend):
    """Where all is on one side, gives the other one the end of the text, or of many documents that of lowest hash."""
    full, empty = ("train", "val") if total["train"] else ("val", "train")
    if total[empty] or not total[full]:
        return
    path, size = folder / f"{full}.bin", total[full]["tokens"]
    if total[full]["documents"] == 1:
        start, moved = last_tokens(path, total[full], marks, fraction, backend)
        start, moved = (start, moved) if full == "train" else (0, total[full] - moved)
    else:
        say(f"note: the hashes put all documents into {full}; {empty} gets that of lowest hash, until there are more")
        start, moved = lowest
    with open(path, "rb") as source, open(folder / f"{empty}.bin", "wb") as target, open(folder / "rest", "wb") as rest:
        for file, end in (rest, start), (target, start + moved["tokens"]), (rest, size):
            while block := source.read(min(BLOCK, 2 * end - source.tell())):
                file.write(block)
    os.replace(folder / "rest", path)
    total[full].subtract(moved)
    total[empty].update(moved)


def sha256(path, seen=None):
    """The file's digest; marks in seen, where given, the ids that the file has."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 * BLOCK):
            digest.update(block)
            if seen is not None:
                seen[np.frombuffer(block, "<u2")] = True
    return digest.hexdigest()


def fsync(path):
    if os.name != "nt" or path.is_file():  # Windows cannot do it to a folder
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def recover(out_dir, old):
    """Ends a replacement that was cut off between its two renames, or after them."""
    if old.exists() and not out_dir.exists():
        os.rename(old, out_dir)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def replacing(out_dir):
    """A folder to write in that then takes the place of out_dir, whole; after any error out_dir is as it was."""
    new, old = (out_dir.with_name(f".{out_dir.name}.{end}") for end in ("new", "old"))
    new.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
        lock = os.open(new, os.O_RDONLY)  # locks go with their process: a killed one leaves none
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out_dir {out_dir}: another prepare.py is writing there; wait for it to end")
    except ImportError:  # Windows has none
        lock = None
    try:
        recover(out_dir, old)
        there = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
        if there - WRITTEN or (there and "meta.json" not in there):
            what = ", ".join(sorted(there - WRITTEN)[:3]) or "data without meta.json"
            fail(f"--out_dir {out_dir}: holds {what}, not made by prepare.py, and is not replaced; name another folder")
        for path in new.iterdir():  # left by a killed run
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield new
        for path in (*new.rglob("*"), new):
            fsync(path)
        if out_dir.exists():
            os.rename(out_dir, old)
        os.rename(new, out_dir)  # a kill between these two renames is made good by the next start
        fsync(out_dir.parent)
    finally:
        recover(out_dir, old)
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)


# ---- all of it ----

def prepare(args):
    began, out_dir = time.monotonic(), Path(os.path.realpath(args.out_dir))  # of a link, what it leads to is replaced
    if args.tokenizer and os.path.exists(args.tokenizer) and not os.path.isfile(f"{args.tokenizer}/tokenizer.json"):
        fail(f"--tokenizer {args.tokenizer}: has no tokenizer.json; give the folder of a fast tokenizer, or a hub name")
    with replacing(out_dir) as folder:
        documents, one_text, source, no_text, bar = open_text(args)
        tokenizer, origin, no_tokenizer = load_tokenizer(args.tokenizer)
        stand_in = " and ".join(["text"] * no_text + ["tokenizer"] * no_tokenizer) or None
        if stand_in and is_real(out_dir):
            fail(f"--out_dir {out_dir}: holds real data and stays as it was, as the {stand_in} could not be fetched; "
                 "give local copies (--input, --tokenizer) or another --out_dir")
        if not one_text and tokenizer.eos_token_id is None:
            fail(f"--tokenizer {origin}: has no end-of-text token to set between documents; give it an eos_token")
        try:
            tokenizer.save_pretrained(folder / "tokenizer")
        except Exception as error:  # a full disk, in the words of a library
            fail(f"--out_dir {args.out_dir}: the tokenizer cannot be saved: {reason(error)}")
        backend = tokenizer.backend_tokenizer
        backend.encode_special_tokens = True  # text stays text
        with bar:
            parts = encode(in_pieces(documents, is_cuttable(backend)), backend)
            total, lowest, marks = write_ids(folder, parts, None if one_text else tokenizer.eos_token_id, args, bar)
        fill_empty_side(folder, total, lowest, marks, args.val_fraction, backend)
        train, val = total["train"]["tokens"], total["val"]["tokens"]
        if not train + val:
            fail(f"{source}: no text in it" + f" within --max_tokens {args.max_tokens}" * bool(args.max_tokens))
        if min(train, val) < 2:
            fail(f"{source}: too short: {train} training and {val} held-out tokens, and each needs 2; "
                 f"give more text, or another --val_fraction than {args.val_fraction}")
        meta = {"source": source, "tokenizer": origin, "stand_in": stand_in, "val_fraction": args.val_fraction,
                "vocab_size": 1 + max(tokenizer.get_vocab().values()), "eos_token_id": tokenizer.eos_token_id,
                **describe(folder, total)}
        meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    report(args.out_dir, meta, backend, time.monotonic() - began)


def describe(folder, total):
    """What meta.json says of the files."""
    train, val, seen = total["train"], total["val"], np.zeros(2**16, dtype=bool)
    return {
        **{key: train[key] + val[key] for key in ("characters", "bytes", "tokens", "documents")},
        "unrepresentable": train["lost"] + val["lost"], "train_tokens": train["tokens"],
        **{f"val_{key}": val[key] for key in ("tokens", "bytes", "characters")},
        "split": "val is the end of the text" if train["documents"] + val["documents"] == 1 else
                 "val is whole documents, chosen by the sha256 of the first MiB of each",
        "train_sha256": sha256(folder / "train.bin", seen), "val_sha256": sha256(folder / "val.bin", seen),
        "tokenizer_sha256": sha256(folder / "tokenizer" / "tokenizer.json"), "distinct_tokens": int(seen.sum())}


def is_real(out_dir):
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # what is damaged may be replaced
        return json.loads((out_dir / "meta.json").read_text(encoding="utf-8"))["stand_in"] is None


def report(out_dir, meta, backend, seconds):
    first = np.fromfile(Path(out_dir, "train.bin"), "<u2", 1500).tolist()
    text = backend.decode(first, skip_special_tokens=False)[:300]
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)  # nothing that moves the cursor
    lines = f"""\
text        {meta['source']}
tokenizer   {meta['tokenizer']}
characters  {meta['characters']:,} ({meta['bytes']:,} bytes) in {meta['documents']:,} document(s)
tokens      {meta['tokens']:,}: {meta['characters'] / meta['tokens']:.2f} characters per token
distinct    {meta['distinct_tokens']:,} of {meta['vocab_size']:,} tokens of the vocabulary
train, val  {meta['train_tokens']:,} and {meta['val_tokens']:,} tokens ({meta['split']})
written to  {out_dir} in {seconds:.1f} s; the first 300 characters:

{text}

next: python train.py config/smollm2.py{f' --data_dir={out_dir}' if out_dir != DEFAULT_OUT_DIR else ''}"""
    encoding = sys.stdout.encoding or "utf-8"
    print(lines.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    if meta["stand_in"]:
        say(f"""
  **************************************************************************************
  STAND-IN DATA: the {meta['stand_in']} could not be fetched.
  What was written is good for a try, not for results. With a network, or with
  --input FILE and --tokenizer FOLDER, run prepare.py again: it then replaces this.
  **************************************************************************************""")


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # all cores, also where the caller forks later on
    try:
        prepare(args)
    except BrokenPipeError:  # `prepare.py | head`: all is done but for the report
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        fail(f"stopped by Ctrl-C; {args.out_dir} is as it was", 130)
    except OSError as error:  # disk full, no permission, a name too long
        fail(f"{error.filename or args.out_dir}: {error.strerror or error}; {args.out_dir} is as it was")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: fail("stopped by SIGTERM; the data are as they were", 143))
    main()
