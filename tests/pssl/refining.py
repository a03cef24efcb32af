"""A quick run of pssl.refine, and what it leaves, for the tests of pseudo labels."""

from pssl import refine


def tiny_refine(tiny_cams, out, method="none", **more) -> refine.RefineConfig:
    """The command with few iterations and a short training of affinities."""
    config = refine.RefineConfig(
        method=method, cams=tiny_cams.train, data=tiny_cams.data, out=out, workers=2, **more
    )
    config.crf.iterations, config.par.iterations, config.par.dilations = 2, 2, (1, 2)
    config.affinity.epochs, config.affinity.dim, config.affinity.log2_steps = 1, 4, 3
    config.affinity.scale, config.affinity.radius = 1.0, 3
    return config


def labels_of(folder, ids) -> dict[str, bytes]:
    return {image_id: (folder / f"{image_id}.png").read_bytes() for image_id in ids}
