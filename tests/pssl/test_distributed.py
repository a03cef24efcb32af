"""Real gloo processes against one: prototypes are global, gradients those of the whole batch, counts summed."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from pssl.config.model import ModelConfig
from pssl.config.optimizer import EngineConfig, ScheduleConfig
from pssl.core import ranks
from pssl.inputs.activations import cached_activations
from pssl.inputs.images import ActivationInputs, ImageInputs
from pssl.method.objective import Objective
from pssl.method.support import SupportNet
from pssl.method.terms.rcm import RCM, RCMConfig
from pssl.method.terms.registry import MethodConfig
from pssl.models.backbones.small import SmallBackbone
from pssl.models.build import build_cam_net
from pssl.models.cam_net import CamNet, CamOutput
from pssl.scoring.scoring import Scorer
from pssl.training.cam import CamTraining
from pssl.training.loop import epoch_batches, run_training

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """What is compared with ranks is computed as they compute, by one thread: sums in another order round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    inputs = ActivationInputs([f"i{n}" for n in range(8)], images, activations, labels, "cpu")
    net = CamNet(backbone, 3, 8, standardise=True, frozen=True)
    objective = Objective(MethodConfig(), ("mam",), classes=3, dim=8, size=16)
    schedule = ScheduleConfig(batch_size=4)
    stage = CamTraining(
        "mam", "arm", net, SupportNet(net, "ema", 0.9), objective, inputs, 2, 1e-2, schedule, 0,
        folder / "state.pt",
    )  # fmt: skip
    run_training(stage)

    own = list(ranks.share(range(8)))
    rcm = RCM(3, 8, 16, RCMConfig())
    main = net(inputs.plain(own, 1.0, False))
    loss = rcm(
        main.features,
        main.features.detach(),
        [CamOutput(main.features.detach(), main.cam.detach())],
        labels[own],
    )
    total = ranks.sum_over_ranks(loss.detach()) / ranks.world_size()

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


def process(rank: int, count: int, folder: Path, port: int, job) -> None:
    os.environ |= {
        "WORLD_SIZE": str(count), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    ranks.start(torch.device("cpu"))
    try:
        (folder / f"rank_{rank}.json").write_text(json.dumps(job(folder)))
    finally:
        ranks.stop()


def in_processes(count: int, folder: Path, job) -> list[dict]:
    """What `job(folder)` returns in each of so many processes."""
    folder.mkdir()
    multiprocessing.spawn(process, (count, folder, free_port(), job), nprocs=count)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(count)]


RATES = {"rcm+mam": 2.0, "seam": 0.2}
# SEAM's losses pick the strongest class and the pixels that differ most, and divide by spreads as small as 1e-5:
# rounding decides now and then. A share weighed wrongly is off by tenths of what the weights move.
DEVIATION = {"rcm+mam": 1e-3, "seam": 2e-2}


def train_unevenly(folder: Path) -> dict:
    """Arms with fixed norms on batches of 5, the last of 3, in which image 0 has no class; rcm has no foreground there.

    What depends on the number of ranks otherwise: batch norm's statistics, and PPC's draws.
    """
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=source, dtype=torch.uint8)
    labels = (torch.rand(8, 3, generator=source) < 0.5).float()
    result = {"gathered": gather_unevenly()}
    for arm in ("rcm+mam", "seam"):
        torch.manual_seed(0)
        net = build_cam_net(ModelConfig(dim=8, width=16, fixed="norms"), 3)
        if arm == "seam":
            net.add_pixel_correlation()
        inputs = ImageInputs(
            [f"i{n}" for n in range(8)], images, labels, net.backbone.normalise, (1, 1.2), "cpu"
        )
        schedule = ScheduleConfig(batch_size=5, drop_last=False, optimizer="sgd")
        stage = CamTraining(
            arm, "arm", net, SupportNet(net, "ema", 0.9) if arm == "rcm+mam" else None,
            Objective(MethodConfig(), arm.split("+"), classes=3, dim=8, size=16), inputs, 2,
            RATES[arm], schedule, 0,
        )  # fmt: skip
        first = epoch_batches(stage, 0)[0]
        stage.inputs.labels = labels.clone()
        stage.inputs.labels[first[0]] = 0  # the first rank's only image, with three ranks
        before = net.embed.weight.detach().clone()
        run_training(stage)
        result[arm] = {
            "net": {k: v.tolist() for k, v in net.trained_state().items()},
            "history": stage.history,
            "moved": float((net.embed.weight.detach() - before).abs().max()),
        }
        if arm == "rcm+mam":
            result[arm]["memory"] = stage.objective.rcm.memory.rows.tolist()
            result[arm]["pushed"] = stage.objective.rcm.memory.pushed.tolist()
    return result


def gather_unevenly() -> dict:
    """Rank r has r rows, and a mean r of r things."""
    rank = ranks.rank()
    mean = torch.tensor(float(rank), requires_grad=True)
    part = ranks.share_of_mean(mean, rank)
    part.backward()
    return {
        "rows": ranks.gather_rows(torch.full((rank, 2), float(rank))).tolist(),
        "flags": ranks.gather_rows(torch.full((rank,), rank == 1)).tolist(),
        "mean": float(ranks.sum_over_ranks(part.detach()) / ranks.world_size()),
        "gradient": float(mean.grad),
        "nothing": float(ranks.share_of_mean(torch.tensor(0.0), 0)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_with_uneven_shares_train_as_one(tmp_path, count):
    expected = train_unevenly(tmp_path)
    found = in_processes(count, tmp_path / "ranks", train_unevenly)
    things = list(range(count))
    for rank, one in enumerate(found):
        gathered = one.pop("gathered")
        assert gathered["rows"] == [[r, r] for r in things for _ in range(r)]
        assert gathered["flags"] == [r == 1 for r in things for _ in range(r)] and gathered["nothing"] == 0
        assert gathered["mean"] == pytest.approx(sum(r * r for r in things) / sum(things))
        assert gathered["gradient"] == pytest.approx(rank * count / sum(things))
    del expected["gathered"]
    for arm, wanted in expected.items():
        assert all(other[arm] == found[0][arm] for other in found)
        assert wanted["moved"] > 1e-3, "nothing was learnt, so nothing was compared"
        for name, value in found[0][arm]["net"].items():
            apart = (torch.tensor(value) - torch.tensor(wanted["net"][name])).abs().max()
            assert apart <= DEVIATION[arm] * wanted["moved"], (arm, name)
        for step, whole in zip(found[0][arm]["history"], wanted["history"], strict=True):
            assert step == pytest.approx(whole, rel=DEVIATION[arm], abs=1e-6), arm
    torch.testing.assert_close(
        torch.tensor(found[0]["rcm+mam"]["memory"]),
        torch.tensor(expected["rcm+mam"]["memory"]),
        rtol=1e-3,
        atol=1e-4,
    )
    assert found[0]["rcm+mam"]["pushed"] == expected["rcm+mam"]["pushed"]


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    expected = work(tmp_path)
    found = in_processes(2, tmp_path / "ranks", work)
    assert found[0] == found[1]
    for part in ("net", "support"):
        for name, value in found[0][part].items():
            torch.testing.assert_close(
                torch.tensor(value), torch.tensor(expected[part][name]), rtol=1e-4, atol=1e-5, msg=name
            )
    torch.testing.assert_close(
        torch.tensor(found[0]["memory"]), torch.tensor(expected["memory"]), rtol=1e-3, atol=1e-4
    )
    assert found[0]["pushed"] == expected["pushed"]
    assert found[0]["rcm"] == pytest.approx(expected["rcm"], rel=1e-4)
    assert found[0]["curve"] == expected["curve"] and found[0]["images"] == 8


def train_with_a_break(folder: Path) -> dict:
    """An arm in two parts a step, whole, and stopped after two of its steps and resumed.

    The batches are large enough for three ranks, the network for several buckets of gradients.
    """
    images = torch.randint(
        0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    labels = (torch.rand(12, 3, generator=torch.Generator().manual_seed(1)) < 0.5).float()

    def new_training(name: str) -> CamTraining:
        torch.manual_seed(0)
        net = build_cam_net(ModelConfig(dim=2048, width=128, fixed="norms"), 3)
        inputs = ImageInputs(
            [f"i{n}" for n in range(12)], images, labels, net.backbone.normalise, (1, 1), "cpu"
        )
        objective = Objective(MethodConfig(), ("mam",), classes=3, dim=2048, size=16)
        training = CamTraining(
            "mam", "arm", net, SupportNet(net, "ema", 0.9), objective, inputs, 2, 1e-2,
            ScheduleConfig(batch_size=6), 0, folder / f"{name}.pt",
            EngineConfig(accumulate=2, save_every=1, clip_norm=1.0),
        )  # fmt: skip
        return training

    def state(training: CamTraining) -> str:
        digest = hashlib.sha256()
        for value in training.net.trained_state().values():
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    whole = new_training("whole")
    run_training(whole)

    def stop(values: dict) -> None:
        if values["step"] == 2:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        run_training(new_training("broken"), on_step=stop)
    ranks.wait()
    resumed = new_training("broken")
    run_training(resumed, resume=True)
    return {"whole": state(whole), "resumed": state(resumed), "same": whole.history == resumed.history}


@pytest.mark.slow
def test_ranks_resume_to_the_bit(tmp_path):
    found = in_processes(3, tmp_path / "ranks", train_with_a_break)
    assert {value for result in found for value in (result["whole"], result["resumed"])} == {
        found[0]["whole"]
    }
    assert all(result["same"] for result in found)


TINY = [
    "-m", "pssl.train", "--data.size", "48", "--model.width", "16", "--model.dim", "8",
    "--schedule.classifier-epochs", "1", "--schedule.arm-epochs", "1", "--schedule.batch-size", "4",
    "--arms", "rcm+mam", "--inference.scales", "1", "--evaluation.steps", "10", "--pictures", "1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_the_command_under_torchrun(tiny_root, tmp_path, machines):
    """Two ranks on one machine, and one on each of two machines that share data and results."""
    port, environment = str(free_port()), {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(machines), "--nproc-per-node",
        str(2 // machines), "--master-addr", "127.0.0.1", "--master-port", port,
    ]  # fmt: skip
    job = [*TINY, "--data.root", str(tiny_root), "--out", str(tmp_path / "run")]
    agents = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(number), *job],
            cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(machines)
    ]  # fmt: skip
    outputs = [agent.communicate(timeout=300) for agent in agents]
    for agent, (_, errors) in zip(agents, outputs, strict=True):
        assert agent.returncode == 0, errors[-3000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    scores = metrics["runs"][0]["arms"]["rcm+mam"]["readouts"]["cam"]
    assert metrics["ranks"] == 2 and (scores["train"]["images"], scores["val"]["images"]) == (16, 6)
    assert sum(said.count("mIoU val") for said, _ in outputs) == 1, "only the first rank reports"


def test_shares_and_gathering_alone():
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.world_size() == 1
    rows = torch.rand(2, 3)
    assert ranks.gather_rows(rows) is rows and ranks.is_first()
    assert torch.equal(ranks.sum_over_ranks(rows), rows)
