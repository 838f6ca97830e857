"""Writes a folder that is a Hugging Face Space as it stands: the demo page, scripts and models.

    python -m tools.space space/ exported/ out/                  # one model, or several to choose
    python -m tools.space space/ HuggingFaceTB/SmolLM2-135M      # fetched by the Space
"""
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import prepare
from model import HUB_NAME
from tools.export import PATHS
from train import checkpoints, read_checkpoint, write_checkpoint

FRONT_MATTER = """\
---
title: SmolLM2, trained from scratch
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
---
"""
APP = """\
from tools.demo import main

main({argv!r})
"""
# What the page reads of a source, besides checkpoints; whatever else lies there stays private.
PUBLIC = ("config.json", "*.safetensors", "tokenizer*.json", "tokenizer/tokenizer*.json",
          "metrics.jsonl")
RUN_ALONE = {"optimizer": {}, "muon": {}, "rng": [], "machine": {}}  # what resumes a run


def write_space(folder, sources, models):
    """sources: folders to copy, by their names in the Space. models: of the hub."""
    root = Path(__file__).resolve().parent.parent
    (folder / "tools").mkdir(parents=True)
    for file in ("model.py", "train.py", "prepare.py", "sample.py", "tools/__init__.py",
                 "tools/demo.py", "tools/plot.py"):
        shutil.copy(root / file, folder / file)
    for name, source in sources.items():
        (folder / name).mkdir()
        for pattern in PUBLIC:
            for path in Path(source).glob(pattern):
                new = folder / name / path.relative_to(source)
                new.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, new)
        for path in checkpoints(source):
            state = read_checkpoint(path)
            state["config"] |= dict.fromkeys(PATHS, "")
            write_checkpoint(folder / name / path.name, state | RUN_ALONE)
    pinned = [line.split()[0] for file in ("requirements.txt", "tools/requirements.txt")
              for line in (root / file).read_text().splitlines() if "==" in line]
    versions = dict(line.split("==") for line in pinned)
    needed = [f"{name}=={versions[name]}" for name in ("torch", "transformers", "numpy")]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n")
    (folder / "README.md").write_text(FRONT_MATTER.format_map(versions))
    (folder / "app.py").write_text(APP.format(argv=["--checkpoint", *sources, *models]))


@prepare.command("tools.space")
def main(argv=None):
    parser = prepare.new_parser("tools.space", __doc__)
    parser.add_argument("folder", type=prepare.typed_path, help="the new folder to write")
    parser.add_argument("checkpoint", nargs="+", type=prepare.typed_path,
                        help="folders of runs, exported folders, hub names")
    args = parser.parse_args(argv)
    folder, names = Path(args.folder), args.checkpoint
    if folder.exists():
        parser.error(f"{folder} is there already: name another")
    sources = {Path(name).resolve().name: name for name in names if Path(name).is_dir()}
    models = [name for name in names if not os.path.exists(name)]
    for name in models:
        if not re.fullmatch(HUB_NAME, name) or Path(name).parent.exists():
            parser.error(f"{name}: no such folder")
    if len(sources) + len(models) < len(names) or "tools" in sources:
        parser.error("name folders, each with a name of its own (and none tools)")
    for name in sources.values():
        if not Path(name, "config.json").exists() and not checkpoints(name):
            parser.error(f"{name}: holds no model")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".space-", dir=folder.parent) as new:
        write_space(Path(new, "space"), sources, models)
        os.rename(f"{new}/space", folder)  # so that nothing half written is left
    print(f"{folder} is written: create a Gradio Space, and push this folder to it, as in\n"
          f"hf upload --repo-type space USER/NAME {shlex.quote(args.folder)}")


if __name__ == "__main__":
    main()
