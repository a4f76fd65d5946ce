"""Families of operations: what moves, copies, adds, multiplies, sums, convolves or rectifies, one list each.

A family holds names of operations without their overloads (`operation_name`), as in `aten.add`; families whose name
ends in `OVERLOADS` hold overloads, as in `aten.add.Tensor`, for those who read a node's arguments by their place. An
operation that works in place has a name of its own, with an underscore behind it.
"""

from typing import Any

from torch import fx
from torch._ops import OpOverload

# Copies and casts: the result holds the numbers of the input where they are. Dropout is one of them in `eval()`.
WHOLE_VIEWS = frozenset({"aten.alias", "aten.detach"})  # share the input's memory in every case
COPIES = WHOLE_VIEWS | {
    *("aten.clone", "aten.contiguous", "aten.detach_", "aten.lift_fresh_copy"),
    *("aten.to", "aten._to_copy", "aten.type_as", "aten.dropout"),
}
# Dropout of whole channels and of SELU networks: copies in `eval()` too, but no gain is followed through them.
RARE_DROPOUTS = frozenset({"aten.feature_dropout", "aten.alpha_dropout"})
# What a gain is followed through unchanged.
UNCHANGED = COPIES | {"aten.positive"}
# Linear in their one operand among the operations that torch declares pointwise; other copies have a rule of their own.
LINEAR_POINTWISE = frozenset(
    {"aten.neg", "aten.neg_", "aten.positive", "aten.clone", "aten.alias", "aten._to_copy", "aten.to"}
)

# Sums of two: linear in each operand, as long as only one holds units of a space.
ADDITIONS = frozenset({"aten.add", "aten.add_"})
SUMS = ADDITIONS | {"aten.sub", "aten.sub_", "aten.rsub"}
# Of two tensors, neither a plain number.
ADDITION_OVERLOADS = frozenset({"aten.add.Tensor", "aten.add_.Tensor"})

# Products element by element: linear in the first operand.
MULTIPLICATIONS = frozenset({"aten.mul", "aten.mul_"})
PRODUCTS = MULTIPLICATIONS | {"aten.div", "aten.div_"}

# Sums over axes that are linear in what they sum.
LINEAR_REDUCTIONS = frozenset({"aten.mean", "aten.sum"})

# Functions element by element that hand on a factor: odd ones a sign, those of degree one a positive factor.
ODD_FUNCTIONS = frozenset({"aten.tanh", "aten.sin", "aten.sinh", "aten.asinh", "aten.atan", "aten.erf"})
RECTIFIERS = frozenset({"aten.relu", "aten.relu_"})
DEGREE_ONE = frozenset({"aten.relu", "aten.leaky_relu", "aten.abs"})

# Products that sum over an axis.
LINEAR_LAYERS = frozenset({"aten.linear"})
MATRIX_PRODUCTS = frozenset({"aten.matmul", "aten.mm"})  # of an activation with a matrix
BATCHED_PRODUCTS = frozenset({"aten.bmm", "aten.matmul", "aten.baddbmm"})  # of stacks, the last two arguments
# Compute the result in one slot from what stands in that slot alone, unless the sum runs over slots.
SLOTWISE_PRODUCTS = LINEAR_LAYERS | MATRIX_PRODUCTS | {"aten.bmm", "aten.baddbmm", "aten.addmm", "aten.einsum"}
CONVOLUTIONS = frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d"})
# With padding in numbers: the overload `padding` takes a word.
CONVOLUTION_OVERLOADS = frozenset(f"{name}.default" for name in CONVOLUTIONS)

# Views that cut the same memory into other dimensions.
RESHAPES = frozenset({"aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unflatten"})
# Those of one type: `view.dtype` reads the same bytes as other numbers.
RESHAPE_OVERLOADS = frozenset(
    {
        "aten.view.default",
        "aten._unsafe_view.default",
        "aten.reshape.default",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
    }
)
SQUEEZES = frozenset({"aten.squeeze", "aten.unsqueeze"})
# Views that exchange dimensions.
TRANSPOSES = frozenset({"aten.t", "aten.transpose", "aten.permute", "aten.numpy_T", "aten.mT"})
# What a stack of matrices may pass through on its way to its product; `t` and the like take no stacks.
STACK_MOVES = frozenset({"aten.transpose", "aten.permute", "aten.contiguous", "aten.to"})
# Take some places along one dimension and keep the dimension: the argument behind the input names it, or behind a size.
SPLITS = frozenset({"aten.split", "aten.split_with_sizes", "aten.chunk"})
SLICES = SPLITS | {"aten.slice", "aten.narrow", "aten.index_select"}
# Take one place along a dimension, which goes.
PICKS = frozenset({"aten.select", "aten.unbind"})
# May leave out numbers of their input altogether; splits, of which every part is there, do not.
SELECTIONS = frozenset(
    f"aten.{name}"
    for name in ("slice", "select", "narrow", "index", "index_select", "take_along_dim", "diagonal", "unfold")
)

# The normalisation by running statistics as modules call it: input, weight and bias come first.
BATCH_NORM_OVERLOADS = frozenset({"aten.batch_norm.default"})


def operation_name(node: fx.Node) -> str:
    """A short name of the operation that a node runs."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        packet: Any = target.overloadpacket
        return str(packet)
    return getattr(target, "__name__", str(target)) if node.op == "call_function" else node.op


def overload_name(node: fx.Node) -> str:
    """The name of the very overload that a node runs."""
    target: Any = node.target
    return str(target)


def writes_in_place(node: fx.Node) -> bool:
    """Whether an operation writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
