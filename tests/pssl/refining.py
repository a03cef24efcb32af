"""A quick run of pssl.refine, and what it leaves, for the tests of pseudo labels."""

from pssl import refine
from pssl.config.refine import RefineSettings


def tiny_refine(tiny_cams, out, method="none", **more) -> refine.RefineConfig:
    """The command with few iterations and a short training of affinities."""
    own = {name: more.pop(name) for name in list(more) if name in RefineSettings.__dataclass_fields__}
    settings = RefineSettings(method=method, **own)
    settings.crf.iterations, settings.par.iterations, settings.par.dilations = 2, 2, (1, 2)
    settings.affinity.epochs, settings.affinity.dim, settings.affinity.log2_steps = 1, 4, 3
    settings.affinity.scale, settings.affinity.radius = 1.0, 3
    where = {"cams": tiny_cams.train, "data": tiny_cams.data.folder, "out": out, "workers": 2}
    return refine.RefineConfig(settings, **(where | more))


def labels_of(folder, ids) -> dict[str, bytes]:
    return {image_id: (folder / f"{image_id}.png").read_bytes() for image_id in ids}
