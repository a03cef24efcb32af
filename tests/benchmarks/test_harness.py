"""What makes a benchmark worth trusting: nothing is timed that disagrees, providers take turns, slowdowns are seen."""

import copy
import json
from collections import Counter
from dataclasses import replace

import compare as compare_script
import pytest
import torch
from harness import compare, goals, measure, report, results
from harness.cost import with_peaks
from harness.problem import Lineup, Problem

CACHE = 2**14


def total(x, y):
    return (x * y).sum()


def problem(**providers):
    # Positive: of a sum that nearly cancels, rounding alone would be a disagreement.
    inputs = dict(x=torch.rand(50, 40), y=torch.rand(40))
    providers = {"peers": total, "native": lambda x, y: (x @ y).sum(), **providers}
    return Problem("sum", "sum of products", inputs, ("x", "y"), providers, "native", (8160, 8160))


# -- agreement ---------------------------------------------------------------------------------------------------------


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (x * y).sum()

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y.expand_as(x), grad * 1.01 * x.sum(0)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda x, y: 1.001 * total(x, y), "sum of products: wrong disagrees with peers: result is up to"),
        (lambda x, y: total(x, y) * float("nan"), "result is up to nan away in 1 of 1"),
        (WrongGradient.apply, "gradient of y is up to"),
        (lambda x, y: total(x, y)[None], r"result is \[1\], not \[\]"),
    ],
    ids=["value", "nan", "gradient", "shape"],
)
def test_a_disagreement_stops_the_run(wrong, said):
    timed = []

    def watched(x, y):
        timed.append(1)
        return total(x, y)

    with pytest.raises(SystemExit, match=said):
        measure.measure(problem(watched=watched, wrong=wrong), 0.0, 1e9, CACHE)
    assert len(timed) == 1, "a provider was timed before all agreed"


def test_exceptions_are_a_share_of_the_values():
    labels = torch.zeros(1000)
    one_off = labels.clone()
    one_off[3] = 1
    providers = {"peers": lambda x: labels + 1, "native": lambda x: one_off + 1}
    made = Problem("labels", "labels", dict(x=labels), (), providers, "native", (4000, 0), exceptions=1e-3)
    measure.check_agreement(made)
    with pytest.raises(SystemExit, match="1 of 1000 values"):
        measure.check_agreement(replace(made, exceptions=0.9e-3))


def test_a_lineup_says_why_a_provider_is_missing():
    lineup = Lineup(compiled=False).add("here", total, compiled=True).add("there", total, "not installed")
    assert list(lineup.providers) == ["here"] and lineup.left_out == {"there": "not installed"}
    chosen = lineup.own("prototype_pool", "cpu", lambda backend: total)
    assert list(lineup.providers)[-1] == chosen and "reference" not in lineup.left_out


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_results_hold_every_provider_and_pass():
    found = measure.measure(problem(), 0.05, 1e9, CACHE)
    assert [(r.provider, r.work) for r in found] == [
        (provider, work) for work in measure.PASSES for provider in ("peers", "native")
    ]
    for r in found:
        assert 0 < r.p20 <= r.p50 <= r.p80 and r.calls >= 1 and r.extra_bytes > 0
        assert r.ours == (r.provider == "native") and (r.ratio == 1 or not r.ours)
        compulsory = 8160 * (1 + (r.work != "forward"))
        assert r.copy_share == pytest.approx(compulsory / r.p50 / 1e9)


def test_without_gradients_there_is_one_pass_and_estimates_stand_in_it():
    made = replace(problem(), wanted=(), estimates={"dense": lambda inputs: (3.0, "1 of 3 parts, times 3")})
    found = {r.provider: r for r in measure.measure(made, 0.0, 1e9, CACHE)}
    assert list(found) == ["dense", "peers", "native"]
    assert found["dense"].p50 == 3.0 and found["dense"].estimate.startswith("1 of 3")
    assert {r.work for r in found.values()} == {"forward"}


def test_providers_take_turns():
    counts = {"fast": 12, "slow": 3, "once": 1, "never": 0}
    order = list(measure.by_turns(counts))
    assert Counter(order) == {k: v for k, v in counts.items() if v}
    for third in (order[:5], order[5:11], order[11:]):
        assert {"fast", "slow"} <= set(third)
    assert order.index("once") in range(6, 10)


def test_what_fast_providers_leave_goes_to_slow_ones():
    assert measure._further_calls({"fast": 1e-4, "slow": 1.0}, 20.0) == {
        "fast": measure.MOST_CALLS,
        "slow": 19,
    }
    assert measure._further_calls({"fast": 1e-4, "slow": 50.0}, 0.0) == {
        "fast": measure.MOST_CALLS,
        "slow": 0,
    }
    alike = measure._further_calls({"a": 1.0, "b": 1.0}, 10.0)
    assert alike == {"a": 5, "b": 5}


def test_slow_providers_are_called_once_where_no_time_is_left():
    late = measure._further_calls({"peers": 5.0, "compiled": 4.4, "eager": 2.8, "ours": 0.03}, -50.0)
    assert late.pop("ours") >= measure.PARTS and set(late.values()) == {0}


def test_inputs_rotate_beyond_the_cache():
    inputs = dict(x=torch.arange(1000.0), y=torch.arange(10))
    sets = measure.rotated(inputs, 50_000)
    assert len(sets) == -(-50_000 // 4080)
    assert len({s["x"].data_ptr() for s in sets}) == len(sets)
    assert all(torch.equal(s[n], inputs[n]) for s in sets for n in inputs)
    assert len(measure.rotated(inputs, 10**12)) == measure.MOST_COPIES
    assert len(measure.rotated(inputs, 1)) == 2


def test_noise_is_the_drift_between_stretches():
    assert measure.noise([1.0, 2.0, 1.0, 2.0]) is None
    assert measure.noise([1.0] * 4 + [9.0]) == 4.0
    assert measure.noise([1.0, 1.0, 5.0] * 10) == 0.0, "outliers within a stretch are no drift"
    assert measure.noise([1.0 + i / 100 for i in range(100)]) == pytest.approx(0.4 / 1.495, rel=1e-3)


def test_peak_memory_is_what_lives_at_once():
    def stages(x, y):
        for _ in range(3):
            big = torch.ones(2**20)  # 4 MiB, freed before the next
            del big
        return torch.cat([x, x]).sum() * y.sum()

    made = problem(stages=stages)
    (_, (forward, both)) = with_peaks(made, "stages")
    assert 4 * 2**20 <= forward <= 5 * 2**20 and both == forward
    in_numpy = replace(made, in_numpy=("stages",))
    assert with_peaks(in_numpy, "stages")[1][0] < 2**20, "tracemalloc does not see torch's"


# -- comparing ---------------------------------------------------------------------------------------------------------


def record(ratio=10.0, noise=0.02, **more):
    """A results file with one problem: a peer at ``ratio`` and ours."""
    common = dict(
        problem="sum", title="sum", work="forward", calls=9, p20=1.0, p80=1.0, extra_bytes=1, copy_share=0.5
    )
    made = [
        measure.Result(provider="peers", ours=False, p50=ratio, ratio=ratio, noise=noise, **common),
        measure.Result(provider="native", ours=True, p50=1.0, ratio=1.0, noise=noise, **common),
    ]
    about = dict(date="2026-01-01 00:00 UTC", commit="0" * 40, threads=2, versions={"torch": "2.13.0"})
    machine = {"name": "m", "device": "cpu", "processor": "p", "simd": "AVX2", "cores": 2}
    return {"machine": machine, "runs": {"rcm": results.run_record(about, made, **more)}}


def status(tmp_path, baseline, now):
    for name, content in (("baseline", baseline), ("now", now)):
        results.write(tmp_path / f"{name}.json", content)
    return compare_script.main([str(tmp_path / "baseline.json"), str(tmp_path / "now.json")])


def test_a_planted_slowdown_is_seen(tmp_path, capsys):
    assert status(tmp_path, record(), record(ratio=5.0)) == 1
    said = capsys.readouterr().out
    assert "SLOWER  rcm: sum, forward: 10 × as fast as peers before, 5 × now (-50%" in said


def test_what_the_noise_explains_is_no_slowdown(tmp_path, capsys):
    assert status(tmp_path, record(), record(ratio=9.5)) == 0
    assert status(tmp_path, record(noise=0.3), record(ratio=5.0, noise=0.3)) == 0
    assert status(tmp_path, record(noise=None), record(ratio=5.0)) == 1, "once called is not anything goes"
    assert status(tmp_path, record(), record(ratio=20.0)) == 0
    assert "faster  rcm" in capsys.readouterr().out
    assert status(tmp_path, record(), record()) == 0


def test_files_that_cannot_be_compared_are_named(tmp_path):
    other = copy.deepcopy(record())
    other["machine"]["device"] = "cuda"
    with pytest.raises(SystemExit, match="one kind of device, got cpu and cuda"):
        compare.report(record(), other)
    other["machine"]["device"], other["runs"] = "cpu", {}
    with pytest.raises(SystemExit, match="none in common"):
        compare.report(record(), other)
    (tmp_path / "no.json").write_text("[1]")
    for path in (tmp_path / "no.json", tmp_path / "absent.json"):
        with pytest.raises(SystemExit, match=path.name):
            results.load(path)


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "m.json"
    results.write(path, record())
    both = results.merged(path, record()["machine"], {"other": record()["runs"]["rcm"]})
    assert set(both["runs"]) == {"rcm", "other"}
    with pytest.raises(SystemExit, match="expected results of"):
        results.merged(path, {**record()["machine"], "cores": 64}, {})


def test_the_csv_holds_what_the_json_holds(tmp_path):
    results.write(tmp_path / "m.json", record(ratio=1 / 3))
    rows = (tmp_path / "m.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[1].startswith("m,rcm,2,000000000000,sum,sum,peers,forward,False,9")
    held = json.loads((tmp_path / "m.json").read_text())["runs"]["rcm"]["results"][0]
    assert held["ratio"] == 0.33333 and "0.33333" in rows[1]


# -- goals -------------------------------------------------------------------------------------------------------------


def test_a_goal_is_met_or_missed_or_not_judged():
    found = results.results_of(record()["runs"]["rcm"])
    faster = goals.Goal("sum", "cpu", "forward", "times_faster_than", ("peers", "other"), at_least=9)
    memory = goals.Goal("sum", "cpu", "forward", "memory_of", ("peers",), at_most=0.5)
    share = goals.Goal("sum", "cpu", "forward", "copy_bandwidth", at_least=0.6, why="It computes.")
    absent = goals.Goal("sum", "cpu", "forward", "times_faster_than", ("other",), at_least=9)
    launches = goals.Goal("sum", "cpu", "forward", "launches", at_most=4)
    elsewhere = replace(faster, device="cuda")
    judged = goals.verdicts([faster, memory, share, absent, launches, elsewhere], found, "cpu")
    assert [(str(v.goal), v.measured, v.met) for v in judged] == [
        ("≥ 9 × as fast as peers and other", "10 ×", True),
        ("≤ 50% of the extra memory of peers", "100%", False),
        ("≥ 60% of the copy bandwidth", "50%", False),
    ]
    assert report.missed(judged) == [
        "`sum`, forward: ≤ 50% of the extra memory of peers, measured 100%",
        "`sum`, forward: ≥ 60% of the copy bandwidth, measured 50%. It computes.",
    ]
    quick = goals.Goal("sum", "cpu", "forward", "seconds", at_most=20e-6)
    assert (str(quick), quick.said(0.000138)) == ("≤ 20 µs", "138 µs")


@pytest.mark.parametrize(
    "text, said",
    [
        ("cpu: {a: [{at_least: 3}]}", "g.yaml: cpu, a: expected one of times_faster_than"),
        ("cpu: {a: [{of: warmth, at_least: 3}]}", "got .'warmth'."),
        ("cpu: {a: [{of: seconds}]}", "expected at_least or at_most"),
        ("cpu: {a: [{of: seconds, at_most: 1, work: backward}]}", "work expected one of forward"),
        ("cpu: {a: [{of: seconds, at_most: 2e-05}]}", "expected a number as at_most, got '2e-05'"),
    ],
)
def test_a_goal_that_is_none_is_named(tmp_path, text, said):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        goals.load_goals(tmp_path / "g.yaml")
