"""Two real gloo processes against one: prototypes are global, gradients averaged, counts summed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from pssl.config import MethodConfig, RCMConfig, ScheduleConfig
from pssl.engine import distributed
from pssl.engine.feature_cache import cached_activations
from pssl.engine.inputs import ActivationInputs
from pssl.engine.loop import Stage, run_stage
from pssl.engine.scoring import Scorer
from pssl.method.losses import Objective
from pssl.method.rcm import RCM
from pssl.method.support import SupportNet
from pssl.models.backbones import SmallBackbone
from pssl.models.cam_net import CamNet, CamOutput

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(folder: Path) -> dict:
    """What both settings compute: a MAM stage on cached activations, one RCM step, a score."""
    torch.manual_seed(0)
    backbone = SmallBackbone(16).eval()
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    labels = (torch.rand(8, 3) < 0.6).float()
    scales = [0.5, 1.0, 1.5, 2.0]
    activations = cached_activations(folder / "cache", images, backbone, scales, description={})
    inputs = ActivationInputs([f"i{n}" for n in range(8)], activations, labels, "cpu")
    net = CamNet(backbone, 3, 8, standardise=True, frozen=True)
    objective = Objective(MethodConfig(), 3, 8, 16, mam=True)
    schedule = ScheduleConfig(batch_size=4)
    stage = Stage(
        "mam", "arm", net, SupportNet(net, "ema", 0.9), objective, inputs, 2, 1e-2, schedule, 0,
        folder / "state.pt",
    )  # fmt: skip
    run_stage(stage)

    own = list(distributed.share(range(8)))
    rcm = RCM(3, 8, 16, RCMConfig())
    main = net(inputs.plain(own, 1.0, False))
    loss = rcm(
        main.features,
        main.features.detach(),
        [CamOutput(main.features.detach(), main.cam.detach())],
        labels[own],
    )
    total = distributed.sum_over_ranks(loss.detach()) / distributed.world_size()

    scorer = Scorer(4, 10)
    for index in own:
        present = labels[index].nonzero().flatten()
        cam = torch.rand(len(present), 16, 16, generator=torch.Generator().manual_seed(index))
        mask = (images[index, 0] % 4).numpy()
        scorer.add(cam.half(), (present + 1).byte(), mask)
    score = scorer.result()
    return {
        "net": {k: v.tolist() for k, v in net.trained_state().items()},
        "support": {k: v.tolist() for k, v in stage.support.net.trained_state().items()},
        "memory": rcm.memory.rows.tolist(),
        "pushed": rcm.memory.pushed.tolist(),
        "rcm": float(total),
        "curve": score.curve,
        "images": score.images,
    }


def process(rank: int, folder: Path, port: int) -> None:
    os.environ |= {
        "WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    try:
        (folder / f"rank_{rank}.json").write_text(json.dumps(work(folder)))
    finally:
        distributed.stop()


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    single, double = tmp_path / "single", tmp_path / "double"
    single.mkdir(), double.mkdir()
    expected = work(single)
    multiprocessing.spawn(process, (double, free_port()), nprocs=2)
    ranks = [json.loads((double / f"rank_{r}.json").read_text()) for r in range(2)]
    assert ranks[0] == ranks[1]
    for part in ("net", "support"):
        for name, value in ranks[0][part].items():
            torch.testing.assert_close(
                torch.tensor(value), torch.tensor(expected[part][name]), rtol=1e-4, atol=1e-5, msg=name
            )
    torch.testing.assert_close(
        torch.tensor(ranks[0]["memory"]), torch.tensor(expected["memory"]), rtol=1e-3, atol=1e-4
    )
    assert ranks[0]["pushed"] == expected["pushed"]
    assert ranks[0]["rcm"] == pytest.approx(expected["rcm"], rel=0.2)  # mean over ranks of means over pixels
    assert ranks[0]["curve"] == expected["curve"] and ranks[0]["images"] == 8


@pytest.mark.slow
def test_the_command_under_torchrun(tiny_root, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "pssl.train", "--data.root", str(tiny_root), "--data.size", "48", "--out", str(tmp_path / "run"),
        "--model.width", "16", "--model.dim", "8", "--schedule.classifier-epochs", "1",
        "--schedule.arm-epochs", "1", "--schedule.batch-size", "4", "--arms", "rcm+mam",
        "--inference.scales", "1", "--evaluation.steps", "10", "--pictures", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    scores = metrics["runs"][0]["arms"]["rcm+mam"]["readouts"]["cam"]
    assert metrics["ranks"] == 2 and (scores["train"]["images"], scores["val"]["images"]) == (16, 6)
    assert done.stdout.count("mIoU val") == 1, "only the first rank reports"


def test_shares_and_gathering_alone():
    assert distributed.share([1, 2, 3]) == [1, 2, 3] and distributed.world_size() == 1
    rows = torch.rand(2, 3)
    assert distributed.gather_rows(rows) is rows and distributed.is_first()
    assert torch.equal(distributed.sum_over_ranks(rows), rows)
