"""The gradient of an operator as autograd runs it, with as little Python as there can be on the way to the kernel.

``torch.library.register_autograd`` does the same in more time: its formula is found by the dispatcher alone, which
turns every argument into C++ and back first, and it takes lists of tensors apart with pytrees. It serves where torch
lacks what `formula` needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pssl_ext.torch_private import CAN_RUN_BELOW_AUTOGRAD, any_requires_grad, run_below_autograd


def register(
    library: torch.library.Library, op: Any, op_backward: Any, kinds: list[str], differentiable: list[int]
) -> Callable:
    """Register the gradient of ``op`` with the dispatcher; return ``run(args)``, which records it without.

    ``op_backward`` takes the outputs' gradients (None: zero), the same arguments and a flag for each of the arguments
    ``differentiable``, and returns their gradients. ``kinds`` are the arguments' types as the schema spells them.
    """
    if CAN_RUN_BELOW_AUTOGRAD:
        run = formula(op, op_backward, kinds, differentiable)
        name = op.name().partition("::")[2]
        library.impl(name, lambda keyset, *args: run(args, keyset), "Autograd", with_keyset=True)
        return run
    _register_with_torch(library, op, op_backward, kinds, differentiable)
    return lambda args: op(*args)


def formula(
    op: Any, op_backward: Any, kinds: list[str], differentiable: list[int], op_saving: Any = None
) -> Callable:
    """Return ``run(args, keyset=None)``: ``op``, recorded where one of the arguments asks for a gradient.

    Arguments as in `register`; ``keyset`` is the dispatcher's where it is the caller. ``op_saving`` runs instead of
    ``op`` where a gradient is recorded: it returns a tensor more, for ``op_backward``, which takes it behind the
    outputs' gradients.
    """
    tape = _Tape(kinds)
    lists = tape.lists
    recorded = op if op_saving is None else op_saving

    def forward(ctx: Any, keyset: Any, args: tuple, *tensors: Any) -> Any:
        outputs = run_below_autograd(recorded, args, keyset)
        if op_saving is None:
            tape.save(ctx, args, tensors)
        else:
            tape.save(ctx, args, (*tensors, outputs[-1]))
            outputs = outputs[:-1]
        return outputs

    def backward(ctx: Any, *grads: Any) -> tuple:
        args, spans, more = tape.load(ctx)
        wanted = ctx.needs_input_grad[2:]
        results = [None] * len(wanted)
        needs = [True in wanted[spans[i]] for i in differentiable]
        found = tape.gradients(op_backward, grads, more, args, needs)
        for i, needed, gradient in zip(differentiable, needs, found, strict=False):
            if needed:
                results[spans[i]] = gradient if i in lists else (gradient,)
        return (None, None, *results)

    name = "".join(map(str.capitalize, op.name().partition("::")[2].split("_")))
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    record = type(name, (torch.autograd.Function,), methods).apply

    def run(args: tuple, keyset: Any = None) -> Any:
        if not (torch.is_grad_enabled() and any_requires_grad(*args)):
            return run_below_autograd(op, args, keyset)
        return record(keyset, args, *tape.tensors(args))

    return run


class _Tape:
    """What a forward pass leaves to the backward pass of an operator: its arguments, tensors apart from the rest."""

    def __init__(self, kinds: list[str]) -> None:
        self.lists = [i for i, kind in enumerate(kinds) if kind == "Tensor[]"]
        self.slots = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?", "Tensor[]")]

    def tensors(self, args: tuple) -> list[Any]:
        found: list[Any] = []
        lists = self.lists
        for i in self.slots:
            found.extend(args[i]) if i in lists else found.append(args[i])
        return found

    def save(self, ctx: Any, args: tuple, tensors: Any) -> None:
        """Save the arguments; ``tensors`` are theirs, and what is saved beside them."""
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        # in a tensor's place how many there are, and the rest as it is
        rest, lists = list(args), self.lists
        for i in self.slots:
            rest[i] = len(args[i]) if i in lists else 1
        ctx.rest = rest

    def load(self, ctx: Any) -> tuple[list[Any], dict[int, slice], tuple]:
        """Return the arguments, where in the order of `tensors` each one's are, and what was saved beside them."""
        saved = ctx.saved_tensors
        args, spans, start, lists = list(ctx.rest), {}, 0, self.lists
        for i in self.slots:
            stop = start + args[i]
            spans[i] = slice(start, stop)
            args[i] = list(saved[start:stop]) if i in lists else saved[start]
            start = stop
        return args, spans, saved[start:]

    def gradients(
        self, op_backward: Any, grads: tuple, more: tuple, args: list[Any], needs: list[bool]
    ) -> Any:
        """Return one gradient for each of ``differentiable``; nothing where none is needed or there is none."""
        if True not in needs or all(g is None for g in grads):
            return ()
        found = op_backward(*grads, *more, *args, needs)
        return (found,) if len(needs) == 1 else found


def _register_with_torch(
    library: torch.library.Library, op: Any, op_backward: Any, kinds: list[str], differentiable: list[int]
) -> None:
    """Register the gradient by ``torch.library.register_autograd``."""
    tape = _Tape(kinds)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tape.save(ctx, inputs, tape.tensors(inputs))

    def backward(ctx: Any, *grads: Any) -> tuple:
        args, _, more = tape.load(ctx)
        # a list has a flag and a gradient for each of its tensors
        results = [[None] * len(a) if i in tape.lists else None for i, a in enumerate(args)]
        wanted = [ctx.needs_input_grad[i] for i in differentiable]
        needs = [True in w if isinstance(w, (list, tuple)) else w for w in wanted]
        found = tape.gradients(op_backward, grads, more, args, needs)
        for i, needed, gradient in zip(differentiable, needs, found, strict=False):
            if needed:
                results[i] = gradient
        return tuple(results)

    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=library)
