"""A term of the loss is one file: one that a test defines is configured, trained, logged, plotted and resumed."""

import csv
import json

import pytest
import yaml
from new_python import in_new_python

from pssl.method.arms import ARMS, known_terms, terms_of
from pssl.method.terms import TERMS, MethodConfig, register

PROGRAM = """
import sys
from dataclasses import dataclass
from pssl.method.arms import ARMS
from pssl.method.terms import Term, register

@dataclass
class QuietConfig:
    "Keeps CAMs low."
    weight: float = 0.5
    "Weight of the loss."
    from_epoch: int = 0
    "First epoch."

@register
class Quiet(Term):
    name, Config = "quiet", QuietConfig

    def __init__(self, config, setting):
        super().__init__(config, setting)
        import torch
        self.register_buffer("seen", torch.zeros(()))

    @property
    def main_scales(self):
        return (0.5,)

    def forward(self, step):
        self.seen += len(step.image_labels)
        return step.main[0.5].cam.square().mean()

ARMS["quiet"] = ("quiet",)
from pssl import report, train
command, *flags = sys.argv[1:] or {argv!r}
{{"train": train.run.main, "report": report.run.main}}[command](flags)
"""


def program(*argv: str) -> str:
    done = in_new_python(PROGRAM.format(argv=list(argv)))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_term_of_a_test(tiny_root, tmp_path):
    run = tmp_path / "run"
    flags = [
        "--data.root", str(tiny_root), "--data.size", "48", "--model.width", "8", "--model.dim", "8",
        "--schedule.classifier-epochs", "1", "--schedule.arm-epochs", "2", "--schedule.batch-size", "4",
        "--inference.scales", "1", "--evaluation.steps", "10", "--pictures", "1", "--out", str(run),
        "--method.quiet.weight", "0.25",
    ]  # fmt: skip
    said = program("train", *flags, "--arms", "classifier,quiet", "--schedule.arm-epochs", "2")
    assert "quiet" in said
    assert yaml.safe_load((run / "config.yaml").read_text())["method"]["quiet"] == {
        "weight": 0.25,
        "from_epoch": 0,
    }
    rows = list(csv.DictReader((run / "losses.csv").open()))
    own = [row for row in rows if row["stage"] == "0/quiet"]
    assert list(rows[0])[4:] == ["classification", "quiet", "total"] and len(own) == 8
    for row in own:
        total = float(row["classification"]) + 0.25 * float(row["quiet"])
        assert float(row["total"]) == pytest.approx(total, rel=1e-5)
    weights = (run / "checkpoints/quiet.safetensors").read_bytes()
    program("train", *flags, "--arms", "classifier,quiet", "--resume")
    assert list(csv.DictReader((run / "losses.csv").open())) == rows
    assert (run / "checkpoints/quiet.safetensors").read_bytes() == weights
    program("report", str(run))
    assert "quiet" in (run / "report.html").read_text()
    assert list(json.loads((run / "metrics.json").read_text())["runs"][0]["arms"]) == ["classifier", "quiet"]


def test_the_tables_agree():
    assert set(TERMS) == set(known_terms()) and next(iter(TERMS)) == "classification"
    assert all(hasattr(MethodConfig(), name) for name in TERMS)
    assert terms_of("ppc") == ("classification", "seam", "ppc") and set(ARMS["rcm+mam"]) == {"rcm", "mam"}
    with pytest.raises(ValueError, match="term 'rcm' is registered twice"):
        register(TERMS["rcm"])
