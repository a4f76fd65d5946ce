"""Parameters that hold one matrix for each of several experts or heads: how their indices are labelled.

Usually every index of a dimension is one unit. In a stack, an index means another unit in every part: unit i of one
expert has nothing to do with unit i of another. The labels then vary along both dimensions. Finer labels never claim
more than is true, since what belongs together is found to be so where the labels meet others.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from isthmus.graph.operations import BATCHED_PRODUCTS, STACK_MOVES, operation_name

Groups = tuple[tuple[int, ...], ...]

# Labels beyond this number are not worth their memory: the parts of such a stack move alike.
LARGEST = 2**25


def labelled_together(node: fx.Node, shape: Sequence[int]) -> Groups:
    """For each layer of a parameter's labels, the dimensions that it varies along.

    Args:
        node: The parameter's placeholder.
        shape: The parameter's shape.
    """
    alone = tuple((d,) for d in range(len(shape)))
    users = [user for user in node.users if _returns(user)]
    if len(shape) < 2 or not users:
        return alone
    if all(_picks_a_part(user, node) for user in users):
        return _affordable(((0,), *((0, d) for d in range(1, len(shape)))), shape, alone)
    if len(shape) == 3 and len(users) == 1:
        order, last, user = [0, 1, 2], node, users[0]
        while operation_name(user) in STACK_MOVES:
            arguments: Any = user.args
            if operation_name(user) == "aten.transpose":
                a, b = arguments[1] % 3, arguments[2] % 3
                order[a], order[b] = order[b], order[a]
            elif operation_name(user) == "aten.permute":
                order = [order[d % 3] for d in arguments[1]]
            after = [each for each in user.users if _returns(each)]
            if len(after) != 1:
                return alone
            last, user = user, after[0]
        roles = _roles_in(user, last)
        if roles is not None:
            return _affordable(tuple(tuple(sorted(order[d] for d in group)) for group in roles), shape, alone)
    return alone


def _affordable(groups: Groups, shape: Sequence[int], otherwise: Groups) -> Groups:
    """The groups, or the plain ones where there would be too many labels."""
    count = 0
    for group in groups:
        size = 1
        for d in group:
            size *= shape[d]
        count += size
    return groups if count <= LARGEST else otherwise


def _returns(node: fx.Node) -> bool:
    """Whether a node has a value, unlike an assertion."""
    return not isinstance(node.target, OpOverload) or bool(node.target._schema.returns)


def _picks_a_part(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node takes whole parts of a stack along its first dimension, by a number or by chosen numbers."""
    arguments: Any = user.args
    if not arguments or arguments[0] is not node:
        return False
    if operation_name(user) == "aten.select":
        return arguments[1] == 0
    if operation_name(user) == "aten.unbind":
        return len(arguments) < 2 or arguments[1] == 0
    indices: Any = arguments[1] if operation_name(user) == "aten.index" else ()
    return len(indices) == 1 and isinstance(indices[0], fx.Node) and _is_chosen(indices[0])


def _is_chosen(node: fx.Node) -> bool:
    """Whether a tensor holds the indices that `topk` found, perhaps reshaped."""
    while node.op == "call_function" and isinstance(node.target, OpOverload) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    arguments: Any = node.args if node.op == "call_function" and len(node.args) == 2 else (None, None)
    source, which = arguments
    return isinstance(source, fx.Node) and operation_name(source) == "aten.topk" and which == 1


def _roles_in(user: fx.Node, node: fx.Node) -> Groups | None:
    """The groups of dimensions of one factor of a product: what is kept, what is summed, each with what is shared."""
    name = operation_name(user)
    if name == "aten.einsum":
        terms, arrow, result = str(user.args[0]).replace(" ", "").partition("->")
        operands: Any = user.args[1]
        factors = terms.split(",")
        if not arrow or len(factors) != 2 or "." in terms:
            return None
        mine = factors[list(operands).index(node)]
        other = factors[1 - list(operands).index(node)]
    elif name in BATCHED_PRODUCTS:
        pair = user.args[-2:]
        if node not in pair or any(not isinstance(x, fx.Node) for x in pair):
            return None
        first = pair[0] is node
        partner: Any = pair[1] if first else pair[0]
        example = partner.meta.get("val")
        own = node.meta["val"]
        if not isinstance(example, Tensor) or example.ndim not in (2, 3):
            return None
        shared = example.ndim == 3 and example.shape[0] == own.shape[0]
        mine, other, result = ("bks" if first else "bsk"), ("bs" if shared else "s"), "bk"
    else:
        return None
    if len(set(mine)) < 3:
        return None
    both = [d for d, x in enumerate(mine) if x in other and x in result]
    kept = [d for d, x in enumerate(mine) if x not in other and x in result]
    summed = [d for d, x in enumerate(mine) if x not in result]
    groups = [(*both, *kept), (*both, *summed)]
    if both:
        groups.insert(0, tuple(both))
    return tuple(tuple(sorted(group)) for group in dict.fromkeys(groups) if group)
