"""Verdicts on the claims of the paper on singular directions, from measured figures and thresholds that are stated.

Nothing expensive runs here: the caller measures, this file judges. A verdict is about the networks that were measured,
not about the paper.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from isthmus.errors import InputError
from isthmus.explain.spectrum import LayerSpectrum, Spectra
from isthmus.explain.taylor import TaylorBarrier
from isthmus.wording.short import shortened, told

HOLDS, PARTLY, FAILS = "holds", "holds partly", "does not"

# What `barriers` may hold: loss barriers by matching method, "naive" being none.
METHODS = ("naive", "weight_matching", "activation_matching", "ste")

# Claim 1. The paper reports that matching takes off 6 to 20 % of the distance.
SMALL_DISTANCE_SHARE = 0.25  # share of the distance that matching takes off
MISSED = 0.5  # error of the estimate, as a share of the real barrier
FLOOR = 0.01  # barriers are compared as if they were at least this: less is the noise of a few thousand samples

# Claim 2.
ALIKE = 0.1  # difference of two spectra over their mean norm

# Claim 3.
GAMMA = 0.3  # the paper's threshold for large directions
LEAD = 0.05  # by how much R of the large directions must be above R of all
RISING = 0.3  # Spearman's correlation of alignment with singular value

# Claim 4.
TOP_SHARE = 0.1  # share of the directions taken as the top ones
LEAST_CHANCE_RATIO = 2.0  # the input's share in their span over what chance gives
WIDER = 0.05  # by how much the merged model's gain along large directions must be above that along the others

# Claim 5.
NEAR_BARRIER_SHARE = 0.1  # difference of two barriers, as a share of the naive one
LEAST_ALIKE_RATIO = 0.5  # smallest ratio of two R that are alike
SMALL = 0.25  # share of weight matching's R below which R is small


@dataclass(frozen=True)
class Claim:
    """One claim, what was measured, and whether it held.

    Attributes:
        text: The claim.
        figure: What was measured; or, where something was not, what is missing.
        verdict: `"holds"`, `"holds partly"`, `"does not"`, or None where it could not be judged.
        threshold: What decides.
    """

    text: str
    figure: str
    verdict: str | None
    threshold: str

    def __repr__(self) -> str:
        return told(self, self.verdict or "not judged", shortened(self.text, 70), shortened(self.figure, 70))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)


def judge_claims(
    spectra: Spectra | None = None,
    taylor: TaylorBarrier | None = None,
    barriers: Mapping[str, float] | None = None,
    *,
    activation_matching: Spectra | None = None,
    ste: Spectra | None = None,
) -> tuple[Claim, ...]:
    """The five claims of Ito et al. on weight matching, each with a verdict.

    A claim of two parts holds if both do and holds partly if one does. A claim with a part that was not measured has no
    verdict.

    Args:
        spectra: What `measure_spectra` returned for weight matching; with `merged=` and `data=` for claim 4.
        taylor: What `taylor_barrier` returned for the models that weight matching aligned.
        barriers: Loss barriers at λ = ½ by method, all on the same data: `"naive"` (no matching), `"weight_matching"`,
            `"activation_matching"`, `"ste"`.
        activation_matching: What `measure_spectra` returned for activation matching.
        ste: What it returned for the straight-through estimator. It, and its barrier, must come from a search that
            starts where the models are, `STE(start="identity")`: from weight matching's permutations on, it
            keeps what these aligned, and the claim says nothing of that.

    Raises:
        InputError: A barrier of an unknown name.

    Source: Ito, Yamada, Kumagai, "Analysis of linear mode connectivity via permutation-based weight matching", ICLR
        2025 (arXiv 2402.04051). The claims are in this project's words, and all thresholds are its own.
    """
    known = {name: value for name, value in (barriers or {}).items() if math.isfinite(value)}
    for name in barriers or {}:
        if name not in METHODS:
            raise InputError(f"barrier {name!r}: choose from {', '.join(METHODS)}")
    return (
        _judge_distance(spectra, taylor),
        _judge_values(spectra),
        _judge_order(spectra),
        _judge_merged(spectra),
        _judge_methods(spectra, activation_matching, ste, known),
    )


def _judge_distance(spectra: Spectra | None, taylor: TaylorBarrier | None) -> Claim:
    """Claim 1: distance does not explain the barrier."""
    text = (
        "Weight matching takes off only little of the distance between two models, and a second-order estimate of the "
        "barrier that rests on that distance fails."
    )
    threshold = (
        f"distance falls by at most {SMALL_DISTANCE_SHARE:.0%}; the estimate misses the real barrier by more than "
        f"{MISSED:.0%} of it (barriers below {FLOOR} count as {FLOOR})"
    )
    missing = [
        *_missing_unless(spectra is not None, "the spectra after weight matching"),
        *_missing_unless(spectra is None or spectra.distance_before > 0, "two models that differ"),
        *_missing_unless(taylor is not None, "the Taylor estimate of the aligned models"),
    ]
    if spectra is None or taylor is None or missing:
        return unmeasured(text, missing, threshold)
    taken = 1 - spectra.distance_ratio
    error = abs(taylor.estimate - taylor.real) / max(abs(taylor.real), FLOOR)
    figure = (
        f"distance {spectra.distance_before:.4g} before and {spectra.distance_after:.4g} after ({taken:.1%} less); "
        f"barrier estimated {taylor.estimate:.4g}, real {taylor.real:.4g} (off by {error:.0%})"
    )
    return Claim(text, figure, verdict_of(taken <= SMALL_DISTANCE_SHARE, error > MISSED), threshold)


def _judge_values(spectra: Spectra | None) -> Claim:
    """Claim 2: spectra coincide, and matching leaves them as they are."""
    text = (
        "Permutations change no singular value, and the spectra of independently trained models nearly coincide, those "
        "of the output layer least."
    )
    threshold = (
        "singular values change by no more than rounding; the median difference of spectra over the layers is at most "
        f"{ALIKE:.0%} of their norm; that of the last layer is the largest"
    )
    missing = [
        *_missing_unless(spectra is not None, "the spectra after weight matching"),
        *_missing_unless(spectra is None or spectra.exact, "an alignment by permutations"),
        *_missing_unless(spectra is None or len(spectra.layers) > 1, "two layers or more"),
    ]
    if spectra is None or missing:
        return unmeasured(text, missing, threshold)
    unchanged = max(layer.unchanged for layer in spectra.layers)
    within = all(layer.unchanged <= layer.tolerance for layer in spectra.layers)
    differences = {layer.name: layer.difference for layer in spectra.layers}
    middle, last = median(differences.values()), list(differences)[-1]
    worst = max(differences, key=lambda name: differences[name])
    figure = (
        f"singular values change by {unchanged:.1e} of the largest; spectra differ by {middle:.1%} (median), "
        f"{differences[last]:.1%} in the last layer ({last}), most in {worst} ({differences[worst]:.1%})"
    )
    return Claim(text, figure, verdict_of(within and middle <= ALIKE, worst == last), threshold)


def _judge_order(spectra: Spectra | None) -> Claim:
    """Claim 3: large directions are aligned first."""
    text = "Weight matching aligns the singular directions of large singular values first."
    threshold = (
        f"R at γ = {GAMMA} is above R at γ = 0 by at least {LEAD}; the median Spearman correlation of a direction's "
        f"alignment with its singular value over the layers is at least {RISING}"
    )
    missing = _missing_unless(spectra is not None, "the spectra after weight matching")
    overlaps = _overlaps_of(spectra)
    missing += _missing_unless(spectra is None or {0.0, GAMMA} <= overlaps.keys(), f"R at γ = 0 and {GAMMA}")
    known = [layer.rank_correlation for layer in spectra.layers] if spectra is not None else []
    correlations = [value for value in known if value is not None]
    missing += _missing_unless(
        spectra is None or bool(correlations), "a layer whose directions are aligned differently"
    )
    if spectra is None or missing:
        return unmeasured(text, missing, threshold)
    (all_before, all_after), (large_before, large_after) = overlaps[0.0], overlaps[GAMMA]
    middle = median(correlations)
    figure = (
        f"R at γ = 0 {all_before:.3f} before and {all_after:.3f} after; at γ = {GAMMA} {large_before:.3f} before and "
        f"{large_after:.3f} after; median Spearman correlation {middle:.2f} over {len(correlations)} layers"
    )
    return Claim(text, figure, verdict_of(large_after - all_after >= LEAD, middle >= RISING), threshold)


def _judge_merged(spectra: Spectra | None) -> Claim:
    """Claim 4: the merged model keeps the directions that the function lies along."""
    text = (
        "The merged model keeps the large singular directions of the models that it was made of, and these carry the "
        "function: the input of a layer lies along its top right singular directions."
    )
    threshold = (
        f"over the layers, the median gain of the merged model along A's directions of at least {GAMMA} of the largest "
        f"singular value is above that along the others by at least {WIDER}; the median share of a layer's input in "
        f"the span of its top {TOP_SHARE:.0%} of directions is at least {LEAST_CHANCE_RATIO:g} times that of chance"
    )
    layers = spectra.layers if spectra is not None else ()
    split = [pair for pair in map(_split_gains, layers) if pair is not None]
    fed = [layer for layer in layers if layer.input_shares]
    missing = [
        *_missing_unless(spectra is not None, "the spectra after weight matching"),
        *_missing_unless(spectra is None or bool(split), "the merged model (merged=) with directions of both kinds"),
        *_missing_unless(spectra is None or bool(fed), "what the layers read (data=)"),
    ]
    if missing:
        return unmeasured(text, missing, threshold)
    large, small = median(pair[0] for pair in split), median(pair[1] for pair in split)
    parts = [top_share(layer) for layer in fed]
    shares, ratios = [share for share, _ in parts], [share / chance for share, chance in parts]
    figure = (
        f"gain {large:.3f} along large directions and {small:.3f} along the others ({len(split)} layers; ½ is kept by "
        f"one model alone); {median(shares):.1%} of a layer's input in its top {TOP_SHARE:.0%} of directions, "
        f"{median(ratios):.1f} times chance ({len(fed)} layers)"
    )
    return Claim(text, figure, verdict_of(large - small >= WIDER, median(ratios) >= LEAST_CHANCE_RATIO), threshold)


def _judge_methods(
    spectra: Spectra | None, activation: Spectra | None, ste: Spectra | None, barriers: Mapping[str, float]
) -> Claim:
    """Claim 5: activation matching is alike, the straight-through estimator is not."""
    text = (
        "Activation matching works as weight matching does; the straight-through estimator reaches a low barrier "
        "without aligning singular directions. (That weight matching is therefore better for three models or more is "
        "not judged here.)"
    )
    threshold = (
        f"activation matching: its barrier is within {NEAR_BARRIER_SHARE:.0%} of the naive one from weight matching's, "
        f"and the smaller R at γ = {GAMMA} is at least {LEAST_ALIKE_RATIO:g} of the larger; straight-through: its "
        f"barrier is no more than {NEAR_BARRIER_SHARE:.0%} of the naive one above weight matching's, and its R at "
        f"γ = {GAMMA} is at most {SMALL:g} of weight matching's"
    )
    found = {"weight_matching": spectra, "activation_matching": activation, "ste": ste}
    overlaps = {name: _overlaps_of(each) for name, each in found.items()}
    missing = [f"the barrier of {name}" for name in METHODS if name not in barriers]
    missing += [f"R of {name} at γ = {GAMMA}" for name in found if GAMMA not in overlaps[name]]
    missing += _missing_unless("naive" not in barriers or barriers["naive"] > FLOOR, "a naive barrier to lower")
    if missing:
        return unmeasured(text, missing, threshold)
    room = NEAR_BARRIER_SHARE * barriers["naive"]
    by_method = {name: overlaps[name][GAMMA][1] for name in found}
    weight, other, through = (by_method[name] for name in found)
    alike = abs(barriers["activation_matching"] - barriers["weight_matching"]) <= room
    alike &= min(weight, other) >= LEAST_ALIKE_RATIO * max(weight, other)
    apart = barriers["ste"] - barriers["weight_matching"] <= room and through <= SMALL * weight
    told = ", ".join(f"{name} {barriers[name]:.4g}" for name in METHODS)
    figure = f"barriers: {told}; R at γ = {GAMMA}: " + ", ".join(f"{name} {by_method[name]:.3f}" for name in found)
    return Claim(text, figure, verdict_of(alike, apart), threshold)


def verdict_of(*parts: bool) -> str:
    """The verdict on a claim of these parts."""
    return HOLDS if all(parts) else PARTLY if any(parts) else FAILS


def _missing_unless(there: bool, what: str) -> list[str]:
    """What is missing, if it is."""
    return [] if there else [what]


def unmeasured(text: str, missing: list[str], threshold: str) -> Claim:
    """A claim without a verdict."""
    return Claim(text, f"not measured: {'; '.join(missing)} would be needed", None, threshold)


def _overlaps_of(spectra: Spectra | None) -> dict[float, tuple[float, float]]:
    """R of the whole network before and after matching, by threshold, where it is defined."""
    if spectra is None:
        return {}
    every = {round(each.threshold, 9): (each.before, each.after) for each in spectra.overlaps}
    return {threshold: pair for threshold, pair in every.items() if not any(map(math.isnan, pair))}


def _split_gains(layer: LayerSpectrum) -> tuple[float, float] | None:
    """The merged model's gain along A's large directions and along the others, None where there are none of one kind.

    Gains are weighted by squared singular values: how much of A's own matrix, in that part, the merged one holds.
    """
    if layer.gains is None:
        return None
    large, small = [], []
    for gain, value in zip(layer.gains, layer.values_a, strict=False):  # directions of value zero have no gain
        (large if value >= GAMMA * layer.values_a[0] else small).append((gain, value**2))
    if not large or not small:
        return None
    means = [math.fsum(g * w for g, w in part) / math.fsum(w for _, w in part) for part in (large, small)]
    return means[0], means[1]


def top_share(layer: LayerSpectrum) -> tuple[float, float]:
    """The share of a layer's input in the span of its top directions, and what chance gives."""
    shares = layer.input_shares or ()
    k = max(1, round(TOP_SHARE * len(shares)))
    return shares[k - 1], layer.chance(k)
