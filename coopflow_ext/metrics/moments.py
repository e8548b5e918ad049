"""First and second moments of data and samples, and the gap between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coopflow_ext._checks import check_count
from coopflow_ext._tensors import room_for


class RunningMoments:
    """Mean and covariance of everything that was shown, in float32 sums on one device.

    Args:
        dim: number of elements of one event.
        device: where the sums live.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        check_count("dim", dim, 1)
        kind: dict[str, Any] = {"dtype": torch.float32, "device": torch.device(device)}
        self.count = torch.zeros((), **kind)
        self.sum = torch.zeros(dim, **kind)
        with room_for("the covariance of an event", (dim, dim), self.sum.dtype):
            self.outer = torch.zeros(dim, dim, **kind)

    def update(self, x: Tensor) -> None:
        """Add a batch (B, …) of ``dim`` elements each."""
        rows = x.detach().flatten(1).float()
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def reset(self) -> None:
        """Forget everything."""
        for tensor in self.state_dict().values():
            tensor.zero_()

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) with divisor n."""
        mean = self.sum / self.count
        return mean, self.outer / self.count - mean.outer(mean)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums themselves, to be saved or overwritten in place."""
        return {"count": self.count, "sum": self.sum, "outer": self.outer}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Overwrite the sums."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def moment_gap(a: RunningMoments, b: RunningMoments) -> float:
    """‖mean_a − mean_b‖₂ + ‖cov_a − cov_b‖_F over the pixels."""
    mean_a, cov_a = a.mean_and_covariance()
    mean_b, cov_b = b.mean_and_covariance()
    return float((mean_a - mean_b).norm() + (cov_a - cov_b).norm())
