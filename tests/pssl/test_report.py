"""The report: what is on the page, that it stands alone, that a browser shows it."""

import base64
import io
import re
import shutil
import subprocess
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from pssl import pipeline, report, segment, train
from pssl.data import VOCFolder, colour_labels
from pssl.reporting.charts import Key, bar_chart, line_chart
from pssl.reporting.comparison import draw_comparison
from pssl.reporting.page import render
from pssl.reporting.panels import Images, Panel, Picture
from pssl.reporting.run_files import RunFiles
from pssl.reporting.sections import Configuration, Stages, Tile
from pssl.reporting.series import MOST_POINTS, Series, smoothed, thinned
from pssl.reporting.svg import COLOURS
from pssl.reporting.tables import Cell, table
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


SECTIONS = ("stages", "ablation", "unscored", "classes", "thresholds", "losses", "images", "configuration")


class Page(HTMLParser):
    """Tags that are left open, all tags, ids, references, headings, pictures, text."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.references, self.headings, self.pictures, self.text = [], [], [], [], ""
        self.tags, self.ids = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.pictures.append((values["alt"], values["src"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

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
    assert "<script" not in text and "url(" not in text and "<?xml" not in text
    assert len(page.ids) == len(set(page.ids)), "several charts, one of each id"
    light, dark = text.split("prefers-color-scheme: dark")
    assert all(f"--{name}:#" in light and f"--{name}:#" in dark for name in COLOURS)
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
    (
        config.settings.model.width,
        config.settings.model.dim,
        config.settings.schedule.epochs,
        config.settings.predict.scales,
    ) = 16, 8, 1, (1.0,)
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


def drawn(svg, kind):
    """The outlines of a kind: stretches of points [n,2], y upwards, for each element of the chart of that class."""
    found = []
    for group in ElementTree.fromstring(svg).iter("g"):
        if group.get("class") == kind:
            stretches = re.findall(r"M ([^Mz]*)", group.find("path").get("d"))
            points = [np.array(re.findall(r"-?[\d.]+", one), float).reshape(-1, 2) for one in stretches]
            found.append([one * (1, -1) for one in points])
    return found


def texts(svg):
    """All texts of a chart, and its tooltips."""
    return [
        element.text for element in ElementTree.fromstring(svg).iter() if element.tag in ("text", "title")
    ]


def test_lines_are_what_they_are_given():
    lines = [Series("a", [0, 1, 2, 3, 4], [0.0, 1.0, None, 4.0, 2.0]), Series("b", [0, 4], [3.0, 3.0], 3)]
    chart = line_chart(lines, "step", "loss", [(3, 4.0, "last")])
    (first, second), (flat,) = drawn(chart.svg, "line")
    assert len(first) == len(second) == len(flat) == 2, "a gap parts a line"
    place = (flat[1, 0] - flat[0, 0]) / 4
    assert first[1, 0] - first[0, 0] == pytest.approx(place, abs=0.2)
    assert second[0, 0] - first[0, 0] == pytest.approx(3 * place, abs=0.2)
    height = (second[0, 1] - first[0, 1]) / 4
    assert height > 50 and first[1, 1] - first[0, 1] == pytest.approx(height, abs=0.2)
    assert flat[0, 1] - first[0, 1] == pytest.approx(3 * height, abs=0.2)
    (((mark,)),) = drawn(chart.svg, "mark")
    assert (mark.min(0) + mark.max(0)) / 2 == pytest.approx(second[0], abs=0.2) and np.ptp(
        mark, 0
    ) == pytest.approx(8)
    shown = texts(chart.svg)
    across = ["0", "0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4"]
    assert [text for text in shown if text[0].isdigit()] == [*across, "0", "1", "2", "3", "4"]
    assert shown[-1] == "last" and {"step", "loss"} < set(shown)
    colours = re.findall(r"stroke: var\(--(s\d)\)", chart.svg)
    assert colours == ["s0", "s3"] and chart.legend == [Key("a", "var(--s0)"), Key("b", "var(--s3)")]
    assert line_chart([Series("a", [1, 2], [None, float("inf")])], "x", "y") is None
    assert line_chart([Series("a", [1, 2], [-1.0, -1.0])], "x", "y").legend == [], "alone, it needs no key"


def test_noisy_lines_are_smoothed_above_the_steps():
    steps = [float(n % 2) for n in range(60)]
    assert smoothed(np.array(steps))[20:40] == pytest.approx([0.5] * 20, abs=0.11)
    assert smoothed(np.array([3.0, np.nan])) == pytest.approx([3.0, np.nan], nan_ok=True)
    gaps = np.array([*steps[:30], np.nan, *steps[31:]])
    assert np.isnan(smoothed(gaps)).sum() == 1 and smoothed(gaps)[28] == pytest.approx(0.5, abs=0.11)
    svg = line_chart([Series("a", list(range(60)), steps, 4)], "step", "loss", noisy=True).svg
    (((faint,)),), (((line,)),) = drawn(svg, "faint"), drawn(svg, "line")
    assert np.ptp(line[:, 1]) < np.ptp(faint[:, 1]) / 2 and len(faint) == 60
    assert svg.index('class="faint"') < svg.index('class="line"') and svg.count("stroke: var(--s4)") == 2
    assert svg.count("stroke-opacity: 0.25") == 1


def test_long_lines_are_thinned():
    x, y = thinned(np.arange(1000.0), np.arange(1000.0), 100)
    assert len(x) == 100 and y[0] == pytest.approx(4.5) and np.array_equal(x, y)
    assert thinned(x, y)[0] is x
    gaps = np.where(np.arange(1000) < 10, np.nan, 1.0)
    assert np.isnan(thinned(np.arange(1000.0), gaps, 100)[1]).tolist() == [True] + [False] * 99
    rng = np.random.default_rng(0)
    svg = line_chart([Series("a", list(range(20000)), rng.random(20000).tolist())], "step", "loss").svg
    assert 100 < len(drawn(svg, "line")[0][0]) <= MOST_POINTS and len(svg) < 8000


def test_bars_are_as_long_as_their_values():
    series = [Series("s", (), [50.0, None]), Series("t", (), [100.0, 0.0])]
    chart = bar_chart(["x", "y"], series, "IoU")
    bars = [outline for (outline,) in drawn(chart.svg, "bar")]
    length, thick = np.transpose([np.ptp(bar, 0) for bar in bars])
    assert len(bars) == 3 and length[0] * 2 == pytest.approx(length[1], abs=0.2) and 0 < length[2] < 1
    assert thick == pytest.approx([9] * 3, abs=0.5)
    tops = [bar[:, 1].max() for bar in bars]
    assert tops[0] > tops[1] > tops[2], "from top to bottom: x of s, x of t, y of t"
    shown = texts(chart.svg)
    assert {"x, s: 50.0", "x, t: 100.0", "y, t: 0.0", "50", "x", "y"} < set(shown) and "nan" not in shown
    assert [text for text in shown if text.isdigit()] == [
        "0",
        "20",
        "40",
        "60",
        "80",
        "100",
        "50",
        "100",
        "0",
    ]
    assert [key.name for key in chart.legend] == ["s", "t"] and bar_chart([], [], "IoU") is None


def test_charts_depend_on_nothing_but_their_data():
    """Neither on the time nor on matplotlib's settings, which they leave alone; all colours are the page's."""

    def both():
        lines = [Series(f"{n}", [0, 1], [0.0, n]) for n in range(8)]
        return line_chart(lines, "x", "y", [(0, 0, "a")]).svg, bar_chart(
            ["a", "b"], [Series("t", (), [1, 2])], "x"
        ).svg

    plain = both()
    with matplotlib.rc_context(
        {"text.usetex": True, "lines.linewidth": 9, "axes.grid": True, "svg.fonttype": "path"}
    ):
        settings = dict(matplotlib.rcParams)
        assert both() == plain
        assert dict(matplotlib.rcParams) == settings
    for svg in plain:
        assert re.match(r'<svg viewBox="0 0 640 \d+" role="img" aria-label="[^"]+">', svg)
        assert not re.search(r'#|<defs|<style|<metadata|font|clip|url|\bid="|xmlns|width="', svg)
    assert "s0 s1 s2 s3 s4 s5 s0 s1".split() == re.findall(r"stroke: var\(--(s\d)", plain[0])


HOSTILE = "<i>&'\" $x_1^2$ 日本\x1b_"


def test_texts_of_the_data_are_texts_of_the_page():
    line = line_chart([Series(HOSTILE, [0, 1], [0, 1])] * 2, HOSTILE, HOSTILE, [(0, 0, HOSTILE)])
    bars = bar_chart([HOSTILE] * 2, [Series(HOSTILE, (), [1, 2])] * 2, HOSTILE)
    cells = table([HOSTILE], [[HOSTILE]])
    sections = {
        "stages": Stages(cells, cells),
        "ablation": cells,
        "unscored": None,
        "classes": bars,
        "thresholds": {HOSTILE: line},
        "losses": {HOSTILE: line},
        "images": Images(
            [Key(HOSTILE, "#000")], {"Worst": [Panel(HOSTILE, HOSTILE, [Picture(HOSTILE, "data:,", True)])]}
        ),
        "configuration": Configuration(HOSTILE, HOSTILE),
    }
    text = render(HOSTILE, HOSTILE, [Tile(HOSTILE, HOSTILE)], sections, HOSTILE)
    page = Page(text)
    assert page.open == [] and "i" not in page.tags and len(page.headings) == 7
    assert page.pictures == [(f"{HOSTILE} of {HOSTILE}", "data:,")]
    head, tables, charts, images, file = 5, 4 + 2, 2 + 3 + 3, 1 + 3, 2
    assert page.text.count(HOSTILE) == head + tables + charts + images + file + 1, "and the closing line"
    svg = HOSTILE.replace("\x1b", " ")
    assert [texts(chart.svg).count(svg) for chart in (line, bars)] == [3, 3], (
        "axes, a tooltip; groups, an axis"
    )
    assert f"{svg}, {svg}: 1.0" in texts(bars.svg)


def test_tables_single_out_the_best():
    data = table(["arm", "mIoU"], [["a", "41.5 ± 1"], ["b", "–"], ["c", "39.0"]], best=(1,))
    assert data.head == [Cell("arm", "text"), Cell("mIoU")], "a column of words"
    assert data.rows[0] == [Cell("a", "text"), Cell("41.5 ± 1", "best")]
    assert data.rows[1:] == [[Cell("b", "text"), Cell("–")], [Cell("c", "text"), Cell("39.0")]]
    html = render("", "", [], dict.fromkeys(SECTIONS) | {"ablation": data}, "")
    assert html.count('class="best"') == 1 and '<td class="best">41.5 ± 1</td>' in html
    assert '<td class="text">a</td>' in html and '<th scope="col" class="text">arm</th>' in html
    assert Page(html).headings == ["Ablation"]
    alone = table(["arm", "mIoU"], [["a", "41.5"]], best=(1,))
    assert alone.rows == [[Cell("a", "text"), Cell("41.5")]], "of one there is no best"


def test_every_loss_keeps_its_colour(tmp_path):
    """Each column has the colour of its place, whatever the losses are called."""
    rows = [
        ("stage", "epoch", "step", "lr", "classification", "rcm", "new term", "seam", "ppc", "total"),
        ("0/rcm", 0, 0, 0.1, 1, 2, "", "", "", 3),
        ("0/ppc", 0, 0, 0.1, 1, "", "", 4, 5, 10),
        ("0/new", 0, 0, 0.1, "", "", 6, "", "", 6),
        ("segment", 0, 0, 0.1, *[""] * 5, 7),
    ]
    path = tmp_path / "losses.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in rows))
    found = RunFiles(tmp_path).losses(path)
    assert {stage: [(s.name, s.colour) for s in curves] for stage, curves in found.items()} == {
        "0/rcm": [("classification", 0), ("rcm", 1), ("total", 5)],
        "0/ppc": [("classification", 0), ("seam", 3), ("ppc", 4), ("total", 5)],
        "0/new": [("new term", 0)],
        "segment": [("total", 0)],
    }


def test_comparisons_show_regions_in_the_colours_of_the_report(tmp_path):
    mask = np.repeat(np.array([[0, 3, 255]], np.uint8), 6, 0).repeat(2, 1)
    image = np.full((6, 6, 3), 77, np.uint8)
    path = tmp_path / "comparison.png"
    draw_comparison(path, image, mask, [("CAM", torch.zeros(1, 6, 6))], [3], ["a", "b", "c"])
    shown = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    area = (shown == 77).all(1).sum()
    for region in (0, 3, 255):
        count = (shown == colour_labels(np.array([region]))).all(1).sum()
        assert count == pytest.approx(area / 3, rel=0.15), region


def test_archives_hold_all_files_of_the_package():
    """What is no Python module, such as the template, comes into a wheel by a pattern of MANIFEST.in only."""
    package = Path(report.__file__).parent
    line = re.search(r"^recursive-include pssl (.*)$", (package.parent / "MANIFEST.in").read_text(), re.M)
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert "page.html.jinja" in [path.name for path in files]
    assert [path for path in files if not any(fnmatch(path.name, kind) for kind in line[1].split())] == []
