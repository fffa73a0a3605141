"""AdamW whose moments are split over the ranks by DeepSpeed: stage 1 of ZeRO (Rajbhandari et al. 2020).

Each rank holds the moments of its part of the numbers, steps that part, and sends it to the others. Weights
and gradients stay whole, so the passes between two steps need nothing of this and may differ in number. The
package is optional: `pip install '.[deepspeed]'`.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # numbers that are summed, or sent, at once: 200 MB


class ZeroAdamW:
    """What `torch.optim.AdamW` without weight decay is to a training, with 1/ranks of its moments here.

    The weights are the parameters' own: what is written into them between two steps counts. All ranks call
    all methods together.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, *, eps: float) -> None:
        optimizer_class = _deepspeed(parameters[0].device)
        from deepspeed.utils.timer import NoopTimer

        parameters = list(parameters)
        # Of the inner optimizer DeepSpeed replaces the parameters by this rank's part of them, as one tensor.
        self._inner = torch.optim.AdamW(parameters, lr=learning_rate, eps=eps, weight_decay=0.0)
        self._zero = optimizer_class(
            self._inner,
            param_names={parameter: str(i) for i, parameter in enumerate(parameters)},
            timers=NoopTimer(),
            optimizer_params={},
            verbose=False,
            dp_process_group=torch.distributed.group.WORLD,
            partition_grads=False,
            contiguous_gradients=False,  # else it takes each gradient away as soon as a pass made it
            gradient_average=False,  # the losses are divided by what the whole batch weighs
            reduce_bucket_size=BUCKET,
            allgather_bucket_size=BUCKET,
            communication_data_type=torch.float32,
        )
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": learning_rate}]
        self._parameters = parameters

    def step_if_finite(self, max_grad_norm: float) -> tuple[float, bool]:
        """Sum the gradients over ranks, clip, step and clear, as `optim.step_if_finite` says."""
        for parameter in self._parameters:
            if parameter.grad is None:  # a rank without passes still takes part in the sums
                parameter.grad = torch.zeros_like(parameter)
        self._zero.refresh_fp32_params()
        self._zero.clip_grad = max_grad_norm
        self._inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
            self._zero.reduce_gradients()
            self._zero.step()
        self._zero.zero_grad(set_to_none=True)
        norm = float(self._zero._global_grad_norm)
        return norm, math.isfinite(norm)

    def held(self) -> int:
        """How many of the numbers whose moments are kept are kept here."""
        return int(self._part.numel())

    def state_dict(self) -> dict[str, Any]:
        """The moments of each parameter, whole; in the form of `torch.optim.Optimizer.state_dict`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        if own := self._inner.state.get(self._part):
            self._zero._lazy_init_hp_params_optimizer_state()
            for i, parameter in enumerate(self._parameters):
                state[i] = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
                state[i]["step"] = own["step"].clone()
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take each rank's part of whole moments."""
        from deepspeed.utils import safe_set_full_optimizer_state

        state = state_dict["state"]
        if not state:
            return
        own = {name: torch.zeros_like(self._part) for name in MOMENTS}
        self._inner.state[self._part] = {"step": state[0]["step"].clone()} | own
        self._zero._lazy_init_hp_params_optimizer_state()
        for i, parameter in enumerate(self._parameters):
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[i][name].to(parameter.device), name)

    @property
    def _part(self) -> Tensor:
        part: Tensor = self._inner.param_groups[0]["params"][0]
        return part


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed's optimizer of stages 1 and 2, ready to talk by the process group that is there.

    Raises InputError when the package is missing.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            "run.sharding: moments needs DeepSpeed: pip install -c constraints.txt '.[deepspeed]'"
        ) from error
    from deepspeed import comm
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # Sums between processes of one CPU: a minute of compiling for what gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not comm.is_initialized():
        comm.init_distributed(torch.distributed.get_backend(), verbose=False)
    return DeepSpeedZeroOptimizer
