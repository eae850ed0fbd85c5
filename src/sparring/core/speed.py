"""A model computed faster for the length of a training step: bfloat16, folded BatchNorm, `torch.compile`, threads.

Outside the step, where it is validated and saved, the model computes as it was built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparring.core.machine import Machine
from sparring.core.types import logits_of


class AtSpeed:
    """A context in which `model` computes as `machine` says; afterwards it is as it was. To be used again and again.

    bf16: products and convolutions by autocast in bfloat16; the logits come back in float32, so losses, gradients of
    inputs, noise and projections are in float32. folded: a BatchNorm that follows a convolution is part of its weights
    while it is in eval mode and the weights are frozen, that is while crafting. compiled: by `torch.compile`.

    >>> model = nn.Linear(4, 3)
    >>> with AtSpeed(model, Machine(torch.device("cpu"), bf16=True)):
    ...     model(torch.rand(2, 4)).dtype
    torch.float32
    """

    def __init__(self, model: nn.Module, machine: Machine) -> None:
        self.threads, self.threads_before = machine.threads, 0
        self.forwards: list[tuple[nn.Module, Any]] = []
        self.before: list[tuple[nn.Module, Any]] = []
        for conv, norm in foldable(model) if machine.folded else ():
            self.forwards += [(conv, partial(_convolved, conv, norm)), (norm, partial(_normalized, conv, norm))]
        if machine.bf16 or machine.compiled:
            inner = torch.compile(model.forward) if machine.compiled else model.forward
            kind = machine.device.type if machine.bf16 else ""
            self.forwards.append((model, partial(_cast, inner, kind)))

    def __enter__(self) -> None:
        self.before = [(module, vars(module).get("forward")) for module, _ in self.forwards]
        for module, forward in self.forwards:
            module.forward = forward
        if self.threads:
            self.threads_before = torch.get_num_threads()
            torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        for module, own in self.before:
            if own is None:
                del module.forward  # that of its class is seen again
            else:
                module.forward = own
        if self.threads:
            torch.set_num_threads(self.threads_before)


def foldable(model: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Pairs of a convolution and the BatchNorm that alone reads it, each called once; none where fx cannot trace."""
    try:  # with a copy, since tracing calls it
        nodes = list(fx.symbolic_trace(copy.deepcopy(model)).graph.nodes)
    except Exception:  # whatever somebody's forward does with a proxy
        return []
    modules: dict[Any, nn.Module] = dict(model.named_modules())
    called = [modules[node.target] for node in nodes if node.op == "call_module"]
    found = []
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = modules[before.target], modules[node.target]
        if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or "forward" in {**vars(conv), **vars(norm)}:
            continue
        if norm.affine and norm.track_running_stats and called.count(conv) == called.count(norm) == 1:
            found.append((conv, norm))
    return found


def channels_last_crashes(model: nn.Module) -> bool:
    """Whether a training step in channels-last may end the process: a 1x1 convolution with a stride, of fewer than 8
    channels. On CPUs with AVX2 only, the backward pass of PyTorch 2.13 writes beyond its memory there."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return any(m.in_channels < 8 and set(m.kernel_size) == {1} != set(m.stride) for m in convolutions)


def _cast(inner: Callable[..., Any], kind: str, *args: Any, **named: Any) -> Any:
    """What the model returns; computed in bfloat16 on a `kind` of device, its logits in float32."""
    if not kind:
        return inner(*args, **named)
    with torch.autocast(kind, torch.bfloat16):
        out = inner(*args, **named)
    logits = logits_of(out)
    return logits.float() if logits.dtype == torch.bfloat16 else out


def _folds(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    learns = conv.weight.requires_grad or norm.weight.requires_grad
    return not norm.training and not (learns and torch.is_grad_enabled())


def _convolved(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)) where it folds: weight w s and bias (b - mean) s + shift, s = scale / sqrt(variance + eps)."""
    if not _folds(conv, norm):
        return nn.Conv2d.forward(conv, x)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], norm.bias - mean * scale)


def _normalized(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return x if _folds(conv, norm) else nn.BatchNorm2d.forward(norm, x)
