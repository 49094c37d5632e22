"""Small reference networks with readable module names; torch's global seed decides their initialization."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normscope.core.errors import ArgumentError

NormFactory = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with normalization beside a shortcut: [N, C, H, W] to [N, channels, H/stride, W/stride]."""

    def __init__(self, inputs: int, channels: int, stride: int, norm: NormFactory) -> None:
        """Build the parts.

        Args:
            inputs: channels of the input.
            channels: channels of the output.
            stride: stride of the first convolution; where it or the channels change the shape, the shortcut convolves.
            norm: normalization layer from a number of channels.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != channels:
            self.shortcut.append(nn.Conv2d(inputs, channels, 1, stride, bias=False)).append(norm(channels))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut to the normalized branch, then rectify."""
        branch = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        rectified: Tensor = self.relu2(branch + self.shortcut(x))
        return rectified


def residual_cnn(
    channels: int = 16, blocks: Sequence[int] = (2, 2, 2), norm: NormFactory = nn.BatchNorm2d, classes: int = 10
) -> nn.Sequential:
    """Build a residual CNN for gray images, [N, 1, H, W] to [N, classes].

    A strided stem, then stages of residual blocks; each stage after the first halves the resolution and doubles the
    channels. ReLUs work in place, as in most networks of this kind.

    Args:
        channels: channels of the stem and the first stage.
        blocks: number of residual blocks in each stage.
        norm: normalization layer from a number of channels.
        classes: number of outputs.

    Returns:
        The network, with modules `stem`, `stage1.block1`, ..., `pool`, `head`.
    """
    stem = OrderedDict(
        conv=nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False), norm=norm(channels), relu=nn.ReLU(inplace=True)
    )
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem))
    width = channels
    for stage, count in enumerate(blocks):
        inputs, width = width, channels * 2**stage
        members = OrderedDict[str, nn.Module]()
        for block in range(count):
            first = block == 0
            stride = 2 if first and stage > 0 else 1
            members[f"block{block + 1}"] = ResidualBlock(inputs if first else width, width, stride, norm)
        parts[f"stage{stage + 1}"] = nn.Sequential(members)
    parts["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts["head"] = nn.Linear(width, classes)
    return nn.Sequential(parts)


class Attention(nn.Module):
    """Causal self-attention, [N, T, width] to [N, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        """Build the parts.

        Args:
            width: features per place, a multiple of heads.
            heads: number of heads.
        """
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each place with those before it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return projected


class TransformerBlock(nn.Module):
    """Pre-norm block: attention, then a perceptron of four times the width, each added to the residual stream."""

    def __init__(self, width: int, heads: int, norm: NormFactory) -> None:
        """Build the parts.

        Args:
            width: features per place.
            heads: number of attention heads.
            norm: normalization layer from a number of features.
        """
        super().__init__()
        self.norm1 = norm(width)
        self.attention = Attention(width, heads)
        self.norm2 = norm(width)
        self.mlp = nn.Sequential(
            OrderedDict(expand=nn.Linear(width, 4 * width), gelu=nn.GELU(), contract=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches to the stream."""
        x = x + self.attention(self.norm1(x))
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


class Embedding(nn.Module):
    """Sum of a token's and its place's embedding: [N, T] to [N, T, width]."""

    def __init__(self, vocabulary: int, width: int, context: int) -> None:
        """Build the parts.

        Args:
            vocabulary: number of tokens.
            width: features per place.
            context: number of places, the largest T.
        """
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens and their places."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.token(tokens) + self.place(places)
        return embedded


def transformer(
    vocabulary: int,
    width: int = 96,
    layers: int = 4,
    heads: int = 4,
    context: int = 64,
    *,
    norm: NormFactory = nn.LayerNorm,
) -> nn.Sequential:
    """Build a pre-norm decoder that predicts the next token, int64 [N, T] to logits [N, T, vocabulary].

    Args:
        vocabulary: number of tokens.
        width: features per place, a multiple of heads.
        layers: number of blocks.
        heads: number of attention heads.
        context: the largest T.
        norm: normalization layer from a number of features.

    Returns:
        The network, with modules `embedding`, `block1`, ..., `norm`, `head`.

    Raises:
        ArgumentError: width is no multiple of heads.
    """
    if width % heads:
        raise ArgumentError(f"width={width} is no multiple of heads={heads}; try width={heads * (width // heads + 1)}.")
    parts: OrderedDict[str, nn.Module] = OrderedDict(embedding=Embedding(vocabulary, width, context))
    for layer in range(layers):
        parts[f"block{layer + 1}"] = TransformerBlock(width, heads, norm)
    parts["norm"] = norm(width)
    parts["head"] = nn.Linear(width, vocabulary)
    return nn.Sequential(parts)


def mlp(sizes: Sequence[int], norm: NormFactory | None = nn.BatchNorm1d, *, bias: bool = True) -> nn.Sequential:
    """Build a perceptron with normalization before each ReLU; inputs are flattened to [N, sizes[0]].

    Args:
        sizes: features of the input, of each hidden layer, of the output.
        norm: normalization layer from a number of features, None for none.
        bias: whether the hidden layers have a bias; the head always has.

    Returns:
        The network, with modules `flatten`, `layer1.linear`, `layer1.norm`, `layer1.relu`, ..., `head`.

    Raises:
        ArgumentError: there are fewer than two sizes.

    >>> [name for name, _ in mlp([4, 3, 2]).named_modules()][2:]
    ['layer1', 'layer1.linear', 'layer1.norm', 'layer1.relu', 'head']
    """
    if len(sizes) < 2:
        raise ArgumentError(f"sizes={list(sizes)} needs an input and an output at least; try [784, 64, 10].")
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for layer, (inputs, outputs) in enumerate(pairwise(sizes[:-1]), start=1):
        members: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(inputs, outputs, bias=bias))
        if norm is not None:
            members["norm"] = norm(outputs)
        members["relu"] = nn.ReLU(inplace=True)
        parts[f"layer{layer}"] = nn.Sequential(members)
    parts["head"] = nn.Linear(sizes[-2], sizes[-1])
    return nn.Sequential(parts)
