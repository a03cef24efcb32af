"""Pseudo labels: each step against a literal computation, the command end to end, stopped and carried on."""

import itertools
import json
import math
import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image
from refining import labels_of, tiny_refine

from pssl import refine
from pssl.config.refine import CRFConfig, PARConfig, RefineSettings
from pssl.core import ranks
from pssl.core import settings_file as claims
from pssl.core.threads import over_images
from pssl.data import VOCFolder, voc_palette
from pssl.data.voc import read_label_png
from pssl.method import refinement
from pssl.method.affinity import AffinityHead, affinity_losses
from pssl.method.pseudo_labels import (
    best_regions,
    confident_regions,
    crf_step,
    label_scores,
    par_step,
    probabilities,
    shares,
    walk_step,
)
from pssl.models.cam_files import read_cams, write_cams
from pssl_ext import dense_crf, pixel_refine, random_walk


@pytest.fixture
def random_cams() -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 CAMs of regions 7 and 3, in this order, with values equal to thresholds and to each other."""
    cams = torch.randint(0, 11, (2, 9, 8), generator=torch.Generator().manual_seed(0)) / 10
    return cams.half(), torch.tensor([7, 3], dtype=torch.uint8)


@pytest.mark.parametrize("power", [None, 3.0])
def test_threshold_and_power_by_hand(random_cams, power):
    cams, ids = random_cams
    scores, regions = label_scores(cams, ids, 0.5, power)
    labels = best_regions(scores, regions)
    assert labels.dtype == torch.uint8 and regions == [0, 3, 7]
    for y, x in itertools.product(range(9), range(8)):
        of_7, of_3 = cams[:, y, x].float().tolist()
        background = 0.5 if power is None else (1 - max(of_7, of_3)) ** power
        expected = 0 if max(of_7, of_3) <= background else 3 if of_3 >= of_7 else 7
        assert labels[y, x] == expected, (y, x)
    assert (labels == 0).any() and (labels == 3).any() and (labels == 7).any()


def test_unsure_pixels_become_255(random_cams):
    scores, regions = label_scores(*random_cams, 0.3)
    sure, share_of = best_regions(scores, regions), shares(scores).amax(0)
    labels = best_regions(scores, regions, unsure=0.6)
    assert torch.equal(labels == 255, share_of < 0.6) and (labels == 255).any()
    assert torch.equal(labels[labels != 255], sure[labels != 255])


def test_image_without_classes_is_background():
    scores, regions = label_scores(torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.uint8), 0.3, 4.0)
    assert regions == [0] and best_regions(scores, regions).eq(0).all()


def test_what_two_labellings_are_sure_of():
    sparing = torch.tensor([[1, 0, 0, 2]], dtype=torch.uint8)
    generous = torch.tensor([[1, 0, 2, 1]], dtype=torch.uint8)
    assert confident_regions(sparing, generous).tolist() == [[1, 0, 255, 2]]


def test_steps_call_the_operators(random_cams):
    """CRF and PAR get probabilities; the walk gets means over the cells of its grid."""
    scores, _ = label_scores(*random_cams, 0.4)
    image = torch.randint(0, 256, (3, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    p = probabilities(scores, 3.0)[None]
    odds = (p[0, 1] / p[0, 0]).log()
    torch.testing.assert_close(odds, 3 * (scores[1] - 0.4), atol=1e-5, rtol=1e-5)
    crf = CRFConfig(iterations=3, gaussian=(2.0, 1.0), bilateral=(20.0, 30.0, 2.0))
    expected = dense_crf(image[None], p, iterations=3, gaussian=(2.0, 1.0), bilateral=(20.0, 30.0, 2.0))[0]
    assert torch.equal(crf_step(image, p[0], crf), expected) and not torch.equal(expected, p[0])
    refined = pixel_refine(image[None].float(), p, dilations=(1, 3), iterations=2)[0]
    expected = refined / refined.sum(0)
    par = par_step(image, p[0], PARConfig(dilations=(1, 3), iterations=2))
    torch.testing.assert_close(par, expected)
    features = torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(2))
    small = scores.view(3, 3, 3, 4, 2).mean((2, 4))
    walked = random_walk(small, features=features, radius=2, beta=3.0, log2_steps=2)
    expected = torch.nn.functional.interpolate(walked[None], size=(9, 8), mode="bilinear")[0]
    for own, before in zip(expected, scores, strict=True):
        own *= before.max() / own.max()
    assert torch.allclose(expected[0], torch.tensor(0.4)), "a threshold is the same after the walk"
    torch.testing.assert_close(walk_step(features, scores, 2, 3.0, 2), expected)


def test_affinity_loss_over_literal_pairs():
    source = torch.Generator().manual_seed(3)
    features = torch.rand(2, 3, 6, 5, generator=source, requires_grad=True)
    labels = torch.randint(0, 3, (2, 6, 5), generator=source).to(torch.uint8)
    labels[:, 0] = 255
    costs = {"foreground": [], "background": [], "different": []}
    cells = list(itertools.product(range(6), range(5)))
    for f, own in zip(features, labels.tolist(), strict=True):
        for (y, x), (v, u) in itertools.combinations(cells, 2):
            if (v - y) ** 2 + (u - x) ** 2 >= 4 or 255 in (own[y][x], own[v][u]):
                continue
            a = math.exp(-float((f[:, y, x] - f[:, v, u]).abs().mean().detach()))
            if own[y][x] != own[v][u]:
                costs["different"].append(-math.log(1 + 1e-5 - a))
            else:
                costs["foreground" if own[y][x] else "background"].append(-math.log(a + 1e-5))
    losses = affinity_losses(features, labels, 2)
    losses["total"].backward()
    losses = {name: loss.detach() for name, loss in losses.items()}
    for name, values in costs.items():
        assert len(values) > 3 and float(losses[name]) == pytest.approx(np.mean(values), rel=1e-4), name
    means = [float(losses[name]) for name in ("foreground", "background", "different")]
    assert float(losses["total"]) == pytest.approx(means[0] / 4 + means[1] / 4 + means[2] / 2)
    assert features.grad.abs().sum() > 0


def test_affinity_loss_without_sure_cells_is_zero():
    features = torch.rand(1, 2, 3, 3, requires_grad=True)
    losses = affinity_losses(features, torch.full((1, 3, 3), 255, dtype=torch.uint8), 2)
    losses["total"].backward()
    assert float(losses["total"].detach()) == 0 and features.grad.abs().max() == 0
    assert float(affinity_losses(features.detach(), torch.zeros(1, 3, 3, dtype=torch.uint8), 1)["total"]) == 0


def test_affinities_learn_regions():
    """On features that tell left from right, different pairs part and equal ones stay."""
    torch.manual_seed(0)
    features = torch.randn(1, 4, 8, 8) * 0.1
    features[:, 0, :, 4:] += 1
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[:, :, 4:] = 1
    head = AffinityHead(4, 8)
    optimizer = torch.optim.AdamW(head.parameters(), 2e-2)
    for _ in range(60):
        losses = affinity_losses(head(features), labels, 3)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    assert losses["different"] < 0.3 and losses["foreground"] < 0.3 and losses["background"] < 0.3


@pytest.mark.parametrize("method", ["none", "crf", "par", "affinity", "affinity+crf", "par+crf"])
def test_every_method_labels_the_split(tiny_cams, tmp_path, quiet, method):
    config = tiny_refine(tiny_cams, tmp_path, method)
    result = refine.run(config, quiet)
    folder = VOCFolder(tiny_cams.root)
    ids = folder.ids("train")
    assert (result["written"], result["kept"], result["method"]) == (16, 0, method)
    assert set(result["seconds_per_image"]) == {*(() if method == "none" else method.split("+")), "image"}
    assert result["sharpness"] == 4.0
    assert result["background"]["chosen_by"] == "labels of 16 images"
    kinds = set()
    for image_id, present in zip(ids, folder.image_labels(ids), strict=True):
        with Image.open(tmp_path / f"{image_id}.png") as picture:
            assert picture.mode == "P" and picture.getpalette()[:63] == voc_palette(21)
        labels = read_label_png(tmp_path / f"{image_id}.png", len(folder.classes))
        assert labels.shape == folder.mask(image_id).shape
        assert set(np.unique(labels)) <= {0, *(present.nonzero()[0] + 1).tolist()}
        kinds |= {*np.unique(labels)}
    assert len(kinds) > 1
    assert (tmp_path / "affinity.safetensors").is_file() == ("affinity" in method)


def test_labels_are_what_the_steps_make(tiny_cams, tmp_path, quiet):
    """A method's labels are its steps' in their order, whatever the threads."""
    config = tiny_refine(tiny_cams, tmp_path / "a", "par+crf", unsure=0.7, threshold=0.4, sharpness=5.0)
    refine.run(config, quiet)
    config.workers, config.out = 1, tmp_path / "b"
    refine.run(config, quiet)
    folder = VOCFolder(tiny_cams.root)
    for image_id in folder.ids("train"):
        image = torch.from_numpy(folder.image(image_id)).permute(2, 0, 1)
        scores, regions = label_scores(*read_cams(tiny_cams.train, image_id), 0.4)
        scores = par_step(image, (5.0 * scores).softmax(0), config.settings.par)
        scores = crf_step(image, (5.0 * scores).softmax(0), config.settings.crf)
        expected = best_regions(scores, regions, 0.7)
        for out in ("a", "b"):
            found = read_label_png(tmp_path / out / f"{image_id}.png", len(folder.classes))
            assert np.array_equal(found, expected.numpy()), (out, image_id)


def test_stopped_run_carries_on(tiny_cams, tmp_path, quiet):
    """A run that broke off in the middle leaves whole files only, and the next one makes just what is missing."""
    whole = tiny_refine(tiny_cams, tmp_path / "whole", "affinity", threshold=0.4)
    refine.run(whole, quiet)
    ids = VOCFolder(tiny_cams.root).ids("train")
    expected = labels_of(whole.out, ids)

    broken = tiny_refine(tiny_cams, tmp_path / "broken", "affinity", threshold=0.4)
    step = refinement.walk_step
    calls = itertools.count()

    def stop(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    refinement.walk_step = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            refine.run(broken, quiet)
    finally:
        refinement.walk_step = step
    done = {path.stem: path.stat().st_mtime_ns for path in broken.out.glob("*.png")}
    assert 0 < len(done) < 16
    assert labels_of(broken.out, done) == {i: expected[i] for i in done}
    state = (broken.out / "affinity.state.pt").stat().st_mtime_ns
    result = refine.run(broken, quiet)
    assert (result["written"], result["kept"]) == (16 - len(done), len(done))
    assert labels_of(broken.out, ids) == expected
    assert {i: (broken.out / f"{i}.png").stat().st_mtime_ns for i in done} == done, (
        "finished files were written again"
    )
    assert (broken.out / "affinity.state.pt").stat().st_mtime_ns == state, "affinities were trained again"
    assert not [path.name for path in broken.out.iterdir() if path.name.startswith(".")]


def test_sharpness_is_the_readouts(tiny_cams, tmp_path, quiet):
    """By cams.yaml, unless it is given."""
    folder = tmp_path / "cams"
    folder.mkdir()
    text = (tiny_cams.train / "cams.yaml").read_text()
    assert "readout: cam" in text
    (folder / "cams.yaml").write_text(text.replace("readout: cam", "readout: prototype"))
    for path in tiny_cams.train.glob("*.npz"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = tiny_refine(tiny_cams, tmp_path / "out", "crf")
    config.cams = folder
    assert refine.run(config, quiet)["sharpness"] == 8.0
    config = tiny_refine(tiny_cams, tmp_path / "given", "crf", sharpness=2.0)
    assert refine.run(config, quiet)["sharpness"] == 2.0


def test_trained_affinities_serve_another_split(tiny_cams, tmp_path, quiet):
    trained = tiny_refine(tiny_cams, tmp_path / "train", "affinity")
    refine.run(trained, quiet)
    other = tiny_refine(tiny_cams, tmp_path / "val", "affinity", split="val", threshold=0.4)
    other.cams, other.settings.affinity.checkpoint = tiny_cams.val, trained.out / "affinity.safetensors"
    assert refine.run(other, quiet)["written"] == 6
    assert not (other.out / "confident").exists()
    other.out, other.settings.affinity.dim = tmp_path / "other", 5
    with pytest.raises(ValueError, match=r"affinity.safetensors: expected affinities of .*'dim': 5"):
        refine.run(other, quiet)


def test_other_settings_are_refused_in_the_same_folder(tiny_cams, tmp_path, quiet):
    config = tiny_refine(tiny_cams, tmp_path, threshold=0.4)
    refine.run(config, quiet)
    config.workers, before = 1, json.loads((tmp_path / "refine.json").read_text())
    after = refine.run(config, quiet)
    assert after["kept"] == 16 and after["seconds_per_image"] == before["seconds_per_image"]
    assert before["seconds_per_image"]["image"] > 0
    config.settings.threshold = 0.5
    with pytest.raises(ValueError, match=r"differ in threshold \(0.4, now 0.5\)"):
        refine.run(config, quiet)
    claims.write_or_require_same(tmp_path / "x.yaml", {"a": {"b": 1}, "c": None})
    with pytest.raises(ValueError, match=r"a.b \(1, now 2\), c \(None, now None\)"):
        claims.write_or_require_same(tmp_path / "x.yaml", {"a": {"b": 2}})


def test_missing_things_are_named(tiny_cams, tmp_path, quiet):
    ids = VOCFolder(tiny_cams.root).ids("train")
    config = tiny_refine(tiny_cams, tmp_path / "out", "affinity")
    config.cams = tmp_path / "foreign"
    for image_id in ids:
        write_cams(config.cams, image_id, torch.zeros(1, 48, 48), torch.tensor([1]))
    with pytest.raises(ValueError, match="threshold: expected one, or a power"):
        refine.run(config, quiet)
    config.settings.threshold = 0.4
    with pytest.raises(ValueError, match="checkpoint: expected one for the affinities"):
        refine.run(config, quiet)
    config.settings.method = "none"
    assert refine.run(config, quiet)["written"] == 16
    write_cams(config.cams, ids[3], torch.zeros(1, 5, 5), torch.tensor([1]))
    config.out = tmp_path / "again"
    with pytest.raises(ValueError, match=r"npz: expected CAMs of the image's size \[48, 48\], got \[5, 5\]"):
        refine.run(config, quiet)
    with pytest.raises(ValueError, match="sharpness: expected a value above 0, got 0"):
        RefineSettings(sharpness=0.0)
    for method in ("crf+crf", "", "walk"):
        with pytest.raises(
            ValueError, match="method: expected 'none', or different names of crf, par, affinity"
        ):
            RefineSettings(method=method)


def one_rank(rank: int, port: int, config: refine.RefineConfig) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        refine.run(config)
    finally:
        ranks.stop()


@pytest.mark.slow
def test_two_ranks_share_the_images(tiny_cams, tmp_path, quiet):
    config = tiny_refine(tiny_cams, tmp_path / "one", "par+crf")
    refine.run(config, quiet)
    config.out, config.workers = tmp_path / "two", 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(one_rank, (port, config), nprocs=2)
    ids = VOCFolder(tiny_cams.root).ids("train")
    assert labels_of(tmp_path / "two", ids) == labels_of(tmp_path / "one", ids)
    assert json.loads((tmp_path / "two/refine.json").read_text())["written"] == 16


def test_threads_keep_the_order_and_raise():
    before = torch.get_num_threads()
    assert list(over_images(lambda n: n * n, range(40), 3)) == [n * n for n in range(40)]
    with pytest.raises(ZeroDivisionError):
        list(over_images(lambda n: 1 // n, [1, 0, 1], 2))
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="workers: expected at least 1"):
        list(over_images(str, [1], 0))
