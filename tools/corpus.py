"""Turns many documents into token ids for train.py, in the same format as prepare.py.

    python -m tools.corpus --input notes/ 'more/*.jsonl.gz' --out_dir data/mine
    python -m tools.corpus --dataset HuggingFaceTB/smollm-corpus:cosmopedia-v2 \\
        --max_tokens 100_000_000 --allow_unrepresentable --out_dir data/cosmopedia

Files: .txt and .md (each a document), .jsonl and .json (many documents, in the field --column; an
object a line, or a list), all these also as .gz; .parquet and .arrow. Whole documents are held
out, chosen by the sha256 of their first MiB alone, so that adding documents moves none to the other
side. <|endoftext|> follows each of them. Everything is streamed: memory holds one batch and the
longest document (a list in .json: all of it).
"""
import contextlib
import glob
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import prepare

READERS = {".jsonl": "lines", ".json": "lines", ".parquet": "parquet", ".arrow": "arrow"}
PACKED = "parquet", "arrow"  # read by libraries
NO_DOCUMENTS = ("dataset_info.json", "dataset_dict.json", "state.json")  # save_to_disk writes them
BATCH = 2**22  # characters encoded together


# ---- reading: documents are pairs of a name, for messages, and a text ----

def suffix(path):
    """What kind of file this is: ".jsonl" for a.jsonl and for a.jsonl.gz."""
    return Path(path.lower().removesuffix(".gz")).suffix


def find_files(inputs):
    """The files that --input names, each once, in order. Raises ValueError, OSError."""
    files = {}
    for given in inputs:
        found = [given]
        if os.path.isdir(given):
            found = files_below(given)
        elif not os.path.exists(given):
            found = [file for match in sorted(glob.glob(given, recursive=True)) for file in
                     (files_below(match) if os.path.isdir(match) else [match])]
        if not found:
            raise ValueError(f"--input {given}: no such file, or none of a kind that is read here")
        for file in found:
            if not os.path.isfile(file):  # a pipe or a device could block for ever
                raise ValueError(f"--input {file}: not a regular file")
            with open(file, "rb") as opened:  # unreadable? better now than after an hour
                if READERS.get(suffix(file)) in PACKED and not opened.read(1):
                    raise ValueError(f"--input {file}: it is empty; delete or download it again")
                files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def files_below(folder):
    """The files of the known kinds in a folder, and in those below, but for hidden ones."""
    found = []
    for path, folders, names in os.walk(folder, onerror=raise_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(path, name)):  # it could lead back up
                prepare.log(f"{os.path.join(path, name)}: a link to a folder; give it as --input")
        for name in names:
            is_known = suffix(name) in (".txt", ".md", *READERS) and name not in NO_DOCUMENTS
            if is_known and not re.match(r"\.|cache-.*\.arrow", name):  # (the library's caches)
                found.append(os.path.join(path, name))
    return sorted(found)


def raise_error(error):
    raise error  # os.walk would pass over an unreadable folder in silence


def read_files(files, column):
    """Yields the documents of files."""
    for file in files:
        kind = READERS.get(suffix(file))
        if kind in PACKED and file.lower().endswith(".gz"):
            raise ValueError(f"--input {file}: cannot be read packed; gunzip it first")
        if kind == "lines":
            yield from read_records(read_lines(file), file, column)
        elif kind == "parquet":
            yield from read_records(read_parquet(file), file, column)
        elif kind == "arrow":
            name = glob.escape(os.path.abspath(file))
            stream = open_stream(file, kind, data_files=[name], split="train")
            yield from read_records(stream, file, column)
        else:
            yield file, read_text(file)  # the library's own reader changes line ends


def read_lines(file):
    """Yields the records of a .jsonl or .json file. (The library takes the types of all its fields,
    also of those that nobody asked for, from the first 10 MB, and ends where a later record
    differs; and where a list has a text that is none, it quotes all others.)"""
    opened = gzip.open if file.lower().endswith(".gz") else open
    may_be_one = suffix(file) == ".json"  # that is printed over several lines
    with opened(file, "rt", encoding="utf-8-sig") as lines:
        for line in filter(str.strip, lines):
            try:
                found = json.loads(line)
            except ValueError:
                if not may_be_one:
                    raise
                found = json.loads(line + lines.read())
            may_be_one = False
            for record in found if isinstance(found, list) else [found]:
                yield {"text": record} if isinstance(record, str) else dict(record)


def read_parquet(file):
    """Yields the records of a .parquet file. (datasets would read a group of rows at once, which
    often is the file.)"""
    datasets_library(file)
    from pyarrow.parquet import ParquetFile
    for batch in ParquetFile(file).iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def read_text(file):
    content = Path(file).read_bytes()
    if file.lower().endswith(".gz"):
        with prepare.explaining(f"--input {file}: broken gzip"):
            content = gzip.decompress(content)
    return prepare.decode_text(file, content)


def datasets_library(shown):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{shown}: the `datasets` library is missing: "
                         "pip install -r tools/requirements.txt") from None
    return datasets


def open_stream(shown, *args, **options):
    """Records, one after the other, by the `datasets` library. Raises ValueError."""
    datasets = datasets_library(shown)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it also raises
    with prepare.explaining(shown):  # the network, a wrong name, a broken file
        stream = datasets.load_dataset(*args, streaming=True, **options)
    if stream.info.builder_name == "text":
        raise ValueError(f"{shown}: holds text files, of which the library makes each line a "
                         "document; give them as --input")
    return stream


def read_records(stream, shown, column):
    """Yields the documents of a stream of records. Raises ValueError with the record's number."""
    number, records = 0, iter(stream)
    while True:
        number += 1
        with prepare.explaining(f"{shown}: after record {number - 1}"):
            record = next(records, None)
        if record is None:
            return
        if column not in record:
            raise ValueError(f"--column {column}: not in {shown}, which has {', '.join(record)}")
        text = record[column]
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"--column {column}: record {number} of {shown} has {kind}, not text")
        with prepare.explaining(f"record {number} of {shown} is not Unicode"):
            (text or "").encode()  # half a surrogate pair, as where an emoji was cut
        yield f"record {number} of {shown}", text or ""


# ---- encoding and writing ----

def next_batch(documents, characters):
    """The next documents, until they have that many characters; none at the end."""
    batch = []
    for name, text in documents:
        if text:  # an empty document is none
            batch.append((name, text))
            characters -= len(text)
        if characters <= 0:
            break
    return batch


def encode(documents, tokenizer):
    """Yields each name and text, its ids, and what they decode to; all are encoded together."""
    pieces = [prepare.cut(text, tokenizer) for _, text in documents]
    ids, decoded = map(iter, prepare.encode([*chain(*pieces)], tokenizer))
    for (name, text), parts in zip(documents, pieces):
        count = len(parts)
        yield name, text, np.concatenate([*islice(ids, count)]), "".join(islice(decoded, count))


def is_held_out(text, val_fraction):
    """By the hash of the text's first MiB, which is spread evenly over [0, 1)."""
    first = text[:2**20].encode()[:2**20]
    return int(hashlib.sha256(first).hexdigest()[:13], 16) / 16**13 < val_fraction


def write_documents(documents, folder, tokenizer, eos, args):
    """Writes train.bin and val.bin, and returns what is in each side: a Counter of counts."""
    counts = {"train": Counter(), "val": Counter()}
    limit, done = args.max_tokens or float("inf"), 0
    with contextlib.ExitStack() as stack:
        files = {side: stack.enter_context(open(folder / f"{side}.bin", "wb")) for side in counts}
        bar = stack.enter_context(tqdm(total=args.max_tokens, unit=" tokens", unit_scale=True,
                                       leave=False, delay=3, mininterval=1))
        # A token has a byte at least, so a batch of as many characters as tokens are missing
        # hardly reads more than is taken.
        while batch := next_batch(documents, min(BATCH, limit - done)):
            for name, text, ids, decoded in encode(batch, tokenizer):
                ids = np.append(ids, np.uint16(eos))
                if done + len(ids) > limit:
                    return counts
                prepare.check_decoded(name, text, decoded, args.allow_unrepresentable)
                side = "val" if is_held_out(text, args.val_fraction) else "train"
                files[side].write(ids)
                counts[side].update(documents=1, tokens=len(ids), characters=len(text),
                                    bytes=len(text.encode()))
                done += len(ids)
                bar.update(len(ids))
    return counts


def check_sides(counts, args):
    """Raises ValueError where one side is empty; says so where it is far from what was asked."""
    train, val = counts["train"]["tokens"], counts["val"]["tokens"]
    documents = counts["train"]["documents"] + counts["val"]["documents"]
    if not documents:
        raise ValueError("there is no text in it, or none within --max_tokens")
    if documents == 1:
        raise ValueError("this is one document, and whole ones are held out; for one text, whose "
                         "end is held out: python prepare.py --input FILE")
    if min(train, val) < 2:
        raise ValueError(f"the hashes of {documents:,} documents leave {min(train, val)} tokens on "
                         "one side; give more, cut them smaller, or take another --val_fraction")
    share = val / (train + val)
    is_near = args.val_fraction / 2 <= share <= args.val_fraction * 2
    if not is_near or 1 - share < (1 - args.val_fraction) / 2:
        prepare.log(f"note: {share:.2%} of the tokens are held out, and --val_fraction asks for "
                    f"{args.val_fraction:.2%}: whole documents are held out, chosen by hash, and "
                    "these are few or of very different sizes; give more, or cut long ones smaller")


# ---- the command line ----

def parse_args(argv):
    parser = prepare.new_parser("tools.corpus", __doc__)
    prepare.add_data_options(parser, "data/corpus")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", action="extend", type=prepare.typed_path,
                        metavar="PATH", help="files, folders, globs")
    source.add_argument("--dataset", type=prepare.typed_path, metavar="NAME",
                        help="of the hub: USER/NAME[@REVISION][:CONFIG]")
    parser.add_argument("--split", help="of the dataset [train]")
    parser.add_argument("--column", default="text", help="field with the text [text]")
    parser.add_argument("--max_tokens", type=prepare.number(int, 1), metavar="N",
                        help="stop before the document that would pass N tokens [none]")
    args = parser.parse_args(argv)
    if args.split and not args.dataset:
        parser.error("argument --split: goes with --dataset only")
    if args.dataset and os.path.isfile(args.dataset):
        parser.error(f"argument --dataset: {args.dataset} is a file; give it as --input")
    return args


def open_documents(args):
    """The documents that args name, and what they are called in meta.json."""
    if args.input:
        files = find_files(args.input)
        names = [os.path.basename(file) for file in files[:3]]
        if len(files) > 3:
            names.append(f"... ({len(files):,} files)")
        return read_files(files, args.column), ", ".join(names)
    split, shown = args.split or "train", args.dataset
    name, _, config = args.dataset.partition(":")
    name, _, revision = name.partition("@")
    if os.path.isdir(args.dataset):  # a copy on this machine, whose folders are nobody's business
        name, config, revision = args.dataset, None, None
        shown = os.path.basename(os.path.realpath(args.dataset))
    stream = open_stream(f"--dataset {args.dataset}", name, config or None, split=split,
                         revision=revision or None)
    return read_records(stream, shown, args.column), f"{shown}, split {split}"


def prepare_corpus(args):
    """Prepares the documents as args say; returns the facts. Raises OSError, ValueError."""
    with prepare.replacing(args.out_dir) as folder:
        documents, source = open_documents(args)
        tokenizer, facts = prepare.prepare_tokenizer(args, source, folder)
        if args.dataset and facts["stand_in"]:  # (the hub was there a moment ago)
            raise ValueError(f"--tokenizer {args.tokenizer}: could not be fetched; try again, or "
                             "name a folder")
        if facts["eos_token_id"] is None:
            raise ValueError(f"--tokenizer {facts['tokenizer']}: it has no end-of-text token to "
                             "set between documents; give it an eos_token")
        counts = write_documents(documents, folder, tokenizer, facts["eos_token_id"], args)
        check_sides(counts, args)
        for side, count in counts.items():
            facts |= {f"{side}_{what}": number for what, number in count.items()}
        prepare.write_meta(folder, facts)
    return facts


@prepare.command("tools.corpus")
def main(argv=None):
    args = parse_args(argv)
    prepare.report(args.out_dir, prepare_corpus(args))


if __name__ == "__main__":
    main()
