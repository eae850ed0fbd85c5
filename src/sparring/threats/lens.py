"""A threat on one named input of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from sparring.core.noise import Noise
from sparring.threats.base import ThreatModel, not_finite


@dataclass(frozen=True)
class Lens(ThreatModel):
    """`threat` on the input called `name`; the others stay as they are. Radius and unit are those of `threat`.

    For verification: a pair of pictures of which the opponent may change the second.

    >>> from sparring.threats import Linf
    >>> threat = Lens(Linf(0.1), "probe")
    >>> pair = {"gallery": torch.zeros(1, 2), "probe": torch.zeros(1, 2)}
    >>> threat.realize(pair, threat.project(pair, torch.tensor([[0.3, 0.05]])))
    {'gallery': tensor([[0., 0.]]), 'probe': tensor([[0.1000, 0.0500]])}
    """

    threat: ThreatModel
    name: str
    per_example: ClassVar[tuple[str, ...]] = ("threat",)

    @property
    def radius(self) -> Any:
        return self.threat.radius

    @property
    def norm(self) -> str | None:  # type: ignore[override]
        return self.threat.norm

    @property
    def discrete(self) -> bool:  # type: ignore[override]
        return self.threat.discrete

    def at(self, factor: float) -> Lens:
        return replace(self, threat=self.threat.at(factor))

    def null(self, x: Mapping[str, Tensor]) -> Tensor:
        return self.threat.null(self._seen(x))

    def sample(self, x: Mapping[str, Tensor], noise: Noise) -> Tensor:
        return self.threat.sample(self._seen(x), noise)

    def apply(self, x: Mapping[str, Tensor], z: Tensor) -> dict[str, Any]:
        return {**x, self.name: self.threat.apply(self._seen(x), z)}

    def realize(self, x: Mapping[str, Tensor], z: Tensor) -> dict[str, Any]:
        return {**x, self.name: self.threat.realize(self._seen(x), z)}

    def project(self, x: Mapping[str, Tensor], z: Tensor) -> Tensor:
        return self.threat.project(self._seen(x), z)

    def steepest(self, x: Mapping[str, Tensor], grad: Tensor) -> Tensor:
        return self.threat.steepest(self._seen(x), grad)

    def corner(self, x: Mapping[str, Tensor], grad: Tensor) -> Tensor:
        return self.threat.corner(self._seen(x), grad)

    def size(self, x: Mapping[str, Tensor], z: Tensor) -> Tensor:
        return self.threat.size(self._seen(x), z)

    def valid(self, x: Mapping[str, Tensor], adversarial: Mapping[str, Tensor]) -> Tensor:
        valid = self.threat.valid(self._seen(x), self._seen(adversarial))
        for name in x.keys() - {self.name}:
            valid = valid & (adversarial[name] == x[name]).reshape(len(valid), -1).all(1)
        return valid

    def room(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        return self.threat.room(self._seen(x))

    def complaints(self, x: Mapping[str, Tensor]) -> list[str]:
        others = {name: tensor for name, tensor in x.items() if name != self.name}
        return not_finite(others) or [f"{self.name}: {told}" for told in self.threat.complaints(self._seen(x))]

    def describe(self) -> str:
        return f"In the input {self.name!r} alone: {self.threat.describe()}"

    def text(self) -> str:
        return f"{self.threat.text()} on {self.name}"

    def _seen(self, x: Mapping[str, Tensor]) -> Tensor:
        if isinstance(x, Tensor) or self.name not in x:
            got = "one tensor" if isinstance(x, Tensor) else f"inputs called {', '.join(x)}"
            raise ValueError(f"this threat changes the input called {self.name!r} of several; got {got}")
        return x[self.name]
