"""The contract of a threat model: what may be changed. And the check that anyone can run on one of their own."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparring.core.geometry import per_example
from sparring.core.noise import Noise
from sparring.core.types import Inputs, device_of, size, take


class ThreatModel(ABC):
    """What may be changed, as a space Z of perturbations around each input, and its geometry.

    Subclasses are frozen dataclasses. `x` are Inputs (batch axis first; a threat states which kind it takes), `z` is
    (B, *Z). Every method acts on each example by itself. The methods with a body fit most threats.
    """

    radius: Any
    """A number or a tensor (B,), in the unit that the class states."""
    per_example: ClassVar[tuple[str, ...]] = ("radius",)
    """The fields that may hold a row for each example; see `take`."""
    norm: ClassVar[str | None] = None
    """"linf", "l2" or "l1" where z and its size are those of that norm: what attacks made for one norm go by."""
    discrete: ClassVar[bool] = False
    """Whether the input moves in jumps, so that a verdict needs a search without gradients, too."""

    @abstractmethod
    def null(self, x: Any) -> Tensor:
        """The z that changes nothing."""

    @abstractmethod
    def sample(self, x: Any, noise: Noise) -> Tensor:
        """A random start inside the set."""

    @abstractmethod
    def apply(self, x: Any, z: Tensor) -> Any:
        """The model's input, differentiable in z."""

    @abstractmethod
    def realize(self, x: Any, z: Tensor) -> Any:
        """The input that is judged and saved; for text: real token ids."""

    @abstractmethod
    def project(self, x: Any, z: Tensor) -> Tensor:
        """A point of the set and of the valid domain; what is in it stays."""

    @abstractmethod
    def steepest(self, x: Any, grad: Tensor) -> Tensor:
        """argmax <grad, s> over the unit ball of this geometry, a new tensor; zero where the gradient is."""

    @abstractmethod
    def size(self, x: Any, z: Tensor) -> Tensor:
        """(B,) how far z goes, at most `radius` inside the set."""

    @abstractmethod
    def valid(self, x: Any, adversarial: Any) -> Tensor:
        """(B,) bool: a realized input is finite and lies in the domain of real inputs."""

    def at(self, factor: float) -> Any:
        """The same threat with its radius times `factor`: radius schedules, security curves."""
        return self if factor == 1.0 else dataclasses.replace(self, radius=self.radius * factor)  # type: ignore[type-var]

    def corner(self, x: Any, grad: Tensor) -> Tensor:
        """argmax <grad, z> over the set, in balls with a box a good guess at it: radius * steepest, projected."""
        null = self.null(x)
        return self.project(x, null + per_example(self.radius, null) * self.steepest(x, grad))

    def room(self, x: Any) -> tuple[Tensor, Tensor] | None:
        """How far each entry of z may go down (<= 0) and up (>= 0), the radius aside; None where nothing else binds."""
        return None

    def complaints(self, x: Any) -> list[str]:
        """Why the inputs cannot be attacked under this threat, in sentences; none where all is well."""
        if broken := not_finite(x):
            return broken
        # realize would clip to a box, and so hide what is asked here; named inputs have no other judged form
        valid = self.valid(x, x if isinstance(x, Tensor) else self.realize(x, self.null(x)))
        if bool(valid.all()):
            return []
        outside = f"{int((~valid).sum())} of {len(valid)} inputs lie outside the valid domain of {type(self).__name__}"
        return [f"{outside}{self._why(x)}"]

    def _why(self, x: Any) -> str:
        """The rest of that sentence."""
        return ": no attack can start there. Correct the data or the threat model"

    def describe(self) -> str:
        """What the opponent may do, in a sentence."""
        return f"The opponent may change the input within this threat model: {self.text()}."

    def text(self) -> str:
        """The text that `make_threat` reads back, or the repr of what has none."""
        return repr(self)


def not_finite(x: Inputs) -> list[str]:
    """A sentence about inputs that hold NaN or infinity, if there are any."""
    for tensor in [x] if isinstance(x, Tensor) else x.values():
        broken = ~tensor.isfinite()
        if bool(broken.any()):
            bad = int(broken.view(len(tensor), -1).any(1).sum())
            return [f"{bad} of {len(tensor)} inputs hold NaN or infinity: fill or drop those examples"]
    return []


def inside(threat: ThreatModel, x: Inputs, z: Tensor) -> Tensor:
    """(B,) bool: `size` is at most the radius, up to float rounding (1e-5 relative, 1e-6 absolute)."""
    found = threat.size(x, z)
    rounding = max(1e-5, 2 * torch.finfo(found.dtype).eps)
    return found <= per_example(threat.radius, found) * (1 + rounding) + 1e-6


def check_threat(threat: ThreatModel, x: Inputs, *, num_directions: int = 1000, seed: int = 0) -> None:
    """Raises AssertionError with a plain sentence where a threat model breaks the contract on the inputs `x`.

    Give at least three valid inputs and a finite radius. Checked: null changes nothing and is inside; random starts
    and projections are inside, valid and idempotent; `steepest` has size one and beats random directions; every
    example stands alone.

    >>> from sparring.threats import Linf
    >>> check_threat(Linf(0.1), torch.rand(3, 2, 5))
    """
    _expect(
        isinstance(threat, ThreatModel), "it is no subclass of sparring.ThreatModel, which has the other half of it"
    )
    num = size(x)
    if num < 3:
        raise ValueError(f"check_threat got {num} examples; it needs at least 3 to see whether they stand alone")
    noise = Noise.make(seed, "check_threat", torch.arange(num)).to(device_of(x))
    null, start = threat.null(x), threat.sample(x, noise)
    far = null + 10 * (start - null) + noise.normal(null.shape[1:], draw=7).to(null)
    points = {"null": null, "sample": start, "project": threat.project(x, far)}

    _expect(bool((threat.size(x, null) == 0).all()), "size(null) is not 0")
    if isinstance(x, Tensor):
        _expect(bool((threat.realize(x, null) == x).all()), "null changes the input")
    for name, z in points.items():
        _expect(z.shape == null.shape and z.dtype == null.dtype, f"{name} has another shape or dtype than null(x)")
        _expect(bool(inside(threat, x, z).all()), f"{name} leaves the set: size {float(threat.size(x, z).max()):.4g}")
        real, seen = threat.realize(x, z), threat.apply(x, z)
        _expect(bool(threat.valid(x, real).all()), f"{name} leaves the valid domain")
        if isinstance(real, Tensor) and isinstance(seen, Tensor):
            _expect(_close(seen, real), f"{name} leaves the valid domain, which realize hides by clipping")
        again = threat.project(x, z)
        _expect(_close(again, z), f"project moves a point of the set ({name}) by {(again - z).abs().max():.2g}")

    grad = noise.normal(null.shape[1:], draw=8).to(null)
    best = threat.steepest(x, grad)
    _expect(_close(threat.size(x, best), torch.ones(num).to(null)), "steepest does not have size 1")
    radius = per_example(threat.radius, null)
    gain = (grad * best).flatten(1).sum(1)
    for i in range(num_directions):
        random = noise.normal(null.shape[1:], draw=9 + i).to(null)
        rivals = (threat.project(x, null + radius * v) - null for v in (random, best + random, best + 0.1 * random))
        for other in (threat.steepest(x, random), *(rival / radius for rival in rivals)):
            worse = (grad * other).flatten(1).sum(1) <= gain * (1 + 1e-4) + 1e-6
            _expect(bool(worse.all()), "another direction of size 1 climbs faster than steepest")
    _expect(bool((threat.steepest(x, 0 * grad) == 0).all()), "steepest of a zero gradient is not zero")

    _expect(_close(threat.steepest(x, grad), best), "steepest writes over the gradient it is given")
    for some in (torch.tensor(rows, device=null.device) for rows in ([2, 0], *([i] for i in range(num)))):
        _check_alone(threat, x, noise, some, far, grad)


def _check_alone(threat: ThreatModel, x: Inputs, noise: Noise, some: Tensor, far: Tensor, grad: Tensor) -> None:
    """Some examples by themselves give what they gave in the batch."""
    part, x_part = take(threat, some), take(x, some)
    pairs = {
        "sample": (threat.sample(x, noise), part.sample(x_part, noise.take(some))),
        "project": (threat.project(x, far), part.project(x_part, far[some])),
        "steepest": (threat.steepest(x, grad), part.steepest(x_part, grad[some])),
        "size": (threat.size(x, far), part.size(x_part, far[some])),
    }
    for name, (whole, alone) in pairs.items():
        _expect(_close(whole[some], alone), f"{name} of an example depends on the rest of the batch")


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def _expect(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(f"threat model breaks its contract: {sentence}")
