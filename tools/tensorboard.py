"""Writes a run's metrics, samples and recipe as TensorBoard's events.

    python -m tools.tensorboard out/             # all that is there by now, in out/tensorboard/
    python -m tools.tensorboard out/ --follow    # and what comes, until Ctrl-C
    tensorboard --logdir out/tensorboard
"""
import json
import shlex
import sys
import time
from pathlib import Path

import prepare
from tools.export import PATHS
from tools.plot import read_metrics

TAGS = {"loss": "loss/training", "val_loss": "loss/held-out", "lr": "optimizer/lr",
        "grad_norm": "optimizer/grad_norm", "tokens_per_sec": "speed/tokens_per_sec"}


def new_writer(out):
    """A writer whose events take the place of those that were written before."""
    recipe = json.loads((out / "run.json").read_text(encoding="utf-8"))["config"]
    recipe = {name: value for name, value in recipe.items() if name not in PATHS}
    from torch.utils.tensorboard import SummaryWriter
    events = SummaryWriter(out / "tensorboard" / out.name, purge_step=0)
    events.add_custom_scalars({"loss": {"both": ["Multiline", ["loss/.*"]]}})
    events.add_text("recipe", f"```\n{json.dumps(recipe, indent=1)}\n```")
    return events


def write_events(events, out, rows):
    """Writes rows of metrics.jsonl, and the samples of their steps."""
    for row in rows:
        for name in TAGS.keys() & row.keys():
            if row[name] is not None:
                events.add_scalar(TAGS[name], row[name], row["step"])
        sample = out / "samples" / f"step_{row['step']:06d}.txt"
        if sample.exists():
            text = sample.read_text(encoding="utf-8")
            events.add_text("sample", f"```\n{text}\n```", row["step"])
    events.flush()


@prepare.command("tools.tensorboard")
def main(argv=None):
    parser = prepare.new_parser("tools.tensorboard", __doc__)
    parser.add_argument("run", type=prepare.typed_path, help="an out_dir of train.py")
    parser.add_argument("--follow", action="store_true", help="look for more every five seconds")
    args = parser.parse_args(argv)
    out = Path(args.run).resolve()
    try:
        events, step = new_writer(out), 0
        while True:
            while args.follow and not (out / "metrics.jsonl").stat().st_size:
                time.sleep(5)  # the first step compiles
            rows = read_metrics(out)
            if rows[-1]["step"] < step:  # resumed from an older checkpoint
                events.close()
                events, step = new_writer(out), 0
            write_events(events, out, [row for row in rows if row["step"] > step])
            if step == 0:
                folder = shlex.quote(str(out / "tensorboard"))
                print(f"step {rows[-1]['step']}; tensorboard --logdir {folder} shows it",
                      file=sys.stderr)
            step = rows[-1]["step"]
            if not args.follow:
                break
            time.sleep(5)
    except ImportError:
        raise ValueError("tensorboard is missing: pip install -r tools/requirements.txt") from None
    except (OSError, ValueError, LookupError) as e:
        raise ValueError(f"{args.run}: {prepare.first_line(e)}") from None
    events.close()


if __name__ == "__main__":
    main()
