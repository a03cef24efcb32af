"""One training step by its parts: what of it is the method's, and how fast and how large it is as a whole.

    python benchmarks/bench_train_step.py                      # tables, runs/bench/train_step.json, .csv, .png
    python benchmarks/bench_train_step.py --backbone resnet38d --size 448 --batch 8

The default is the recipe of the backbone (`small` on a CPU; ResNet38d at 448² on a GPU where this version has it), on
made images. The parts are those of a step of `pssl.train` with RCM and MAM: the same calls, cut where networks and
losses meet, so that the sum of their gradients is the step's. Whole steps, uncut, take turns with cut ones.
Floating point operations are those that torch.utils.flop_counter knows (convolutions, matrix products); what they are
a share of, a large matrix product, is measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from harness import report
from harness.cost import peaks_of
from harness.machine import describe_run
from harness.measure import PASSES, Result, noise, percentile
from harness.runner import finish, parser, start
from rich.table import Table
from scenes import generator, image_labels
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pssl.cli import parse
from pssl.config.train import TrainConfig
from pssl.core.seeding import generator as seeded
from pssl.inputs.images import ImageInputs
from pssl.method.objective import Objective
from pssl.method.support import SupportNet
from pssl.method.terms import Step as TermStep
from pssl.models.backbones import backbone_names
from pssl.models.build import build_cam_net
from pssl.models.cam_net import CamOutput
from pssl.training.optimizer import build_optimizer

CLASSES = 20  # PASCAL VOC's
METHOD = ("support network", "main network, other scales", "rcm", "mam", "moving average")
OPERATORS = ("rcm", "mam")


@dataclass
class Step:
    """Everything a step needs, and the step whole and in parts."""

    config: TrainConfig
    device: torch.device

    def __post_init__(self) -> None:
        config, g = self.config, generator()
        torch.manual_seed(0)
        net = build_cam_net(config.model, CLASSES)  # weights change no time
        self.net = net.to(self.device, memory_format=torch.channels_last).train()
        self.objective = Objective(
            config.method, ("rcm", "mam"), classes=CLASSES, dim=self.net.dim, size=config.data.splits.size
        ).to(self.device)
        self.support = SupportNet(self.net, config.method.support.mode, config.method.support.momentum)
        self.optimizer = build_optimizer(self.net, config.schedule.lr, config.schedule)
        self.batch, side = config.schedule.batch_size, config.data.splits.size
        images = torch.randint(0, 256, (self.batch, 3, side, side), generator=g, dtype=torch.uint8)
        self.labels = image_labels(g, self.batch, CLASSES).to(self.device)
        normalise, zoom = self.net.backbone.normalise, config.data.zoom
        ids = [str(i) for i in range(self.batch)]
        self.images = ImageInputs(ids, images, self.labels, normalise, zoom, self.device)

    def inputs(self) -> dict[float, Tensor]:
        draws = [seeded(0, "benchmark", i) for i in range(self.batch)]
        return self.images.training(range(self.batch), draws, self.objective.scales).inputs

    def whole(self) -> None:
        """As `pssl.training.loop.run_training` makes it."""
        self.optimizer.zero_grad(set_to_none=True)
        self.objective(self.net, self.support, self.inputs(), self.labels)["total"].backward()
        self.optimizer.step()
        self.support.update(self.net)

    def parts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The step cut into (name, what it does); each is to be run before the next is asked for."""
        objective, seen, target, leaves = self.objective, {}, {}, {}
        inputs: dict[float, Tensor] = {}
        others = [s for s in objective.main_scales() if s != 1]

        def see(scales: list[float]) -> None:
            for scale in scales:
                seen[scale] = self.net(inputs[scale])
                leaves[scale] = CamOutput(
                    *(t if t is None else t.detach().requires_grad_() for t in seen[scale])
                )

        def loss(name: str) -> None:
            view = TermStep(leaves, target, self.labels, None, objective.views, objective.terms)
            term = objective.terms[name]
            (term.weight(view) * term(view)).backward()

        def back(scales: list[float]) -> None:
            pairs = [pair for s in scales for pair in zip(seen[s], leaves[s], strict=True)]
            outputs, at = zip(
                *((o, leaf.grad) for o, leaf in pairs if o is not None and leaf.grad is not None), strict=True
            )
            torch.autograd.backward(outputs, at)

        yield "inputs", lambda: inputs.update(self.inputs())
        self.optimizer.zero_grad(set_to_none=True)
        yield "main network, other scales", lambda: see([s for s in others if s < 1])
        yield "main network, scale 1", lambda: see([1.0])
        yield "main network, other scales", lambda: see([s for s in others if s > 1])
        yield (
            "support network",
            lambda: target.update({s: self.support(inputs[s]) for s in objective.support_scales()}),
        )
        for name in ("classification", "rcm", "mam"):
            yield name, lambda name=name: loss(name)
        yield "main network, scale 1", lambda: back([1.0])
        yield "main network, other scales", lambda: back(others)
        yield "optimiser", self.optimizer.step
        yield "moving average", lambda: self.support.update(self.net)

    def timed_parts(self) -> dict[str, float]:
        """Seconds of each part of one step."""
        times: dict[str, float] = {}
        for name, part in self.parts():
            times[name] = times.get(name, 0.0) + timed(part, self.device)
        return times


def timed(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def product_rate(device: torch.device, side: int) -> float:
    """Floating point operations a second of a product of two matrices of ``side``, the fastest of several: float32 in
    the precision that convolutions have here (TF32 on a GPU, where torch allows it them)."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * side**3 / min(timed(lambda: a @ b, device) for _ in range(6))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure(step: Step, seconds: float) -> dict:
    """Whole and cut steps by turns for about ``seconds``; the figures of results.py's ``parts``, and more."""
    for call in (step.whole, step.timed_parts):
        call()  # warms up, and fills the prototype memory
    peak = peaks_of(lambda done: (step.whole(), done()), step.device, resident=True)[1]
    with FlopCounterMode(display=False) as counter:
        step.whole()
    flops = counter.get_total_flops()
    rate = product_rate(step.device, 8192 if step.device.type == "cuda" else 1024)
    whole, cut, deadline = [], [], time.monotonic() + seconds
    while len(whole) < 5 or time.monotonic() < deadline:
        whole.append(timed(step.whole, step.device))
        cut.append(step.timed_parts())
    total = statistics.median(sum(parts.values()) for parts in cut)
    everything, rows = sum(sum(parts.values()) for parts in cut), []
    for name in cut[0]:
        times = [parts[name] for parts in cut]
        spread = {f"p{p}": percentile(times, p) for p in (20, 50, 80)}
        rows.append({"name": name, **spread, "noise": noise(times), "share": sum(times) / everything})
    middle = statistics.median(whole)
    return {
        "parts": rows,
        "results": [asdict(r) for r in yardstick(whole, cut)],
        "calls": len(whole),
        "step_seconds": {f"p{p}": percentile(whole, p) for p in (20, 50, 80)},
        "cut_step_seconds": total,
        "method_share": sum(r["share"] for r in rows if r["name"] in METHOD),
        "operators_share": sum(r["share"] for r in rows if r["name"] in OPERATORS),
        "images_per_second": step.batch / middle,
        "peak_extra_bytes": peak,
        "flops": flops,
        "flops_per_second": flops / middle,
        "share_of_product_rate": flops / middle / rate,
        "product_flops_per_second": rate,
    }


def yardstick(whole: list[float], cut: list[dict[str, float]]) -> list[Result]:
    """The operators, and the whole step, beside the network's passes at scale 1, which are torch's: ratios that --check
    can compare between runs."""
    found = []
    network = [parts["main network, scale 1"] for parts in cut]
    operators = [sum(parts[name] for name in OPERATORS) for parts in cut]
    for name, own in ((" + ".join(OPERATORS), operators), ("whole step", whole)):
        middle = statistics.median(own)
        for provider, times in (("main network, scale 1", network), (name, own)):
            spread = {f"p{p}": percentile(times, p) for p in (20, 50, 80)}
            found.append(
                Result(
                    f"train_step/{name}",
                    "one training step",
                    provider,
                    PASSES[1],
                    times is own,
                    len(times),
                    **spread,
                    noise=noise(times),
                    ratio=statistics.median(times) / middle,
                    extra_bytes=None,
                    copy_share=None,
                )
            )
    return found


def tables(found: dict) -> Table:
    table = Table(title="one training step by parts", title_justify="left")
    for column in ("part", "p20 ms", "p50 ms", "p80 ms", "noise", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in found["parts"]:
        jitter = "" if row["noise"] is None else f"±{100 * row['noise']:.0f} %"
        times = (report.milliseconds(row[p]) for p in ("p20", "p50", "p80"))
        table.add_row(row["name"], *times, jitter, f"{100 * row['share']:.1f} %")
    return table


def summary(found: dict) -> str:
    return (
        f"step {1e3 * found['step_seconds']['p50']:.1f} ms ({1e3 * found['cut_step_seconds']:.1f} ms in parts), "
        f"{found['images_per_second']:.1f} images/s; {100 * found['method_share']:.0f} % of it the method's, "
        f"{100 * found['operators_share']:.1f} % the operators'; "
        f"peak {found['peak_extra_bytes'] / 2**20:.0f} MiB extra; {found['flops'] / 1e9:.1f} GFLOP, "
        f"{100 * found['share_of_product_rate']:.0f} % of what a matrix product reaches"
    )


def main() -> None:
    on_gpu = torch.cuda.is_available()
    options = parser(__doc__, "train_step", seconds=60)
    large = on_gpu and "resnet38d" in backbone_names()
    options.add_argument("--backbone", choices=backbone_names(), default="resnet38d" if large else "small")
    options.add_argument(
        "--size", type=int, help="side of the images (default: the recipe's; 448 with ResNet38d)"
    )
    options.add_argument("--batch", type=int, help="images (default: the recipe's)")
    args = options.parse_args()
    machine = start(args)
    begin = time.monotonic()
    found = measure(Step(configured(args), torch.device(args.device)), args.seconds)
    report.console().print(tables(found))
    print(summary(found))
    about = {**describe_run(), "seconds": time.monotonic() - begin, "backbone": args.backbone}
    finish(args, machine, {**about, **found})


def configured(args: argparse.Namespace) -> TrainConfig:
    """The recipe of the backbone, trained from made images whatever the recipe says of caches and weights."""
    words = [f"--model.backbone={args.backbone}", "--model.no-frozen"]
    size = args.size or (448 if args.backbone == "resnet38d" else None)
    words += [f"--data.size={size}"] if size else []
    words += [f"--schedule.batch-size={args.batch}"] if args.batch else []
    return parse(TrainConfig, words, prog="bench_train_step")


if __name__ == "__main__":
    main()
