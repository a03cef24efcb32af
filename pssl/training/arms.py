"""The arms of a run: trained from one stage 1, scored, kept."""

from __future__ import annotations

import time
from pathlib import Path

from pssl.core.device import memory_format
from pssl.core.ranks import is_first
from pssl.inputs.images import ActivationInputs
from pssl.method.inference import READOUTS
from pssl.method.support import SupportNet
from pssl.models.build import new_net
from pssl.models.cam_net import CamNet
from pssl.training.cam import CamTraining
from pssl.training.experiment import (
    Experiment,
    agreement,
    find_prototypes,
    label_precision,
    save,
    score,
    score_role,
)
from pssl.training.loop import run_training

STEP_VALUES = ("epoch", "step", "lr", "total")


def new_training(experiment: Experiment, arm: str, net: CamNet, seed: int, out: Path) -> CamTraining:
    """Return the training of `net`: stage 1 for the arm "classifier", else the arm on top of it."""
    config = experiment.config
    schedule, first = config.schedule, arm == "classifier"
    objective = experiment.objective(arm)
    objective.equip(net, seed)
    support = None
    if objective.support_scales():
        support = SupportNet(net, config.method.support.mode, config.method.support.momentum)
    return CamTraining(
        name=arm,
        draws="stage1" if first else "arm",
        net=net,
        support=support,
        objective=objective,
        inputs=experiment.inputs["train"],
        epochs=schedule.classifier_epochs if first else schedule.arm_epochs,
        lr=schedule.lr * (1.0 if first else schedule.arm_lr_factor),
        schedule=schedule,
        seed=seed,
        state_path=out / "checkpoints" / f"{arm}.state.pt",
        engine=config.engine,
        prototypes=lambda: find_prototypes(experiment, net, objective.rcm),
    )


def train_arm(experiment: Experiment, arm: str, net: CamNet, seed: int, out: Path) -> CamTraining:
    """Train `net` in place as `arm` asks, with a bar and losses.csv; return the training."""
    config, log = experiment.config, experiment.log
    training = new_training(experiment, arm, net, seed, out)
    with log.progress(f"train {arm}", training.steps) as bar:

        def on_step(values: dict[str, float]) -> None:
            log.plot(f"{seed}/{arm}", values)
            shown = (f"{name} {value:.3f}" for name, value in values.items() if name not in STEP_VALUES)
            bar.reach(int(values["step"]) + 1, "  ".join(shown))

        def on_epoch(epoch: int) -> None:
            every = config.evaluation.every
            if every and (epoch + 1) % every == 0 and experiment.has_truth("train"):
                keep_if_best(experiment, training, epoch, seed, out)

        run_training(training, resume=config.resume, on_step=on_step, on_epoch=on_epoch)
        bar.reach(training.steps)  # steps that were resumed count too
    log.take_losses(f"{seed}/{arm}", training.history)
    if is_first():
        log.write_losses(config.out / "losses.csv")
    return training


def keep_if_best(experiment: Experiment, training: CamTraining, epoch: int, seed: int, out: Path) -> None:
    """Score the CAMs of a training's network on the training images; keep it if none of its epochs scored higher."""
    arm = training.name
    prototypes = find_prototypes(experiment, training.net, training.objective.rcm)
    scored = score_role(experiment, arm, training.net, prototypes, "train")["cam"]
    miou = max(scored.curve)
    if miou > training.best.get("miou", -1.0):
        training.best = {"epoch": epoch, "miou": miou, "threshold": scored.best_threshold}
        best = {"cam": scored.best_threshold}
        save(experiment, f"{arm}.best", training.net, prototypes, seed, out, best, arm=arm, epoch=epoch)


def run_seed(experiment: Experiment, seed: int, out: Path) -> tuple[dict, dict[str, CamNet]]:
    """Train and score all arms for one seed, and write their checkpoints; return the results and the networks."""
    config = experiment.config
    layout = memory_format(config.engine.channels_last)
    stage1 = new_net(config.model, len(experiment.folder.classes), seed, memory_format=layout)
    stage1 = stage1.to(experiment.device)
    train_inputs = experiment.inputs["train"]
    if isinstance(train_inputs, ActivationInputs):
        stage1.set_channel_statistics(*train_inputs.channel_statistics())
    first = train_arm(experiment, "classifier", stage1, seed, out)
    arms, nets = {}, {}
    for arm in config.arms:
        net, training = stage1, first
        if arm != "classifier":
            net = stage1.twin()
            training = train_arm(experiment, arm, net, seed, out)
        nets[arm] = net
        arms[arm] = _conclude(experiment, arm, training, first.steps, seed, out)
    results = {"seed": seed, "stage_1_steps": first.steps, "arms": arms}
    if not experiment.has_truth("val") and len(nets) > 1:
        thresholds = {arm: entry["readouts"]["cam"]["val"]["threshold"] for arm, entry in arms.items()}
        results["agreement"] = agreement(experiment, nets, thresholds)
    return results, nets


def headline(scores: dict[str, dict]) -> str:
    """Return a readout's scores on both splits in a line: mIoU where there are masks, else shares of foreground."""
    known = {role: score for role, score in scores.items() if score["miou"] is not None}
    figures = ", ".join(f"{role} {score['miou']:.1f}" for role, score in known.items())
    others = ", ".join(
        f"{role} {100 * score['foreground']:.0f} % foreground"
        for role, score in scores.items()
        if role not in known
    )
    said = "; ".join(filter(None, [f"mIoU {figures}" if figures else "", others]))
    return f"{said} at threshold {scores['val']['threshold']:.2f}"


def _conclude(
    experiment: Experiment, arm: str, training: CamTraining, first_steps: int, seed: int, out: Path
) -> dict:
    """Score a trained arm and write its checkpoint; return its entry in the results."""
    net, begin = training.net, time.perf_counter()
    prototypes = find_prototypes(experiment, net, training.objective.rcm)
    readouts = score(experiment, arm, net, prototypes)
    for readout, scores in readouts.items():
        experiment.log.say(f"{arm}, {readout}: {headline(scores)}")
    entry = {
        "readouts": readouts,
        "steps_after_stage_1": 0 if arm == "classifier" else training.steps,
        "seconds_training": round(training.seconds, 2),
        "seconds_scoring": round(time.perf_counter() - begin, 2),
    }
    if not experiment.has_truth("val"):
        entry["label_precision"] = label_precision(experiment, net)
    if training.best:
        entry["best_epoch"] = training.best
    thresholds = {readout: readouts[readout]["val"]["threshold"] for readout in READOUTS}
    steps = first_steps + entry["steps_after_stage_1"]
    save(experiment, arm, net, prototypes, seed, out, thresholds, arm=arm, steps=steps)
    return entry
