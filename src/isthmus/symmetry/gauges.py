"""Gauges: signs, scales and turns that units are free to take, and the ones that are taken for canonical."""

# torch and numpy leave the types of from_numpy, linalg and all() open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.symmetry.spaces import Gauge, Site, Space
from isthmus.symmetry.symmetry import Symmetry
from isthmus.symmetry.transform import from_front, to_front

# One factor a unit and copy, by the space's name.
Factors = Mapping[str, Float[Tensor, "copies size"]]

# A 2 × 2 matrix, a turn and a scale, for each pair and copy, by the gauge's name.
Turns = Mapping[str, Float[Tensor, "copies pairs 2 2"]]

# Random scales lie between 1 / WIDEST and WIDEST.
WIDEST = 2.0

# Scales are balanced once no factor differs from one by more.
BALANCED = 1e-11
MOST_SWEEPS = 10_000


def rescaled(state: Mapping[str, Tensor], symmetry: Symmetry, factors: Factors) -> dict[str, Tensor]:
    """The state with units multiplied by factors where they are written, and divided by them where they are read.

    Args:
        state: A state dict of the traced architecture.
        symmetry: What `trace` returned for it.
        factors: One factor a unit, for spaces among the gauges; units of other spaces stay as they are.
    """
    result = dict(state)
    for name, factor in factors.items():
        for site in symmetry[name].sites:
            own = factor if site.role == "vector" else 1 / factor
            result[site.parameter] = _rescale_site(result[site.parameter], site, own)
    symmetry.tie(result)
    return result


def _rescale_site(tensor: Tensor, site: Site, factor: Float[Tensor, "copies size"]) -> Tensor:
    """The tensor with one factor for each unit of a site."""
    each = factor.reshape(-1, 1).expand(-1, site.positions.shape[2]).reshape(-1, 1)
    return _change_rows(tensor, site, lambda rows: rows * each.to(rows))


def turned(state: Mapping[str, Tensor], symmetry: Symmetry, turns: Turns) -> dict[str, Tensor]:
    """The state with pairs of query units turned and scaled, and pairs of key units turned alike and divided.

    Args:
        state: A state dict of the traced architecture.
        symmetry: What `trace` returned for it.
        turns: Turns for gauges of the kind "rotation"; other pairs stay as they are.
    """
    result = dict(state)
    for gauge in symmetry.gauges:
        if gauge.kind == "rotation" and gauge.space in turns:
            turn = turns[gauge.space]
            for site in gauge.sites:
                own = turn if site.role == "vector" else torch.linalg.inv(turn).mT
                result[site.parameter] = _turn_site(result[site.parameter], site, own)
    symmetry.tie(result)
    return result


def _turn_site(tensor: Tensor, site: Site, turn: Float[Tensor, "copies pairs 2 2"]) -> Tensor:
    """The tensor with every pair of units at a site turned."""

    def act(rows: Tensor) -> Tensor:
        pairs = rows.reshape(*turn.shape[:2], -1, 2, rows[0].numel())
        return torch.einsum("cpij,cpmjx->cpmix", turn.to(rows), pairs).reshape(rows.shape)

    return _change_rows(tensor, site, act)


def _change_rows(tensor: Tensor, site: Site, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor with its rows at a site changed, in at least float32."""
    flat = to_front(tensor, site.dims).to(torch.promote_types(tensor.dtype, torch.float32)).clone()
    where = torch.from_numpy(site.positions.reshape(-1)).to(tensor.device)
    flat[where] = act(flat[where])
    return from_front(flat, tensor.shape, site.dims).to(tensor.dtype)


def _turns_by(
    angle: Float[Tensor, "copies pairs"], scale: Float[Tensor, "copies pairs"]
) -> Float[Tensor, "copies pairs 2 2"]:
    """The matrices that turn by an angle, in radians, and scale."""
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    return torch.stack([torch.stack([cosine, -sine], dim=-1), torch.stack([sine, cosine], dim=-1)], dim=-2)


def random_turns(symmetry: Symmetry, rng: np.random.Generator) -> dict[str, Tensor]:
    """Random turns and scales for all pairs of units that are free to take some."""
    found: dict[str, Tensor] = {}
    for gauge in symmetry.gauges:
        if gauge.kind == "rotation":
            shape = gauge.sites[0].positions.shape[:2]
            angle = torch.from_numpy(rng.uniform(-np.pi, np.pi, size=shape))
            scale = torch.from_numpy(np.exp(rng.uniform(-np.log(WIDEST), np.log(WIDEST), size=shape)))
            found[gauge.space] = _turns_by(angle, scale)
    return found


def random_factors(symmetry: Symmetry, rng: np.random.Generator) -> dict[str, Tensor]:
    """Random factors for all units that are free to take some."""
    found: dict[str, Tensor] = {}
    for gauge in symmetry.gauges:
        if gauge.kind == "rotation":
            continue
        space = symmetry[gauge.space]
        shape = (space.copies, space.size)
        if gauge.kind == "sign":
            drawn = rng.choice([-1.0, 1.0], size=shape)
        else:
            drawn = np.exp(rng.uniform(-np.log(WIDEST), np.log(WIDEST), size=shape))
        found[space.name] = found.get(space.name, torch.ones(shape, dtype=torch.float64)) * torch.from_numpy(drawn)
    return found


def canonicalise(model: nn.Module, symmetry: Symmetry) -> nn.Module:
    """A new module that computes the same, every free sign, scale and turn set to a canonical one.

    Scales: all weights that write a unit and all that read it have the same norm, which makes the sum of all squares
    smallest. Signs: of the numbers that write a unit, the largest in size is positive. Networks that differ in such
    factors alone become the same. Units that nothing writes, or nothing reads, keep their scale.

    Pairs of units of queries and keys are read as complex numbers z: queries and keys get the same norm, the sum of all
    z² is real and positive, and the real part of the sum of all z is not negative. None of it depends on the order of
    the units that are read.

    Computed in float64 and cast back. Models are canonicalised alike, before they are aligned.

    Args:
        model: A module of the traced architecture.
        symmetry: What `trace` returned for it.

    Source: Stock, Graham, Gribonval, Jégou, "Equi-normalization of Neural Networks", ICLR 2019, for scales; signs are
        this project's own.
    """
    state = model.state_dict()
    rotations = [gauge for gauge in symmetry.gauges if gauge.kind == "rotation"]
    others = [gauge for gauge in symmetry.gauges if gauge.kind != "rotation"]
    touched = [*(site for gauge in rotations for site in gauge.sites)]
    touched += [site for gauge in others for site in symmetry[gauge.space].sites]
    names = {site.parameter for site in touched}
    wide = {name: tensor.double() if name in names else tensor for name, tensor in state.items()}
    scales = [symmetry[gauge.space] for gauge in others if gauge.kind == "scale"]
    signs = [symmetry[gauge.space] for gauge in others if gauge.kind == "sign"]
    for _ in range(MOST_SWEEPS):
        largest = 0.0
        for space in scales:
            factor = _balancing_factors(wide, space)
            largest = max(largest, float((factor - 1).abs().max()))
            wide = rescaled(wide, symmetry, {space.name: factor})
        if largest <= BALANCED:
            break
    for space in signs:
        wide = rescaled(wide, symmetry, {space.name: _leading_signs(wide, space)})
    wide = turned(wide, symmetry, {gauge.space: _leading_turns(wide, gauge) for gauge in rotations})
    result = copy.deepcopy(model)
    result.load_state_dict({name: wide[name].to(old.dtype) for name, old in state.items()})
    return result


def _unit_rows(tensor: Tensor, site: Site) -> Float[Tensor, "copies size numbers"]:
    """A tensor's numbers at a site, one row a unit."""
    copies, size, _ = site.positions.shape
    where = torch.from_numpy(site.positions.reshape(-1)).to(tensor.device)
    return to_front(tensor, site.dims)[where].reshape(copies, size, -1)


def _balancing_factors(state: Mapping[str, Tensor], space: Space) -> Float[Tensor, "copies size"]:
    """One factor a unit that makes what writes it and what reads it equal in norm; one where either norm is zero."""
    squares = {"vector": torch.zeros(()), "covector": torch.zeros(())}
    for site in space.sites:
        squares[site.role] = squares[site.role] + _unit_rows(state[site.parameter], site).square().sum(dim=2)
    written, read = squares["vector"], squares["covector"]
    alive = (written > 0) & (read > 0)
    return torch.where(alive, read / torch.where(alive, written, 1), 1).double() ** 0.25


def _leading_signs(state: Mapping[str, Tensor], space: Space) -> Float[Tensor, "copies size"]:
    """The sign of the largest number that writes each unit; one where all are zero."""
    rows = torch.cat([_unit_rows(state[s.parameter], s) for s in space.sites if s.role == "vector"], dim=2)
    leading = rows.gather(2, rows.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    return torch.where(leading < 0, -1.0, 1.0).double()


def _leading_turns(state: Mapping[str, Tensor], gauge: Gauge) -> Float[Tensor, "copies pairs 2 2"]:
    """The turns and scales that make pairs of queries and keys canonical; pairs that are zero in either stay."""
    sides: dict[str, Tensor] = {}
    for role in ("vector", "covector"):
        numbers = []
        for site in (site for site in gauge.sites if site.role == role):
            copies, pairs, repeat = site.positions.shape
            where = torch.from_numpy(site.positions.reshape(-1))
            tensor = state[site.parameter].cpu()
            rows = to_front(tensor, site.dims)[where].reshape(copies, pairs, repeat // 2, 2, -1)
            numbers.append(torch.complex(rows[..., 0, :], rows[..., 1, :]).flatten(2))
        sides[role] = torch.cat(numbers, dim=2)
    queries, keys = (each.abs().square().sum(dim=2) for each in sides.values())
    alive = (queries > 0) & (keys > 0)
    scale = torch.where(alive, keys / torch.where(alive, queries, 1), 1) ** 0.25
    z = torch.cat([sides["vector"] * scale[..., None], sides["covector"] / scale[..., None]], dim=2)
    angle = -z.square().sum(dim=2).angle() / 2
    behind = (z.sum(dim=2) * torch.polar(torch.ones_like(angle), angle)).real < 0
    angle = torch.where(behind, angle + torch.pi, angle)
    return _turns_by(torch.where(alive, angle, 0), scale)
