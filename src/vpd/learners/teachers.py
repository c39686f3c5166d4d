"""Whose weights play the teacher.

``live`` the student's own, at this moment; ``ema`` an exponential moving average that moves once per iteration;
``frozen`` the initial ones; ``trust_region`` the lerp of initial and live *logits* (SDPO, arXiv 2601.20802);
``external`` another model (GKD, arXiv 2306.13649).

An average and the initial weights are a copy of the whole model each.  An average is kept in at least fp32, because its
small steps would round to nothing in 16 bits.  Of a 16-bit model it plays the teacher rounded to that model's dtype, so
that it takes 6 bytes a weight; with ``dtype="float32"`` it plays the teacher itself: 4 bytes, and slower passes.

Of a model with LoRA the two are the same base seen with another adapter and with none (:mod:`vpd.model.lora`), and cost
nothing but that adapter.  The average is then taken of A and of B, as is commonly done; it is not the average of B A.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch

from vpd.errors import ConfigError
from vpd.learners.settings import TeacherSettings as TeacherSettings
from vpd.model import lora
from vpd.model.scorer import LogitMixture


class TeacherWeights:
    """The teacher's modules.  ``keep_initial`` also keeps the initial weights, for a fixed prior.

    ``precise`` gives the fp32 master of a live parameter that has one (:mod:`vpd.learners.master_weights`), which the
    average then follows.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        live: Any,
        *,
        external: Any = None,
        keep_initial: bool = False,
        precise: Callable[[Any], Any] = lambda parameter: parameter,
    ):
        if (settings.kind == "external") != (external is not None):
            raise ValueError("an external teacher and kind='external' go together")
        self.settings = settings
        if settings.dtype is not None and lora.is_attached(live):
            raise ConfigError("teacher_dtype is of a copy, and with model.lora there is none", got=settings.dtype)
        self._live = live
        self._precise = precise
        self._external = _freeze(external) if external is not None else None
        self._average = self._averaged() if settings.kind == "ema" else None
        self._rounded = self._copied() if self._is_rounded() else None
        keep_initial = keep_initial or settings.kind in ("frozen", "trust_region")
        self._initial = self._unmoved() if keep_initial else None

    def mixture(self, weights: Literal["live", "initial", "teacher"]) -> LogitMixture:
        """The modules that play a role, with their share in the logits."""
        if weights == "live":
            return ((self._live, 1.0),)
        if weights == "initial":
            if self._initial is None:
                raise ValueError("the initial weights were not kept; build the learner with keep_initial=True")
            return ((self._initial, 1.0),)
        match self.settings.kind:
            case "live":
                return ((self._live, 1.0),)
            case "ema":
                return ((self._average if self._rounded is None else self._rounded, 1.0),)
            case "frozen":
                return ((self._initial, 1.0),)
            case "external":
                return ((self._external, 1.0),)
            case "trust_region":
                mix = self.settings.trust_region_mix
                shares = ((self._initial, 1.0 - mix), (self._live, mix))
                return tuple((module, share) for module, share in shares if share > 0)

    def modules(self) -> dict[str, torch.nn.Module]:
        """The copies that are modules of their own, by name; adapters of the live model are not."""
        kept = {
            "average": self._average,
            "rounded_average": self._rounded,
            "initial": self._initial,
            "external": self._external,
        }
        return {name: module for name, module in kept.items() if isinstance(module, torch.nn.Module)}

    @torch.no_grad()
    def end_iteration(self) -> None:
        """Move an EMA teacher: rate 1 copies the live weights, rate 0 never moves."""
        if self._average is not None:
            average = _moving(self._average)
            live = [self._precise(new).to(old.dtype) for old, new in zip(average, _moving(self._live), strict=True)]
            torch._foreach_lerp_(average, live, self.settings.ema_rate)
            self._round()

    def state(self) -> dict[str, Any]:
        """What must outlive a restart: the average and the initial weights (an external model has its own file)."""
        kept = {"average": self._average, "initial": self._initial}
        return {name: module.state_dict() for name, module in kept.items() if module is not None}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave; a missing part is an error."""
        for name, module in {"average": self._average, "initial": self._initial}.items():
            if module is not None:
                module.load_state_dict(state[name])
        self._round()

    def _averaged(self) -> Any:
        if lora.is_attached(self._live):
            return lora.average(self._live)
        average = self._copied()
        if self.settings.dtype is None:
            for parameter in average.parameters():
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return average

    def _is_rounded(self) -> bool:
        """Whether the average is of more bits than the weights that play the teacher."""
        if self._average is None or self.settings.dtype is not None or lora.is_attached(self._live):
            return False
        return any(p.dtype != q.dtype for p, q in zip(_moving(self._average), _moving(self._live), strict=True))

    def _round(self) -> None:
        if self._rounded is not None and self._average is not None:
            for rounded, average in zip(self._rounded.parameters(), self._average.parameters(), strict=True):
                rounded.copy_(average)

    def _unmoved(self) -> Any:
        return lora.View(self._live, None) if lora.is_attached(self._live) else self._copied()

    def _copied(self) -> Any:
        """The weights as they are at this moment, a second time."""
        copied = _freeze(copy.deepcopy(self._live))
        return copied if self.settings.dtype is None else copied.to(getattr(torch, self.settings.dtype))


def _moving(module: Any) -> list[torch.Tensor]:
    """What is trained of the live weights, and what follows it in their average."""
    if isinstance(module, lora.View):
        return list(module.state_dict().values())
    return list(lora.state(module).values() if lora.is_attached(module) else module.parameters())


def _freeze(module: Any) -> Any:
    return module.eval().requires_grad_(False)
