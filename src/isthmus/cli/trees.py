"""What `isthmus inspect` shows of a symmetry: a tree of spaces, one of what is frozen and why, and warnings."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.text import Text
from rich.tree import Tree


def space_tree(symmetry: Mapping[str, Any]) -> Tree:
    """The spaces as a tree, children under their parents, each with its size, copies, group and sites."""
    root = Tree("spaces" if symmetry["spaces"] else "no spaces: nothing can move")
    branches: dict[str | None, Tree] = {None: root}
    for space in symmetry["spaces"]:
        copies = f" × {space['copies']} copies" if space["copies"] > 1 else ""
        sites = len(space["sites"])
        label = f"{space['name']}  {space['size']} units{copies}, {space['group']}, {sites} site{'s' * (sites != 1)}"
        branch = branches[space["parent"]].add(escape(label))
        branches[space["name"]] = branch
        for site in space["sites"]:
            dims = ", ".join(str(d) for d in site["dims"])
            branch.add(Text(f"{site['parameter']} [{dims}] {site['role']}", style="dim"))
    return root


def frozen_tree(symmetry: Mapping[str, Any]) -> Tree:
    """Everything that cannot move: by operation and reason, then by module, every axis; unexpected ones first.

    Last come the gains that cannot be folded, whose spaces allow permutations only.
    """
    root = Tree("frozen" if symmetry["frozen"] else "nothing is frozen")
    rows: dict[tuple[bool, str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for item in symmetry["frozen"]:
        row = rows.setdefault((item["expected"], item["operation"], item["reason"]), {})
        row.setdefault(item["module"], []).append(item)
    for (expected, operation, reason), modules in sorted(rows.items(), key=lambda row: row[0]):
        units = sum(item["units"] for items in modules.values() for item in items)
        label = f"{operation or 'structure'}: {reason} ({units:,} units)"
        branch = root.add(Text(label, style="" if expected else "yellow"))
        for module, items in modules.items():
            axes = ", ".join(f"{item['parameter']} [{item['dim'].replace(',', ', ')}]" for item in items)
            branch.add(Text(f"in {module or 'the model'}: {axes}", style="dim"))
    kept: dict[str, list[str]] = {}
    for gain in symmetry.get("gains", ()):
        if gain["obstacle"]:
            kept.setdefault(gain["obstacle"], []).append(gain["parameter"])
    for obstacle, names in kept.items():
        root.add(Text(f"permutations only: a gain cannot be folded: {obstacle}")).add(Text(", ".join(names), "dim"))
    return root


def spoken_gauges(symmetry: Mapping[str, Any]) -> str:
    """What is free beside the spaces, in a line: signs, scales and turns, with the first places of each."""
    parts = []
    for kind, words in (
        ("sign", "signs of single units in"),
        ("scale", "scales of single units in"),
        ("rotation", "turns of pairs under rotary positions in"),
    ):
        names = [gauge["space"].removesuffix("/turns") for gauge in symmetry["gauges"] if gauge["kind"] == kind]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{words} {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def freeze_warnings(symmetry: Mapping[str, Any]) -> list[str]:
    """A line for every operation that froze what it need not have: one without a rule, or an irregular pattern."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for item in symmetry["frozen"]:
        if not item["expected"]:
            found.setdefault((item["operation"], item["reason"]), []).append(item)
    lines = []
    for (operation, reason), items in sorted(found.items()):
        modules = sorted({item["module"] for item in items if item["module"]})
        where = f" in {', '.join(modules[:3])}" + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
        units, axes = sum(item["units"] for item in items), len(items)
        lines.append(
            f"{operation or 'the graph'}{where if modules else ''}: {reason}; {units:,} units on {axes} axes stay "
            "where they are, though they might be free"
        )
    return lines
