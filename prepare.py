"""Turns one text into token ids for train.py.

    python prepare.py                                        # Tiny Shakespeare, in data/shakespeare
    python prepare.py --input book.txt --out_dir data/book   # a text of your own, in UTF-8
    python -m tools.corpus --help                            # many documents: folders, JSONL, hubs

The first nine tenths of the characters train, the rest is held out, as nanoGPT cuts the same text.
A "<|endoftext|>" in it is text like any other. A byte order mark is dropped, every other byte kept
(line ends too): the ids are decoded and compared with the text.
"""
import sys

if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed, and this is {sys.version.split()[0]}")

import argparse
import codecs
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tqdm import tqdm

DEFAULT_OUT_DIR = "data/shakespeare"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of Tiny Shakespeare
TOKENIZER = "HuggingFaceTB/SmolLM2-135M@93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
SPECIAL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep>
    <filename> <gh_stars> <issue_start> <issue_comment> <issue_closed> <jupyter_start>
    <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> <empty_output>""".split()
GPT2_WORDS = ByteLevel(add_prefix_space=False)  # how a text is cut into words
SMOLLM2_WORDS = Sequence([Digits(individual_digits=True), GPT2_WORDS])
CORPUS = r"(?i)\.(jsonl?|parquet|arrow)$"  # names of files of many documents
FILES = {"train": "train.bin", "val": "val.bin", "tokenizer": "tokenizer/tokenizer.json"}


# ---- the data format: FILES (.bin is raw uint16) and meta.json ----

class Data:
    """A prepared folder: train and val (uint16 ids, on disk), tokenizer, meta (what meta.json
    says; train.py wants source, stand_in, vocab_size, val_tokens and val_bytes of it),
    tokens_per_byte of val, and fingerprint, which tells data from other data, under any name.

    Raises FileNotFoundError where nothing is prepared, ValueError where something was changed."""

    def __init__(self, folder):
        folder = self.folder = Path(folder)
        content = (folder / "meta.json").read_bytes()
        with explaining(f"{folder} is damaged"):  # anything may have been written into it
            meta = self.meta = json.loads(content)
            changed = seal(folder, meta).items() - meta.items()
            if changed:
                raise ValueError(f"{max(changed)[0]} does not fit: something was changed")
            self.fingerprint = {name: meta[f"{name}_sha256"][:16] for name in FILES}
            self.tokens_per_byte = meta["val_tokens"] / meta["val_bytes"]
            self.train = np.memmap(folder / "train.bin", "<u2", "r")
            self.val = np.memmap(folder / "val.bin", "<u2", "r")
            self.tokenizer, _ = open_tokenizer(folder / "tokenizer")
            largest = max(self.train.max(), self.val.max())
            if largest >= meta["vocab_size"]:
                raise ValueError(f"id {largest} is not below vocab_size {meta['vocab_size']}")


def write_meta(folder, facts):
    (folder / "meta.json").write_text(json.dumps(seal(folder, facts), indent=2) + "\n")


def seal(folder, facts):
    """What meta.json says: these facts, the digest of each file, and the digest of all this."""
    meta = facts | {f"{name}_sha256": digest(folder / file) for name, file in FILES.items()}
    meta.pop("sha256", None)
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    return meta


def digest(path):
    """The sha256 of a file; "" where there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- text and tokenizer ----

SIGNATURES = {  # how a file begins that is no UTF-8 text: what it is, and what to do
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32: iconv -f UTF-32 -t UTF-8 {} > new.txt",
    rb"\xff\xfe|\xfe\xff": "UTF-16: iconv -f UTF-16 -t UTF-8 {} > new.txt",
    rb"\x1f\x8b": "gzip: gunzip < {} > new.txt",
    rb"%PDF": "PDF: pdftotext {} new.txt",
    rb"PAR1|ARROW1": "Parquet or Arrow: name it so, for python -m tools.corpus",
    rb"PK\x03\x04|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd":
    "packed (zip, as .docx is, bzip2, xz, Zstandard): unpack it, and save the text as UTF-8",
    rb"(?s).{,999}?(.\0){4}": "zero bytes, as in UTF-16: iconv -f UTF-16LE -t UTF-8 {} > new.txt"}


def decode_text(path, content):
    """The text in a file's content; ValueError says what else it is, and what to do."""
    quoted = shlex.quote(path)
    for beginning, advice in SIGNATURES.items():
        if re.match(beginning, content):
            raise ValueError(f"--input {path}: not UTF-8 text, but {advice.format(quoted)}")
    with explaining(f"--input {path}: not UTF-8 text (if it is from Windows: iconv -f CP1252 "
                    f"-t UTF-8 {quoted} > new.txt)"):
        return content.decode().removeprefix("\ufeff")


def stand_in_text():
    from pydoc_data.topics import topics  # the language reference: it ships inside every Python
    return "\n".join(topics.values())


def choose_text(path):
    """A file's text and name; for URL, Tiny Shakespeare or what stands in for it."""
    if path != URL:
        return decode_text(path, Path(path).read_bytes()), Path(path).name
    from huggingface_hub.utils import http_backoff
    try:
        content = http_backoff("GET", URL, timeout=10, max_retries=2).content
        if hashlib.sha256(content).hexdigest() != SHA256:  # an error page never becomes data
            raise ValueError(f"what came is something else: {content[:40]!r}")
        return content.decode(), f"Tiny Shakespeare ({URL})"
    except Exception as error:  # refused, timed out, ...
        log(f"Tiny Shakespeare: {first_line(error)}")
    return stand_in_text(), "stand-in: Python's language reference (pydoc_data.topics)"


def open_tokenizer(folder):
    """(tokenizer, the id that ends a text or None), to encode prompts and to decode.

    Of the library `tokenizers`: importing transformers takes a second. Raises ValueError."""
    end = SPECIAL_TOKENS[0]
    with explaining(f"{folder}/tokenizer.json does not load"):
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        with suppress(FileNotFoundError):
            config = json.loads(Path(folder, "tokenizer_config.json").read_bytes())
            end = config.get("eos_token") or end
        if isinstance(end, dict):  # as older files have it
            end = end["content"]
        return tokenizer, tokenizer.token_to_id(end)


def hub_folder(name):
    """The folder of the hub's cache with the tokenizer of NAME or NAME@REVISION; never code."""
    from huggingface_hub import snapshot_download
    name, _, revision = name.partition("@")
    return snapshot_download(name, revision=revision or None, allow_patterns=["tokenizer*.json"])


def stand_in_tokenizer(folder):
    """Makes a folder with a byte-level BPE of the stand-in text, else like SmolLM2's tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.pre_tokenizer = SMOLLM2_WORDS
    lines = stand_in_text().splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, 8192, min_frequency=0, special_tokens=SPECIAL_TOKENS,
                                  show_progress=False)
    folder.mkdir()
    tokenizer.save(f"{folder}/tokenizer.json")
    return folder


def choose_tokenizer(name, new):
    """(folder, name) of a tokenizer here or on the hub, or of a stand-in for TOKENIZER, in new."""
    if os.path.exists(name):
        return name, Path(name).resolve().name
    try:
        return hub_folder(name), name
    except Exception as error:
        if name != TOKENIZER:
            raise
        log(f"{name}: {first_line(error)}")
    return stand_in_tokenizer(new), "stand-in: byte-level BPE trained on pydoc_data.topics"


def prepare_tokenizer(args, source, folder):
    """Chooses the tokenizer and writes its files. Returns (tokenizer, facts for meta.json).

    Raises ValueError where it cannot be used, or would bring a stand-in in place of real data."""
    from transformers import PreTrainedTokenizerFast
    folder = folder / "tokenizer"
    with explaining(f"--tokenizer {args.tokenizer}: cannot copy it from a folder or the hub"):
        origin, name = choose_tokenizer(args.tokenizer, folder)
        tokenizer, end = open_tokenizer(origin)
        # AutoTokenizer goes by the class's name and so loses Digits (seen with transformers 5.23).
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            origin, tokenizer_object=tokenizer, local_files_only=True)
        tokenizer.eos_token_id = end
        tokenizer.save_pretrained(folder)
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    if vocab_size > 65_536:
        raise ValueError(f"--tokenizer {name}: {vocab_size:,} tokens; at most 65,536 fit uint16")
    names = {"text": source, "tokenizer": name}
    stand_in = " and ".join(what for what in names if names[what].startswith("stand-in: "))
    if stand_in:
        log(f"*** STAND-IN DATA: the {stand_in} could not be fetched. For a try, not for results:\n"
            "*** with a network, or --input FILE and --tokenizer FOLDER, prepare again.")
    with suppress(FileNotFoundError):  # (nothing is prepared there yet)
        if stand_in and not Data(args.out_dir).meta["stand_in"]:
            raise ValueError(f"--out_dir {args.out_dir}: its real data stay; name another folder")
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    return backend, {"source": source, "tokenizer": name, "val_fraction": args.val_fraction,
                     "stand_in": stand_in or None, "eos_token_id": end, "vocab_size": vocab_size}


# ---- ids ----

# GPT-2's pattern, with or without Digits before it, always ends a word before a space or line feed
# that follows no white space: none of its alternatives 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+|
#  ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ runs on over such a place. So a text is cut there, and else not.
# In pieces much longer than 4,096 characters the encoder is slower (its caches).
PIECES = re.compile(r".{4096}.*?(?<=\S)(?=[ \n])|.*", re.DOTALL)
BATCH = 1024  # pieces handed to all cores at once


def cut(text, tokenizer):
    """A text in PIECES, if these surely have the ids of the whole; for other tokenizers uncut."""
    words = str(tokenizer.pre_tokenizer) in map(str, (GPT2_WORDS, SMOLLM2_WORDS))
    special = all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    return PIECES.findall(text) if words and special and not tokenizer.normalizer else [text]


def encode(pieces, tokenizer):
    """Two lists, made on all cores: the ids (uint16) of each piece, and what they decode to."""
    ids, decoded = [], []
    for first in tqdm(range(0, len(pieces), BATCH), leave=False, delay=3):  # a bar after 3 seconds
        codes = tokenizer.encode_batch_fast(pieces[first:first + BATCH], add_special_tokens=False)
        codes = [code.ids for code in codes]
        ids += [np.array(code, "<u2") for code in codes]
        decoded += tokenizer.decode_batch(codes, skip_special_tokens=False)
    return ids, decoded


def check_decoded(name, text, decoded, allowed):
    """Raises ValueError where a character of a text has no token, unless that is allowed."""
    if decoded != text:
        place = min(len(os.path.commonprefix([text, decoded])), len(text) - 1)
        message = f"no token for U+{ord(text[place]):04X} as it is, character {place:,} of {name}"
        if not allowed:
            raise ValueError(f"{message}; remove such characters, or --allow_unrepresentable")
        log(f"dropped: {message}, and perhaps others")


# ---- writing: a new folder, then two renames ----

def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # (some file systems flush no folders)
            raise
    os.close(handle)


@contextmanager
def replacing(out_dir):
    """A folder to write in, which then takes the place of out_dir; after an error nothing did."""
    out_dir = Path(os.path.realpath(out_dir))  # of a link, what it leads to is replaced
    if Path.cwd().is_relative_to(out_dir) or out_dir.is_mount():  # neither can be replaced
        raise ValueError(f"--out_dir {out_dir}: you are in it, or it is a disk; name one below")
    is_parent_new = not out_dir.parent.exists()
    work = out_dir.with_name(f".{out_dir.name}.part")
    new, old = work / "new", work / "old"
    lock = FileLock(work / "lock", timeout=0)
    with explaining(f"--out_dir {out_dir}: cannot write there, or another process does"):
        lock.acquire()  # makes the folder of the file, too
    try:
        if old.exists() and not out_dir.exists():  # killed between the two renames
            old.rename(out_dir)
        names = set(os.listdir(out_dir)) if out_dir.exists() else set()
        if {"tokenizer", "meta.json"} <= names:  # what prepare.py made may be replaced
            names -= {"train.bin", "val.bin", "meta.json", "tokenizer", ".DS_Store"}  # (Finder's)
        if names:
            raise ValueError(f"--out_dir {out_dir}: holds {min(names)}; name a new folder")
        for rest in new, old:
            shutil.rmtree(rest, ignore_errors=True)
        new.mkdir()
        yield new
        for path in *new.rglob("*"), new:
            fsync(path)
        if out_dir.exists():
            out_dir.rename(old)
        new.rename(out_dir)
        fsync(out_dir.parent)
    finally:
        if out_dir.exists() or not old.exists():  # else the next start puts the old data back
            shutil.rmtree(work, ignore_errors=True)  # while the lock in it is held
        lock.release()
        if is_parent_new:
            with suppress(OSError):
                out_dir.parent.rmdir()  # after an error: if there is anything in it, it stays


# ---- the command line ----

class Unbreakable(codecs.StreamWriter):  # (what it does not define is the stream's own)
    """A standard stream: what nobody can read any more is lost, and ends no work."""

    def write(self, text):
        with suppress(OSError, ValueError):  # a closed pipe, a full disk
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        pass  # write did


def protect_streams():
    """Nothing that is printed can end the work; no file of it takes a closed stream's number."""
    for name in "stdin", "stdout", "stderr":
        stream = getattr(sys, name) or open(os.devnull, "r+")
        with suppress(Exception):  # (a stdin that was read, a notebook's stream)
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Unbreakable(getattr(stream, "stream", stream)))  # (once, if it is one)


def log(message):
    print(message, file=sys.stderr)


def fail(program, message, code=1):
    log(f"{program}: {first_line(message)}")
    raise SystemExit(code)


def first_line(error):
    """What an error says; libraries like to add paragraphs."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def explaining(what):
    """Whatever goes wrong within, in the words of any library, becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {first_line(error)}")


@contextmanager
def command(program):
    """Turns an early end of the work within into one line on standard error and an exit code."""
    def stop(signum, frame):
        fail(program, f"stopped by {signal.Signals(signum).name}", 128 + signum)
    protect_streams()
    for signum in signal.SIGTERM, signal.SIGINT:
        signal.signal(signum, stop)
    try:
        yield
    except (OSError, ValueError, MemoryError) as error:
        fail(program, error)


def new_parser(program, description):
    """An argparse parser whose errors are one line."""
    parser = argparse.ArgumentParser(program, description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda problem: fail(
        program, problem.replace("one argument", "a value, as in --key=value"), 2)
    return parser


def add_data_options(parser, out_dir):
    """What the command lines of prepare.py and tools.corpus share."""
    add = parser.add_argument
    add("--tokenizer", type=typed_path, default=TOKENIZER,
        help=f"a hub name, or a folder with tokenizer.json [{TOKENIZER}]")
    add("--out_dir", type=typed_path, default=out_dir,
        help=f"prepared data in it are replaced, anything else is not [{out_dir}]")
    add("--val_fraction", type=number(float, 1e-6, 1 - 1e-6), default=0.1, help="held out [0.1]")
    add("--allow_unrepresentable", action="store_true",
        help="drop characters that the tokenizer has no token for [they are an error]")


def typed_path(text):
    """A path or name as a shell takes it."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is empty, or not a name")
    return os.path.expanduser(text)


def number(kind, low, high=2**63 - 1):
    """An argparse type: an int or a float from low to high."""
    def convert(text):
        if not low <= kind(text) <= high:  # not true of nan, too
            raise argparse.ArgumentTypeError(f"{text}: must be {low} or more, and at most {high}")
        return kind(text)
    convert.__name__ = kind.__name__
    return convert


def parse_args(argv=None):
    """prepare.py's command line; more than one text is answered with the command for that."""
    parser = new_parser("prepare.py", __doc__)
    add_data_options(parser, DEFAULT_OUT_DIR)
    parser.add_argument("--input", type=typed_path, default=URL, metavar="FILE",
                        help="one text in UTF-8 [Tiny Shakespeare]")
    args, odd = parser.parse_known_args(argv)
    if odd or os.path.isdir(args.input) or re.search(CORPUS, args.input):
        parser.error(f"one text is taken, not {shlex.join(odd) or args.input} (see --help); many: "
                     f"python -m tools.corpus {shlex.join(argv or sys.argv[1:])}")
    return args


def prepare(args):
    """Prepares one text as args say; returns the facts of it. Raises OSError, ValueError."""
    with replacing(args.out_dir) as folder:
        text, source = choose_text(args.input)
        tokenizer, facts = prepare_tokenizer(args, source, folder)
        end = int((1 - args.val_fraction) * len(text))  # by default nanoGPT's int(0.9 * len(text))
        for name, side in (("train", text[:end]), ("val", text[end:])):
            ids, decoded = encode(cut(side, tokenizer), tokenizer)
            ids = np.concatenate(ids)
            check_decoded(f"{source} ({name} side)", side, "".join(decoded),
                          args.allow_unrepresentable)
            if len(ids) < 2:
                raise ValueError(f"{source}: only {len(ids)} tokens on the {name} side; give more")
            (folder / f"{name}.bin").write_bytes(ids)
            facts |= {f"{name}_tokens": len(ids), f"{name}_characters": len(side),
                      f"{name}_bytes": len(side.encode())}
        write_meta(folder, facts)
    return facts


def report(out_dir, facts):
    """Shows what was written, and what to do with it."""
    print(f"""\
text        {facts['source']}
tokenizer   {facts['tokenizer']}
tokens      {facts['train_tokens']:,} to train on, {facts['val_tokens']:,} held out
next: python train.py config/smollm2.py --data_dir={shlex.quote(out_dir)}""")


@command("prepare.py")
def main(argv=None):
    args = parse_args(argv)
    report(args.out_dir, prepare(args))


if __name__ == "__main__":
    main()
