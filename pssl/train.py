"""Train a classifier, then RCM, MAM and baselines from the same weights, and compare: ``python -m pssl.train``.

Without arguments this runs on the embedded synthetic data. OUT (``--out``) holds afterwards: config.yaml (runs the
same again), metrics.json, summary.csv, losses.csv, data.yaml (where the data are), checkpoints/ and pictures/. With
several seeds the last two have a folder per seed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from pssl.cli import command
from pssl.config.data import SplitDataConfig
from pssl.config.mapping import to_dict, to_yaml
from pssl.config.train import TrainConfig
from pssl.core import ranks
from pssl.core.device import resolve_device
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.settings_file import require_same
from pssl.data.origin import Origin
from pssl.data.split import even_selection
from pssl.method.arms import ARMS
from pssl.method.inference import read_images
from pssl.models.cam_net import CamNet
from pssl.reporting.comparison import draw_comparison
from pssl.scoring.results import commit, summarise, to_csv, to_table, versions
from pssl.training.arms import run_seed
from pssl.training.experiment import Experiment, open_experiment

MAY_DIFFER = (
    *("arms", "recipe", "out", "device", "threads", "resume", "pictures", "inference"),
    *(
        "evaluation.steps",
        "evaluation.train_images",
        "engine.save_every",
        "engine.tensorboard",
        "data.workers",
    ),
)
"""Settings that may differ on `--resume`, because training does not depend on them."""


def draw_pictures(experiment: Experiment, nets: dict[str, CamNet], out: Path) -> None:
    """Draw image, ground truth, the classifier's CAM and the CAM of the fullest arm, for a few held-out images."""
    config, folder, inputs = experiment.config, experiment.folder, experiment.inputs["val"]
    indices = even_selection(experiment.scored_indices("val"), config.pictures)
    shown = [arm for arm in ("classifier_long", "classifier") if arm in nets][:1]
    fullest = max(nets, key=lambda arm: len(ARMS[arm]))
    shown += [fullest] if ARMS[fullest] else []
    readings = [
        list(
            read_images(
                nets[arm], inputs, indices, lambda i: folder.image(i).shape[:2], config.inference, None
            )
        )
        for arm in shown
    ]
    scored = set(experiment.splits["val"].scored)
    for images in zip(*readings, strict=True):
        draw_comparison(
            out / f"{images[0].id}.png",
            folder.image(images[0].id),
            folder.mask(images[0].id) if images[0].id in scored else None,
            [(arm, image.maps["cam"]) for arm, image in zip(shown, images, strict=True)],
            images[0].class_ids.tolist(),
            folder.classes,
        )


def describe_data(experiment: Experiment) -> dict:
    """Return what metrics.json says of the data."""
    config, folder = experiment.config.data, experiment.folder
    return {
        "root": folder.name,
        "variant": config.folder.variant if config.folder.root is None else None,
        **{role: {"split": split.name, **split.counts()} for role, split in experiment.splits.items()},
        "classes": list(folder.classes),
    }


@command("pssl.train", TrainConfig)
def run(config: TrainConfig, log: Log) -> dict:
    """Train, score and compare all arms; return what metrics.json holds."""
    begin = time.perf_counter()
    config.check()
    if config.engine.tensorboard and ranks.is_first():
        log.open_tensorboard(config.out / "tensorboard")
    seeds, splits = config.seed_list, config.data.splits
    if config.resume:
        # each of several seeds has a folder of its own
        require_same(
            config.out / "config.yaml", to_dict(config), (*MAY_DIFFER, *(["seeds"] if len(seeds) > 1 else []))
        )
    ranks.wait()
    experiment = open_experiment(config, resolve_device(config.device), log)
    if ranks.is_first():
        write_text(config.out / "config.yaml", to_yaml(config))
    data = SplitDataConfig(config.data.folder, splits)
    Origin(data, splits.train_split, tuple(experiment.folder.classes)).write(config.out)
    runs = []
    for seed in seeds:
        out = config.out if len(seeds) == 1 else config.out / f"seed_{seed}"
        results, nets = run_seed(experiment, seed, out)
        runs.append(results)
        if ranks.is_first():
            draw_pictures(experiment, nets, out / "pictures")
    rows = summarise(runs, {"train": splits.train_split, "val": splits.val_split})
    metrics = {
        "data": describe_data(experiment),
        "seeds": list(seeds),
        "scales": list(config.inference.scales),
        "flip": config.inference.flip,
        "commit": commit(),
        "versions": versions(),
        "ranks": ranks.world_size(),
        "seconds": round(time.perf_counter() - begin, 1),
        "summary": rows,
        "runs": runs,
    }
    if ranks.is_first():
        write_text(config.out / "metrics.json", json.dumps(metrics, indent=1))
        write_text(config.out / "summary.csv", to_csv(rows))
        title = f"{experiment.folder.name}, seed {', '.join(map(str, seeds))}: mIoU in percent"
        log.console.print(to_table(rows, title))
        left_out = "".join(split.said() for split in experiment.splits.values())
        log.say(f"{metrics['seconds']:.0f} s in all; results in {config.out}{left_out}")
    return metrics


if __name__ == "__main__":
    run.main()
