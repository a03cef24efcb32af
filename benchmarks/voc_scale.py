"""CAM inference and evaluation at VOC's scale: time and peak memory of `pssl.cams` and `pssl.evaluate`.

    python benchmarks/voc_scale.py                 # 1,464 made images of VOC's sizes, as many as VOC's train has
    python benchmarks/voc_scale.py --images 100 --model.width 64

Images of ellipses, one to three of 20 classes, and an untrained network of the small backbone: what they hold does not
matter for what reading, resizing, writing and counting cost. CAMs are multi-scale and mirrored, and 60 thresholds are
scored in one pass over their files. Each command is a process of its own, whose peak memory is that of the whole
process, Python and torch included.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from harness.machine import describe_machine, describe_run
from PIL import Image, ImageDraw, ImageFilter
from rich.console import Console
from rich.table import Table

from pssl.cli import parse
from pssl.config.model import ModelConfig
from pssl.config.values import Floats
from pssl.core.files import write_text
from pssl.core.seeding import derive_seed
from pssl.data import write_label_csv, write_label_png
from pssl.models.build import new_net
from pssl.models.checkpoints import save_net
from pssl.models.prototypes import Prototypes

CLASSES = tuple(f"class{number:02}" for number in range(1, 21))
SIZES = ((500, 375),) * 6 + ((375, 500),) * 2 + ((500, 333), (500, 334))
"""Widths and heights, about as often as in VOC."""


@dataclass
class VOCScaleConfig:
    """`python benchmarks/voc_scale.py`: what CAMs of a VOC-sized split cost, and their scores."""

    images: int = 1464
    """Images of the split (VOC 2012's train: 1,464)."""
    steps: int = 61
    """Thresholds tried are i/steps, one fewer than this."""
    scales: Floats = (0.5, 1.0, 1.5, 2.0)
    """Scales of the CAMs, each also mirrored."""
    batch_size: int = 4
    """Images of one size at a time."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(width=16, dim=64))
    """The network. A width of 16 so that the network is not all that is measured."""
    out: Path = Path("runs/bench/voc_scale")
    """Folder of the images, the CAMs and voc_scale.json; what is there of the images is kept."""


def draw(folder: Path, number: int) -> np.ndarray:
    """Write image `number` and its mask; returns its image-level labels, uint8 [K]."""
    random = np.random.default_rng(derive_seed(0, "voc scale", number) % 2**32)
    size = SIZES[number % len(SIZES)]
    noise = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    image, mask = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), Image.new("L", size)
    labels = np.zeros(len(CLASSES), np.uint8)
    for region in random.choice(len(CLASSES), random.integers(1, 4), replace=False) + 1:
        x, y = random.integers(0, np.array(size) * 3 // 4)
        box = (x, y, x + random.integers(60, 300), y + random.integers(60, 300))
        ImageDraw.Draw(image).ellipse(box, fill=tuple(random.integers(0, 256, 3).tolist()))
        ImageDraw.Draw(mask).ellipse(box, fill=int(region), outline=255, width=3)
        labels[region - 1] = 1
    image.filter(ImageFilter.BoxBlur(1)).save(folder / f"JPEGImages/i{number:04}.jpg", quality=90)
    write_label_png(folder / f"SegmentationClass/i{number:04}.png", np.array(mask))
    return labels


def make(config: VOCScaleConfig) -> Path:
    """The folder, in VOC's layout."""
    folder = config.out / f"images_{config.images}"
    if (folder / "classes.txt").is_file():
        return folder
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    labels = np.stack([draw(folder, number) for number in range(config.images)])
    ids = [f"i{number:04}" for number in range(config.images)]
    (folder / "ImageSets/Segmentation/train.txt").write_text("".join(f"{i}\n" for i in ids))
    write_label_csv(folder / "labels.csv", ids, labels, CLASSES)
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in CLASSES))
    return folder


def checkpoint(config: VOCScaleConfig) -> Path:
    """An untrained network as pssl.train would leave it, whose images are read from files."""
    path = config.out / "untrained.safetensors"
    net = new_net(config.model, len(CLASSES), 0)
    nothing = Prototypes(
        torch.zeros(len(CLASSES) + 1, net.dim), torch.zeros(len(CLASSES) + 1, dtype=torch.bool), 0.5
    )
    save_net(path, net, nothing, config.model, CLASSES, 448, loading="files")
    return path


def measured(command: list[str]) -> dict[str, float]:
    """Seconds and MiB of a process; SystemExit if it fails."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu(usage), "mib": usage.ru_maxrss / 1024}


def cpu(usage: resource.struct_rusage) -> float:
    """Processor seconds, of all threads."""
    return usage.ru_utime + usage.ru_stime


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and write voc_scale.json; returns what that holds."""
    config = parse(VOCScaleConfig, argv, prog="python benchmarks/voc_scale.py")
    folder, cams = make(config), config.out / f"cams_{config.images}"
    data = ["--data.root", str(folder), "--data.labels", str(folder / "labels.csv")]
    commands = {
        "pssl.cams": [
            *("--checkpoint", str(checkpoint(config)), "--inference.batch-size", str(config.batch_size)),
            *("--inference.scales", *map(str, config.scales), "--out", str(cams)),
        ],
        "pssl.evaluate": ["--cams", str(cams), "--evaluation.steps", str(config.steps)],
    }
    results = {name: measured([name, *data, *flags]) for name, flags in commands.items()}
    scored = json.loads((cams / "scores.json").read_text())
    if (scored["images"], len(scored["curve"])) != (config.images, config.steps - 1):
        raise SystemExit(f"expected {config.images} images and {config.steps - 1} thresholds scored")
    machine, run = describe_machine("cpu"), describe_run()
    found = {"machine": machine, **run, "images": config.images, "scales": config.scales, "results": results}
    write_text(config.out / "voc_scale.json", json.dumps(found, indent=1))
    table = Table(
        title=f"{config.images} images, {len(config.scales)} scales and mirrored, {config.steps - 1} thresholds",
        caption=f"{machine['processor']}, {machine['simd']}, {machine['cores']} cores",
    )
    for name in ("command", "s", "ms an image", "CPU s", "MiB"):
        table.add_column(name, justify="left" if name == "command" else "right")
    for name, row in results.items():
        each = 1000 * row["seconds"] / config.images
        figures = (f"{row['seconds']:.1f}", f"{each:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['mib']:.0f}")
        table.add_row(name, *figures)
    Console().print(table)
    return found


if __name__ == "__main__":
    main()
