"""The words of every check: operator, argument, what was expected and what came."""

import re

import pytest
import torch

from pssl_ext import (
    cam_compare,
    cam_regions,
    cam_sweep,
    dense_crf,
    pixel_refine,
    prototype_contrast,
    prototype_pool,
    random_walk,
)

FEATURES = torch.zeros(2, 4, 3, 3)
LABELS = torch.zeros(2, 6, 6, dtype=torch.int64)
PROTOTYPES = torch.zeros(3, 4)
CAMS = [torch.zeros(2, 3, 4, 4)]
PRESENT = torch.ones(2, 3)
META = torch.device("meta")

POOL = dict(features=FEATURES, regions=LABELS, num_regions=3)
CONTRAST = dict(features=FEATURES, prototypes=PROTOTYPES, regions=LABELS)
COMPARE = dict(main=CAMS, support=CAMS, image_labels=PRESENT, size=(4, 4))
REGIONS = dict(cams=CAMS, image_labels=PRESENT, size=(4, 4))
SWEEP = dict(
    cams=torch.zeros(1, 4, 4),
    class_ids=torch.tensor([1]),
    ground_truth=torch.zeros(4, 4, dtype=torch.uint8),
    thresholds=[0.5],
    num_regions=3,
)
WALK = dict(cams=torch.zeros(2, 4, 5), edge=torch.zeros(4, 5))
REFINE = dict(images=torch.zeros(2, 3, 6, 5), masks=torch.zeros(2, 4, 3, 3))
CRF = dict(images=torch.zeros(2, 3, 4, 5, dtype=torch.uint8), probabilities=torch.ones(2, 3, 4, 5))
SHAPE = "[B,C,H,W]=[2,1 or more,4,5]"
FINITE = "finite, with standard deviations greater than 0"
CELLS = "features must be of at least 1×1 cells where there are label pixels"
FLOATS = "float16, bfloat16, float32 or float64"

SOUND = {
    prototype_pool: POOL,
    prototype_contrast: CONTRAST,
    cam_compare: COMPARE,
    cam_regions: REGIONS,
    cam_sweep: SWEEP,
    random_walk: WALK,
    pixel_refine: REFINE,
    dense_crf: CRF,
}

#: for each function unsound arguments, and what the error says after "<op>: "
TABLE = {
    prototype_pool: [
        (dict(features=[1]), "features must be a tensor, got list"),
        (dict(features=LABELS), f"features must be {FLOATS}, got torch.int64"),
        (dict(features=FEATURES[0]), "features must be [B,D,h,w], got [4, 3, 3] torch.float32 on cpu"),
        (
            dict(features=torch.zeros(2, 4, 0, 3)),
            f"{CELLS}, got [2, 4, 0, 3] torch.float32 on cpu",
        ),
        (dict(regions=None), "regions must be a tensor, got NoneType"),
        (dict(regions=LABELS.bool()), "regions must be of an integer type, got torch.bool"),
        (dict(regions=LABELS[:1]), "regions must be [B,H,W]=[2,*,*], got [1, 6, 6] torch.int64 on cpu"),
        (
            dict(regions=torch.zeros(2, 5, 6, 6)),
            "regions must be [B,C,H,W]=[2,3,*,*] (soft masks), got [2, 5, 6, 6] torch.float32 on cpu",
        ),
        (
            dict(regions=LABELS.to(META)),
            "regions must be on cpu as the first argument, got [2, 6, 6] torch.int64 on meta",
        ),
        (dict(num_regions=0), "num_regions must be at least 1, got 0"),
        (dict(weights=LABELS), f"weights must be {FLOATS}, got torch.int64"),
        (
            dict(weights=torch.zeros(2, 3, 6)),
            "weights must be [B,H,W]=[2, 6, 6], got [2, 3, 6] torch.float32 on cpu",
        ),
        (
            dict(weights=torch.zeros(2, 6, 6, device=META)),
            "weights must be on cpu as the first argument, got [2, 6, 6] torch.float32 on meta",
        ),
        (dict(regions=LABELS + 3), "regions must hold labels 0..2 or ignore_index=255, got [3]"),
        (dict(regions=LABELS - 1), "regions must hold labels 0..2 or ignore_index=255, got [-1]"),
    ],
    prototype_contrast: [
        (dict(features=FEATURES[0]), "features must be [B,D,h,w], got [4, 3, 3] torch.float32 on cpu"),
        (dict(features=LABELS), f"features must be {FLOATS}, got torch.int64"),
        (
            dict(features=torch.zeros(2, 4, 3, 0)),
            f"{CELLS}, got [2, 4, 3, 0] torch.float32 on cpu",
        ),
        (dict(prototypes=PROTOTYPES.long()), f"prototypes must be {FLOATS}, got torch.int64"),
        (
            dict(prototypes=torch.zeros(3, 5)),
            "prototypes must be [C,D]=[*,4] or [B,C,D]=[2,*,4], got [3, 5] torch.float32 on cpu",
        ),
        (
            dict(prototypes=torch.zeros(1, 3, 4)),
            "prototypes must be [C,D]=[*,4] or [B,C,D]=[2,*,4], got [1, 3, 4] torch.float32 on cpu",
        ),
        (dict(regions=LABELS.float()), "regions must be of an integer type, got torch.float32"),
        (dict(regions=LABELS[0]), "regions must be [B,H,W]=[2,*,*], got [6, 6] torch.int64 on cpu"),
        (dict(temperature=0.0), "temperature must be greater than 0, got 0.0"),
        (
            dict(temperature=torch.ones(2)),
            "temperature must be a number or a tensor of one element, got [2] torch.float32 on cpu",
        ),
        (dict(temperature=torch.tensor(1)), f"temperature must be {FLOATS}, got torch.int64"),
        (dict(valid=[True]), "valid must be a tensor, got list"),
        (dict(valid=torch.ones(3)), "valid must be bool, got [3] torch.float32 on cpu"),
        (
            dict(valid=torch.ones(4, dtype=torch.bool)),
            "valid must be [C]=[3] or [B,C]=[2,3], got [4] torch.bool on cpu",
        ),
        (dict(weights=LABELS), f"weights must be {FLOATS}, got torch.int64"),
        (
            dict(weights=torch.zeros(2, 6)),
            "weights must be [B,H,W]=[2, 6, 6], got [2, 6] torch.float32 on cpu",
        ),
        (
            dict(prototypes=PROTOTYPES.to(META)),
            "prototypes must be on cpu as the first argument, got [3, 4] torch.float32 on meta",
        ),
        (dict(reduction="max"), "reduction must be one of mean, sum, none, got 'max'"),
        (dict(regions=LABELS + 254), "regions must hold labels 0..2 or ignore_index=255, got [254]"),
        (
            dict(regions=LABELS - 100, ignore_index=-1),
            "regions must hold labels 0..2 or ignore_index=-1, got [-100]",
        ),
    ],
    cam_compare: [
        (dict(main=[]), "main must be at least one map, got []"),
        (dict(main=[LABELS]), f"main[0] must be {FLOATS}, got torch.int64"),
        (
            dict(support=[*CAMS, torch.zeros(2, 4, 4, 4)]),
            "support[1] must be [B,K,h,w]=[2,3,*,*], got [2, 4, 4, 4] torch.float32 on cpu",
        ),
        (dict(image_labels=torch.ones(3)), "image_labels must be [B,K], got [3] torch.float32 on cpu"),
        (dict(size=(4, 0)), "size must be (H,W), two integers of at least 1, got (4, 0)"),
        (dict(size=4), "size must be (H,W), two integers of at least 1, got 4"),
        (dict(size=(4.0, 4)), "size must be (H,W), two integers of at least 1, got (4.0, 4)"),
        (
            dict(main=[torch.zeros(2, 3, 4, 0)]),
            "main[0] must be of at least 1×1 cells, got [2, 3, 4, 0] torch.float32 on cpu",
        ),
        (dict(attention="dot"), "attention must be one of none, cosine, got 'dot'"),
        (dict(reduction="max"), "reduction must be one of mean, sum, none, got 'max'"),
    ],
    cam_regions: [
        (dict(cams=[]), "cams must be at least one map, got []"),
        (dict(image_labels=None), "image_labels must be a tensor, got NoneType"),
        (
            dict(cams=[CAMS[0].to(META)]),
            "cams[0] must be on cpu as the first argument, got [2, 3, 4, 4] torch.float32 on meta",
        ),
        (
            dict(cams=[torch.zeros(1, 255, 2, 2)], image_labels=torch.ones(1, 255)),
            "cams must be of at most 254 classes (the mask is uint8), got 255",
        ),
        (dict(size=(4, 0)), "size must be (H,W), two integers of at least 1, got (4, 0)"),
        (dict(size=4), "size must be (H,W), two integers of at least 1, got 4"),
        (dict(size=(4.0, 4)), "size must be (H,W), two integers of at least 1, got (4.0, 4)"),
        (
            dict(cams=[torch.zeros(2, 3, 4, 0)]),
            "cams[0] must be of at least 1×1 cells, got [2, 3, 4, 0] torch.float32 on cpu",
        ),
        (dict(background=0.5), "background must be at most foreground=0.3, got 0.5"),
        (dict(ignore_index=256), "ignore_index must be in 0..255 (the mask is uint8), got 256"),
    ],
    cam_sweep: [
        (dict(cams=[]), "cams, class_ids, ground_truth must be lists of one length, got (0, 1, 4)"),
        (dict(cams=[], class_ids=[], ground_truth=[]), "cams must be at least one image, got []"),
        (dict(cams=torch.zeros(4, 4)), "cams[0] must be [k,h,w], got [4, 4] torch.float32 on cpu"),
        (dict(class_ids=torch.tensor([1, 2])), "class_ids[0] must be [k]=[1], got [2] torch.int64 on cpu"),
        (dict(class_ids=torch.ones(1)), "class_ids[0] must be of an integer type, got torch.float32"),
        (dict(class_ids=torch.tensor([0])), "class_ids[0] must hold region numbers 1..2, got [0]"),
        (dict(ground_truth=LABELS), "ground_truth[0] must be [H,W], got [2, 6, 6] torch.int64 on cpu"),
        (
            dict(ground_truth=torch.full((4, 4), 7)),
            "ground_truth[0] must hold labels 0..2 or ignore_index=255, got [7]",
        ),
        (dict(power=[1.0]), "power must be None where thresholds are given, got [1.0]"),
        (dict(thresholds=None), "thresholds must be given where power is not, got None"),
        (dict(num_regions=0), "num_regions must be at least 1, got 0"),
        (
            dict(cams=torch.zeros(1, 0, 4)),
            "cams[0] must be of at least 1×1 cells where there is ground truth, got [1, 0, 4] torch.float32 on cpu",
        ),
        (dict(thresholds=None, power=[0.0]), "power must be greater than 0, got 0.0"),
        (dict(thresholds=torch.zeros(1, 2)), "thresholds must be [T], got [1, 2] torch.float32 on cpu"),
    ],
    random_walk: [
        (dict(cams=LABELS), f"cams must be {FLOATS}, got torch.int64"),
        (dict(cams=FEATURES), "cams must be [k,h,w], got [2, 4, 3, 3] torch.float32 on cpu"),
        (dict(edge=None), "edge must be given, or else features, got 'none'"),
        (dict(features=torch.zeros(1, 4, 5)), "edge must be given, or else features, got 'both'"),
        (dict(edge=torch.zeros(5, 4)), "edge must be [h,w]=[4,5], got [5, 4] torch.float32 on cpu"),
        (dict(edge=LABELS[0]), f"edge must be {FLOATS}, got torch.int64"),
        (
            dict(edge=torch.zeros(4, 5, device=META)),
            "edge must be on cpu as the first argument, got [4, 5] torch.float32 on meta",
        ),
        (
            dict(edge=None, features=torch.zeros(0, 4, 5)),
            "features must be [D,h,w]=[*,4,5] with D >= 1, got [0, 4, 5] torch.float32 on cpu",
        ),
        (dict(radius=0), "radius must be at least 1, got 0"),
        (dict(beta=0.0), "beta must be greater than 0, got 0.0"),
        (dict(log2_steps=-1), "log2_steps must be in 0..30, got -1"),
        (dict(log2_steps=31), "log2_steps must be in 0..30, got 31"),
        (dict(edge=torch.full((4, 5), 1.5)), "edge must hold values in 0..1, got [1.5]"),
        (dict(edge=torch.full((4, 5), -0.5)), "edge must hold values in 0..1, got [-0.5]"),
        (dict(edge=torch.full((4, 5), torch.nan)), "edge must hold values in 0..1, got [nan]"),
    ],
    pixel_refine: [
        (dict(images=LABELS), f"images must be {FLOATS}, got torch.int64"),
        (
            dict(images=FEATURES),
            "images must be [B,3,H,W] of at least 1×1 pixels, got [2, 4, 3, 3] torch.float32 on cpu",
        ),
        (
            dict(images=torch.zeros(2, 3, 0, 5)),
            "images must be [B,3,H,W] of at least 1×1 pixels, got [2, 3, 0, 5] torch.float32 on cpu",
        ),
        (dict(masks=LABELS), f"masks must be {FLOATS}, got torch.int64"),
        (
            dict(masks=torch.zeros(1, 4, 3, 3)),
            "masks must be [B,k,h,w]=[2,*,*,*] of at least 1×1 cells, got [1, 4, 3, 3] torch.float32 on cpu",
        ),
        (
            dict(masks=torch.zeros(2, 4, 3, 0)),
            "masks must be [B,k,h,w]=[2,*,*,*] of at least 1×1 cells, got [2, 4, 3, 0] torch.float32 on cpu",
        ),
        (
            dict(masks=torch.zeros(2, 4, 3, 3, device=META)),
            "masks must be on cpu as the first argument, got [2, 4, 3, 3] torch.float32 on meta",
        ),
        (dict(dilations=()), "dilations must be one or more distances, each at least 1, got []"),
        (dict(dilations=(1, 0)), "dilations must be one or more distances, each at least 1, got [1, 0]"),
        (dict(iterations=0), "iterations must be at least 1, got 0"),
        (dict(colour_scale=0.0), "colour_scale must be greater than 0, got 0.0"),
    ],
    dense_crf: [
        (dict(images=None), "images must be a tensor, got NoneType"),
        (dict(images=torch.zeros(2, 3, 4, 5)), "images must be uint8, got torch.float32"),
        (dict(images=CRF["images"][0]), "images must be [B,3,H,W], got [3, 4, 5] torch.uint8 on cpu"),
        (dict(images=CRF["images"][:, :2]), "images must be [B,3,H,W], got [2, 2, 4, 5] torch.uint8 on cpu"),
        (dict(probabilities=LABELS), f"probabilities must be {FLOATS}, got torch.int64"),
        (
            dict(probabilities=FEATURES[0]),
            f"probabilities must be {SHAPE}, got [4, 3, 3] torch.float32 on cpu",
        ),
        (
            dict(probabilities=torch.zeros(2, 0, 4, 5)),
            f"probabilities must be {SHAPE}, got [2, 0, 4, 5] torch.float32 on cpu",
        ),
        (
            dict(probabilities=torch.zeros(2, 3, 5, 4)),
            f"probabilities must be {SHAPE}, got [2, 3, 5, 4] torch.float32 on cpu",
        ),
        (
            dict(probabilities=CRF["probabilities"].to(META)),
            "probabilities must be on cpu as the first argument, got [2, 3, 4, 5] torch.float32 on meta",
        ),
        (dict(iterations=-1), "iterations must be at least 0, got -1"),
        (dict(gaussian=3), f"gaussian must be (sxy, compat), {FINITE}, got 3"),
        (dict(gaussian=(0, 3)), f"gaussian must be (sxy, compat), {FINITE}, got (0, 3)"),
        (dict(bilateral=(80, 10)), f"bilateral must be (sxy, srgb, compat), {FINITE}, got (80, 10)"),
        (
            dict(bilateral=(80, 13, float("nan"))),
            f"bilateral must be (sxy, srgb, compat), {FINITE}, got (80, 13, nan)",
        ),
    ],
}


@pytest.mark.parametrize(
    "function, unsound, words",
    [
        pytest.param(f, u, w, id=f"{f.__name__}-{'-'.join(u)}-{i}")
        for f in TABLE
        for i, (u, w) in enumerate(TABLE[f])
    ],
)
def test_words(function, unsound, words):
    """Values (labels) are looked at by the kernel, whose C++ can only raise RuntimeError."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        function(**{**SOUND[function], **unsound})
    if " hold " in words:
        assert f"{function.__name__}: {words}" in str(error.value)
    else:
        assert error.type in (ValueError, TypeError)
        assert str(error.value) == f"{function.__name__}: {words}"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("function, sound", [(prototype_pool, POOL), (prototype_contrast, CONTRAST)])
def test_a_label_out_of_range_is_never_a_crash(function, sound, dtype):
    """The ends of every integer type, forward and with a gradient asked for."""
    for label in {3, torch.iinfo(dtype).max - 1, torch.iinfo(dtype).min} - {0}:
        regions = LABELS.to(dtype).clone()
        regions[1, 2, 3] = label
        features = FEATURES.clone().requires_grad_()
        with pytest.raises(
            (ValueError, RuntimeError), match=re.escape(f"or ignore_index=255, got [{label}]")
        ):
            function(**dict(sound, features=features, regions=regions))


@pytest.mark.parametrize("function, sound", [(prototype_pool, POOL), (prototype_contrast, CONTRAST)])
def test_the_sound_arguments_are_sound(function, sound):
    function(**sound)
