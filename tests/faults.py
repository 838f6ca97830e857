"""Breaks the program, a line at a time, and asks the test that should notice whether it does.

    python -m tests.faults                 # all the faults that tests/README.md lists
    python -m tests.faults sample 0 3      # the first three of sample.py

Each fault is applied to a copy of the project. A fault that its test does not see is an error.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def listed(wanted):
    """The faults whose rows in the README's last block begin so, as (row, the test above it)."""
    block = (ROOT / "tests" / "README.md").read_text(encoding="utf-8").split("```")[-2]
    rows, test = [], ""
    for line in block.splitlines()[1:]:
        if not line.startswith("  "):
            test = line
        elif line.strip().startswith(wanted):
            rows.append((line.strip(), test))
    return rows


def is_caught(row, test):
    """Shows a fault; whether the test fails with it in place. ("train |  | " is none.)"""
    print(row, flush=True)
    what, code, fault = row.split(" | ")
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".*", "venv", "out*", "data", "__pycache__")
        project = shutil.copytree(ROOT, Path(folder, "project"), ignore=ignored)
        path = project / f"{what.partition(':')[0]}.py"
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(code, fault, 1), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-xq", "tests/" + test.replace("::", ".py::")]
        done = subprocess.run(command, cwd=project, capture_output=True)
        return code in text and done.returncode == 1


def main():
    wanted, first, last = [*sys.argv[1:], *["", 0, 999][len(sys.argv) - 1:]]
    rows = listed(wanted)[int(first):int(last)]
    missed = [row for row, test in rows if not is_caught(row, test)]
    missed += [test for test in {*dict(rows).values()} if is_caught("train |  | ", test)]
    sys.exit("not caught: " + "; ".join(missed) if missed else 0)


if __name__ == "__main__":
    main()
