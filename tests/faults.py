"""Breaks the program, a line at a time, and asks the tests whether they notice.

    python -m tests.faults                 # all faults; a table (fault, caught by) at the end
    python -m tests.faults train 0 20      # faults 0 to 19 of train.py

Each fault is applied to a copy of the project, whose fast tests then run until the first one fails.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"train.py": ["test_train", "test_resume", "test_distributed"], "model.py": ["test_model"],
         "sample.py": ["test_sample"], "prepare.py": ["test_prepare", "test_train"]}
FAULTS = [  # script, what is wrong, the line, the line with the fault
    ("train.py", "torch's generator is not restored", 'torch.set_rng_state(state["torch"])', "pass"),
    ("train.py", "NumPy's generator is not restored", 'np.random.set_state(state["numpy"])', "pass"),
    ("train.py", "Python's generator is not restored", 'random.setstate(state["python"])', "pass"),
    ("train.py", "a checkpoint is not flushed to the disk", "os.fsync(f.fileno())", "pass"),
    ("train.py", "the checkpoint's name is not flushed", "os.fsync(folder)", "pass"),
    ("train.py", "written in place, not renamed", 'path.with_suffix(".tmp")', "path"),
    ("train.py", "the digest is not compared", "if not is_whole:", "if False:"),
    ("train.py", "a checkpoint may hold code", "weights_only=True", "weights_only=False"),
    ("train.py", "a batch begins one token late", "data.train[start:start + T + 1]",
     "data.train[start + 1:start + T + 2]"),
    ("train.py", "every epoch has the same order", "((seed, epoch))", "((seed, 0))"),
    ("train.py", "the cuts never move", "rng.integers(n - blocks * T) + T", "0 + T"),
    ("train.py", "all processes read the same rows", "run.sequence + machine.rank * share",
     "run.sequence"),
    ("train.py", "the place in the data is counted in steps of one", "self.sequence + size",
     "self.sequence + 1"),
    ("train.py", "the epoch is not counted", "self.epoch += epochs", "pass"),
    ("train.py", "tokens are not counted on", '"sequence", "tokens", "seconds", "best")\n\n    def',
     '"sequence", "seconds", "best")\n\n    def'),
    ("train.py", "another block size keeps its place", "self.epoch += self.sequence > 0", "return"),
    ("train.py", "the rate is one step late", "(step + 1) / warmup", "step / warmup"),
    ("train.py", "the warm-up counts as decay", "(step - warmup) / (end - warmup)", "step / end"),
    ("train.py", "min_lr is not held", "return lowest\n", "return 0.0\n"),
    ("train.py", "the norms decay, too", '"weight_decay": 0.0}', '"weight_decay": config.weight_decay}'),
    ("train.py", "nothing is clipped", "config.grad_clip or math.inf", "math.inf"),
    ("train.py", "micro-batches are summed", "(part / len(parts)).backward()", "(part).backward()"),
    ("train.py", "gradients of two steps are added", "zero_grad(set_to_none=True)", "state_dict()"),
    ("train.py", "a loss of NaN changes the weights", "if not math.isfinite(loss) or not", "if not"),
    ("train.py", "fp16 steps on an infinite gradient", "if not is_skipped:", "if True:"),
    ("train.py", "processes sum their losses", "loss / machine.world_size, torch", "loss, torch"),
    ("train.py", "held-out windows overlap", "starts = range(0, n, T)", "starts = range(0, n, T - 1)"),
    ("train.py", "a sample draws from the training's generator", "generator=generator)", "generator=None)"),
    ("train.py", "the best is the worst", 'row["val_loss"] < run.best', 'row["val_loss"] > run.best'),
    ("train.py", "the best checkpoint is deleted", 'kept.add(run.best["step"])', "pass"),
    ("train.py", "the one before is deleted, too", "[-config.keep_checkpoints:]", "[-1:]"),
    ("train.py", "the optimizer starts anew", "optimizer.load_state_dict(", "dict("),
    ("train.py", "the loss scale starts anew", "self.scaler.load_state_dict(", "dict("),
    ("train.py", "steps beyond the checkpoint stay in metrics.jsonl", "(keepends=True)[:step]", "(keepends=True)"),
    ("train.py", "a signal is not heeded", "self.asked = self.asked or self.alone", "pass"),
    ("train.py", "a stopped run exits with 0", "raise SystemExit(128 + stop.signum)\n    best", "return\n    best"),
    ("train.py", "two processes write one run", "held.acquire(timeout=0)", "pass"),
    ("train.py", "a rate below min_lr climbs", '("min_lr", c.min_lr, "learning_rate", c.learning_rate)',
     '("min_lr", 0, "learning_rate", 0)'),
    ("train.py", "another tokenizer is taken", 'if old["tokenizer"] != new["tokenizer"]:', "if False:"),
    ("train.py", "other data are taken", 'if old != new and "data_dir"', 'if False and "data_dir"'),
    ("train.py", "later checkpoints are not set aside", "if step_of(path) > run.step:", "if False:"),
    ("train.py", "changes are not named", "    if changes:\n", "    if False:\n"),
    ("model.py", "eps is left out", " + self.eps)", ")"),
    ("model.py", "the rotation turns the other way", "torch.cat((-angles, angles)", "torch.cat((angles, -angles)"),
    ("model.py", "the embedding is not tied", "self.lm_head.weight = self.model.embed_tokens.weight  # tied",
     "pass  # tied"),
    ("model.py", "eager attention sees the future", "is_causal=True", "is_causal=False"),
    ("model.py", "the mask is one key too wide", ".triu(i + 1)", ".triu(i + 2)"),
    ("model.py", "the norm comes after the attention", "self.self_attn(self.input_layernorm(x)",
     "self.self_attn((x)"),
    ("model.py", "ignored targets count", "count = (targets >= 0).sum()", "count = (targets >= -100).sum()"),
    ("model.py", "top_p drops the token that crosses the line", "before >= top_p", "before + probs > top_p"),
    ("model.py", "the penalty rewards", "past > 0, past / repetition_penalty, past * repetition_penalty",
     "past > 0, past * repetition_penalty, past / repetition_penalty"),
    ("model.py", "one position too many", "if size > limit:", "if size > limit + 1:"),
    ("model.py", "an old GPU gets bf16", "if major >= 8:", "if major >= 7:"),
    ("prepare.py", "a file is not flushed to the disk", "os.fsync(handle)", "pass"),
    ("prepare.py", "a changed meta.json is taken", "!= meta_digest(meta)", "== 0"),
    ("prepare.py", "an id beyond the vocabulary is let through", 'largest >= meta["vocab_size"]', "False"),
    ("prepare.py", "lost characters are not seen", "if back != piece:", "if False:"),
    ("prepare.py", "the byte order mark stays", '.removeprefix("\\ufeff")', ""),
    ("sample.py", "a stop text is shown", "return self.take(min(found))", "return self.take(len(self.waiting))"),
    ("sample.py", "the beginning of a stop text is shown", "begun = max(begun, n)", "pass"),
    ("sample.py", "the prompt is cut", 'print(prompt, end="", flush=True)', 'print(prompt[1:], end="", flush=True)'),
    ("sample.py", "text goes on after the end", "if not stream.ended and token != eos:", "if not stream.ended:"),
    ("sample.py", "any tokenizer is taken", 'if digest.startswith(state["data"]["tokenizer"]):', "if True:"),
    ("sample.py", "the seed is not used", ".manual_seed(args.seed)", ".manual_seed(1)"),
]


def caught_by(script, line, fault):
    """The first test that fails with the fault in place; None where none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out*", "data", "__pycache__"))
        text = (copy / script).read_text(encoding="utf-8")
        if line not in text:
            return "NO SUCH LINE"
        (copy / script).write_text(text.replace(line, fault, 1), encoding="utf-8")
        for name in TESTS[script]:
            slow = [] if name == "test_distributed" else ["-m", "not slow"]
            done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *slow, f"tests/{name}.py"],
                                  cwd=copy, capture_output=True, text=True)
            if done.returncode:
                found = re.search(r"^(?:FAILED|ERROR) tests/(\S+?\.py(?:::\w+)?)", done.stdout, re.M)
                return found[1].replace("::", ": ") if found else done.stdout[-300:] + done.stderr[-300:]
    return None


def main():
    script, first, last = (sys.argv[1:] + ["", "0", "999"][len(sys.argv) - 1:])[:3]
    chosen = [fault for fault in FAULTS if fault[0].startswith(script)][int(first):int(last)]
    rows = []
    for script, what, line, fault in chosen:
        rows.append((script, what, caught_by(script, line, fault)))
        print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
    missed = [what for _, what, test in rows if test in (None, "NO SUCH LINE")]
    sys.exit(f"not caught: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
