"""Learning rates and crop sizes as pure functions of the step: nothing to save, nothing to resume.

What ran so far decides only `plateau`: it replays torch's ReduceLROnPlateau over the validation errors in the log.
"""

from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau


def one_cycle(step: int, *, steps: int, peak: float, warm_up: float) -> float:
    """Learning rate at `step` of `steps`: linear to `peak` over the share `warm_up`, then linear to zero."""
    rising = warm_up * steps
    return peak * min(1.0, (step + 1) / rising, (steps - step) / (steps - rising))


def staircase(step: int, *, steps: int, peak: float, warm_up: float, drops: Sequence[float]) -> float:
    """A tenth of `peak` for the share `warm_up`, then `peak`, divided by 10 after each share of `drops`.

    The paper on CIFAR: 64k iterations, drops at 32k and 48k; depth 110 has 400 iterations of warm-up at 0.01.
    """
    if step < warm_up * steps:
        return peak / 10
    return peak / 10.0 ** sum(step >= drop * steps for drop in drops)


def plateau(val_errors: Sequence[float], *, peak: float, patience: int) -> float:
    """Learning rate of the epoch after those that ended with `val_errors`: `peak`, divided by 10 on each plateau.

    The paper on ImageNet: "divided by 10 when the error plateaus". It does not say what a plateau is; here it is
    `patience` epochs in a row without a new lowest error, and one more.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=patience, threshold=0)
    for error in val_errors:
        scheduler.step(error)
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def crop_size(epoch: int, *, epochs: int, first: int, last: int) -> int:
    """Pixels of a training crop's side: `first` for seven tenths of the epochs, then up to `last` by steps of 32.

    Small crops are cheap and enough for most of the training; ffcv-imagenet trains at 160 until 29 of 40 epochs and
    at 192 from 34 on. The last tenth always sees `last`.
    """
    share = (epoch / epochs - 0.7) / 0.2
    if share >= 1:
        return last
    return min(last, first + 32 * round(max(0.0, share) * (last - first) / 32))


def ema_decay(updates: int, *, decay: float) -> float:
    """How much of an average of weights stays, when it has been updated so many times: `decay` in the end.

    At first it is less (TensorFlow's ExponentialMovingAverage), or the average of a short run would be the weights that
    it began with: of 1,500 steps with 0.999, for a fifth.
    """
    return min(decay, (1 + updates) / (10 + updates))
