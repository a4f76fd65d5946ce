"""What a merged network's units are: the evidence beside every alignment."""

from isthmus.explain.claims import Claim, judge_claims
from isthmus.explain.directions import Intervention, intervene, match_directions
from isthmus.explain.features import Pictures, respond, visualise, visualise_many
from isthmus.explain.images import ImageStatistics, high_frequency_share, measure_images, spectrum_of
from isthmus.explain.layer_similarity import CKAMatrix, cka_matrix
from isthmus.explain.parametrisations import FourierImages, Maco
from isthmus.explain.similarity import (
    cka,
    debiased_cka,
    matched_correlations,
    procrustes_distance,
    pwcca,
    svcca,
    unit_correlations,
)
from isthmus.explain.spectrum import LayerSpectrum, Spectra, measure_spectra
from isthmus.explain.taylor import TaylorBarrier, taylor_barrier
from isthmus.explain.units import SpaceFates, UnitFates, measure_units

__all__ = [
    "CKAMatrix",
    "Claim",
    "FourierImages",
    "ImageStatistics",
    "Intervention",
    "LayerSpectrum",
    "Maco",
    "Pictures",
    "SpaceFates",
    "Spectra",
    "TaylorBarrier",
    "UnitFates",
    "cka",
    "cka_matrix",
    "debiased_cka",
    "high_frequency_share",
    "intervene",
    "judge_claims",
    "match_directions",
    "matched_correlations",
    "measure_images",
    "measure_spectra",
    "measure_units",
    "procrustes_distance",
    "pwcca",
    "respond",
    "spectrum_of",
    "svcca",
    "taylor_barrier",
    "unit_correlations",
    "visualise",
    "visualise_many",
]
