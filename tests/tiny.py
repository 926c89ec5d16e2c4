"""Tiny random models, made in the test: real architectures, a few thousand weights, no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> LlamaForCausalLM:
    """A random Llama of 2 layers, 32 wide, with grouped-query attention; ``config`` overrides any setting."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # wide enough for activations that differ from column to column
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, in any text: 256 of them, and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    special = ["<bos>", "<eos>", "<unk>", "<spare>"]
    vocabulary |= {word: len(alphabet) + index for index, word in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )


def tiny_blocks(n_blocks: int = 8, block_length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random tokens, (n_blocks, block_length)."""
    return torch.randint(0, 256, (n_blocks, block_length), generator=torch.Generator().manual_seed(seed))


def save_tiny(folder: str | Path, **options) -> Path:
    """A tiny Llama and its tokenizer as a folder in Hugging Face format."""
    tiny_llama(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
