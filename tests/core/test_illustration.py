"""Which figure shows what a finding is about."""

import pytest

from normscope.core.gallery import reproduction
from normscope.core.illustration import ILLUSTRATED, illustrations
from normscope.diagnostics.explanation import explanations

# a number or word that each figure's own caption or claims must have for the link to be true
PROOF = {
    ("run.diverged", "CO-13"): "crosses",
    ("training.learning-rate", "CO-13"): "by learning rate",
    ("training.learning-rate", "CO-3"): "the first steps have blown these up",
    ("propagation.signal-exploding", "CO-26"): "doubled by each block without normalization",
    ("propagation.gradient-exploding", "CO-17"): "exponential growth backward",
    ("conditioning.ill-conditioned-inputs", "CO-1"): "largest eigenvalue of the second moment",
    ("conditioning.ill-conditioned-inputs", "CO-5"): "gradient descent with step",
    ("conditioning.ill-conditioned-gradients", "CO-2"): "second moment of the gradient",
    ("conditioning.curvature-dominated", "CO-4"): "largest eigenvalue of the last layer's input grows with depth",
    ("conditioning.rank-collapse", "CO-16"): "without normalization r falls to 1",
    ("curvature.edge-of-stability", "CO-20"): "2/λmax",
    ("curvature.outliers", "CO-6"): "outliers far from the bulk",
    ("curvature.outliers", "CO-7"): "Share of the gradient's squared norm",
    ("curvature.negative", "CO-6"): "Largest and smallest eigenvalue",
    ("scale.invariance", "SI-1"): "orthogonal to the row",
    ("scale.effective-rate", "SI-2"): "effective learning rate therefore only falls",
    ("scale.effective-rate", "SI-3"): "effective learning rate falls with it",
    ("scale.equilibrium", "SI-5"): "norm",
    ("scale.equilibrium", "SI-4"): "√(2ηλ/(1+α))",
    ("scale.decay", "SI-4"): "climbs for thousands of steps",
    ("scale.decay", "SI-10"): "rises only where they decay",
    ("scale.gain-collapse", "AP-4"): "the more gains are zero",
    ("scale.gain-collapse", "RE-5"): "many are near 0",
    ("noise.small-batch", "ST-2"): "how far the output of a sample moves with the batch",
    ("noise.small-batch", "ST-7"): "less that with the stored statistics",
    ("noise.whitening-batch", "ST-3"): "features",
    ("noise.whitening-batch", "ST-4"): "group",
    ("mismatch.train-eval-gap", "ST-7"): "less that with the stored statistics",
    ("mismatch.target-shift", "ST-10"): "removed exactly by the first layer",
    ("mismatch.batch-statistics", "ST-10"): "with those of test batches",
    ("mismatch.served-in-training-mode", "ST-10"): "cost accuracy where test batches are small",
    ("structure.few-values", "ST-6"): "scatters as",
    ("structure.few-values", "RE-2"): "leaves signs",
}


def test_every_link_is_of_a_finding_to_a_figure():
    assert set(ILLUSTRATED) <= set(explanations())
    links = {(finding, item.id) for finding in ILLUSTRATED for item in illustrations(finding)}
    assert links == set(PROOF)


@pytest.mark.parametrize(("finding", "figure"), PROOF)
def test_a_figure_says_itself_what_the_finding_is_about(finding, figure):
    assert PROOF[finding, figure] in reproduction(figure).caption
    (link,) = [item for item in illustrations(finding) if item.id == figure]
    assert link.title == reproduction(figure).title
    assert link.command == f"normscope figures {figure}"
    assert not link.shows.endswith(".")


def test_a_finding_without_a_figure_has_none():
    assert illustrations("structure.eps") == ()
