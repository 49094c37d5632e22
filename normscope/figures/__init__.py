"""Figures: pictures of a record, prepared without matplotlib and drawn by `normscope.figures.draw` or the report."""

from __future__ import annotations

from normscope.core.figure import Figure
from normscope.figures import attention, conditioning, curvature, mismatch, noise, propagation, run, scale, spikes

FIGURES: tuple[Figure, ...] = (
    propagation.SIGNAL,
    propagation.DIFFERENCES,
    propagation.GRADIENT,
    propagation.NON_FINITE,
    propagation.DEAD,
    propagation.SATURATED,
    propagation.OUTLIERS,
    propagation.PEAKS,
    propagation.EPS_WEIGHT,
    attention.LOGITS,
    attention.HEADS,
    attention.ENTROPIES,
    attention.LEVEL,
    conditioning.KAPPA,
    conditioning.GRADIENT,
    conditioning.CURVATURE,
    conditioning.RANK,
    conditioning.LARGEST,
    conditioning.SPECTRA,
    conditioning.CORRELATIONS,
    curvature.SHARPNESS,
    curvature.SPECTRUM,
    curvature.OUTLIERS,
    curvature.SHARES,
    curvature.LAYERS,
    curvature.PATH,
    scale.DEFECTS,
    scale.RATES,
    scale.ANGLES,
    scale.NORMS,
    scale.GAINS,
    scale.BIASES,
    noise.MOVED,
    noise.SIZES,
    noise.RATIO,
    mismatch.DRIFT,
    mismatch.LOSSES,
    mismatch.UPDATES,
    mismatch.LAG,
    mismatch.VARIANCES,
    spikes.ONSETS,
    run.LOSS,
    run.DIVERGENCE,
    run.GRADIENT_NORM,
    run.LEARNING_RATE,
)

# what the page shows of a subject whatever was found
OVERVIEW: tuple[tuple[str, tuple[Figure, ...]], ...] = (
    ("Propagation", (propagation.SIGNAL, propagation.GRADIENT)),
    ("Attention", (attention.LOGITS, attention.HEADS, attention.ENTROPIES, attention.LEVEL)),
    (
        "Conditioning",
        (
            conditioning.KAPPA,
            conditioning.RANK,
            conditioning.SPECTRA,
            conditioning.GRADIENT,
            conditioning.CURVATURE,
            conditioning.LARGEST,
            conditioning.CORRELATIONS,
        ),
    ),
    (
        "Curvature",
        (
            curvature.SHARPNESS,
            curvature.SPECTRUM,
            curvature.LAYERS,
            curvature.OUTLIERS,
            curvature.SHARES,
            curvature.PATH,
        ),
    ),
    ("Scale", (scale.NORMS, scale.RATES, scale.ANGLES, scale.DEFECTS)),
    ("Noise", (noise.MOVED, noise.SIZES, noise.RATIO)),
    ("Mismatch", (mismatch.DRIFT, mismatch.LOSSES)),
)


def figure_for(finding_id: str) -> Figure | None:
    """Return the picture of a finding, None where it has none.

    Args:
        finding_id: "subject.name".

    Returns:
        The figure.

    >>> figure_for("propagation.dead-units").title
    'Dead channels of the worst layers'
    """
    return next((figure for figure in FIGURES if finding_id in figure.explains), None)
