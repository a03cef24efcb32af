"""The report: what is on the page, that it stands alone, that a browser shows it."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from pssl import pipeline, report, segment, train
from pssl.data import VOCFolder, colour_labels
from pssl.reporting.charts import SERIES, Series, bar_chart, line_chart, smoothed, thinned, ticks
from pssl.reporting.page import STYLE, table
from pssl.reporting.run_files import LOSSES, RunFiles
from pssl.scoring.scoring import LabelScorer

BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(autouse=True)
def deterministic_mode_ends_with_the_test():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(tiny_pipeline, tmp_path_factory):
    """A pipeline's folder with its report."""
    config = tiny_pipeline(tmp_path_factory.mktemp("report") / "run <&>")
    pipeline.run(config)
    torch.use_deterministic_algorithms(False)
    return config.out


class Page(HTMLParser):
    """Tags that are left open, references, headings, pictures, text."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.references, self.headings, self.pictures, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.pictures.append((values["alt"], values["src"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_page_stands_alone_and_is_whole(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert "<script" not in text and "url(" not in text and "prefers-color-scheme: dark" in STYLE
    assert page.headings == [
        "From CAMs to predictions", "Ablation", "Classes", "Background threshold", "Losses", "Images", "Configuration",
    ]  # fmt: skip
    assert {f"#{part}" for part in re.findall(r'<section id="(\w+)"', text)} == set(page.references) & {
        r for r in page.references if r.startswith("#")
    }
    assert "run <&>" in page.text and "run <&>" not in text
    assert "classifier_epochs: 2" in page.text and "method: affinity+crf" in page.text


def test_pictures_are_those_of_the_run(finished, tiny_root):
    """All six pictures of the worst and the best images; the ground truth's pixels are the mask's."""
    folder = VOCFolder(tiny_root)
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    scores = {}
    for image_id in folder.ids("val"):
        path = finished / f"segment/results/VOC2012/Segmentation/comp6_val_cls/{image_id}.png"
        scorer = LabelScorer(len(folder.classes) + 1)
        scorer.add(np.array(Image.open(path)), folder.mask(image_id))
        scores[image_id] = scorer.result().summary(("background", *folder.classes), "missed")["miou"]
    kinds = ("image", "CAM", "region mask", "pseudo label", "prediction", "ground truth")
    order = sorted(scores, key=lambda i: (scores[i], i))
    shown = order[:3] + order[3:][::-1]
    assert [name for name, _ in page.pictures] == [f"{kind} of {i}" for i in shown for kind in kinds]
    pictures = {
        name: Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for name, uri in page.pictures
    }
    for image_id in shown:
        own = np.array(pictures[f"ground truth of {image_id}"].convert("RGB"))
        assert np.array_equal(own, colour_labels(folder.mask(image_id)))
        label = np.array(Image.open(finished / f"labels/val/{image_id}.png"))
        assert np.array_equal(np.array(pictures[f"pseudo label of {image_id}"]), label)
        assert f"mIoU of the prediction {scores[image_id]:.1f}" in page.text
    image = folder.image(shown[0])
    assert np.array_equal(np.array(pictures[f"image of {shown[0]}"]), image)


def test_a_browser_shows_it(finished, tmp_path):
    """In a headless Chromium: no console message, every picture decoded, every chart drawn."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium (Debian: apt-get install chromium)")
    probe = """<script>addEventListener("load", () => {
      const pictures = [...document.images], charts = [...document.querySelectorAll("svg")];
      document.body.dataset.pictures = pictures.filter(p => p.complete && p.naturalWidth > 0).length;
      document.body.dataset.charts = charts.filter(c => c.getBBox().width > 300 && c.getBBox().height > 100).length;
      document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
    })</script></body>"""
    text = (finished / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    command = [browser, *BROWSER, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += [
        "--window-size=1200,900",
        "--virtual-time-budget=5000",
        "--dump-dom",
        f"file://{tmp_path}/page.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = dict(re.findall(r'data-(\w+)="(\w+)"', done.stdout))
    page = Page(text)
    assert found == {"pictures": str(len(page.pictures)), "charts": str(text.count("<svg")), "wide": "false"}
    assert len(page.pictures) == 36 and text.count("<svg") == 1 + 2 + 2


def test_report_of_a_single_stage(tiny_config, tiny_cams, tmp_path, quiet):
    tiny_config.arms = ("classifier",)
    train.run(tiny_config, quiet)
    page = Page(report.run(report.ReportConfig(run=tiny_config.out), quiet).read_text(encoding="utf-8"))
    assert (
        page.headings == ["Ablation", "Background threshold", "Losses", "Configuration"] and not page.pictures
    )
    assert all(f"mIoU of the best arm by {how}, classifier, val" in page.text for how in ("cam", "prototype"))
    config = segment.SegmentConfig(
        labels=tiny_cams.root / "SegmentationClass", data=tiny_cams.data, out=tmp_path / "segment"
    )
    config.model.width, config.model.dim, config.schedule.epochs, config.predict.scales = 16, 8, 1, (1.0,)
    segment.run(config, quiet)
    out = report.run(report.ReportConfig(run=config.out, images=1, out=tmp_path / "page.html"), quiet)
    page = Page(out.read_text(encoding="utf-8"))
    assert page.headings == ["Classes", "Losses", "Images", "Configuration"]
    assert [name.partition(" of ")[0] for name, _ in page.pictures] == [
        "image",
        "prediction",
        "ground truth",
    ] * 2
    with pytest.raises(FileNotFoundError, match="found neither metrics"):
        report.run(report.ReportConfig(run=tmp_path / "nothing"), quiet)


def test_charts_draw_what_they_are_given():
    svg = line_chart([Series("a<b", [0, 1, 2, 3], [0.0, 1.0, None, 4.0])], "step", "loss", [(3, 4.0, "last")])
    first, second = (path.split() for path in re.findall(r'points="([^"]*)"', svg))
    assert len(first) == 2 and len(second) == 1 and "a&lt;b" in svg
    left, right = float(first[0].split(",")[0]), float(second[0].split(",")[0])
    middle = float(first[1].split(",")[0])
    assert middle - left == pytest.approx((right - left) / 3, abs=0.2)
    heights = [float(point.split(",")[1]) for point in (*first, *second)]
    assert heights[0] - heights[1] == pytest.approx((heights[0] - heights[2]) / 4, abs=0.2), "y grows upwards"
    assert "<title>last</title>" in svg and line_chart([Series("a", [1], [None])], "x", "y") == ""
    steps = [float(n % 2) for n in range(60)]
    assert smoothed(Series("a", steps, steps)).y[20:40] == pytest.approx([0.5] * 20, abs=0.11)
    assert smoothed(Series("a", [0, 1], [3.0, None])).y == [3.0, None]
    noisy = line_chart([Series("a", list(range(60)), steps, 4)], "step", "loss", noisy=True)
    faint, line = (path.split() for path in re.findall(r'points="([^"]*)"', noisy))
    assert noisy.count('class="line s4 faint"') == noisy.count('class="line s4"') == 1
    spread = [np.ptp([float(point.split(",")[1]) for point in path]) for path in (faint, line)]
    assert spread[1] < spread[0] / 2
    bars = bar_chart(["x", "y"], [Series("s", (), [50.0, None]), Series("t", (), [100.0, 25.0])], "IoU")
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', bars)]
    assert widths[0] * 2 == pytest.approx(widths[1], abs=0.2) and widths[1] == pytest.approx(
        4 * widths[2], abs=0.2
    )
    assert len(widths) == 3 and bar_chart([], [], "IoU") == ""


def test_ticks_and_thinning():
    assert (
        ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
        and ticks(0, 73, 5) == [0, 20, 40, 60]
        and ticks(3, 3) == [3]
    )
    long = thinned(Series("a", list(range(1000)), [float(n) for n in range(1000)]), 100)
    assert len(long.x) == 100 and long.y[0] == pytest.approx(4.5) and long.x == long.y
    assert thinned(long) is long


def test_tables_single_out_the_best():
    html = table(["arm", "mIoU"], [["a", "41.5 ± 1"], ["b<", "–"], ["c", "39.0"]], best=(1,))
    assert html.count('class="best"') == 1 and '<td class="best">41.5 ± 1</td>' in html and "b&lt;" in html
    assert html.count("class=text") == 1 and '<td class="text">a</td>' in html, "a column of words"


def test_every_loss_keeps_its_colour(tmp_path):
    columns = ("stage", "step", *LOSSES)
    rows = [
        ("0/rcm", 0, 1, 2, "", "", "", 3),
        ("0/ppc", 0, 1, "", "", 4, 5, 10),
        ("segment", 0, *[""] * 5, 7),
    ]
    path = tmp_path / "losses.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in (columns, *rows)))
    found = RunFiles(tmp_path).losses(path)
    assert {stage: [(s.name, s.colour) for s in curves] for stage, curves in found.items()} == {
        "0/rcm": [("classification", 0), ("rcm", 1), ("total", 5)],
        "0/ppc": [("classification", 0), ("seam", 3), ("ppc", 4), ("total", 5)],
        "segment": [("total", 0)],
    }
    assert len(LOSSES) == SERIES
