"""What became of the features: questions on merged networks, answered from the units' scores by stated thresholds."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median

import torch

from isthmus.explain.claims import Claim, unmeasured, verdict_of
from isthmus.explain.spectrum import rank_correlation
from isthmus.explain.units import LOST, SHARED, SpaceFates

MOST_UNITS = 0.5  # share of units that is most of them
LEAST_DIFFERENCE = 0.1  # difference of two shares, or of two correlations, that counts
SURVIVES = 0.3  # Spearman's correlation of how well a pair matched with how much of both is left
COLLAPSED = 0.8  # variance of merged units over their models' below which it has collapsed
REPAIRED = (0.8, 1.25)  # the same once it is repaired


def answer_questions(
    spaces: Mapping[str, SpaceFates],
    variance_ratios: Mapping[str, Mapping[str, float | None]],
    *,
    repaired: bool = True,
) -> tuple[Claim, ...]:
    """Verdicts on what merging makes of features, for the networks that were measured.

    Args:
        spaces: What `measure_units` found, in the order of the network.
        variance_ratios: By space, the variance of merged units over their models': `"aligned"`, in the common frame
            before any repair, and `"mended"`, the result.
        repaired: Whether the result was repaired at all; if not, what repair does was not measured.

    Source: the questions are Zou et al.'s, UniReps 2024, as far as its abstract tells; thresholds are this
        project's own.
    """
    own = [space for space in spaces.values() if space.merged.shape[1]]
    return (
        _whose_features(own),
        _whether_pairs_survive(own),
        _by_depth(own),
        _by_matching(own),
        _variance(variance_ratios, repaired),
    )


def _shares(labels: Sequence[str]) -> tuple[float, float, float]:
    """The shares of labels that are shared, of some models only, and lost."""
    count = max(1, len(labels))
    shared, lost = labels.count(SHARED) / count, labels.count(LOST) / count
    return shared, 1 - shared - lost, lost


def _whose_features(spaces: Sequence[SpaceFates]) -> Claim:
    """Is a merged unit A's feature, B's, a blend, or lost?"""
    text = "Most units of the merged network still are features of all its models."
    level = spaces[0].threshold if spaces else 0
    threshold = (
        f"a unit is a model's feature if they correlate by {level:.2f} or more: holds if {MOST_UNITS:.0%} of all units "
        "are of all models, partly if so many are of one at least"
    )
    labels = [label for space in spaces for label in space.labels]
    if not labels:
        return unmeasured(text, ["any unit"], threshold)
    shared, some, lost = _shares(labels)
    figure = f"{shared:.0%} shared, {some:.0%} of some models only, {lost:.0%} lost"
    naive = [label for space in spaces for label in space.naive_labels]
    if naive:
        figure += "; averaged without matching {:.0%}, {:.0%}, {:.0%}".format(*_shares(naive))
    return Claim(text, figure, verdict_of(shared >= MOST_UNITS, shared + some >= MOST_UNITS), threshold)


def _whether_pairs_survive(spaces: Sequence[SpaceFates]) -> Claim:
    """Do well-matched pairs survive?"""
    text = "The better a pair matched, the more of both is left in the merged unit."
    threshold = (
        f"median over the spaces of Spearman's correlation at least {SURVIVES}; the quarter of units that matched best "
        f"keeps {LEAST_DIFFERENCE} more than the quarter that matched worst"
    )
    relations, gaps = [], []
    for space in spaces:
        count = len(space.matched)
        if count < 8:
            continue
        kept = space.merged.min(dim=0).values
        relation = rank_correlation(space.matched, kept)
        if relation is None:
            continue
        relations.append(relation)
        order = space.matched.argsort()
        gaps.append(float(kept[order[-(count // 4) :]].mean() - kept[order[: count // 4]].mean()))
    if not relations:
        return unmeasured(text, ["a space of eight units or more that differ"], threshold)
    figure = f"Spearman {median(relations):.2f}, best quarter {median(gaps):+.2f} (medians of {len(relations)} spaces)"
    return Claim(text, figure, verdict_of(median(relations) >= SURVIVES, median(gaps) >= LEAST_DIFFERENCE), threshold)


def _by_depth(spaces: Sequence[SpaceFates]) -> Claim:
    """How does it change with depth?"""
    text = "The deeper the space, the less of its features is left."
    threshold = (
        f"the mean correlation with the models is {LEAST_DIFFERENCE} lower in the later half of the spaces than in the "
        "earlier; the last space keeps less than the first"
    )
    if len(spaces) < 2:
        return unmeasured(text, ["two spaces or more"], threshold)
    kept = [float(space.merged.mean()) for space in spaces]
    half = len(kept) // 2
    early, late = fmean(kept[:half]), fmean(kept[-half:])
    figure = (
        f"mean correlation {early:.2f} in the earlier half, {late:.2f} in the later; first {kept[0]:.2f}, "
        f"last {kept[-1]:.2f}"
    )
    return Claim(text, figure, verdict_of(early - late >= LEAST_DIFFERENCE, kept[-1] < kept[0]), threshold)


def _by_matching(spaces: Sequence[SpaceFates]) -> Claim:
    """Is it the matching that keeps them?"""
    text = "Matching, not averaging alone, keeps the features."
    threshold = (
        f"median correlation with the models at least {LEAST_DIFFERENCE} above that of the average without matching; "
        f"top inputs in common at least {LEAST_DIFFERENCE} more"
    )
    known = [space for space in spaces if space.naive is not None]
    if not known:
        return unmeasured(text, ["the average without matching"], threshold)
    matched = float(torch.cat([space.merged.flatten() for space in known]).median())
    plain = float(torch.cat([space.naive.flatten() for space in known if space.naive is not None]).median())
    figure = f"median correlation {matched:.2f} matched, {plain:.2f} not"
    parts = [matched - plain >= LEAST_DIFFERENCE]
    tops = [(s.overlap, s.naive_overlap) for s in known if s.overlap is not None and s.naive_overlap is not None]
    if tops:
        with_it, without = (fmean(float(pair[i].mean()) for pair in tops) for i in (0, 1))
        figure += f"; top inputs in common {with_it:.0%} and {without:.0%}"
        parts.append(with_it - without >= LEAST_DIFFERENCE)
    return Claim(text, figure, verdict_of(*parts), threshold)


def _variance(ratios: Mapping[str, Mapping[str, float | None]], repaired: bool) -> Claim:
    """What does repair change?"""
    text = "Averaging shrinks the merged units' variance, and repair gives it back."
    threshold = (
        f"variance over that of the models, median of spaces: below {COLLAPSED} before repair, from {REPAIRED[0]} to "
        f"{REPAIRED[1]} after"
    )
    found = [
        [value for each in ratios.values() if (value := each.get(kind)) is not None] for kind in ("aligned", "mended")
    ]
    missing = [] if all(found) else ["the variance before and after repair"]
    missing += [] if repaired else ["a merge that was repaired"]
    if missing:
        return unmeasured(text, missing, threshold)
    before, after = (median(values) for values in found)
    figure = f"{before:.2f} before, {after:.2f} after"
    return Claim(text, figure, verdict_of(before < COLLAPSED, REPAIRED[0] <= after <= REPAIRED[1]), threshold)
