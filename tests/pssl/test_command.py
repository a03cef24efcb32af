"""The frame of all commands: one line for what a person can mend, a traceback for our own faults."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from pssl.cli import command
from pssl.core.errors import InputError, MissingPackage

COMMANDS = ("train", "cams", "refine", "segment", "evaluate", "pipeline", "report", "data", "data.synthetic")


@dataclass
class Settings:
    """Settings of a command that fails as it is told."""

    fail: str = "nothing"
    """How."""
    device: str = "auto"
    """Torch device."""
    threads: int | None = None
    """CPU threads."""

    def __post_init__(self) -> None:
        if self.fail == "check":
            raise InputError("fail: expected anything else, got 'check'")


ERRORS = {
    "input": InputError("data/x.png: expected an image, got\n3 bytes"),
    "package": MissingPackage("no timm; `pip install pssl[timm]`"),
    "disk": OSError(28, "No space left on device", "runs/train"),
    "diverged": FloatingPointError("training rcm, step 3: losses must be finite, got nan"),
    "fault": ValueError("a fault of ours"),
}


@command("pssl.test", Settings)
def run(config, log):
    """Fail as told."""
    if config.fail in ERRORS:
        raise ERRORS[config.fail]
    log.say("done")
    return torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()


@pytest.mark.parametrize("fail", ["input", "package", "disk", "diverged", "check"])
def test_what_a_person_can_mend_is_one_line(fail, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--fail", fail])
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and "Traceback" not in shown.err
    if fail == "input":
        assert shown.err == "error: data/x.png: expected an image, got 3 bytes\n"


def test_our_own_fault_and_debug_show_where(monkeypatch):
    with pytest.raises(ValueError, match="a fault of ours"):
        run.main(["--fail", "fault"])
    monkeypatch.setenv("PSSL_DEBUG", "1")
    with pytest.raises(InputError):
        run.main(["--fail", "input"])


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "gpu"])
def test_a_device_that_is_not_there_names_the_option(name, capsys):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit):
        run.main(["--device", name])
    assert f"error: device: expected" in capsys.readouterr().err  # noqa: F541


def test_determinism_and_threads_are_set_for_as_long_as_it_runs(quiet):
    before = torch.get_num_threads()
    assert run(Settings(threads=1), quiet) == (True, 1)
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == before
    assert run.main([]) is not None and "Fail as told" in run.__doc__


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--fale", "x"])
    assert end.value.code == 2 and "--fail" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stands_in_the_frame(name, tmp_path):
    """A file that is not there is named in one line, whatever the command."""
    flags = {
        "train": ["--data.root", "nowhere"], "pipeline": ["--data.root", "nowhere", "--out", "never"],
        "cams": ["--checkpoint", "nowhere"], "refine": ["--cams", "nowhere"], "evaluate": ["--cams", "nowhere"],
        "segment": ["--labels", "nowhere"], "report": ["nowhere"], "data": ["nowhere"],
        "data.synthetic": ["/proc/nowhere"],
    }  # fmt: skip
    words = [sys.executable, "-m", f"pssl.{name}", *flags[name]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "nowhere" in lines[0], done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"
