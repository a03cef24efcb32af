"""Write the CAMs of a trained network: ``python -m pssl.cams --checkpoint runs/train/checkpoints/rcm+mam.safetensors``.

One .npz an image in OUT: `cams` float16 [k,H,W] in 0..1 at the image's size, `class_ids` uint8 [k] (1..K), for the
classes that its image-level labels name. OUT/cams.yaml says what made them, OUT/data.yaml of which images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from pssl.cli import command
from pssl.config.data import DataConfig, FolderConfig, SplitDataConfig, SplitsConfig
from pssl.config.mapping import from_dict, to_dict
from pssl.config.reading import InferenceConfig
from pssl.core import ranks
from pssl.core.device import resolve_device
from pssl.core.errors import InputError
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.threads import over_images
from pssl.data.open import open_data
from pssl.data.origin import Origin, folder_from, split_from, splits_from
from pssl.data.split import open_split
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
    """Settings that are left as they are: those of the run that trained the checkpoint."""
    split: str | None = None
    """Split whose images are read. None: the training split of the checkpoint's run, which pseudo labels are for."""
    readout: Literal["cam", "prototype"] = "cam"
    """"cam": the paper's; "prototype": softmax over cosines to RCM's prototypes."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    out: Path = Path("runs/cams")
    """Folder for the files."""
    device: str = "auto"
    """Torch device, or "auto": CUDA where there is one, else CPU."""


@command("pssl.cams", CamsConfig)
def run(config: CamsConfig, log: Log) -> int:
    """Write the files of a split, images read as in training; return how many this rank wrote."""
    trained = load_net(config.checkpoint, resolve_device(config.device))
    place = config.checkpoint.parent
    config = replace(config, data=folder_from(place, config.data), split=split_from(place, config.split))
    folder = open_data(config.data)
    if tuple(folder.classes) != trained.classes:
        raise InputError(
            f"data.root={folder.root}: expected the checkpoint's classes {trained.classes}, got {folder.classes}"
        )
    split = open_split(folder, config.split, config.data, log)
    splits = splits_from(place, SplitsConfig(size=trained.size))
    data = DataConfig(config.data, splits, loading=trained.loading)
    scales = {1.0, *config.inference.scales}
    inputs = build_inputs(folder, split.ids, trained.net, data, trained.model, scales, log)
    own = ranks.share(range(len(split.ids)))
    prototypes = trained.prototypes if config.readout == "prototype" else None

    def size_of(image_id: str) -> tuple[int, int]:
        return folder.image(image_id).shape[:2]

    def write(maps: ImageMaps) -> None:
        write_cams(config.out, maps.id, maps.maps[config.readout], maps.class_ids)

    with log.progress(f"{config.readout} of {config.split}", len(own)) as bar:
        read = read_images(trained.net, inputs, own, size_of, config.inference, prototypes)
        for _ in over_images(write, read):  # threads write while this one computes
            bar.advance()
    Origin(SplitDataConfig(config.data, splits), config.split, trained.classes).write(config.out)
    if ranks.is_first():
        values = {**to_dict(config), **split.counts()}
        write_text(config.out / "cams.yaml", yaml.safe_dump(values, sort_keys=False))
        log.say(f"{len(split.ids)} files in {config.out}{split.said()}")
    return len(own)


def made_from(folder: Path) -> CamsConfig | None:
    """Return what made a folder of CAMs, by its cams.yaml; None where it has none (CAMs of another program)."""
    path = folder / "cams.yaml"
    if not path.is_file():
        return None
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in values.items() if key in to_dict(CamsConfig())}
    return from_dict(CamsConfig, settings, str(path))


if __name__ == "__main__":
    run.main()
