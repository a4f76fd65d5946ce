"""Families of operations, and what a node says about the operation that it runs."""

from torch import fx


def writes_in_place(node: fx.Node) -> bool:
    """Whether an operation writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
