"""The table of architectures: encoders, decoders, both, vision, audio, diffusion, medical images, graphs."""

from __future__ import annotations

from typing import Any

import torch

from tests.architectures.architecture import Architecture, classes, own_loss

TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = TEXT | {"num_key_value_heads": 2}
SEQUENCE = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
L = 2  # layers


def hf(name: str, config: dict[str, Any]) -> Any:
    """Return what makes a model of transformers by its name."""

    def make(package: Any) -> Any:
        model = getattr(package, name)
        return model(model.config_class(**config))

    return make


def tokens() -> dict[str, Any]:
    ids = torch.randint(3, 48, (2, 10))
    return {"input_ids": ids, "labels": ids}


def image(*shape: int, name: str = "pixel_values") -> Any:
    return lambda: {name: torch.randn(*shape)}


def labeled(*shape: int) -> Any:
    return lambda: {"pixel_values": torch.randn(*shape), "labels": torch.arange(shape[0]) % 2}


# ---- text

ENCODERS = (
    Architecture(
        "BERT",
        "transformers",
        hf("BertForMaskedLM", TEXT),
        tokens,
        {"layer": 1 + 2 * L + 1},  # embeddings; after attention and feed-forward; in the head
        own_loss,
    ),
    Architecture(
        "DeBERTa v2",
        "transformers",
        hf("DebertaV2Model", TEXT | {"relative_attention": True, "norm_rel_ebd": "layer_norm"}),
        lambda: {"input_ids": torch.randint(3, 48, (2, 10))},
        {"layer": 1 + 2 * L + 1},  # embeddings; after attention and feed-forward; of the relative embeddings
    ),
    Architecture(
        "ModernBERT",
        "transformers",
        hf("ModernBertForMaskedLM", TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
        tokens,
        {"layer": 1 + (2 * L - 1) + 1 + 1},  # embeddings; before each branch but the first; final; head
        own_loss,
    ),
    Architecture(
        "CLIP",
        "transformers",
        lambda package: package.CLIPModel(
            package.CLIPConfig(
                text_config=TEXT, vision_config=TEXT | {"image_size": 16, "patch_size": 8}, projection_dim=16
            )
        ),
        lambda: {
            "input_ids": torch.randint(3, 48, (2, 10)),
            "pixel_values": torch.randn(2, 3, 16, 16),
            "return_loss": True,
        },
        {"layer": (2 * L + 1) + (1 + 2 * L + 1)},  # text: final; vision: before and after the encoder
        own_loss,
    ),
)

DECODERS = (
    Architecture(
        "GPT-2",
        "transformers",
        hf("GPT2LMHeadModel", {"vocab_size": 48, "n_embd": 32, "n_layer": L, "n_head": 2}),
        tokens,
        {"layer": 2 * L + 1},
        own_loss,
    ),
    Architecture("LLaMA", "transformers", hf("LlamaForCausalLM", DECODER), tokens, {"rms": 2 * L + 1}, own_loss),
    Architecture(
        "Qwen3",
        "transformers",
        hf("Qwen3ForCausalLM", DECODER | {"head_dim": 16}),
        tokens,
        {"rms": (2 + 2) * L + 1},  # queries and keys besides
        own_loss,
    ),
    Architecture(
        "Gemma 3",
        "transformers",
        hf("Gemma3ForCausalLM", DECODER | {"head_dim": 16}),
        tokens,
        {"rms": (4 + 2) * L + 1},  # before and after each branch; queries and keys
        own_loss,
    ),
    Architecture(
        "OLMo 2",
        "transformers",
        hf("Olmo2ForCausalLM", DECODER),
        tokens,
        {"rms": (2 + 2) * L + 1},  # after each branch; queries and keys
        own_loss,
    ),
    Architecture(
        "Llama 4",
        "transformers",
        hf("Llama4ForCausalLM", DECODER | {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2}),
        tokens,
        {"rms": (2 + 1) * L + 1},  # one without gain for queries and keys
        own_loss,
    ),
    Architecture(
        "Cohere",
        "transformers",
        hf("CohereForCausalLM", DECODER | {"use_qk_norm": True}),
        tokens,
        {"layer": (1 + 2) * L + 1},  # parallel branches share one; queries and keys with a gain for each head
        own_loss,
    ),
    Architecture(
        "Nemotron",
        "transformers",
        hf("NemotronForCausalLM", DECODER),
        tokens,
        {"layer": 2 * L + 1},  # LayerNorm1P: times 1 + gain
        own_loss,
    ),
    Architecture(
        "DeepSeek-V3",
        "transformers",
        hf(
            "DeepseekV3ForCausalLM",
            DECODER
            | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
            | {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
            | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        ),
        tokens,
        {"rms": (2 + 2) * L + 1},  # the compressed queries and keys besides
        own_loss,
    ),
    Architecture(
        "Mixtral",
        "transformers",
        hf("MixtralForCausalLM", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        tokens,
        {"rms": 2 * L + 1},
        own_loss,
    ),
    Architecture(
        "Mamba",
        "transformers",
        hf("MambaForCausalLM", {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": L, "state_size": 4}),
        tokens,
        {"rms": L + 1},
        own_loss,
    ),
    Architecture(
        "Mamba 2",
        "transformers",
        hf(
            "Mamba2ForCausalLM",
            {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": L, "state_size": 4, "num_heads": 4}
            | {"head_dim": 16, "n_groups": 2, "chunk_size": 8},
        ),
        tokens,
        {"rms": (1 + 1) * L + 1},  # gated, inside the mixer
        own_loss,
    ),
)

BOTH = (
    Architecture(
        "T5",
        "transformers",
        hf(
            "T5ForConditionalGeneration",
            {"vocab_size": 48, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": L, "num_heads": 2}
            | {"decoder_start_token_id": 0},
        ),
        tokens,
        {"rms": (2 * L + 1) + (3 * L + 1)},  # the decoder attends to the encoder besides
        own_loss,
    ),
    Architecture(
        "BART",
        "transformers",
        hf(
            "BartForConditionalGeneration",
            SEQUENCE
            | {"d_model": 32, "encoder_layers": L, "decoder_layers": L, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
            | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": None},
        ),
        tokens,
        {"layer": (1 + 2 * L) + (1 + 3 * L)},  # embeddings of either
        own_loss,
    ),
)

# ---- images

SIZES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "num_labels": 2}
VISION = (
    Architecture(
        "ViT",
        "transformers",
        hf("ViTForImageClassification", TEXT | {"image_size": 16, "patch_size": 8}),
        labeled(2, 3, 16, 16),
        {"layer": 2 * L + 1},
        own_loss,
    ),
    Architecture(
        "ConvNeXt",
        "transformers",
        hf("ConvNextForImageClassification", SIZES),
        labeled(2, 3, 32, 32),
        {"layer": 1 + 3 + 5 + 1},  # stem, downsamplings, blocks, after pooling
        own_loss,
    ),
    Architecture(
        "ConvNeXt v2",
        "transformers",
        hf("ConvNextV2ForImageClassification", SIZES),
        labeled(2, 3, 32, 32),
        {"layer": 1 + 3 + 5 + 1, "other": 5},  # global response normalization in each block
        own_loss,
    ),
    Architecture(
        "Swin",
        "transformers",
        hf(
            "SwinForImageClassification",
            {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]}
            | {"window_size": 4, "num_labels": 2},
        ),
        labeled(2, 3, 16, 16),
        {"layer": 1 + 2 * (2 + 1) + 1 + 1},  # embeddings, two a block, where patches merge, final
        own_loss,
    ),
    Architecture(
        "ResNet",
        "transformers",
        hf(
            "ResNetForImageClassification",
            {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "num_labels": 2},
        ),
        labeled(4, 3, 32, 32),
        {"batch": 1 + 3 * (2 + 1) + 2},  # stem, three a bottleneck, a shortcut a stage
        own_loss,
    ),
    Architecture(
        "EfficientNet",
        "efficientnet_pytorch",
        lambda package: package.EfficientNet.from_name(
            "efficientnet-b0", num_classes=4, width_coefficient=0.25, depth_coefficient=0.25
        ),
        image(4, 3, 32, 32, name="inputs"),
        {"batch": 1 + (7 * 3 - 1) + 1},  # stem; expansion, depthwise and projection, the first block expands not; head
        classes,
    ),
)

# ---- sound

AUDIO = (
    Architecture(
        "Wav2Vec2",
        "transformers",
        hf(
            "Wav2Vec2ForSequenceClassification",
            TEXT
            | {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4}
            | {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "num_labels": 2},
        ),
        lambda: {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 1])},
        {"group": 1, "layer": 1 + 1 + 2 * L},  # first convolution; projection of features, before the layers, in them
        own_loss,
    ),
    Architecture(
        "Whisper",
        "transformers",
        hf(
            "WhisperForConditionalGeneration",
            SEQUENCE
            | {"d_model": 32, "encoder_layers": L, "decoder_layers": L, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
            | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
            | {"max_source_positions": 16, "max_target_positions": 16},
        ),
        lambda: {"input_features": torch.randn(2, 8, 32), "labels": torch.randint(3, 48, (2, 10))},
        {"layer": (2 * L + 1) + (3 * L + 1)},  # the decoder attends to the encoder besides
        own_loss,
    ),
)

# ---- diffusion

UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def noisy(*shape: int, **others: Any) -> Any:
    """Return what draws a noisy sample with its timestep and, of the sizes given, random conditions."""
    return lambda: {
        "sample": torch.randn(*shape),
        "timestep": torch.arange(shape[0]),
        **{name: torch.randn(*size) for name, size in others.items()},
    }


DIFFUSION = (
    Architecture(
        "UNet2D",
        "diffusers",
        lambda package: package.UNet2DModel(
            **UNET,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ),
        noisy(2, 3, 8, 8),
        {"group": 2 * (2 + 2 + 4) + (1 + 1 + 2) + 1},  # two a residual block; attention down, amid, up; before the last
    ),
    Architecture(
        "UNet2D with conditions",
        "diffusers",
        lambda package: package.UNet2DConditionModel(
            **UNET,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=8,
        ),
        noisy(2, 4, 8, 8, encoder_hidden_states=(2, 3, 8)),
        {"group": 2 * (2 + 2 + 4) + (1 + 1 + 2) + 1, "layer": 3 * (1 + 1 + 2)},  # as above; three a transformer block
    ),
    Architecture(
        "AutoencoderKL",
        "diffusers",
        lambda package: package.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        image(2, 3, 8, 8, name="sample"),
        # two a residual block, attention amid, before the last convolution; the decoder has two blocks a resolution
        {"group": (2 * (2 + 2) + 1 + 1) + (2 * (2 * 2 + 2) + 1 + 1)},
    ),
    Architecture(
        "AutoencoderKL of Wan",
        "diffusers",
        lambda package: package.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, attn_scales=[], temperal_downsample=[True]
        ),
        image(1, 3, 1, 8, 8, name="sample"),
        # the same parts, RMS over channels
        {"rms": (2 * (2 + 2) + 1 + 1) + (2 * (2 * 2 + 2) + 1 + 1)},
    ),
    Architecture(
        "DiT",
        "diffusers",
        lambda package: package.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=L,
            sample_size=8,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.arange(2),
            "class_labels": torch.arange(2),
        },
        {"layer": 2 * L + 1},  # without gain: adaptive
    ),
    Architecture(
        "Flux",
        "diffusers",
        lambda package: package.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 4),
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "pooled_projections": torch.randn(2, 8),
            "timestep": torch.rand(2),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
        },
        # double block: before attention and feed-forward of two streams; single block: one; last
        # queries and keys: of two streams, of one
        {"layer": 4 * 1 + 1 * 2 + 1, "rms": 4 * 1 + 2 * 2},
    ),
)

# ---- medical images

MEDICAL = (
    Architecture(
        "UNet",
        "monai.networks.nets",
        lambda nets: nets.UNet(2, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2, norm="instance"),
        image(2, 1, 16, 16, name="x"),
        {"instance": 2 + 2 + 2 + (1 + 1) + 1},  # two a unit; up: transposed, and one a unit but the last
        classes,
    ),
    Architecture(
        "DynUNet",
        "monai.networks.nets",
        lambda nets: nets.DynUNet(
            2, 1, 2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 16]
        ),
        image(2, 1, 16, 16, name="x"),
        {"instance": 2 * (1 + 1 + 1 + 2)},  # two a block: input, down, bottleneck, up
        classes,
    ),
    Architecture(
        "SwinUNETR",
        "monai.networks.nets",
        lambda nets: nets.SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), spatial_dims=2, window_size=2),
        image(1, 1, 64, 64, name="x_in"),
        # two a block and one a merging in four stages (five more are calls of a function, no layers);
        # residual blocks: three where channels change, of the input and of five ups, two in four others
        {"layer": (2 + 1) * 4, "instance": 3 * (1 + 5) + 2 * 4},
        classes,
    ),
    Architecture(
        "SegResNet",
        "monai.networks.nets",
        lambda nets: nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 2), blocks_up=(1,), norm=("GROUP", {"num_groups": 4})),
        image(1, 1, 8, 8, 8, name="x"),
        {"group": 2 * (1 + 2 + 1) + 1},  # two a block; before the last convolution
        classes,
    ),
    Architecture(
        "DenseNet",
        "monai.networks.nets",
        lambda nets: nets.DenseNet(3, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2), bn_size=2),
        image(4, 1, 16, 16, 16, name="x"),
        {"batch": 1 + 2 * (2 + 2) + 1 + 1},  # stem, two a layer, transition, last
        classes,
    ),
)

# ---- graphs


def graph() -> dict[str, Any]:
    """Return two rings of six nodes each."""
    here = torch.arange(12)
    there = torch.cat([(torch.arange(6) + 1) % 6 + 6 * i for i in range(2)])
    edges = torch.cat([torch.stack([here, there]), torch.stack([there, here])], 1)
    return {"x": torch.randn(12, 6), "edge_index": edges, "batch": here // 6}


def gcn(norm: str, kind: str, **options: Any) -> Architecture:
    return Architecture(
        f"GCN, {norm}",
        "torch_geometric.nn",
        lambda package: package.GCN(6, 8, num_layers=3, out_channels=2, norm=norm, norm_kwargs=options),
        graph,
        {kind: 3 - 1},  # none after the last
        classes,
    )


GRAPHS = (
    gcn("BatchNorm", "batch"),
    gcn("GraphNorm", "other"),
    gcn("InstanceNorm", "instance"),
    gcn("LayerNorm", "layer"),
    gcn("DiffGroupNorm", "batch", groups=2),  # batch normalization of all groups at once
    Architecture(
        "GCN, MeanSubtractionNorm",
        "torch_geometric.nn",
        lambda package: package.GCN(6, 8, num_layers=3, out_channels=2, norm=package.MeanSubtractionNorm()),
        graph,
        {"other": 3 - 1},
        classes,
    ),
    Architecture(
        "GIN",
        "torch_geometric.nn",
        lambda package: package.GIN(6, 8, num_layers=3, out_channels=2, norm="BatchNorm"),
        graph,
        {"batch": 3 + (3 - 1)},  # in the perceptron of each layer; after each layer but the last
        classes,
    ),
    Architecture(
        "GPS",
        "torch_geometric.nn",
        lambda package: package.Sequential(
            "x, edge_index, batch",
            [
                (package.GPSConv(6, package.GCNConv(6, 6), heads=2), "x, edge_index, batch -> x"),
                (package.GPSConv(6, package.GCNConv(6, 6), heads=2), "x, edge_index, batch -> x"),
            ],
        ),
        graph,
        {"batch": 3 * 2},  # after message passing, attention and feed-forward
        classes,
    ),
)

# ---- variations of the transformer


def decoder(name: str, norms: dict[str, int], **options: Any) -> Architecture:
    return Architecture(
        f"Decoder, {name}",
        "x_transformers",
        lambda package: package.TransformerWrapper(
            num_tokens=48, max_seq_len=16, attn_layers=package.Decoder(dim=32, depth=L, heads=2, **options)
        ),
        lambda: {"x": torch.randint(0, 48, (2, 10))},
        norms,
        lambda output: classes(output.flatten(0, 1)),
    )


VARIATIONS = (
    decoder("RMSNorm", {"rms": 2 * L + 1}, use_rmsnorm=True),
    decoder("ScaleNorm", {"rms": 2 * L + 1}, use_scalenorm=True),
    decoder("sandwich", {"layer": (2 + 2) * L + 1}, sandwich_norm=True),  # after each branch besides
    decoder("after the sum", {"layer": 2 * L}, pre_norm=False),
    decoder("queries and keys", {"layer": 2 * L + 1, "rms": 2 * L}, attn_qk_rmsnorm=True),
    decoder("cosine attention", {"layer": 2 * L + 1}, attn_qk_norm=True),  # a function normalizes queries and keys
    decoder("dynamic tanh", {}, use_dynamic_tanh=True),
)

ARCHITECTURES = (*ENCODERS, *DECODERS, *BOTH, *VISION, *AUDIO, *DIFFUSION, *MEDICAL, *GRAPHS, *VARIATIONS)
