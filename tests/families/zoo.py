"""Every class that transformers maps to causal language modelling, tiny and random.

A configuration is made small by the names of its settings: what is called `hidden_size` becomes 32 in every
family. What is derived from such settings (lists with an entry a layer, inner widths) is left to the family's
own configuration class. Settings that belong together in ways no name tells are in `SETTINGS`, class by
class; classes that cannot be built are in `NOT_BUILT`, each with its reason."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 260
CONTEXT = 96

# {size: the settings that have it}
_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
    CONTEXT: "max_position_embeddings n_positions max_seq_len max_seq_length seq_length context_length "
    "model_max_length max_target_positions original_max_position_embeddings rel_extent",
    32: "hidden_size d_model n_embd embed_dim emb_dim dim embedding_dim word_embed_proj_dim lru_width "
    "input_embedding_size output_embedding_size ple_embed_dim attention_hidden_size dim_model_base "
    "hidden_dim backbone_hidden_size out_hidden_size projection_dim",
    64: "intermediate_size ffn_dim ffn_hidden_size n_inner decoder_ffn_dim encoder_ffn_dim dff dim_ff "
    "d_inner feed_forward_size dense_intermediate_size intermediate_size_mlp mamba_d_ssm mlp_dim",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
    "expert_intermediate_size prompt_mid_dim time_step_rank kv_lora_rank q_lora_rank o_lora_rank "
    "laurel_rank adapter_rank hc_lowrank loop_gate_rank hidden_size_per_layer_input router_hidden_size "
    "pronunciation_embed_dim shape_embed_dim d_rel",
    8: "head_dim dim_head d_head attention_head_size v_head_dim qk_nope_head_dim qk_rope_head_dim "
    "index_head_dim swa_head_dim global_head_dim kv_channels mamba_d_head mamba_head_dim mamba_headdim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state state_size ssm_state_size "
    "rotary_dim mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size block_size swa_v_head_dim "
    "query_pre_attn_scalar num_centroids prompt_length sliding_window sliding_window_size window_size "
    "local_attention attention_window_size attention_chunk_size keep_window_size index_topk",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts index_n_heads "
    "linear_num_value_heads linear_num_heads conv_kernel_size",
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers "
    "num_encoder_layers",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads multi_query_group_num num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k linear_num_key_heads depth zero_expert_num "
    "num_global_key_value_heads",
    1: "n_group num_expert_group topk_group n_groups mamba_n_groups first_k_dense_replace num_mem_blocks "
    "num_dense_layers n_shared_experts moe_num_shared_experts num_shared_experts mamba_ngroups",
}
_TINY = {name: size for size, names in _SIZES.items() for name in names.split()}
_OFTEN_NONE = ("head_dim", "num_key_value_heads", "num_experts_per_tok")
_SPECIAL_TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 0}
# Lists with an entry a layer whose words say what the layer is: one layer of every kind is built.
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers")

_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1, "layer_types": None},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 40,
            "split_ngram_parts": 1,
        }
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
NOT_BUILT: dict[str, str] = {
    "BltForCausalLM": "reads bytes through three models of its own, none of which its configuration sizes",
    "Gemma3nForConditionalGeneration": "its vision tower is a model of timm, which needs Pillow",
    "Gemma4AssistantForCausalLM": "drafts for another model, whose keys and values it is given",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model, whose keys and values it is given",
    "MusicgenForCausalLM": "transformers maps it to a configuration that it cannot be built from",
    "MusicgenMelodyForCausalLM": "transformers maps it to a configuration that it cannot be built from",
}


@cache
def kinds() -> dict[str, str]:
    """{class name: the model type by which it is built}, each class once, in transformers' order."""
    found: dict[str, str] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(name, kind)
    return found


def built() -> dict[str, str]:
    """`kinds`, less those that cannot be built."""
    return {name: kind for name, kind in kinds().items() if name not in NOT_BUILT}


def config_of(kind: str) -> PretrainedConfig:
    """The tiny configuration of a model type."""
    config_class = CONFIG_MAPPING[kind]
    return config_class(**_settings(config_class, SETTINGS.get(kind, {})))


def _settings(config_class: type[PretrainedConfig], own: dict[str, Any]) -> dict[str, Any]:
    """Small values for those settings that a configuration class has; ``own`` overrides them, nested for
    parts."""
    try:
        default = config_class()
    except Exception:  # one that cannot be made without settings: those of ``own`` are all there are
        return own
    values = default.to_dict()
    found: dict[str, Any] = {}
    for name, value in values.items():
        part = vars(default).get(name)
        if isinstance(part, PretrainedConfig):
            found[name] = _settings(type(part), own.get(name, {}))
        elif name in _SPECIAL_TOKENS:
            found[name] = _SPECIAL_TOKENS[name]
        elif name in _TINY and isinstance(value, int) and not isinstance(value, bool):
            found[name] = _TINY[name]
        elif name in _OFTEN_NONE and value is None:
            found[name] = _TINY[name]
        elif name in _KINDS and isinstance(value, (list, tuple)):
            found[name] = _one_of_every_kind(list(value))
    if values.get("num_key_value_heads") == values.get("num_attention_heads"):
        found.pop("num_key_value_heads", None)
        if "num_key_value_heads" in values:
            found["num_key_value_heads"] = _TINY["num_attention_heads"]
    for lists in _KINDS:
        for depth in ("num_hidden_layers", "n_layer", "num_layers"):
            if lists in found and depth in found:
                found[depth] = max(found[depth], len(found[lists]))
    for lists in _KINDS:
        if lists in found and "num_hidden_layers" in found:
            found[lists] += found[lists][-1:] * (found["num_hidden_layers"] - len(found[lists]))
    return found | {
        name: value for name, value in own.items() if not isinstance(value, dict) or name not in found
    }


def _one_of_every_kind(layers: list[Any]) -> list[Any]:
    found = list(dict.fromkeys(layers))
    return found + [found[0]] * max(0, 3 - len(found))


def build(kind: str, seed: int = 0) -> nn.Module:
    """The tiny model of a model type, float32, in evaluation mode, every weight and buffer of it random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind)).float().eval()
    model.set_experts_implementation("eager")
    _disturb(model)
    return model


def _disturb(model: nn.Module) -> None:
    """No weight is left at zero or one, where a fault would not show; matrices are wide enough for outputs
    that differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        saved = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point() and (not buffer.numel() or buffer.min() > -1e4):
                if buffer.any():  # not where it is zero: it may be a mask there
                    buffer.mul_(1.25 + 0.1 * torch.randn_like(buffer))
                else:
                    buffer.normal_(std=0.1)
