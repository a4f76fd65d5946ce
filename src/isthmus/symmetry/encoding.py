"""Sites and their positions as small JSON values."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from isthmus.symmetry.spaces import Site


def encode_site(site: Site) -> dict[str, Any]:
    """A site as a small JSON value."""
    return {
        "parameter": site.parameter,
        "dims": list(site.dims),
        "role": site.role,
        "positions": _encode_positions(site.positions),
    }


def decode_site(data: Mapping[str, Any]) -> Site:
    """The site that `encode_site` wrote."""
    return Site(data["parameter"], tuple(data["dims"]), _decode_positions(data["positions"]), data["role"])


def _encode_positions(positions: Int[np.ndarray, "copies size repeat"]) -> dict[str, Any]:
    """Positions as a small JSON value: a start and three strides where they are regular, else the whole list."""
    shape = positions.shape
    start = int(positions[0, 0, 0]) if positions.size else 0
    strides = [
        int(np.take(positions, 1, axis)[(0, 0)] - start) if length > 1 and positions.size else 0
        for axis, length in enumerate(shape)
    ]
    if np.array_equal(positions, _regular_positions(shape, start, strides)):
        return {"shape": list(shape), "start": start, "strides": strides}
    return {"shape": list(shape), "values": positions.ravel().tolist()}


def _decode_positions(data: Mapping[str, Any]) -> Int[np.ndarray, "copies size repeat"]:
    """The positions that `_encode_positions` wrote."""
    shape = tuple(data["shape"])
    if "values" in data:
        return np.asarray(data["values"], dtype=np.int64).reshape(shape)
    return _regular_positions(shape, data["start"], data["strides"])


def _regular_positions(shape: tuple[int, ...], start: int, strides: list[int]) -> Int[np.ndarray, "copies size repeat"]:
    """Positions that advance by one fixed stride along each of the three axes."""
    grids = np.indices(shape, dtype=np.int64)
    return start + np.tensordot(np.asarray(strides, dtype=np.int64), grids, axes=1)
