"""Spectra and units of a run as plain JSON values."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from isthmus.explain.claims import top_share
from isthmus.explain.gallery import Gallery
from isthmus.explain.spectrum import Spectra
from isthmus.explain.units import SpaceFates


def describe_spectra(spectra: Spectra) -> dict[str, Any]:
    """Spectra, R by threshold, and distances, layer by layer, as plain JSON values."""
    layers = []
    for layer in spectra.layers:
        share, chance = top_share(layer) if layer.input_shares else (None, None)
        layers.append(
            {
                "name": layer.name,
                "a": list(layer.values_a),
                "b": list(layer.values_b),
                "merged": None if layer.values_merged is None else list(layer.values_merged),
                "r_before": [overlap.before for overlap in layer.overlaps],
                "r_after": [overlap.after for overlap in layer.overlaps],
                "alignment": list(layer.directions),
                "rank_correlation": layer.rank_correlation,
                "input_share": share,
                "input_chance": chance,
                "distance_before": layer.distance_before,
                "distance_after": layer.distance_after,
                "unchanged": layer.unchanged,
            }
        )
    return {
        "thresholds": [overlap.threshold for overlap in spectra.overlaps],
        "distance_before": spectra.distance_before,
        "distance_after": spectra.distance_after,
        "overlaps": [
            {"threshold": each.threshold, "before": each.before, "after": each.after} for each in spectra.overlaps
        ],
        "layers": layers,
        "skipped": dict(spectra.skipped),
    }


def describe_space(own: SpaceFates, ratios: Mapping[str, float | None], gallery: Gallery | None) -> dict[str, Any]:
    """One space's scores as plain JSON values."""
    shown = gallery.chosen.get(own.space, ()) if gallery is not None else ()
    order = [*[f"{name}'s" for name in own.names]]
    kinds = ["shared", *order, *sorted({*own.labels, *own.naive_labels} - {"shared", "lost", *order}), "lost"]

    def middle(values: torch.Tensor) -> float:
        return float(values.median())

    crossed = None
    if shown and shown[0].cross_activation:
        crossed = {
            key: [float(torch.tensor(each).nanmedian()) for each in zip(*rows, strict=True)]
            for key, rows in (
                ("merged", [each.cross_activation for each in shown]),
                ("naive", [each.naive_cross_activation for each in shown]),
            )
        }
    overlaps = None
    if own.overlap is not None and own.shuffled_overlap is not None:
        overlaps = {
            "merged": own.overlap.mean(dim=1).tolist(),
            "naive": None if own.naive_overlap is None else own.naive_overlap.mean(dim=1).tolist(),
            "shuffled": fmean(own.shuffled_overlap.flatten().tolist()),
        }
    return {
        "name": own.space,
        "units": own.merged.shape[1],
        "correlation": {
            "before": middle(own.before),
            "matched": middle(own.matched),
            "merged": [middle(each) for each in own.merged],
            "naive": None if own.naive is None else [middle(each) for each in own.naive],
            "shuffled": middle(own.shuffled.flatten()),
        },
        "labels": {kind: own.labels.count(kind) for kind in kinds},
        "naive_labels": {kind: own.naive_labels.count(kind) for kind in kinds} if own.naive_labels else None,
        "top_overlap": overlaps,
        "variance_ratio": dict(ratios),
        "cross_activation": crossed,
        "per_unit": {
            "sources": [[unit if unit >= 0 else None for unit in row] for row in own.sources.tolist()],
            "label": list(own.labels),
            "r_matched": own.matched.tolist(),
            "r_models": own.merged.tolist(),
            "r_naive": None if own.naive is None else own.naive.tolist(),
            "r_shuffled": own.shuffled.tolist(),
            "norm_ratio": own.norm_ratio.tolist(),
            "top_overlap": None if own.overlap is None else own.overlap.tolist(),
        },
        "gallery": [
            {"unit": each.unit, "group": each.group, "cross_activation": list(each.cross_activation) or None}
            for each in shown
        ],
    }
