"""Write the CAMs of a trained network: ``python -m pssl.cams --checkpoint runs/train/checkpoints/rcm+mam.safetensors``.

One .npz an image in OUT: `cams` float16 [k,H,W] in 0..1 at the image's size, `class_ids` uint8 [k] (1..K), for the
classes that its image-level labels name. OUT/cams.yaml says what made them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from pssl.cli import parse
from pssl.config.data import DataConfig, FolderConfig
from pssl.config.mapping import from_dict, to_dict
from pssl.config.reading import InferenceConfig
from pssl.config.values import narrowed
from pssl.core import ranks
from pssl.core.device import resolve_device
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.threads import over_images
from pssl.data.open import open_data
from pssl.inputs.build import build_inputs
from pssl.method.inference import ImageMaps, read_images
from pssl.models.cam_files import write_cams
from pssl.models.checkpoints import load_net


@dataclass
class CamsConfig:
    """`python -m pssl.cams`: multi-scale CAMs of a checkpoint as files."""

    checkpoint: Path = Path("runs/train/checkpoints/rcm+mam.safetensors")
    """A checkpoint of pssl.train."""
    data: FolderConfig = field(default_factory=FolderConfig)
    split: str = "train"
    """ImageSets split whose images are read (pseudo labels are made for the training images)."""
    readout: Literal["cam", "prototype"] = "cam"
    """"cam": the paper's; "prototype": softmax over cosines to RCM's prototypes."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    out: Path = Path("runs/cams")
    """Folder for the files."""
    device: str = "auto"
    """Torch device, or "auto": CUDA where there is one, else CPU."""

    def __post_init__(self) -> None:
        self.data = narrowed(FolderConfig, self.data)  # a training's says more


def run(config: CamsConfig, log: Log | None = None) -> int:
    """Write the files of a split; returns how many this rank wrote. Images are read as in training."""
    device = resolve_device(config.device)
    ranks.start(device)
    log = log or Log()
    trained = load_net(config.checkpoint, device)
    data = DataConfig(**vars(config.data), size=trained.size, loading=trained.loading)
    folder = open_data(config.data)
    if tuple(folder.classes) != trained.classes:
        raise ValueError(
            f"data.root={folder.root}: expected the checkpoint's classes {trained.classes}, got {folder.classes}"
        )
    ids = folder.ids(config.split)
    inputs = build_inputs(folder, ids, trained.net, data, trained.model, {1.0, *config.inference.scales}, log)
    own = ranks.share(range(len(ids)))
    prototypes = trained.prototypes if config.readout == "prototype" else None

    def write(maps: ImageMaps) -> None:
        write_cams(config.out, maps.id, maps.maps[config.readout], maps.class_ids)

    with log.progress(f"{config.readout} of {config.split}", len(own)) as bar:
        read = read_images(
            trained.net, inputs, own, lambda i: folder.image(i).shape[:2], config.inference, prototypes
        )
        for _ in over_images(write, read):  # threads write while this one computes
            bar.advance()
    if ranks.is_first():
        write_text(config.out / "cams.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        log.say(f"{len(ids)} files in {config.out}")
    return len(own)


def made_from(folder: Path) -> CamsConfig | None:
    """What made a folder of CAMs, by its cams.yaml; None where it has none (CAMs of another program)."""
    path = folder / "cams.yaml"
    if not path.is_file():
        return None
    return from_dict(CamsConfig, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        run(parse(CamsConfig, argv, prog="python -m pssl.cams"))
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
