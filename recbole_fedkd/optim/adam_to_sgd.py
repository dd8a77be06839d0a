"""AdamToSGD: start with Adam, switch to SGD at a learning rate that is found on the way.

SWATS (Keskar and Socher 2017, arXiv:1712.07628), the training strategy of AFD.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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


class _Piece:
    """Moments of several parameters of one kind in one piece: over small tensors one by one a step takes four times as long.

    What the optimiser keeps of a parameter is from then on a view of the piece.

    Args:
        places: of the parameters among those that have a gradient.
        states: what is kept of each.
    """

    def __init__(self, places: list[int], states: Sequence[dict[str, Any]]) -> None:
        self.places, self.sizes = places, [state["exp_avg"].numel() for state in states]
        self.first, self.second = (self._joined(states, name) for name in ("exp_avg", "exp_avg_sq"))

    def _joined(self, states: Sequence[dict[str, Any]], name: str) -> Tensor:
        whole = torch.cat([state[name].flatten() for state in states])
        for state, part in zip(states, whole.split(self.sizes), strict=True):
            state[name] = part.view_as(state[name])
        return whole

    def entries(self, numbers: Sequence[float]) -> float | Tensor:
        """A number of each parameter, for all of its entries; where it is the same, the number."""
        if len(set(numbers)) == 1:
            return numbers[0]
        sizes = torch.tensor(self.sizes, device=self.first.device)
        return self.first.new_tensor(numbers).repeat_interleave(sizes)


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
        self._pieces: dict[int, tuple[tuple[int, ...], list[_Piece]]] = {}
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
        for number, group in enumerate(self.param_groups):
            params, gradients = self._gradients(group)
            beta1, beta2 = group["betas"]
            for piece in self._pieces_of(number, params):
                own = [params[index] for index in piece.places]
                gradient = torch.cat([gradients[index].flatten() for index in piece.places])
                counts = []
                for param in own:
                    self.state[param]["step"] += 1
                    counts.append(self.state[param]["step"])
                first, second = piece.first, piece.second
                first.lerp_(gradient, 1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                denominator = second.sqrt().div_(piece.entries([(1 - beta2**count) ** 0.5 for count in counts]))
                taken = first / denominator.add_(group["eps"])
                taken.mul_(piece.entries([-group["lr"] / (1 - beta1**count) for count in counts]))
                parts = taken.split(piece.sizes)
                torch._foreach_add_(own, [part.view_as(param) for part, param in zip(parts, own, strict=True)])
                step_squared.append(taken.dot(taken))
                step_gradient.append(taken.dot(gradient))
        if step_squared:
            # One transfer a step: the test decides in Python which optimiser takes the next one.
            squared, projected = torch.stack(
                [torch.stack(step_squared).sum(), torch.stack(step_gradient).sum()]
            ).tolist()
            self._estimate_rate(squared, projected)

    def _pieces_of(self, group: int, params: Sequence[Tensor]) -> list[_Piece]:
        """The moments of a group's parameters that have a gradient, those of a kind in one piece each."""
        key = tuple(map(id, params))
        known, pieces = self._pieces.get(group, ((), []))
        if known != key:
            kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
            for index, param in enumerate(params):
                kinds.setdefault((param.dtype, param.device), []).append(index)
                if not self.state[param]:
                    self.state[param].update(
                        step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)
                    )
            pieces = [_Piece(places, [self.state[params[index]] for index in places]) for places in kinds.values()]
            self._pieces[group] = key, pieces
        return pieces

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
            self._pieces.clear()
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
        state["state"] = _apart(state["state"])
        state["switch"] = {
            "iteration": self.iteration,
            "smoothed": self.smoothed,
            "smoothed_count": self.smoothed_count,
            "switched_at": self.switched_at,
            "sgd_learning_rate": self.sgd_learning_rate,
        }
        return state

    def __getstate__(self) -> dict[str, Any]:
        """All of it, where torch's own leaves out what a subclass knows; pieces are made anew by the next step."""
        return {**vars(self), "state": defaultdict(dict, _apart(self.state)), "_pieces": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        state = dict(state_dict)
        switch = state.pop("switch")
        super().load_state_dict(state)
        self._pieces.clear()
        for name, value in switch.items():
            setattr(self, name, value)


def _apart(states: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """What is kept of each parameter, in memory of its own: a view is saved with all of the memory that it is a part of."""
    return {
        of: {name: value.clone() if isinstance(value, Tensor) else value for name, value in own.items()}
        for of, own in states.items()
    }
