"""Train a classifier, then RCM, MAM and baselines from the same weights, and compare: ``python -m pssl.train``.

Without arguments this runs on the embedded synthetic data. OUT (``--out``) holds afterwards: config.yaml (runs the
same again), metrics.json, summary.csv, losses.csv, checkpoints/ and pictures/. With several seeds the last three
have a folder per seed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from pssl.cli import parse
from pssl.config.mapping import to_dict, to_yaml
from pssl.config.train import TERMS_OF_ARM, TrainConfig
from pssl.core import ranks
from pssl.core.device import memory_format, resolve_device
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.ranks import is_first
from pssl.core.settings_file import require_same
from pssl.inputs.images import ActivationInputs
from pssl.method.inference import READOUTS, read_images
from pssl.method.objective import Objective
from pssl.method.support import SupportNet
from pssl.models.build import new_net, new_pixel_correlation
from pssl.models.cam_files import even_selection
from pssl.models.cam_net import CamNet
from pssl.reporting.comparison import draw_comparison
from pssl.scoring.results import commit, summarise, to_csv, to_table, versions
from pssl.training.arms import Experiment, find_prototypes, open_experiment, save, score, score_role
from pssl.training.loop import Stage, run_stage

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
"""Settings that a run that is carried on may change: those that training does not depend on."""


def train_stage(experiment: Experiment, name: str, net: CamNet, seed: int, out: Path) -> Stage:
    """Train `net` in place: stage 1 if `name` is "classifier", else the arm of that name on top of it."""
    config = experiment.config
    schedule, first = config.schedule, name == "classifier"
    terms = TERMS_OF_ARM[name]
    if "seam" in terms:
        new_pixel_correlation(net, seed)
    objective = Objective(
        config.method, net.classes, net.dim, config.data.size, **dict.fromkeys(terms, True)
    ).to(experiment.device)
    support = None
    if objective.needs_support:
        support = SupportNet(net, config.method.support.mode, config.method.support.momentum)
    stage = Stage(
        name=name,
        draws="stage1" if first else "arm",
        net=net,
        support=support,
        objective=objective,
        inputs=experiment.inputs["train"],
        epochs=schedule.classifier_epochs if first else schedule.arm_epochs,
        lr=schedule.lr * (1.0 if first else schedule.arm_lr_factor),
        schedule=schedule,
        seed=seed,
        state_path=out / "checkpoints" / f"{name}.state.pt",
        engine=config.engine,
    )
    if objective.rcm is not None and config.method.rcm.refresh_epochs:
        stage.refresh = lambda stage: refresh(experiment, stage)
        stage.refresh_epochs = config.method.rcm.refresh_epochs
    log = experiment.log
    with log.progress(f"train {name}", stage.steps) as bar:

        def on_step(values: dict[str, float]) -> None:
            log.plot(f"{seed}/{name}", values)
            shown = (f"{k} {values[k]:.3f}" for k in ("classification", *terms) if k in values)
            bar.reach(int(values["step"]) + 1, "  ".join(shown))

        def on_epoch(epoch: int) -> None:
            every = config.evaluation.every
            if every and (epoch + 1) % every == 0:
                keep_if_best(experiment, stage, epoch, seed, out)

        run_stage(stage, resume=config.resume, on_step=on_step, on_epoch=on_epoch)
        bar.reach(stage.steps)  # steps that were resumed count too
    log.take_losses(f"{seed}/{name}", stage.history)
    if is_first():
        log.write_losses(config.out / "losses.csv")
    return stage


def refresh(experiment: Experiment, stage: Stage) -> None:
    """SupportNet starts anew as MainNet; its readout by MainNet's prototypes makes the region masks from here on."""
    stage.objective.rcm.anchor(find_prototypes(experiment, stage.net, stage.objective.rcm))
    stage.support.restart(stage.net)


def keep_if_best(experiment: Experiment, stage: Stage, epoch: int, seed: int, out: Path) -> None:
    """Score the CAMs of a stage's network on the training images; keep it if none of its epochs scored higher."""
    prototypes = find_prototypes(experiment, stage.net, stage.objective.rcm)
    scored = score_role(experiment, stage.name, stage.net, prototypes, "train")["cam"]
    miou = max(scored.curve)
    if miou > stage.best.get("miou", -1.0):
        stage.best = {"epoch": epoch, "miou": miou, "threshold": scored.best_threshold}
        thresholds = {"cam": scored.best_threshold}
        save(
            experiment,
            f"{stage.name}.best",
            stage.net,
            prototypes,
            seed,
            out,
            thresholds,
            arm=stage.name,
            epoch=epoch,
        )


def run_seed(experiment: Experiment, seed: int, out: Path) -> dict:
    """Train and score all arms for one seed; write checkpoints and pictures; return the results."""
    config, folder = experiment.config, experiment.folder
    layout = memory_format(config.engine.channels_last)
    stage1 = new_net(config.model, len(folder.classes), seed, memory_format=layout).to(experiment.device)
    train_inputs = experiment.inputs["train"]
    if isinstance(train_inputs, ActivationInputs):
        stage1.set_channel_statistics(*train_inputs.channel_statistics())
    first = train_stage(experiment, "classifier", stage1, seed, out)
    arms, nets = {}, {}
    for arm in config.arms:
        net, stage = stage1, first
        if arm != "classifier":
            net = stage1.twin()
            stage = train_stage(experiment, arm, net, seed, out)
        prototypes = find_prototypes(experiment, net, stage.objective.rcm)
        nets[arm] = net
        begin = time.perf_counter()
        readouts = score(experiment, arm, net, prototypes)
        for readout, scores in readouts.items():
            figures = ", ".join(f"{role} {scores[role]['miou']:.1f}" for role in scores)
            experiment.log.say(
                f"{arm}, {readout}: mIoU {figures} at threshold {scores['val']['threshold']:.2f}"
            )
        arms[arm] = {
            "readouts": readouts,
            "steps_after_stage_1": 0 if arm == "classifier" else stage.steps,
            "seconds_training": round(stage.seconds, 2),
            "seconds_scoring": round(time.perf_counter() - begin, 2),
        }
        if stage.best:
            arms[arm]["best_epoch"] = stage.best
        save(
            experiment,
            arm,
            net,
            prototypes,
            seed,
            out,
            {readout: readouts[readout]["val"]["threshold"] for readout in READOUTS},
            arm=arm,
            steps=first.steps + arms[arm]["steps_after_stage_1"],
        )
    if is_first():
        draw_pictures(experiment, nets, out / "pictures")
    return {"seed": seed, "stage_1_steps": first.steps, "arms": arms}


def draw_pictures(experiment: Experiment, nets: dict[str, CamNet], out: Path) -> None:
    """Image, truth, the classifier's CAM and the CAM of the fullest arm, for a few held-out images."""
    config, folder, inputs = experiment.config, experiment.folder, experiment.inputs["val"]
    having = experiment.scored_indices("val")
    count = min(config.pictures, len(having))
    if not count:
        return
    indices = [having[i] for i in even_selection(len(having), count)]
    shown = [arm for arm in ("classifier_long", "classifier") if arm in nets][:1]
    shown += [arm for arm in ("rcm+mam", "pssl", "rcm", "mam", "ppc", "seam") if arm in nets][:1]
    readings = [
        list(read_images(nets[arm], inputs, indices, lambda i: folder.mask(i).shape, config.inference, None))
        for arm in shown
    ]
    for position in range(count):
        first = readings[0][position] if readings else None
        if first is not None:
            draw_comparison(
                out / f"{first.id}.png",
                folder.image(first.id),
                folder.mask(first.id),
                [(arm, maps[position].maps["cam"]) for arm, maps in zip(shown, readings, strict=True)],
                first.class_ids.tolist(),
                folder.classes,
            )


def run(config: TrainConfig, log: Log | None = None) -> dict:
    """The whole job; returns what metrics.json holds."""
    begin = time.perf_counter()
    config.check()
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    ranks.start(device)
    log = log or Log()
    if config.engine.tensorboard and is_first():
        log.open_tensorboard(config.out / "tensorboard")
    if config.resume:
        several = len(config.seed_list) > 1  # each has a folder of its own
        but = (*MAY_DIFFER, "seeds") if several else MAY_DIFFER
        require_same(config.out / "config.yaml", to_dict(config), but)
    ranks.wait()
    if is_first():
        write_text(config.out / "config.yaml", to_yaml(config))
    experiment = open_experiment(config, device, log)
    runs = []
    for seed in config.seed_list:
        out = config.out if len(config.seed_list) == 1 else config.out / f"seed_{seed}"
        runs.append(run_seed(experiment, seed, out))
    rows = summarise(runs, {"train": config.data.train_split, "val": config.data.val_split})
    metrics = {
        "data": {
            "root": experiment.folder.name,
            "variant": config.data.variant if config.data.root is None else None,
            "train": {"split": config.data.train_split, "images": len(experiment.inputs["train"].ids)},
            "val": {"split": config.data.val_split, "images": len(experiment.inputs["val"].ids)},
            "classes": list(experiment.folder.classes),
        },
        "seeds": list(config.seed_list),
        "scales": list(config.inference.scales),
        "flip": config.inference.flip,
        "commit": commit(),
        "versions": versions(),
        "ranks": ranks.world_size(),
        "seconds": round(time.perf_counter() - begin, 1),
        "summary": rows,
        "runs": runs,
    }
    if is_first():
        write_text(config.out / "metrics.json", json.dumps(metrics, indent=1))
        write_text(config.out / "summary.csv", to_csv(rows))
        seeds = ", ".join(map(str, config.seed_list))
        log.console.print(to_table(rows, f"{experiment.folder.name}, seed {seeds}: mIoU in percent"))
        log.say(f"{metrics['seconds']:.0f} s in all; results in {config.out}")
    return metrics


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config = parse(TrainConfig, argv, prog="python -m pssl.train")
    try:
        run(config)
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
