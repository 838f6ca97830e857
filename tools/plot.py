"""Draws the curves of one run, or of several over one another: loss, rate, gradient norm, speed.

    python -m tools.plot out/                                    # writes out/plot.png
    python -m tools.plot out/ out-wide/ --x tokens --output compare.svg

All of it comes from metrics.jsonl, so a run can be drawn while it goes on. The training losses are
faint, their mean nearby is a line, held-out losses are dots.
"""
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np

import prepare

AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}  # --x, and its key in a row
NEEDED = *AXES.values(), "loss", "val_loss"  # numbers of each row, the last where it is there
PANELS = {"loss": "Loss, nats per token", "lr": "Learning rate", "grad_norm": "Gradient norm",
          "tokens_per_sec": "Tokens per second"}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": "#999999", "axes.grid": True, "grid.color": "#e8e8e8",
         "axes.axisbelow": True, "axes.titlesize": 10.5, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "xtick.color": "#444444", "ytick.color": "#444444",
         "legend.frameon": False, "lines.linewidth": 1.8, "svg.hashsalt": "",
         "text.parse_math": False}
COLORS = ["#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#db2777"]


def read_metrics(run):
    """The rows (dicts) of a run's metrics.jsonl, from its folder or the file.

    Raises ValueError where there are none, or others'."""
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not from train.py") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):  # of a run that goes on, it may be half written
                break
            raise ValueError(f"{path}, line {number}: is not JSON") from None
        if not isinstance(row, dict) or not all(
                isinstance({"val_loss": 0, **row}.get(name), (int, float)) for name in NEEDED):
            raise ValueError(f"{path}, line {number}: is not from train.py")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds nothing yet")
    return rows


def column(rows, name, x):
    """The x and y of the rows that have a value of that name."""
    kept = [row for row in rows if row.get(name) is not None]
    return [row[x] for row in kept], [row[name] for row in kept]


def smooth(values):
    """The mean around each value, over a fortieth of all to either side; fewer at the ends."""
    at, reach = np.arange(len(values)), len(values) // 40
    first = np.maximum(at - reach, 0)
    end = np.minimum(at + np.minimum(at, reach) + 1, len(values))  # at the steep start: as far on
    sums = np.cumsum([0, *values])
    return (sums[end] - sums[first]) / (end - first)


def line(axis, xs, ys, **how):
    """A line; where there are few points, each is marked, too."""
    axis.plot(xs, ys, marker="o" if len(xs) < 10 else None, **how)


def draw_run(axes, prefix, rows, x, color, dots):
    """One run into all panels. prefix: of its labels, "" where there is no other run."""
    xs, losses = column(rows, "loss", x)
    axes["loss"].plot(xs, losses, color=color, alpha=0.25, linewidth=0.8)
    line(axes["loss"], xs, smooth(losses), color=color, label=f"{prefix}training (smoothed)")
    xs, losses = column(rows, "val_loss", x)
    if xs:
        axes["loss"].plot(xs, losses, "o-", color=dots, markersize=4.5, linewidth=0.8, zorder=3,
                          markeredgecolor="white", markeredgewidth=0.6,
                          label=f"{prefix}held-out, best {min(losses):.3f}")
    for name in ("lr", "grad_norm", "tokens_per_sec"):
        line(axes[name], *column(rows, name, x), color=color, linewidth=1.0, alpha=0.9)


def unit_of_time(runs):
    """(seconds in it, its name): the unit that fits the longest run."""
    longest = max(rows[-1]["seconds"] for rows in runs.values())
    if longest > 7200:
        return 3600, "hours"
    return (60, "minutes") if longest > 120 else (1, "seconds")


def scale(axes, runs, x):
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
    for name, axis in axes.items():
        axis.margins(x=0.01)
        axis.xaxis.set_major_locator(MaxNLocator(8 if name == "loss" else 4, steps=[1, 2, 5, 10],
                                                 integer=x != "time", min_n_ticks=1))
        if x != "time":
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    low, high = axes["loss"].get_ylim()
    if high > 2 * low > 0:  # a logarithmic axis shows the late steps, too
        axes["loss"].set_yscale("log")
        axes["loss"].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axes["loss"].yaxis.set_minor_locator(LogLocator(subs=()))
        axes["loss"].yaxis.set_major_formatter("{x:g}")
    axes["lr"].yaxis.set_major_formatter("{x:g}")
    axes["lr"].set_ylim(bottom=0)
    axes["tokens_per_sec"].yaxis.set_major_formatter(EngFormatter(sep=""))
    axes["tokens_per_sec"].set_ylim(bottom=0)
    norms = sorted(y for rows in runs.values() for y in column(rows, "grad_norm", "step")[1])
    if norms and norms[-1] > 0:  # the first steps would hide all others
        axes["grad_norm"].set_ylim(0, 1.6 * norms[int(0.98 * (len(norms) - 1))] or None)


def draw(runs, output, x="step"):
    """Draws runs {label: rows} to a file, whose ending says the format. Needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    seconds, unit = unit_of_time(runs)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        axes = figure.subplot_mosaic([["loss"] * 3, ["lr", "grad_norm", "tokens_per_sec"]],
                                     height_ratios=[1.9, 1])
        for name, title in PANELS.items():
            axes[name].set_title(title)
        for (label, rows), color in zip(runs.items(), itertools.cycle(COLORS)):
            label = label.encode(errors="backslashreplace").decode()  # (it can be no UTF-8)
            label = re.sub("^_", "./_", label)  # or the legend leaves it out
            rows = [{**row, "seconds": row["seconds"] / seconds} for row in rows]
            if len(runs) == 1:
                draw_run(axes, "", rows, AXES[x], color, "#111827")
                axes["loss"].set_title(f"Loss of {label}, nats per token")
            else:
                draw_run(axes, f"{label}: ", rows, AXES[x], color, color)
        axes["loss"].set_xlabel({"step": "optimizer steps", "tokens": "tokens trained on",
                                 "time": f"{unit} in training steps, without evaluations"}[x])
        axes["loss"].legend(loc="upper right")
        scale(axes, runs, x)
        output = Path(output)
        temporary = output.with_name(f".{os.getpid()}-{output.name}")
        try:
            figure.savefig(temporary, dpi=160, metadata={"Date": None})  # the same bytes each time
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)


@prepare.command("tools.plot")
def main(argv=None):
    parser = prepare.new_parser("tools.plot", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=prepare.typed_path, metavar="RUN",
        help="out_dirs of train.py, or metrics.jsonl files")
    add("--output", type=prepare.typed_path,
        help="a .png or .svg file [plot.png in the first folder]")
    add("--x", choices=list(AXES), default="step", help="what runs to the right [step]")
    args = parser.parse_args(argv)
    first = Path(args.runs[0])
    output = Path(args.output or (first if first.is_dir() else first.parent) / "plot.png")
    if output.suffix not in (".png", ".svg"):
        parser.error(f"--output {output}: must end in .png or .svg")
    try:
        runs = {os.path.normpath(run): read_metrics(run) for run in args.runs}
        draw(runs, output, args.x)
    except ImportError:
        raise ValueError("matplotlib is missing: pip install -r tools/requirements.txt") from None
    except OSError as e:
        raise ValueError(f"cannot write {output}: {e.strerror}") from None
    print(f"{output} is written")


if __name__ == "__main__":
    main()
