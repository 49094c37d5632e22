"""One bibliography: a short key or an id of the survey's catalog resolves to a source."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from normscope.core.errors import unknown_name
from normscope.core.survey import works


@dataclass(frozen=True)
class Source:
    """A work that a number, a threshold or a method comes from.

    Attributes:
        key: the catalog's id where the work is in the catalog, else a short key as "glorot2010".
        title: title of the work, as `readable` writes it.
        year: year of publication.
        url: address of the paper, "" where the catalog has none.
    """

    key: str
    title: str
    year: int
    url: str

    def __str__(self) -> str:
        """Write title, year and address."""
        return f"{self.title} ({self.year})" + (f", {self.url}" if self.url else "")


# short keys of works that the catalog holds; one listed twice there stands for the first of its entries
ALIASES: dict[str, str] = {
    "lecun1998": "S000",
    "ioffe2015": "S007",
    "ba2016": "S011",
    "summers2020": "S015",
    "ioffe2017": "S065",
    "wu2018": "S012",
    "wu2021": "S079",
    "huang2020layerwise": "S117",
    "daneshmand2020": "S138",
    "vanlaarhoven2017": "S125",
    "santurkar2018": "S132",
    "ghorbani2019": "S134",
    "yang2019": "S139",
    "nado2020": "S152",
    "li2016": "S155",
    "schneider2020": "S167",
    "liu2017": "S204",
}

_ARXIV = "https://arxiv.org/abs/"

FURTHER: tuple[Source, ...] = (
    Source(
        "gatys2016",
        "Image Style Transfer Using Convolutional Neural Networks",
        2016,
        "https://doi.org/10.1109/CVPR.2016.265",
    ),
    Source(
        "lanczos1950",
        "An iteration method for the solution of the eigenvalue problem of linear differential and integral operators",
        1950,
        "https://doi.org/10.6028/jres.045.026",
    ),
    Source(
        "daniel1976",
        "Reorthogonalization and Stable Algorithms for Updating the Gram-Schmidt QR Factorization",
        1976,
        "https://doi.org/10.1090/S0025-5718-1976-0431641-8",
    ),
    Source(
        "bernstein2020",
        "On the distance between two neural networks and the stability of learning",
        2020,
        _ARXIV + "2002.03432",
    ),
    Source("pascanu2013", "On the difficulty of training Recurrent Neural Networks", 2013, _ARXIV + "1211.5063"),
    Source("zhang2019", "Fixup Initialization: Residual Learning Without Normalization", 2019, _ARXIV + "1901.09321"),
    Source("zamirai2020", "Revisiting BFloat16 Training", 2020, _ARXIV + "2010.06192"),
    Source(
        "wang2024",
        "How to set AdamW's weight decay as you scale model and dataset size",
        2024,
        _ARXIV + "2405.13698",
    ),
    Source(
        "hutchinson1989",
        "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
        1989,
        "https://doi.org/10.1080/03610918908812806",
    ),
    Source(
        "pearlmutter1994", "Fast Exact Multiplication by the Hessian", 1994, "https://doi.org/10.1162/neco.1994.6.1.147"
    ),
    Source(
        "wu2000",
        "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems",
        2000,
        "https://doi.org/10.1137/S0895479898334605",
    ),
    Source(
        "schraudolph2002",
        "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent",
        2002,
        "https://doi.org/10.1162/08997660260028683",
    ),
    Source(
        "bekas2007", "An estimator for the diagonal of a matrix", 2007, "https://doi.org/10.1016/j.apnum.2007.01.003"
    ),
    Source(
        "glorot2010",
        "Understanding the difficulty of training deep feedforward neural networks",
        2010,
        "https://proceedings.mlr.press/v9/glorot10a.html",
    ),
    Source(
        "saxe2014",
        "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
        2014,
        f"{_ARXIV}1312.6120",
    ),
    Source(
        "he2015delving",
        "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification",
        2015,
        f"{_ARXIV}1502.01852",
    ),
    Source(
        "martens2015",
        "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
        2015,
        f"{_ARXIV}1503.05671",
    ),
    Source("kingma2015", "Adam: A Method for Stochastic Optimization", 2015, f"{_ARXIV}1412.6980"),
    Source("chen2016", "Training Deep Nets with Sublinear Memory Cost", 2016, f"{_ARXIV}1604.06174"),
    Source("lin2016", "Approximating Spectral Densities of Large Matrices", 2016, f"{_ARXIV}1308.5467"),
    Source("schoenholz2017", "Deep Information Propagation", 2017, f"{_ARXIV}1611.01232"),
    Source(
        "hanin2018", "How to Start Training: The Effect of Initialization and Architecture", 2018, f"{_ARXIV}1803.01719"
    ),
    Source(
        "mhammedi2017",
        "Efficient Orthogonal Parametrisation of Recurrent Neural Networks Using Householder Reflections",
        2017,
        f"{_ARXIV}1612.00188",
    ),
    Source(
        "yoshida2017",
        "Spectral Norm Regularization for Improving the Generalizability of Deep Learning",
        2017,
        f"{_ARXIV}1705.10941",
    ),
    Source(
        "goyal2017",
        "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
        2017,
        f"{_ARXIV}1706.02677",
    ),
    Source(
        "li2018",
        "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift",
        2018,
        f"{_ARXIV}1801.05134",
    ),
    Source("kalamkar2019", "A Study of BFLOAT16 for Deep Learning Training", 2019, f"{_ARXIV}1905.12322"),
    Source("micikevicius2018", "Mixed Precision Training", 2018, f"{_ARXIV}1710.03740"),
    Source("mccandlish2018", "An Empirical Model of Large-Batch Training", 2018, f"{_ARXIV}1812.06162"),
    Source("lu2019", "Dying ReLU and Initialization: Theory and Numerical Examples", 2019, f"{_ARXIV}1903.06733"),
    Source(
        "lezcano2019",
        "Trivializations for Gradient-Based Optimization on Manifolds",
        2019,
        f"{_ARXIV}1909.09501",
    ),
    Source("luther2019", "Sample Variance Decay in Randomly Initialized ReLU Networks", 2019, f"{_ARXIV}1902.04942"),
    Source(
        "huang2020",
        "Normalization Techniques in Training DNNs: Methodology, Analysis and Application",
        2020,
        f"{_ARXIV}2009.12836",
    ),
    Source(
        "martens2020",
        "New Insights and Perspectives on the Natural Gradient Method",
        2020,
        f"{_ARXIV}1412.1193",
    ),
    Source("yao2020", "PyHessian: Neural Networks Through the Lens of the Hessian", 2020, f"{_ARXIV}1912.07145"),
    Source(
        "cohen2021",
        "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
        2021,
        f"{_ARXIV}2103.00065",
    ),
    Source("cohen2022", "Adaptive Gradient Methods at the Edge of Stability", 2022, f"{_ARXIV}2207.14484"),
    Source("meyer2021", "Hutch++: Optimal Stochastic Trace Estimation", 2021, f"{_ARXIV}2010.09649"),
    Source(
        "dettmers2022", "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022, f"{_ARXIV}2208.07339"
    ),
    Source(
        "kosson2023",
        "Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks",
        2023,
        f"{_ARXIV}2305.17212",
    ),
    Source(
        "wortsman2023",
        "Small-scale proxies for large-scale Transformer training instabilities",
        2023,
        f"{_ARXIV}2309.14322",
    ),
    Source(
        "epperly2024",
        "XTrace: Making the Most of Every Sample in Stochastic Trace Estimation",
        2024,
        f"{_ARXIV}2301.07825",
    ),
    Source(
        "wortsman2023stable",
        "Stable and low-precision training for large-scale vision-language models",
        2023,
        f"{_ARXIV}2304.13013",
    ),
    Source("chowdhery2022", "PaLM: Scaling Language Modeling with Pathways", 2022, f"{_ARXIV}2204.02311"),
    Source("dixit2021", "Silent Data Corruptions at Scale", 2021, f"{_ARXIV}2102.11245"),
    Source(
        "zhai2023",
        "Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        2023,
        f"{_ARXIV}2303.06296",
    ),
    Source("dehghani2023", "Scaling Vision Transformers to 22 Billion Parameters", 2023, f"{_ARXIV}2302.05442"),
    Source("kimi2025", "Kimi K2: Open Agentic Intelligence", 2025, f"{_ARXIV}2507.20534"),
    Source("sun2024", "Massive Activations in Large Language Models", 2024, f"{_ARXIV}2402.17762"),
    Source(
        "pan2018",
        "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
        2018,
        f"{_ARXIV}1807.09441",
    ),
    Source(
        "nguyen2019",
        "Transformers without Tears: Improving the Normalization of Self-Attention",
        2019,
        f"{_ARXIV}1910.05895",
    ),
    Source("henry2020", "Query-Key Normalization for Transformers", 2020, f"{_ARXIV}2010.04245"),
    Source(
        "singh2020",
        "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks",
        2020,
        f"{_ARXIV}1911.09737",
    ),
    Source("zhao2020", "PairNorm: Tackling Oversmoothing in GNNs", 2020, f"{_ARXIV}1909.12223"),
    Source("ding2021", "CogView: Mastering Text-to-Image Generation via Transformers", 2021, f"{_ARXIV}2105.13290"),
    Source(
        "tang2021", "CrossNorm and SelfNorm for Generalization under Distribution Shifts", 2021, f"{_ARXIV}2102.02811"
    ),
    Source("touvron2021", "Going Deeper with Image Transformers", 2021, f"{_ARXIV}2103.17239"),
    Source("peebles2022", "Scalable Diffusion Models with Transformers", 2022, f"{_ARXIV}2212.09748"),
    Source("wang2022", "DeepNet: Scaling Transformers to 1,000 Layers", 2022, f"{_ARXIV}2203.00555"),
    Source(
        "qin2023",
        "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
        2023,
        f"{_ARXIV}2307.14995",
    ),
    Source(
        "sun2023",
        "Retentive Network: A Successor to Transformer for Large Language Models",
        2023,
        f"{_ARXIV}2307.08621",
    ),
    Source(
        "woo2023",
        "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders",
        2023,
        f"{_ARXIV}2301.00808",
    ),
    Source(
        "dao2024",
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
        2024,
        f"{_ARXIV}2405.21060",
    ),
    Source(
        "loshchilov2024",
        "nGPT: Normalized Transformer with Representation Learning on the Hypersphere",
        2024,
        f"{_ARXIV}2410.01131",
    ),
    Source("cai2025", "SeeDNorm: Self-Rescaled Dynamic Normalization", 2025, f"{_ARXIV}2510.22777"),
    Source("chen2025", "Stronger Normalization-Free Transformers", 2025, f"{_ARXIV}2512.10938"),
    Source(
        "kim2025",
        "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
        2025,
        f"{_ARXIV}2502.02732",
    ),
    Source("sun2025", "The Curse of Depth in Large Language Models", 2025, f"{_ARXIV}2502.05795"),
    Source("zhu2025", "Transformers without Normalization", 2025, f"{_ARXIV}2503.10622"),
)


def readable(title: str) -> str:
    """Write a title for reading: quotes beside what they quote, no braces from a bibliography's markup.

    Args:
        title: a title as the catalog has it.

    Returns:
        The title.

    >>> readable('Rethinking" Batch" in {B}atchNorm')
    'Rethinking “Batch” in BatchNorm'
    """
    quoted = re.sub(r'\s*"\s*([^"]+?)\s*"', r" “\1”", re.sub(r"\{(\w+)\}", r"\1", title))
    return re.sub(r"”(?=\w)", "” ", quoted).replace("( “", "(“").strip()


@functools.cache
def _bibliography() -> dict[str, Source]:
    """Map every key to its source: the short keys first, then the catalog's ids."""
    surveyed = {work.id: Source(work.id, readable(work.title), work.year, work.paper) for work in works()}
    short = {source.key: source for source in FURTHER} | {key: surveyed[work] for key, work in ALIASES.items()}
    return dict(sorted(short.items())) | surveyed


def cite(key: str) -> Source:
    """Resolve a key of the bibliography; an unknown one is an ArgumentError that offers the closest.

    Args:
        key: a short key as "ioffe2015", or an id of the survey's catalog as "S007".

    Returns:
        The source; a short key of a work in the catalog gives the same source as the catalog's id.

    >>> print(cite("ioffe2017"))  # doctest: +ELLIPSIS
    Batch Renormalization: ... (2017), https://arxiv.org/abs/1702.03275
    >>> cite("ioffe2017") is cite("S065")
    True
    """
    _check(key)
    return _bibliography()[key]


def _check(key: str) -> None:
    if key not in _bibliography():
        raise unknown_name("key", key, _bibliography(), "An id of the survey's catalog, S000 to S244, works as well.")
