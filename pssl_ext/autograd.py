"""The gradient of an operator as autograd runs it, with as little Python as there can be on the way to the kernel.

``torch.library.register_autograd`` would do the same in more time: its formula is found by the
dispatcher alone, which turns every argument into C++ and back first, and it takes lists of tensors apart with pytrees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_BELOW = torch._C._after_autograd_keyset


def formula(
    op: Any, op_backward: Any, schema: Any, differentiable: list[int], op_saving: Any = None
) -> Callable:
    """``run(args, keyset=None)``: ``op`` on the schema's arguments, recorded where one of them asks for a gradient.

    ``op_backward`` takes the outputs' gradients (None: zero), the same arguments and a flag for each of the arguments
    ``differentiable``, and returns their gradients. ``keyset`` is the dispatcher's where it is the caller.
    ``op_saving`` runs instead of ``op`` where a gradient is recorded: it returns a tensor more, for ``op_backward``,
    which takes it behind the outputs' gradients.
    """
    kinds = [str(argument.type) for argument in schema.arguments]
    lists = [i for i, kind in enumerate(kinds) if kind == "List[Tensor]"]
    slots = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]") or i in lists]
    single = len(differentiable) == 1

    recorded = op if op_saving is None else op_saving

    def below(op: Any, args: tuple, keyset: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args) if keyset is None else op.redispatch(keyset & _BELOW, *args)

    def forward(ctx: Any, keyset: Any, args: tuple, *tensors: Any) -> Any:
        outputs = below(recorded, args, keyset)
        if op_saving is None:
            ctx.save_for_backward(*tensors)
        else:
            ctx.save_for_backward(*tensors, outputs[-1])
            outputs = outputs[:-1]
        ctx.set_materialize_grads(False)
        # what the tape holds beside the tensors: how long each list is, and the rest as it is
        rest = list(args)
        for i in slots:
            rest[i] = len(args[i]) if i in lists else 1
        ctx.rest = rest
        return outputs

    def backward(ctx: Any, *grads: Any) -> tuple:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        args, spans, start = list(ctx.rest), {}, 0
        for i in slots:
            stop = start + args[i]
            spans[i] = slice(start, stop)
            args[i] = list(saved[start:stop]) if i in lists else saved[start]
            start = stop
        needs = [True in wanted[spans[i]] for i in differentiable]
        results = [None] * len(wanted)
        if True in needs and any(g is not None for g in grads):
            # saved[start:] is what op_saving left
            found = op_backward(*grads, *saved[start:], *args, needs)
            for i, needed, gradient in zip(differentiable, needs, (found,) if single else found, strict=True):
                if needed:
                    results[spans[i]] = gradient if i in lists else (gradient,)
        return (None, None, *results)

    name = "".join(map(str.capitalize, schema.name.split("_")))
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    record = type(name, (torch.autograd.Function,), methods).apply

    def run(args: tuple, keyset: Any = None) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(op, args, keyset)
        tensors: list[Any] = []
        for i in slots:
            tensors.extend(args[i]) if i in lists else tensors.append(args[i])
        return record(keyset, args, *tensors)

    return run
