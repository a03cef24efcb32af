"""Every problem of every script at tiny sizes: all providers agree, the files are whole; the README has their table."""

import argparse
import json

import bench_cam_ops
import bench_dense_crf
import bench_rcm
import bench_refinement
import bench_train_step
import pytest
import table
import torch
import voc_scale
from harness import compare, goals, measure, plot, report, results, runner
from PIL import Image

from pssl.cli import parse
from pssl.config.train import TrainConfig

CACHE = 2**14
OPTIONS = argparse.Namespace(
    device="cpu", no_compile=True, batch=2, dtype=torch.float32, dense=True, root=None
)


def tiny_rcm(dtype=torch.float32):
    options = argparse.Namespace(**{**vars(OPTIONS), "dtype": dtype})
    for size in ((8, 8), (5, 40)):
        made = bench_rcm.Size("tiny", *size, options, d=16, c=4)
        yield bench_rcm.pool_problem(made)
        yield bench_rcm.contrast_problem(made)
        yield bench_rcm.mask_problem(made)
        yield bench_rcm.step_problem(made)


def tiny():
    """One of each kind of problem, made by the scripts' own functions."""
    yield from tiny_rcm()
    yield bench_cam_ops.compare_problem(OPTIONS, 9)
    for more in (dict(k=3), dict(k=20, grid=(9, 8)), dict(k=2, images=3)):
        yield bench_cam_ops.sweep_problem(OPTIONS, "tiny", size=(20, 30), thresholds=7, **more)
    yield bench_refinement.walk_problem(OPTIONS, 12, 8, 2)
    yield bench_refinement.refine_problem(OPTIONS, 32, 3)
    yield bench_dense_crf.problem(OPTIONS, 3, (32, 48))


TINY = list(tiny())


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("problem", TINY, ids=[f"{i}-{p.id}" for i, p in enumerate(TINY)])
def test_all_providers_agree(problem):
    assert problem.ours in problem.providers
    if len(problem.providers) == 1:  # the only peer is an extra's
        pytest.skip("; ".join(f"{name}: {why}" for name, why in problem.left_out.items()))
    assert problem.bytes_moved[0] > 0
    peaks = measure.check_agreement(problem)
    assert all(both >= forward >= 0 for forward, both in peaks.values())


@pytest.mark.parametrize("problem", list(tiny_rcm(torch.bfloat16))[:2], ids=lambda p: p.id)
def test_bfloat16_agrees_too(problem):
    measure.check_agreement(problem)


def test_a_wrong_peer_would_be_noticed():
    """The tolerances are no wider than they need be: a loss of a tenth more pixels is outside of them."""
    made = next(p for p in tiny_rcm() if p.id.startswith("prototype_contrast"))
    inputs = {**made.inputs, "regions": made.inputs["regions"].clone()}
    inputs["regions"][:, :1] = 0
    own, other = made.call(made.ours, made.inputs), made.call(made.ours, inputs)
    assert measure.disagreement(made, other, own, "changed", "ours")


@pytest.mark.filterwarnings("ignore:Sparse")
def test_the_dense_walk_is_estimated_from_one_squaring():
    made = bench_refinement.walk_problem(OPTIONS, 12, 8, 2, dense=False)
    found = {r.provider: r for r in measure.measure(made, 0.0, 1e9, CACHE)}
    assert next(iter(found)) == "dense" and "one squaring of it, taken 8 times" in found["dense"].estimate
    assert found["dense"].p50 > 0 and found["dense"].ratio == found["dense"].p50 / found[made.ours].p50


SCRIPTS = {
    "rcm": (bench_rcm, {}),
    "cam_ops": (bench_cam_ops, {}),
    "refinement": (bench_refinement, {}),
    "dense_crf": (bench_dense_crf, {"size": (375, 500)}),
}


def test_every_goal_belongs_to_a_problem():
    ids = set()
    for script, more in SCRIPTS.values():
        for dtype in (torch.float32, torch.bfloat16):
            options = argparse.Namespace(**{**vars(OPTIONS), **more, "dtype": dtype})
            ids |= {name for name, _ in script.problems(options)}
    assert {goal.problem for goal in goals.load_goals()} <= ids


def options(tmp_path, *words):
    made = runner.parser("", "rcm", 1.0, ("channels",))
    return made.parse_args(["--device", "cpu", "--cache", "0.01", "--out", str(tmp_path), *words])


def few(sizes=(None,)):
    made = bench_rcm.Size("same-grid", 8, 8, OPTIONS, d=16, c=4)
    return [("prototype_pool/same-grid", lambda at=at: bench_rcm.pool_problem(made, at)) for at in sizes]


def test_a_run_leaves_whole_files_and_is_its_own_baseline(tmp_path, capsys):
    runner.run(options(tmp_path), few())
    said = capsys.readouterr().out
    assert "prototype_pool, 8² → 8², B=2, D=16, C=4, float32" in said and "GB/s" in said
    assert "≥ 100 × as fast as class_loop" in said, "the goals of a problem are judged by its id"
    record = results.load(tmp_path / "rcm.json")
    run = record["runs"]["rcm"]
    assert run["threads"] == torch.get_num_threads() and run["versions"]["torch"] == torch.__version__
    assert run["copy_bytes_per_second"] > 0
    assert len((tmp_path / "rcm.csv").read_text().splitlines()) == 1 + len(run["results"])
    assert min(Image.open(tmp_path / "rcm.png").size) > 100

    slowed = json.loads((tmp_path / "rcm.json").read_text())
    for result in slowed["runs"]["rcm"]["results"]:
        result["ratio"] *= 1 if result["ours"] else 1e4  # as if ours had been 10⁴ times as fast before
    (tmp_path / "before.json").write_text(json.dumps(slowed))
    with pytest.raises(SystemExit) as stopped:
        runner.run(options(tmp_path, "--check", str(tmp_path / "before.json")), few())
    assert stopped.value.code == 1
    assert "SLOWER" in capsys.readouterr().out


def test_a_sweep_shows_growth(tmp_path, capsys):
    runner.run(options(tmp_path, "--sweep", "channels"), few((64, 128)))
    said = capsys.readouterr().out
    assert "p50 ms against channels" in said and " ^" in said
    record = results.load(tmp_path / "rcm-channels.json")
    assert {r["size"] for r in record["runs"]["rcm-channels"]["results"]} == {64, 128}


def test_a_baseline_that_is_none_is_refused_before_the_run(tmp_path):
    with pytest.raises(SystemExit, match=r"absent\.json"):
        runner.run(options(tmp_path, "--check", str(tmp_path / "absent.json")), few())


# -- the training step -------------------------------------------------------------------------------------------------


def small_step():
    words = ("--data.size=32", "--model.width=8", "--model.dim=8", "--schedule.batch-size=3")
    return bench_train_step.Step(parse(TrainConfig, words, prog="test"), torch.device("cpu"))


def test_the_parts_make_up_the_step():
    whole, cut = small_step(), small_step()
    for _ in range(2):
        whole.whole()
        names = set(cut.timed_parts())
    assert set(bench_train_step.METHOD) | {"main network, scale 1", "classification", "optimiser"} <= names
    for name, value in whole.net.state_dict().items():
        torch.testing.assert_close(cut.net.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in whole.support.net.state_dict().items():
        torch.testing.assert_close(cut.support.net.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_figures_of_a_step(tmp_path):
    found = bench_train_step.measure(small_step(), 0.0)
    assert sum(row["share"] for row in found["parts"]) == pytest.approx(1)
    assert 0 < found["operators_share"] < found["method_share"] < 1
    assert found["flops"] > 1e6 and found["images_per_second"] > 0 and found["peak_extra_bytes"] > 0
    args = options(tmp_path)
    args.group = "train_step"
    machine = runner.start(args)
    runner.finish(args, machine, {**runner.describe_run(), **found})
    assert (tmp_path / "train_step.png").is_file()
    rows = (tmp_path / "train_step.csv").read_text()
    assert rows.count("one training step") == len(found["parts"]) + len(found["results"])
    made = results.load(tmp_path / "train_step.json")
    said, slower = compare.report(made, made)
    assert not slower and said.startswith("2 ratios compared")


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_readme_holds_the_table_of_the_committed_results():
    readme = table.README.read_text(encoding="utf-8")
    made = table.placed(readme, table.block(table.committed()))
    assert made == readme, "python benchmarks/table.py --write"


def test_the_table_of_a_run(tmp_path):
    runner.run(options(tmp_path, "--seconds", "0"), few())
    record = results.load(tmp_path / "rcm.json")
    ours = next(r for r in results.results_of(record["runs"]["rcm"]) if r.ours and r.work != "forward")
    text = table.block([record])
    line = next(row for row in text.splitlines() if row.startswith("| prototype_pool"))
    assert f"| {report.milliseconds(ours.p50)} |" in line and "× (peers)" in line and " of 2 |" in line
    assert f"torch {torch.__version__}" in text
    judged = goals.verdicts(goals.load_goals(), results.results_of(record["runs"]["rcm"]), "cpu")
    assert len(judged) == 2
    for verdict in judged:
        said = f"* `prototype_pool/same-grid`, forward+backward: {verdict.goal}, measured {verdict.measured}"
        assert (said in text) != verdict.met, verdict
    for result in record["runs"]["rcm"]["results"]:
        result["ratio"] = 1.0
    said = "forward+backward: ≥ 3 × as fast as peers, measured 1 ×"
    assert f"Goals missed:\n\n* `prototype_pool/same-grid`, {said}\n* " in table.block([record])
    placed = table.placed(f"a\n{table.BEGIN}\nold\n{table.END}\nb", text)
    assert placed.startswith("a\n") and placed.endswith("\nb") and text in placed and "old" not in placed


def test_pictures_of_committed_results_can_be_drawn(tmp_path):
    for record in table.committed():
        plot.draw(record, tmp_path / "all.png")
        assert (tmp_path / "all.png").is_file()


@pytest.mark.slow
def test_cams_and_scores_at_voc_s_scale(tmp_path):
    found = voc_scale.main(["--images", "3", "--scales", "0.5", "--steps", "5", "--out", str(tmp_path)])
    assert found == {**json.loads((tmp_path / "voc_scale.json").read_text()), "scales": (0.5,)}
    assert found["results"].keys() == {"pssl.cams", "pssl.evaluate"}
    for row in found["results"].values():
        assert 0 < row["cpu_seconds"] and 0 < row["seconds"] < 300 and row["mib"] > 50
    scores = json.loads((tmp_path / "cams_3/scores.json").read_text())
    assert (scores["images"], scores["split"], len(scores["thresholds"])) == (3, "train", 4)
