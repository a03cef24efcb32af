"""`python -m pssl_ext.env`."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from pssl_ext import env, op


@pytest.fixture(scope="module")
def report() -> dict:
    return env.collect()


def test_json_is_the_report(capsys):
    env.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["torch"]["version"] == torch.__version__
    assert set(report["ops"]) == set(op.OPS)
    assert all(set(texts) == {"cpu", "cuda"} for texts in report["ops"].values())


def test_text_names_everything(report):
    text = env.render(report)
    for expected in ("Machine", "PyTorch", torch.__version__, "Native code", *op.OPS):
        assert expected in text


def test_missing_extension_is_explained(report, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(env.importlib, "import_module", absent)
    monkeypatch.setattr(env, "build_record", lambda: {"native_reason": "PSSL_NATIVE=0 was set"})
    assert env.extension() == {"found": False, "reason": "PSSL_NATIVE=0 was set"}
    monkeypatch.setattr(env, "build_record", lambda: None)
    assert "pip install -e ." in env.extension()["reason"]
    without = {**copy.deepcopy(report), "extension": env.extension()}
    assert "no native code: it was not built" in env.render(without)


def test_broken_extension_keeps_its_own_reason(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(env.importlib, "import_module", broken)
    assert env.extension() == {"found": False, "reason": "undefined symbol: x"}


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        (["8.0"], "8.0", True),
        (["8.0"], "8.6", True),
        (["8.6"], "8.0", False),
        (["8.0"], "9.0", False),
        (["8.0+PTX"], "9.0", True),
        (["9.0a"], "9.0", True),
    ],
)
def test_gpu_that_was_not_compiled_for_is_named(report, architectures, capability, covered):
    made = copy.deepcopy(report)
    made["extension"] = {
        "found": True,
        "cuda": "13.0",
        "cuda_architectures": architectures,
        "torch": "2.13.0",
    }
    made["gpus"] = [{"name": "GPU", "capability": capability, "memory_gib": 1}]
    assert any("not among the compiled architectures" in note for note in env.remarks(made)) != covered
