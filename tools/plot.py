"""Draws the curves of one run, or of several over one another: loss, learning rate, gradient norm, speed.

    python -m tools.plot out/                                    # writes out/plot.png
    python -m tools.plot out/ out-wide/ --x tokens --output compare.svg

All of it comes from metrics.jsonl, so a run can be drawn while it goes on. Raw training losses are faint, their mean
nearby is a line, held-out losses are dots.
"""
import argparse
import itertools
import json
import os
import sys
from pathlib import Path

AXES = {"step": "optimizer steps", "tokens": "tokens", "time": "time"}


def fail(message, code=1):
    print(f"tools.plot: {message}", file=sys.stderr)
    raise SystemExit(code)


def read_metrics(run):
    """The rows of a run's metrics.jsonl (dicts), from its folder or the file. Raises ValueError where there are none."""
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
            if not {"step", "loss", "seconds"} <= rows[-1].keys():
                raise ValueError(f"{path}, line {len(rows)}: is not from train.py")
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}") from None
    except (json.JSONDecodeError, AttributeError):  # the last line of a run that goes on may be half written
        if len(rows) + 1 < len(path.read_text(encoding="utf-8").splitlines()):
            raise ValueError(f"{path}, line {len(rows) + 1}: is not JSON") from None
    if not rows:
        raise ValueError(f"{path}: holds nothing yet")
    return rows


def column(rows, key, x):
    """The x and y of the rows that have a value for the key."""
    kept = [row for row in rows if row.get(key) is not None]
    return [row[x] for row in kept], [row[key] for row in kept]


def smooth(values):
    """The mean around each value, over a fortieth of all of them to either side; fewer at the ends."""
    reach, sums, means = len(values) // 40 + 1, list(itertools.accumulate(values, initial=0.0)), []
    for i in range(len(values)):
        first, last = max(0, i - reach), min(len(values) - 1, i + min(i, reach))  # the steep start: even to both sides
        means.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return means


def draw(runs, output, x="step"):
    """Draws runs {label: rows} to the file output; the ending of its name says the format. Needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    key = {"step": "step", "tokens": "tokens", "time": "seconds"}[x]
    longest = max(row[key] for rows in runs.values() for row in rows)
    unit, scale = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    scale = scale if x == "time" else 1
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999",
             "axes.grid": True, "grid.color": "#e8e8e8", "axes.axisbelow": True, "axes.titlesize": 10.5,
             "axes.titleweight": "bold", "axes.titlelocation": "left", "xtick.color": "#444444", "ytick.color": "#444444",
             "legend.frameon": False, "lines.linewidth": 1.8, "svg.hashsalt": "", "axes.prop_cycle": plt.cycler(
                 color=["#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#db2777"])}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(10, 6.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        axes = figure.subplot_mosaic([["loss"] * 3, ["lr", "grad_norm", "tokens_per_sec"]], height_ratios=[1.9, 1])
        for number, (label, rows) in enumerate(runs.items()):
            color, alone = f"C{number % 8}", len(runs) == 1
            dots = "#111827" if alone else color
            rows = [{**row, key: row[key] / scale} for row in rows]
            at, losses = column(rows, "loss", key)
            axes["loss"].plot(at, losses, color=color, alpha=0.25, linewidth=0.8)
            axes["loss"].plot(at, smooth(losses), color=color, label="training (smoothed)" if alone else label)
            at, losses = column(rows, "val_loss", key)
            if at:
                text = f"held-out, best {min(losses):.3f}" if alone else f"{label}, held-out (best {min(losses):.3f})"
                axes["loss"].plot(at, losses, "o-", color=dots, markersize=4.5, linewidth=0.8, markeredgecolor="white",
                                  markeredgewidth=0.6, label=text, zorder=3)
            for name in ("lr", "grad_norm", "tokens_per_sec"):
                axes[name].plot(*column(rows, name, key), color=color, linewidth=1.0, alpha=0.9)
        for name, title in [("loss", f"Loss of {next(iter(runs))}, nats per token" if len(runs) == 1 else
                             "Loss, nats per token"), ("lr", "Learning rate"), ("grad_norm", "Gradient norm"),
                            ("tokens_per_sec", "Tokens per second")]:
            axes[name].set_title(title)
            axes[name].margins(x=0.01)
            axes[name].xaxis.set_major_locator(MaxNLocator(8 if name == "loss" else 4, steps=[1, 2, 2.5, 5, 10]))
            if x != "time":
                axes[name].xaxis.set_major_formatter(EngFormatter(sep=""))
        low, high = axes["loss"].get_ylim()
        if high > 2 * low > 0:  # a logarithmic axis shows the late steps, too
            axes["loss"].set_yscale("log")
            axes["loss"].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
            axes["loss"].yaxis.set_minor_locator(LogLocator(subs=()))
            axes["loss"].yaxis.set_major_formatter("{x:g}")
        axes["lr"].yaxis.set_major_formatter("{x:g}")
        axes["tokens_per_sec"].yaxis.set_major_formatter(EngFormatter(sep=""))
        axes["tokens_per_sec"].set_ylim(bottom=0)
        norms = sorted(v for rows in runs.values() for v in column(rows, "grad_norm", "step")[1])
        if norms:  # the first steps would hide all others
            axes["grad_norm"].set_ylim(0, 1.6 * norms[int(0.98 * (len(norms) - 1))])
        axes["loss"].set_xlabel(unit if x == "time" else AXES[x])
        axes["loss"].legend(loc="upper right")
        temporary = Path(output).with_name(f".{os.getpid()}-{Path(output).name}")
        try:
            figure.savefig(temporary, dpi=160, metadata={"Date": None} if Path(output).suffix == ".svg" else None)
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
            plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(message, 2)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote, or metrics.jsonl files")
    parser.add_argument("--output", help="a .png or .svg file [plot.png in the first folder]")
    parser.add_argument("--x", choices=list(AXES), default="step", help="what runs to the right [step]")
    args = parser.parse_args(argv)
    first = Path(args.runs[0])
    output = Path(args.output or (first if first.is_dir() else first.parent) / "plot.png")
    if output.suffix not in (".png", ".svg"):
        fail(f"--output {output}: must end in .png or .svg", 2)
    runs = {os.path.normpath(run): None for run in args.runs}
    try:
        for run in runs:
            runs[run] = read_metrics(run)
            if args.x == "tokens" and "tokens" not in runs[run][0]:
                raise ValueError(f"{run}: its metrics.jsonl counts no tokens; draw it by step or time")
        draw(runs, output, args.x)
    except ImportError:
        fail("matplotlib is missing: pip install -r tools/requirements.txt")
    except ValueError as e:
        fail(e)
    except OSError as e:
        fail(f"cannot write {output}: {e.strerror}")
    print(f"{output} is written")


if __name__ == "__main__":
    main()
