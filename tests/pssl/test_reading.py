"""Reading a network: multi-scale CAMs and the prototype readout against literal formulas; scores by hand."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pssl.config.model import ModelConfig
from pssl.config.reading import InferenceConfig
from pssl.inputs.images import ImageInputs
from pssl.method.inference import final_prototypes, read_images
from pssl.method.readout import prototype_margin
from pssl.method.terms.rcm import RCM, RCMConfig, image_prototypes
from pssl.models.build import build_cam_net
from pssl.models.cam_files import read_cams, write_cams
from pssl.models.prototypes import Prototypes
from pssl.scoring.scoring import Scorer, iou

SIZES = {"a": (20, 28), "b": (16, 16), "c": (33, 17), "d": (16, 16)}
LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_cam_net(ModelConfig(dim=8, width=16, logit_scale=1.0), 3).eval()


@pytest.fixture
def inputs(net):
    images = torch.randint(
        0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return ImageInputs(list(SIZES), images, LABELS, net.backbone.normalise, (1, 1), "cpu")


def test_multi_scale_cam_is_the_literal_loop(net, inputs):
    config = InferenceConfig(scales=(0.5, 1.0), flip=True, batch_size=3)
    read = list(read_images(net, inputs, range(4), SIZES.__getitem__, config, None))
    assert [m.id for m in read] == list(SIZES) and read[3].maps["cam"].shape == (0, 16, 16)
    for index, maps in enumerate(read):
        classes = LABELS[index].nonzero().flatten()
        assert maps.class_ids.tolist() == (classes + 1).tolist()
        total = torch.zeros(len(classes), *SIZES[maps.id])
        for scale in config.scales:
            with torch.no_grad():
                plain = net(inputs.plain([index], scale, False)).cam.relu()
                mirrored = net(inputs.plain([index], scale, True)).cam.relu().flip(3)
            grid = ((plain + mirrored) / 2)[:, classes]
            if len(classes):
                total += F.interpolate(grid, size=SIZES[maps.id], mode="bilinear")[0]
        expected = total / (total.amax((1, 2), keepdim=True) + 1e-5) if len(classes) else total
        torch.testing.assert_close(maps.maps["cam"].float(), expected, rtol=0, atol=1e-3)
        assert maps.maps["cam"].dtype == torch.float16


def test_prototype_readout_is_the_literal_formula(net, inputs):
    """softmax over the image's classes and background of cos(f, p_c) / temperature, averaged."""
    rows = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    prototypes = Prototypes(rows, torch.tensor([True, True, True, False]), 0.1)
    config = InferenceConfig(scales=(1.0, 2.0), flip=True)
    read = list(read_images(net, inputs, range(4), SIZES.__getitem__, config, prototypes))
    for index, maps in enumerate(read):
        classes = (LABELS[index].nonzero().flatten() + 1).tolist()
        regions = [0, *(c for c in classes if c != 3)]
        probability = torch.zeros(4, *SIZES[maps.id])
        for scale in config.scales:
            grids = []
            for flip in (False, True):
                with torch.no_grad():
                    features = net(inputs.plain([index], scale, flip)).features[0]
                grid = torch.zeros(4, *features.shape[1:])
                for y in range(features.shape[1]):
                    for x in range(features.shape[2]):
                        cosines = F.cosine_similarity(features[:, y, x], rows[regions], dim=1)
                        grid[regions, y, x] = (cosines / 0.1).softmax(0)
                grids.append(grid.flip(2) if flip else grid)
            mean = (grids[0] + grids[1]) / 2
            resized = F.interpolate(mean[None], size=SIZES[maps.id], mode="bilinear")[0]
            probability += resized / len(config.scales)
        expected = (1 + probability[classes] - probability[0]) / 2
        torch.testing.assert_close(maps.maps["prototype"].float(), expected, rtol=0, atol=1e-3)


def test_margin_without_any_valid_prototype_is_zero():
    prototypes = Prototypes(torch.randn(3, 4), torch.zeros(3, dtype=torch.bool), 0.1)
    margin = prototype_margin(torch.rand(1, 4, 2, 2), prototypes, torch.ones(1, 2, dtype=torch.bool))
    assert margin.abs().max() == 0


def test_final_prototypes_are_the_mean_over_images(net, inputs):
    config, scales = RCMConfig(foreground=0.5), (0.5, 1.0)
    result = final_prototypes(net, inputs, 16, config, InferenceConfig(batch_size=3), scales)
    rcm = RCM(3, 8, 16, config)
    rows = {region: [] for region in range(4)}
    for index in range(4):
        with torch.no_grad():
            seen = {s: net(inputs.plain([index], s, False)) for s in scales}
        regions = rcm.regions([seen[s] for s in scales], LABELS[index : index + 1])
        own, present = image_prototypes(seen[1.0].features, regions, 4)
        for region in present[0].nonzero().flatten().tolist():
            rows[region].append(own[0, region])
    for region, found in rows.items():
        assert bool(result.valid[region]) == bool(found)
        if found:
            torch.testing.assert_close(result.rows[region], F.normalize(torch.stack(found).mean(0), dim=0))


def test_scores_by_hand():
    scorer = Scorer(3, 4)  # thresholds .25 .5 .75
    mask = np.array([[0, 1, 1, 255], [0, 1, 0, 255]], dtype=np.uint8)
    parts = np.array([[0, 1, 2, 255], [0, 2, 0, 255]], dtype=np.uint8)
    cams = torch.tensor([[[0.1, 0.9, 0.6, 1.0], [0.3, 0.4, 0.0, 1.0]]]).half()
    scorer.add(cams, torch.tensor([1], dtype=torch.uint8), mask, parts)
    score = scorer.result()
    expected = [(2 / 3, 3 / 4), (3 / 4, 2 / 3), (3 / 5, 1 / 3)]
    for row, (background, region) in zip(score.iou.tolist(), expected, strict=True):
        assert row[:2] == pytest.approx([background, region]) and np.isnan(row[2])
    assert score.best_threshold == 0.25 and score.images == 1
    assert score.at(0.5)[0] == pytest.approx(100 * (3 / 4 + 2 / 3) / 2)
    assert score.activation == pytest.approx(
        {"part": 0.9, "body": (0.6 + 0.4) / 2, "background": (0.1 + 0.3 + 0.0) / 3}, abs=1e-3
    )
    summary = score.summary(("background", "cat", "dog"), 0.5, "train")
    assert summary["iou"]["dog"] is None and summary["best_threshold_on_this_split"] == 0.25


def test_iou_of_a_region_that_is_nowhere_is_nan():
    assert torch.isnan(iou(torch.zeros(1, 2, 2, dtype=torch.int64))).all()


def test_cam_files_round_trip_and_refuse(tmp_path):
    cams, ids = torch.rand(2, 5, 7).half(), torch.tensor([1, 20], dtype=torch.uint8)
    write_cams(tmp_path, "x", cams, ids)
    again = read_cams(tmp_path, "x")
    assert torch.equal(again[0], cams) and torch.equal(again[1], ids)
    with pytest.raises(FileNotFoundError, match=r"y.npz"):
        read_cams(tmp_path, "y")
    np.savez(tmp_path / "z.npz", cams=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"z.npz: expected arrays 'cams' and 'class_ids'"):
        read_cams(tmp_path, "z")
    np.savez(tmp_path / "w.npz", cams=np.zeros((2, 3)), class_ids=np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match=r"w.npz: expected floating cams \[k,H,W\]"):
        read_cams(tmp_path, "w")
    np.savez(tmp_path / "p.npz", cams=np.array([{}]), class_ids=np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_cams(tmp_path, "p")


def test_cam_files_are_read_by_many_threads(tmp_path):
    """A collection of garbage while NumPy parses a header lets the other threads in; none may see a SystemError."""
    cams, ids = torch.rand(2, 5, 7).half(), torch.tensor([1, 20], dtype=torch.uint8)
    write_cams(tmp_path, "x", cams, ids)
    usual = gc.get_threshold()

    def let_others_run(phase: str, info: dict) -> None:
        time.sleep(0)

    gc.callbacks.append(let_others_run)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as threads:
            for again in threads.map(lambda _: read_cams(tmp_path, "x"), range(300)):
                assert torch.equal(again[0], cams) and torch.equal(again[1], ids)
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(let_others_run)
