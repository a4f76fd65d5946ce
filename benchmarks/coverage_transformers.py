"""Tiny random transformers of many families, for `coverage.py --source transformers`.

Two layers, hidden width 64, 4 heads (8 query heads over 4 key heads where a family groups them), a vocabulary of about
100 and short sequences. Sizes that could be mistaken for one another differ where the family allows it. Nothing is
downloaded: every model is built from a configuration.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from coverage import Case
from torch import nn

# Builds of torchvision without compiled operators lack these names, which `import torchvision` looks up.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

VOCABULARY = 99
HIDDEN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
GROUPED = {**HIDDEN, "num_attention_heads": 8, "num_key_value_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}

# (name, model class, configuration class, configuration, inputs)
DECODERS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 40}),
    (
        "gpt_neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 40,
        },
    ),
    ("gptj", "GPTJForCausalLM", "GPTJConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    ("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**HIDDEN, "rotary_pct": 0.5, "max_position_embeddings": 40}),
    (
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 40,
        },
    ),
    (
        "opt post-norm",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "word_embed_proj_dim": 48,
            "do_layer_norm_before": False,
            "max_position_embeddings": 40,
        },
    ),
    ("bloom", "BloomForCausalLM", "BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    ("mpt", "MptForCausalLM", "MptConfig", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 40}),
    (
        "falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    (
        "falcon grouped",
        "FalconForCausalLM",
        "FalconConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_kv_heads": 4,
            "new_decoder_architecture": True,
        },
    ),
    ("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    ("llama tied", "LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    ("mistral", "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    ("mixtral", "MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **GROUPED,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 48,
        },
    ),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 12}),
    (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 12, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    ),
    ("gemma", "GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 12}),
    ("gemma2", "Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 12, "sliding_window": 4}),
    ("phi", "PhiForCausalLM", "PhiConfig", {**HIDDEN, "partial_rotary_factor": 0.5}),
    ("phi3", "Phi3ForCausalLM", "Phi3Config", {**GROUPED, "max_position_embeddings": 40}),
    ("stablelm", "StableLmForCausalLM", "StableLmConfig", GROUPED),
    ("olmo", "OlmoForCausalLM", "OlmoConfig", GROUPED),
    ("olmo2", "Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    ("cohere", "CohereForCausalLM", "CohereConfig", GROUPED),
    ("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    ("granite", "GraniteForCausalLM", "GraniteConfig", GROUPED),
    (
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 6},
    ),
    (
        "mamba2",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    (
        "rwkv",
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "context_length": 40,
        },
    ),
]

ENCODERS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("bert", "BertModel", "BertConfig", {**HIDDEN, "max_position_embeddings": 40}),
    ("bert classifier", "BertForSequenceClassification", "BertConfig", {**HIDDEN, "max_position_embeddings": 40}),
    ("bert mlm", "BertForMaskedLM", "BertConfig", {**HIDDEN, "max_position_embeddings": 40}),
    ("roberta", "RobertaModel", "RobertaConfig", {**HIDDEN, "max_position_embeddings": 40}),
    (
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 40},
    ),
    (
        "albert",
        "AlbertModel",
        "AlbertConfig",
        {**HIDDEN, "embedding_size": 24, "max_position_embeddings": 40},
    ),
    ("electra", "ElectraModel", "ElectraConfig", {**HIDDEN, "embedding_size": 24, "max_position_embeddings": 40}),
    ("mpnet", "MPNetModel", "MPNetConfig", {**HIDDEN, "max_position_embeddings": 40}),
    (
        "deberta",
        "DebertaModel",
        "DebertaConfig",
        {**HIDDEN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 40},
    ),
    (
        "deberta_v2",
        "DebertaV2Model",
        "DebertaV2Config",
        {**HIDDEN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 40},
    ),
    (
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        {**HIDDEN, "max_position_embeddings": 40, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    ),
    ("clip text", "CLIPTextModel", "CLIPTextConfig", {**HIDDEN, "max_position_embeddings": 40}),
    ("blip text", "BlipTextModel", "BlipTextConfig", {**HIDDEN, "max_position_embeddings": 40}),
]

ENCODER_DECODERS: list[tuple[str, str, str, dict[str, Any]]] = [
    (
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    (
        "t5 gated",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 64,
            "d_kv": 12,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
    ),
    (
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 80,
            "max_position_embeddings": 40,
            "decoder_start_token_id": 2,
        },
    ),
    (
        "pegasus",
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 80,
            "max_position_embeddings": 40,
            "decoder_start_token_id": 2,
        },
    ),
]

IMAGES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("vit", "ViTForImageClassification", "ViTConfig", {**HIDDEN, "image_size": 24, "patch_size": 8}),
    ("deit", "DeiTForImageClassification", "DeiTConfig", {**HIDDEN, "image_size": 24, "patch_size": 8}),
    (
        "beit",
        "BeitForImageClassification",
        "BeitConfig",
        {**HIDDEN, "image_size": 24, "patch_size": 8, "use_relative_position_bias": True},
    ),
    ("dinov2", "Dinov2ForImageClassification", "Dinov2Config", {**HIDDEN, "image_size": 24, "patch_size": 8}),
    ("siglip vision", "SiglipVisionModel", "SiglipVisionConfig", {**HIDDEN, "image_size": 24, "patch_size": 8}),
    (
        "swin",
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    (
        "swinv2",
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    ),
]


def cases() -> Iterator[Case]:
    """All families."""
    for schema in OPERATORS:
        try:
            torch.library.define(f"torchvision::{schema.partition('(')[0]}", schema[schema.index("(") :])
        except RuntimeError:  # defined by torchvision itself
            break
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    for name, model, config, options in DECODERS:
        yield Case(name, factory(model, config, {**TOKENS, **options}), kwargs={"input_ids": ids, "use_cache": False})
    for name, model, config, options in ENCODERS:
        yield Case(name, factory(model, config, {**TOKENS, **options}), kwargs={"input_ids": ids})
    for name, model, config, options in ENCODER_DECODERS:
        kwargs = {"input_ids": ids, "decoder_input_ids": targets, "use_cache": False}
        yield Case(name, scored(factory(model, config, {**TOKENS, **options}), "logits"), kwargs=kwargs, note="logits")
    for name, model, config, options in IMAGES:
        size = options["image_size"]
        yield Case(name, factory(model, config, {**options, "num_labels": 10}), kwargs={"pixel_values": image(size)})
    pairs = {"input_ids": ids, "pixel_values": image(24)}
    yield Case("clip", scored(clip, "logits_per_image"), kwargs=pairs, note="similarities")
    whisper = {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 80,
        "num_mel_bins": 16,
        "max_source_positions": 10,
        "max_target_positions": 12,
        "decoder_start_token_id": 1,
    }
    sound = torch.randn(2, 16, 20, generator=torch.Generator().manual_seed(0))
    yield Case(
        "whisper",
        scored(factory("WhisperForConditionalGeneration", "WhisperConfig", {**TOKENS, **whisper}), "logits"),
        kwargs={"input_features": sound, "decoder_input_ids": targets, "use_cache": False},
        note="logits",
    )
    wave = {
        **HIDDEN,
        "vocab_size": VOCABULARY,
        "conv_dim": (24, 24, 24),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (5, 2, 2),
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
    }
    samples = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    yield Case("wav2vec2", factory("Wav2Vec2Model", "Wav2Vec2Config", wave), kwargs={"input_values": samples})
    stable = {**wave, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    yield Case("wav2vec2 layer", factory("Wav2Vec2Model", "Wav2Vec2Config", stable), kwargs={"input_values": samples})
    yield Case("hubert", factory("HubertModel", "HubertConfig", wave), kwargs={"input_values": samples})


def factory(model: str, config: str, options: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """What builds a model with seeded weights."""

    def build() -> nn.Module:
        import transformers

        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            built = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
            if any("experts" in key for key in options):  # the default implementation has no float64 kernel
                built.set_experts_implementation("batched_mm")
            return built

    return build


class Scores(nn.Module):
    """A model of which one output is kept: hidden states among the outputs would be fixed."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, **inputs: Any) -> torch.Tensor:
        """The output of that name."""
        return getattr(self.model(**inputs), self.name)


def scored(build: Callable[[], nn.Module], name: str) -> Callable[[], nn.Module]:
    """What builds a model of which one output is kept."""
    return lambda: Scores(build(), name).eval()


def clip() -> nn.Module:
    """CLIP's two towers and their similarity."""
    import transformers

    text = {**TOKENS, **HIDDEN, "max_position_embeddings": 40}
    vision = {**HIDDEN, "hidden_size": 48, "intermediate_size": 80, "image_size": 24, "patch_size": 8}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
        return transformers.CLIPModel(config).eval()


def image(size: int) -> torch.Tensor:
    """Two random images."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
