"""Tiny Hugging Face folders of many families, written from configurations; nothing is downloaded."""

import functools
import importlib
import json
from pathlib import Path

import pytest
import torch

REASON = "transformers is the extra `hf`; it is in the extra `dev` too"
VOCABULARY = 64
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
DECODER = {**TOKENS, **SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENCODER = {**TOKENS, **SMALL, "max_position_embeddings": 64}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 8}
SEQUENCES = {
    **TOKENS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2,
}  # fmt: skip

# By family: the configuration's class, the model's class, and what the configuration says.
FAMILIES = {
    "bert": ("BertConfig", "BertForMaskedLM", ENCODER),
    # Positions are counted from behind the padding token, so two of them are never used.
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**ENCODER, "pad_token_id": 1, "max_position_embeddings": 12}),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", {
        "vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24,
    }),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {
        "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1,
    }),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", ENCODER),
    "opt": ("OPTConfig", "OPTForCausalLM", {
        **TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    }),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", DECODER),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 4}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, "head_dim": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", DECODER),
    "t5": ("T5Config", "T5ForConditionalGeneration", {
        **TOKENS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    }),
    "bart": ("BartConfig", "BartForConditionalGeneration", SEQUENCES),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGES),
    "deit": ("DeiTConfig", "DeiTForImageClassification", IMAGES),
    "swin": ("SwinConfig", "SwinForImageClassification", {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
    }),
    "clip": ("CLIPConfig", "CLIPModel", {
        "text_config": {**ENCODER, "max_position_embeddings": 32}, "vision_config": IMAGES, "projection_dim": 12,
    }),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {
        **SEQUENCES, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32,
    }),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", {
        **SMALL, "vocab_size": VOCABULARY, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    }),
    "mamba": ("MambaConfig", "MambaForCausalLM", {
        "vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2,
    }),
}  # fmt: skip
# What the model reads beside, or in place of, tokens.
READS = {
    **{family: {"pixel_values"} for family in ("vit", "deit", "swin")},
    **{family: {"input_ids", "decoder_input_ids"} for family in ("t5", "bart")},
    "clip": {"input_ids", "pixel_values"},
    "whisper": {"input_features", "decoder_input_ids"},
    "wav2vec2": {"input_values"},
}


@functools.cache
def transformers():
    """The package, silent; where torchvision is broken it has to be mended first, as `load_model` does."""
    pytest.importorskip("transformers", reason=REASON)
    from isthmus.models.hugging_face import _import_transformers

    package = _import_transformers("hf:tests")
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    package.utils.logging.set_verbosity_error()
    return package


def model_of(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A model at random weights, each tensor in general position."""
    config, kind, values = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers(), kind)(getattr(transformers(), config)(**{**values, **changes}))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.02 * torch.randn(tensor.shape))
    return model.eval()


def write(folder: Path, family: str, seed: int = 0, *, shard: str = "1GB", **changes: object) -> Path:
    """A folder as `from_pretrained` reads it."""
    model_of(family, seed, **changes).save_pretrained(folder, max_shard_size=shard)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as transformers reads them, after checking that it found nothing missing or unknown."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, told = getattr(transformers(), kind).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.state_dict()
