"""The loop in processes of their own: killed, several together, stopped, and from the command line."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from resnet_ensemble.training import checkpoint
from resnet_ensemble.training.checkpoint import Checkpoint
from resnet_ensemble.training.recipes import new_network
from resnet_ensemble.training.train import Options
from tests.training.small import VALIDATION, write_folders
from tests.training.test_train import FEW_STEPS, RICH, TINY, run, same

pytestmark = pytest.mark.usefixtures("small_cifar")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.training.small import cifar_of_two
from tests.training.test_train import RICH
from resnet_ensemble.training import cifar, train
cifar.read = cifar_of_two
step, calls = train.step, 0
def dying(*arguments):
    global calls
    calls += 1
    if calls == 9:  # six steps an epoch: in the middle of the second
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
train.step = dying
train.train(RICH, Path("unused"), Path(sys.argv[2]))
"""


def test_after_kill_9_in_the_middle_of_an_epoch_the_weights_end_bit_identical(
    tmp_path: Path, root: Path, default_threads: int
) -> None:
    torch.set_num_threads(default_threads)  # what a run has unless it is told otherwise, and the killed one had
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "killed")]
    killed = subprocess.run(command, check=False, capture_output=True)

    resumed, whole = (run(tmp_path / name, RICH) for name in ("killed", "whole"))

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert same(resumed, whole)


def torchrun(processes: int, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


TWO = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from tests.training.small import cifar_of_two
from tests.training.test_train import FEW_STEPS, TINY, gradients
from resnet_ensemble.training import cifar, processes, train
from resnet_ensemble.training.data import Batch
from resnet_ensemble.training.recipes import new_network
cifar.read = cifar_of_two
out = Path(sys.argv[2])
options = train.Options(workers=0, precision="fp32")
data = cifar_of_two(Path(), "train")
images, labels, mean = torch.from_numpy(data.images[:16]), torch.from_numpy(data.labels[:16]), (torch.zeros(3),)
with processes.join() as group:
    train.train(FEW_STEPS, Path("unused"), out / "run", options)
    network = new_network(TINY).eval()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    mine = Batch(group.share(images), mean, group.share(labels))
    train.step(train._wrap(network, group, options), mine, TINY, scaler, options, torch.zeros(3))
    together = gradients(network)
    network.zero_grad()
    train.step(network, Batch(images, mean, labels), TINY, scaler, options, torch.zeros(3))
    worst = max(float((a - b).abs().max()) for a, b in zip(together, gradients(network), strict=True))
    (out / f"worst.{group.rank}").write_text(str(worst))
"""


def test_two_processes_with_half_the_batch_each_are_one_with_the_whole_batch(tmp_path: Path, root: Path) -> None:
    """Batch norm's statistics are each process's own: one process has the same ones with its batch in two parts.

    With batch norm in evaluation mode, where it has no statistics of the batch, the gradients of one step are compared
    with those of the batch as a whole.
    """
    (tmp_path / "two.py").write_text(TWO)
    torchrun(2, str(tmp_path / "two.py"), str(root), str(tmp_path), cwd=tmp_path)
    two = checkpoint.load(tmp_path / "run")

    # One thread, as the two have: with another number, one step alone ends 9e-5 of its way from here.
    assert torch.get_num_threads() == 1
    one = run(tmp_path / "one", FEW_STEPS, options=Options(workers=0, precision="fp32", accumulate=2))
    whole = run(tmp_path / "whole", FEW_STEPS, options=Options(workers=0, precision="fp32"))

    torch.manual_seed(FEW_STEPS.seed)
    start = dict(new_network(TINY).named_parameters())

    def apart(a: Checkpoint, b: Checkpoint) -> float:
        """The distance between their parameters, as a share of the way that training went."""
        between = sum(float((a.weights[name] - b.weights[name]).square().sum()) for name in start)
        gone = sum(float((a.weights[name] - begun.detach()).square().sum()) for name, begun in start.items())
        return math.sqrt(between / gone)

    assert apart(one, two) < 1e-6
    assert apart(one, whole) > 0.02  # other statistics, and the distance shows it
    assert two.history[0].train_loss == pytest.approx(one.history[0].train_loss, rel=1e-4)
    assert (two.history[0].val_images, two.origin.processes) == (VALIDATION, 2)
    assert max(float((tmp_path / f"worst.{rank}").read_text()) for rank in (0, 1)) < 1e-5


STOPPED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from pathlib import Path
from tests.training.small import cifar_of_two
from tests.training.test_train import TINY
from resnet_ensemble.training import cifar, processes, train
cifar.read, train.LOOK_EVERY = cifar_of_two, 1
recipe, out, options = replace(TINY, epochs=1, ema_decay=0.9), Path(sys.argv[2]), train.Options(workers=0)
step, calls = train.step, 0
def step_then_sigterm(*arguments):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
write = train.record.write
def write_slowly(*arguments):  # the other process must not resume before the file is there
    time.sleep(0.5)
    write(*arguments)
train.record.write = write_slowly
with processes.join() as group:
    train.train(recipe, Path("unused"), out / "whole", options)
    train.step = step_then_sigterm
    try:
        train.train(recipe, Path("unused"), out / "stopped", options)
    except train.Stopped as stopped:
        assert stopped.code == 143
    train.train(recipe, Path("unused"), out / "stopped", options)
"""


def test_two_processes_that_were_stopped_in_an_epoch_end_bit_identical_with_their_statistics(
    tmp_path: Path, root: Path
) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = torchrun(2, str(tmp_path / "stopped.py"), str(root), str(tmp_path), cwd=tmp_path)

    whole, stopped = (checkpoint.load(tmp_path / name) for name in ("whole", "stopped"))

    assert "saved after step 3 of epoch 1" in done.stdout
    assert same(stopped, whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_paper_s_imagenet_recipe_finishes_two_epochs_on_a_small_tree(
    tmp_path: Path, root: Path, processes: int
) -> None:
    data = write_folders(tmp_path / "data", train=4, val=3)
    command = f"{root}/training/train.py resnet18a-imagenet-paper --data {data} --out {tmp_path / 'runs'}"
    changes = "--workers 1 --threads 1 --set epochs=2 batch_size=4 classes=3"

    if processes == 1:
        done = subprocess.run(
            [sys.executable, *command.split(), *changes.split()], check=True, capture_output=True, text=True
        )
    else:
        done = torchrun(processes, *command.split(), *changes.split(), cwd=tmp_path)

    saved = checkpoint.load(tmp_path / "runs" / "resnet18a-imagenet-paper")
    assert saved.finished
    assert saved.labels == ("n01440764", "n01443537", "n01484850")
    assert saved.mean_image is not None
    assert saved.mean_image.shape == (224, 224, 3)
    assert saved.mean_image.mean() == pytest.approx((50 + 150 / 3) / 255, abs=0.02)
    assert [(epoch.epoch, epoch.val_images) for epoch in saved.history] == [(1, 9), (2, 9)]
    assert "on 9 images" in done.stdout


def test_sigterm_saves_if_it_comes_to_the_loading_processes_too(tmp_path: Path, root: Path) -> None:
    data = write_folders(tmp_path / "data", train=4, val=1)
    command = f"{root}/training/train.py resnet18a-imagenet-paper --data {data} --out {tmp_path / 'runs'}"
    changes = "--workers 1 --threads 1 --set epochs=500 batch_size=4 classes=3"
    with subprocess.Popen(
        [sys.executable, *command.split(), *changes.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout
        assert "epoch" in running.stdout.readline()  # one is over, and workers load the next
        time.sleep(0.5)
        os.killpg(running.pid, signal.SIGTERM)
        said, wrong = running.communicate(timeout=60)

    assert running.returncode == 128 + signal.SIGTERM, wrong
    assert "saved after" in said


def test_a_mistake_on_the_command_line_ends_the_process_with_1_and_one_line(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "training" / "train.py"), "resnet20-cifar10", "--data", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("no CIFAR-10 in none")
    assert len(done.stderr.splitlines()) == 1
