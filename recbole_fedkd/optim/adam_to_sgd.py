"""AdamToSGD: start with Adam, switch to SGD at a learning rate that is found on the way.

SWATS (Keskar and Socher 2017, arXiv:1712.07628), the training strategy of AFD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from logging import getLogger
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

SWITCH_TESTS = ("relative", "published")


Number = TypeVar("Number", float, Tensor)


def trusted(rate: Number, step_squared: Number, gradient_squared: Number, reach: float) -> Any:
    """Whether SGD at a rate would step at most ``reach`` times as far as Adam just has: ``L^2 sum v <= reach^2 d.d``.

    A step ``L g`` that equals ``d`` along ``d`` is ``1 / cos(d, -g)`` times as long as ``d``. Where the two are nearly at right
    angles, as with steep directions that Adam holds back, most of it goes where Adam did not, and training diverges. A
    direction may be steep and its gradient 0 for once, so that the gradient's length is that of Adam's second moment ``v``.

    Args:
        rate: ``L``, of one network or of several.
        step_squared: ``d.d``.
        gradient_squared: ``sum v``, without its bias.
        reach: see above.
    """
    return rate * rate * gradient_squared <= reach * reach * step_squared


class AdamToSGD(Optimizer):
    """Adam until the projected SGD rate has settled, then SGD with momentum at that rate.

    With Adam step ``d`` and gradient ``g`` over all parameters: ``r = d.d / (-d.g)`` is the SGD rate whose step, projected
    on ``d``, equals ``d`` (iterations with ``d.g = 0`` or ``r < 0`` are skipped); ``lam = b2 lam + (1 - b2) r`` smooths it and
    ``L = lam / (1 - b2^k)`` corrects the bias, ``k`` counting the smoothed iterations. The switch comes when ``k > 1`` and
    ``|L - r| < xi`` (``published``) or ``|L - r| < xi L`` (``relative``, free of scale), and ``L`` can be trusted
    (:func:`trusted`, which the paper does not ask). From then on: SGD with momentum ``b1`` at rate ``(1 - b1) L``, the momentum
    starting at 0.

    Args:
        params: parameters, in any number of groups; the test is over all of them together.
        lr: Adam's learning rate.
        betas: Adam's ``(b1, b2)``.
        eps: Adam's ``eps``.
        weight_decay: L2 penalty, added to the gradient in both phases as in ``torch.optim.Adam`` and ``SGD``.
        switch_test: ``relative`` or ``published``.
        switch_threshold: ``xi``; AFD publishes 1e-9 for the published test.
        switch_reach: how many times as long as Adam's step SGD's may be at the switch; infinite: any, as published.
        name: who is speaking in the log line that tells of the switch.

    Attributes:
        switched_at: iteration of the switch (the last one that Adam took), or None.
        sgd_learning_rate: ``L`` at the switch, or None.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        switch_test: str = "relative",
        switch_threshold: float = 1e-5,
        switch_reach: float = 2.0,
        name: str = "AdamToSGD",
    ) -> None:
        for argument, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{argument} is {value}; it must be >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; both must lie in [0, 1)")
        if switch_test not in SWITCH_TESTS:
            raise ValueError(f"switch_test is '{switch_test}'; it must be one of {', '.join(SWITCH_TESTS)}")
        for argument, value in (("switch_threshold", switch_threshold), ("switch_reach", switch_reach)):
            if value <= 0:
                raise ValueError(f"{argument} is {value}; it must be > 0")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.switch_test = switch_test
        self.switch_threshold, self.switch_reach = switch_threshold, switch_reach
        self.name = name
        self.iteration = 0
        self.smoothed = 0.0
        self.smoothed_count = 0
        self.switched_at: int | None = None
        self.sgd_learning_rate: float | None = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with whichever optimiser is on; ``closure`` as in every torch optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.iteration += 1
        if self.sgd_learning_rate is None:
            self._adam_step()
        else:
            self._sgd_step(self.sgd_learning_rate)
        return loss

    def _gradients(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        params = [param for param in group["params"] if param.grad is not None]
        gradients = [param.grad for param in params]
        if group["weight_decay"] and params:
            gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        return params, gradients

    def _adam_step(self) -> None:
        step_squared: list[Tensor] = []
        step_gradient: list[Tensor] = []
        for group in self.param_groups:
            params, gradients = self._gradients(group)
            if not params:
                continue
            beta1, beta2 = group["betas"]
            for param in params:
                if not self.state[param]:
                    self.state[param].update(
                        step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)
                    )
            states = [self.state[param] for param in params]
            first = [state["exp_avg"] for state in states]
            second = [state["exp_avg_sq"] for state in states]
            for state in states:
                state["step"] += 1
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            denominators = torch._foreach_sqrt(second)
            torch._foreach_div_(denominators, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
            torch._foreach_add_(denominators, group["eps"])
            steps = torch._foreach_div(first, denominators)
            torch._foreach_mul_(steps, [-group["lr"] / (1 - beta1 ** state["step"]) for state in states])
            torch._foreach_add_(params, steps)
            step_squared += [step.pow(2).sum() for step in steps]
            step_gradient += [(step * gradient).sum() for step, gradient in zip(steps, gradients, strict=True)]
        if step_squared:
            # One transfer a step: the test decides in Python which optimiser takes the next one.
            squared, projected = torch.stack(
                [torch.stack(step_squared).sum(), torch.stack(step_gradient).sum()]
            ).tolist()
            self._estimate_rate(squared, projected)

    def _estimate_rate(self, squared: float, projected: float) -> None:
        if projected == 0.0:
            return
        rate = squared / -projected
        if rate < 0:
            return
        beta2 = self.param_groups[0]["betas"][1]
        self.smoothed = beta2 * self.smoothed + (1 - beta2) * rate
        self.smoothed_count += 1
        corrected = self.smoothed / (1 - beta2**self.smoothed_count)
        scale = corrected if self.switch_test == "relative" else 1.0
        if self.smoothed_count > 1 and abs(corrected - rate) < self.switch_threshold * scale:
            mean_squares = [
                float(state["exp_avg_sq"].sum()) / (1 - beta2 ** state["step"]) for state in self.state.values()
            ]
            if not trusted(corrected, squared, sum(mean_squares), self.switch_reach):
                return
            self.switched_at = self.iteration
            self.sgd_learning_rate = corrected
            self.state.clear()
            getLogger().info(
                f"{self.name}: switched from Adam to SGD after iteration {self.switched_at} "
                f"at learning rate {corrected:.6g}"
            )

    def _sgd_step(self, rate: float) -> None:
        for group in self.param_groups:
            params, gradients = self._gradients(group)
            if not params:
                continue
            beta1 = group["betas"][0]
            for param in params:
                if not self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
            momenta = [self.state[param]["momentum"] for param in params]
            torch._foreach_mul_(momenta, beta1)
            torch._foreach_add_(momenta, gradients)
            torch._foreach_add_(params, momenta, alpha=-(1 - beta1) * rate)

    def state_dict(self) -> dict[str, Any]:
        """The dictionary of any torch optimiser plus the estimate and the switch, all plain values."""
        state: dict[str, Any] = super().state_dict()
        state["switch"] = {
            "iteration": self.iteration,
            "smoothed": self.smoothed,
            "smoothed_count": self.smoothed_count,
            "switched_at": self.switched_at,
            "sgd_learning_rate": self.sgd_learning_rate,
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        state = dict(state_dict)
        switch = state.pop("switch")
        super().load_state_dict(state)
        for name, value in switch.items():
            setattr(self, name, value)
