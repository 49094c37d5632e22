"""Which figures show what the survey's catalog asks of this project's analyses."""

from __future__ import annotations

from typing import Final

# name in the catalog -> ids of figures; those of ids that no script has yet are planned
FIGURES: Final[dict[str, tuple[str, ...]]] = {
    "figure:adaptive-filter-view": ("SI-16",),
    "figure:adversarial-vulnerability": ("AP-5",),
    "figure:auto-rate-tuning": ("SI-9",),
    "figure:bn-gradient-descent-quadratic": ("CO-20",),
    "figure:bn-only-training": ("RE-4", "RE-5"),
    "figure:constraint-count": ("RE-1", "RE-2", "RE-3"),
    "figure:covariance-spectrum": ("CO-5",),
    "figure:decorrelation-conditioning": ("CO-5",),
    "figure:domain-statistics-tsne": ("AP-1",),
    "figure:effective-step-size": ("SI-3", "SI-13"),
    "figure:exponential-learning-rate": ("SI-7", "SI-8"),
    "figure:exponential-weight-norm-bias": ("SI-14",),
    "figure:hessian-density": ("CO-6", "CO-7"),
    "figure:instance-enhancement-noise": ("ST-11",),
    "figure:invariance-table": ("SI-1", "SI-12"),
    "figure:l2-vs-normalization": ("SI-5", "SI-8"),
    "figure:layerwise-conditioning": ("CO-1", "CO-2", "CO-3", "CO-4"),
    "figure:length-direction-decoupling": ("CO-21",),
    "figure:loss-smoothness": ("CO-8", "CO-9", "CO-10", "CO-11", "CO-12"),
    "figure:mean-field-fisher": ("CO-23",),
    "figure:mean-field-gradient-explosion": ("CO-17", "CO-18"),
    "figure:norm-interpretations": ("SI-18",),
    "figure:normalized-sensitivity": ("CO-19",),
    "figure:ntk-normalized-convergence": ("CO-25",),
    "figure:path-invariance": ("SI-15",),
    "figure:pathological-sharpness": ("CO-15",),
    "figure:rank-collapse": ("CO-16",),
    "figure:signal-propagation": ("CO-26",),
    "figure:slimming-gamma": ("AP-4",),
    "figure:spherical-adam": ("SI-17",),
    "figure:spherical-motion-dynamics": ("SI-4", "SI-5", "SI-6"),
    "figure:stochastic-disturbance": ("ST-1", "ST-2", "ST-3", "ST-4", "ST-5"),
    "figure:understanding-batch": ("CO-13", "CO-14"),
    "figure:weight-decay-mechanisms": ("SI-10",),
    "figure:weight-norm-growth": ("SI-2", "SI-11"),
    "figure:weight-norm-implicit-bias": ("CO-22",),
    "figure:whitening-stochasticity": ("ST-1", "ST-2", "ST-3", "ST-4", "ST-8"),
}
