"""The survey's catalog: its 245 works, what each of them asks for, and where that is found."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib import resources

# name in the catalog -> "package.module:object"; a name stands here once its object runs and a test checks it
PROVIDED: dict[str, str] = {
    "population:input-whitening": "normscope.norms.families.populations_inference:PopulationNorm",
    "population:factor-centering": "normscope.norms.families.populations_linear:FactorCenteredLinear",
    "population:centering": "normscope.norms.families.populations_linear:CenteredLinear",
    "population:linear-transformations": "normscope.norms.families.populations_linear:LinearTransformations",
    "population:mean-normalized-sgd": "normscope.norms.families.populations_linear:MeanNormalizedLinear",
    "population:natural-neural-network": "normscope.norms.families.populations_linear:NaturalLinear",
    "population:generalized-whitened": "normscope.norms.families.populations_linear:GeneralizedWhitenedLinear",
    "layer:batch": "normscope.norms:build",
    "layer:feature-standardization": "normscope.norms:build",
    "layer:recurrent-batch": "normscope.norms.families.sequences:RecurrentBatchNorm",
    "layer:recurrent-batch-input": "normscope.norms.families.sequences:SequenceBatchNorm",
    "layer:layer": "normscope.norms:build",
    "layer:group": "normscope.norms:build",
    "layer:instance": "normscope.norms:build",
    "layer:positional": "normscope.norms:build",
    "layer:batch-group": "normscope.norms:build",
    "layer:ghost-batch": "normscope.norms:build",
    "layer:local-context": "normscope.norms.families.windows:LocalContextNorm",
    "layer:local-contrast": "normscope.norms.families.windows:LocalContrastNorm",
    "layer:local-response": "normscope.norms.families.windows:LocalResponseNorm",
    "layer:divisive": "normscope.norms.families.windows:DivisiveNorm",
    "layer:decorrelated-batch": "normscope.norms:build",
    "layer:iterative": "normscope.norms:build",
    "layer:whitening-coloring": "normscope.norms:build",
    "layer:batch-whitening-variants": "normscope.norms:build",
    "layer:network-deconvolution": "normscope.norms:build",
    "layer:channel-equilibrium": "normscope.norms.families.decorrelation:ChannelEquilibrium",
    "layer:concept-whitening": "normscope.norms.families.concepts:ConceptWhitening",
    "layer:isotropic-batch": "normscope.norms.families.decorrelation:IsotropicBatchNorm",
    "layer:streaming": "normscope.norms:build",
    "layer:l1-batch": "normscope.norms:build",
    "layer:lp-batch": "normscope.norms:build",
    "layer:generalized-batch": "normscope.norms:build",
    "layer:mean-only-batch": "normscope.norms:build",
    "layer:moving-average-batch": "normscope.norms.families.robust_control:MovingAverageNorm",
    "layer:power": "normscope.norms.families.robust_control:PowerNorm",
    "layer:pixel": "normscope.norms:build",
    "layer:rms": "normscope.norms:build",
    "layer:online": "normscope.norms.families.robust_control:OnlineNorm",
    "layer:variance-only-layer": "normscope.norms:build",
    "recovery:coloring": "normscope.norms:build",
    "recovery:dynamic-layer": "normscope.norms:build",
    "recovery:adaptive-instance": "normscope.norms:build",
    "recovery:adaptive-layer-instance": "normscope.norms.families.recoveries_layers:LayerInstanceNorm",
    "recovery:instance-level-meta": "normscope.norms:build",
    "recovery:spatially-adaptive": "normscope.norms:build",
    "recovery:instance-enhancement": "normscope.norms:build",
    "recovery:attentive": "normscope.norms:build",
    "recovery:adanorm": "normscope.norms.families.recoveries_detached:ControlledNorm",
    "recovery:conditional-batch": "normscope.norms:build",
    "recovery:conditional-instance": "normscope.norms:build",
    "layer:mixture": "normscope.norms.families.mixtures_modes:MixtureNorm",
    "layer:mode": "normscope.norms.families.mixtures_modes:ModeNorm",
    "layer:switchable": "normscope.norms.families.mixtures_switchable:SwitchableNorm",
    "layer:sparse-switchable": "normscope.norms.families.mixtures_switchable:SparseSwitchableNorm",
    "layer:switchable-whitening": "normscope.norms.families.mixtures_whitening:SwitchableWhitening",
    "layer:exemplar": "normscope.norms.families.mixtures_modes:ExemplarNorm",
    "layer:dynamic": "normscope.norms.families.mixtures_modes:DynamicNorm",
    "layer:batch-instance": "normscope.norms.families.mixtures_pairs:BatchInstanceNorm",
    "layer:adaptive-layer-instance": "normscope.norms.families.recoveries_layers:LayerInstanceNorm",
    "layer:task": "normscope.norms.families.mixtures_pairs:TaskNorm",
    "layer:batch-channel": "normscope.norms.families.mixtures_pairs:BatchChannelNorm",
    "layer:evonorm": "normscope.norms.families.mixtures_evonorm:EvoNorm",
    "layer:representative-batch": "normscope.norms.families.recoveries_layers:RepresentativeBatchNorm",
    "layer:invariance-exploiting": "normscope.norms.families.mixtures_pairs:InvariantNorm",
    "layer:kalman": "normscope.norms.families.robust_batch:KalmanNorm",
    "layer:batch-renorm": "normscope.norms.families.robust_batch:BatchRenorm",
    "layer:running-batch": "normscope.norms.families.robust_batch:BlendedNorm",
    "layer:diminishing-batch": "normscope.norms.families.robust_batch:BlendedNorm",
    "layer:full-normalization": "normscope.norms.families.robust_batch:BlendedNorm",
    "layer:momentum-batch": "normscope.norms.families.robust_batch:MomentumBatchNorm",
    "layer:memorized-batch": "normscope.norms.families.robust_memory:MemorizedNorm",
    "layer:cross-iteration-batch": "normscope.norms.families.robust_memory:CrossIterationNorm",
    "layer:stochastic": "normscope.norms.families.robust_batch:StochasticNorm",
    "inference:evalnorm": "normscope.norms.families.populations_inference:EvalNorm",
    "inference:example-weighting": "normscope.norms.families.populations_inference:ExampleWeightedNorm",
    "inference:population-estimation": "normscope.norms:build",
    "inference:precise-batch": "normscope.norms:build",
    "layer:group-whitening": "normscope.norms:build",
    "layer:autodial": "normscope.norms.families.domain_moments:AutoDial",
    "layer:domain-specific": "normscope.norms.families.domain_branches:DomainNorm",
    "layer:domain-agnostic": "normscope.norms.families.domain_branches:DomainAgnosticNorm",
    "layer:dual-batch": "normscope.norms.families.domain_branches:DomainNorm",
    "layer:domain-whitening": "normscope.norms.families.decorrelation:DomainWhitening",
    "layer:transferable": "normscope.norms.families.domain_shared:TransferableNorm",
    "layer:domain-optimized": "normscope.norms.families.domain_moments:DomainOptimizedNorm",
    "layer:sandwich": "normscope.norms:build",
    "layer:adversarial-statistics": "normscope.norms.families.domain_borrowed:AdversarialStatisticsNorm",
    "layer:gated-batch": "normscope.norms.families.domain_moments:GatedBatchNorm",
    "layer:domain-invariant": "normscope.norms.families.domain_shared:DomainInvariantNorm",
    "layer:separable-batch": "normscope.norms.families.domain_shared:SeparableNorm",
    "recovery:dynamic-instance": "normscope.norms:build",
    "layer:thumbnail-instance": "normscope.norms.families.areas:ThumbnailInstanceNorm",
    "layer:groupwise-whitening-coloring": "normscope.norms.families.decorrelation:GroupColoring",
    "recovery:adaptive-convolution": "normscope.norms.families.recoveries_layers:AdaptiveConvolutionNorm",
    "layer:region": "normscope.norms.families.regions:RegionNorm",
    "layer:attentive-semantic": "normscope.norms.families.recoveries_semantic:SemanticNorm",
    "recovery:self-modulation": "normscope.norms:build",
    "recovery:conditional-group": "normscope.norms:build",
    "layer:switchable-width-batch": "normscope.norms.families.domain_branches:SwitchableWidthNorm",
    "layer:fine-grained-batch": "normscope.norms.families.domain_shared:FineGrainedNorm",
    "layer:range-batch": "normscope.norms:build",
    "layer:noise-aware-batch": "normscope.norms.families.robust_batch:NoiseAwareNorm",
    "layer:meta": "normscope.norms.families.domain_shared:MetaNorm",
    "layer:pop-art": "normscope.norms.families.domain_borrowed:PopArt",
    "layer:cross": "normscope.norms.families.domain_borrowed:BorrowingNorm",
    "layer:unsupervised-batch": "normscope.norms.families.domain_borrowed:BorrowingNorm",
    "layer:shuffled-decorrelated": "normscope.norms.families.decorrelation:ShuffledWhitening",
    "layer:differentiable-group": "normscope.norms.families.graph_nodes:DifferentiableGroupNorm",
    "layer:graph": "normscope.norms.families.graph_nodes:GraphNorm",
    "layer:graph-combination": "normscope.norms.families.graph_nodes:GraphCombinationNorm",
    "layer:context": "normscope.norms:build",
    "layer:attentive-context": "normscope.norms.families.graph_nodes:AttentiveContextNorm",
    "layer:spd-batch": "normscope.norms.families.graph_manifold:SPDBatchNorm",
    "layer:robust": "normscope.norms:build",
    "layer:mixture-batch": "normscope.norms.families.domain_branches:DomainNorm",
    "layer:passport-aware": "normscope.norms.families.recoveries_branches:PassportNorm",
    "recovery:associate": "normscope.norms:build",
    "layer:associate": "normscope.norms:build",
    "analysis:input-conditioning": "normscope.metrics.conditioning:conditions",
    "optim:fine-grained-manifold": "normscope.gradients:FineGrainedSGD",
    "optim:cayley-sgd-adam": "normscope.gradients:CayleySGD",
    "optim:block-normalized": "normscope.gradients:BlockNormalized",
    "optim:lars": "normscope.gradients:LARS",
    "optim:lamb": "normscope.gradients:LAMB",
    "optim:lans": "normscope.gradients:LANS",
    "optim:clars": "normscope.gradients:CLARS",
    "optim:gradient-centralization": "normscope.gradients:Centralized",
    "optim:adaptive-gradient-clipping": "normscope.gradients:AdaptiveClipped",
    "optim:path-normalized": "normscope.gradients:PathSGD",
    "optim:riemannian-batch": "normscope.gradients:GrassmannSGD",
    "optim:psi-manifold": "normscope.gradients:PSISGD",
    "optim:adamp-sgdp": "normscope.gradients:AdamP",
    "optim:adamsrt": "normscope.gradients:AdamSRT",
    "optim:projection-weight-norm": "normscope.gradients:ProjectionSGD",
    "weight:weight-norm": "normscope.weights.scaling:WeightNorm",
    "weight:centered": "normscope.weights.scaling:Centered",
    "weight:orthogonal": "normscope.weights.orthogonal:OrthogonalGroups",
    "weight:spectral": "normscope.weights.spectral:spectral",
    "weight:cosine": "normscope.weights.cosine:CosineLinear",
    "weight:standardized": "normscope.weights.scaling:Standardized",
    "weight:centered-moving-average": "normscope.weights.scaling:CenteredOnly",
    "weight:scaled-standardized": "normscope.weights.scaling:ScaledStandardized",
    "weight:unitary": "normscope.weights.recurrent:Unitary",
    "weight:full-capacity-unitary": "normscope.weights.recurrent:LieUnitary",
    "weight:givens": "normscope.weights.rotations:givens",
    "weight:soft-orthogonal-svd": "normscope.weights.recurrent:SoftOrthogonal",
    "weight:unitary-lie-algebra": "normscope.weights.recurrent:LieUnitary",
    "weight:gated-orthogonal-recurrent": "normscope.weights.cells:GatedOrthogonalCell",
    "weight:scaled-cayley": "normscope.weights.recurrent:ScaledCayley",
    "weight:singular-value-bounding": "normscope.weights.orthogonal:BoundedSingularValues",
    "weight:isometric": "normscope.weights.orthogonal:Isometric",
    "weight:oni": "normscope.weights.orthogonal:NewtonOrthogonal",
    "weight:parseval": "normscope.weights.orthogonal:Parseval",
    "regularizer:orthogonal-convolution": "normscope.weights.penalties:orthogonal_convolution",
    "regularizer:soft-double-mutual-srip": "normscope.weights.regularizers:regularizer",
    "regularizer:biggan-orthogonal": "normscope.weights.penalties:biggan",
    "regularizer:instance-selective-whitening": "normscope.weights.features:instance_whitening",
    "regularizer:bn-statistics-matching": "normscope.weights.features:statistics_matching",
    "app:prediction-time-batch": "normscope.applications.adaptation:prediction_time",
    "app:adabn": "normscope.applications.adaptation:adabn",
    "app:covariate-shift-mixing": "normscope.applications.adaptation:MixedNorm",
    "app:corruption-rectification": "normscope.applications.adaptation:adabn",
    "app:tent": "normscope.applications.adaptation:Tent",
    "app:adain-style": "normscope.applications.style:adain",
    "app:wct-style": "normscope.applications.style:wct",
    "app:network-slimming": "normscope.applications.compression:prune",
    "app:eagleeye": "normscope.applications.compression:eagle_eye",
    "app:batch-recalibration": "normscope.norms:recalibrate",
}


# of names "figure:...", all of which are regenerated
_FIGURES = "normscope.core.gallery:named"
_CHAPTERS = {"1": "Methodology", "2": "Analysis", "3": "Application"}


@dataclass(frozen=True)
class Work:
    """One work of the survey, as the catalog lists it.

    Attributes:
        id: "S000" to "S244".
        number: number of the survey's section, as "1.2.1".
        chapter: "methodology", "analysis" or "application".
        section: title of the section.
        subsection: title of the subsection, "" where there is none.
        title: title of the work.
        venue: where it appeared.
        year: year of publication.
        paper: address of the paper, "" where there is none.
        provides: names of what it asks for, as "layer:batch"; several works may share one.
    """

    id: str
    number: str
    chapter: str
    section: str
    subsection: str
    title: str
    venue: str
    year: int
    paper: str
    provides: tuple[str, ...]


@functools.cache
def works() -> tuple[Work, ...]:
    """Return all works in the survey's order; the catalog is read once.

    >>> works()[11].title, works()[11].provides
    ('Layer Normalization', ('layer:layer',))
    """
    text = resources.files("normscope.core").joinpath("data/catalog.csv").read_text(encoding="utf-8")
    return tuple(_work(row) for row in csv.DictReader(text.splitlines()))


def _work(row: dict[str, str]) -> Work:
    fields = {name: value for name, value in row.items() if name not in {"year", "provides"}}
    return Work(**fields, year=int(row["year"]), provides=tuple(row["provides"].split()))


@dataclass(frozen=True)
class Section:
    """A numbered part of the survey's outline.

    Attributes:
        number: as "2.2"; "2" is a chapter.
        title: its title.
        works: its works, those of the sections in it included.
    """

    number: str
    title: str
    works: tuple[Work, ...]


@functools.cache
def outline() -> tuple[Section, ...]:
    """Return the chapters and sections of the survey in their order.

    >>> [(section.number, len(section.works)) for section in outline() if section.number.startswith("2")]
    [('2', 43), ('2.1', 18), ('2.2', 16), ('2.3', 7), ('2.4', 2)]
    """
    titles: dict[str, str] = {}
    for work in works():
        chapter, section = work.number[0], work.number[:3]
        titles.setdefault(chapter, _CHAPTERS[chapter])
        titles.setdefault(section, work.section)
        titles.setdefault(work.number, work.subsection)
    return tuple(
        Section(number, title, tuple(work for work in works() if f"{work.number}.".startswith(f"{number}.")))
        for number, title in titles.items()
    )


def catalog() -> list[dict[str, object]]:
    """Return the public JSON form of the catalog.

    Returns:
        A list of `{id, chapter, section, title, year, provides: [{name, object, status}]}`, one per work; `object` is
        an import path "package.module:object" and `status` "done", or they are None and "planned".
    """
    return [entry(work) for work in works()]


def entry(work: Work) -> dict[str, object]:
    """Return the public JSON form of one work, as a row of `catalog`."""
    return {
        "id": work.id,
        "chapter": work.chapter,
        "section": work.section,
        "title": work.title,
        "year": work.year,
        "provides": [_provision(name) for name in work.provides],
    }


def _provision(name: str) -> dict[str, str | None]:
    found = PROVIDED.get(name, _FIGURES if name.startswith("figure:") else None)
    return {"name": name, "object": found, "status": "planned" if found is None else "done"}
