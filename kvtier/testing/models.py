"""Small models of a real engine with random weights from a seed: nothing is downloaded.

Does not: import torch or transformers until asked for a model.
"""

from __future__ import annotations

from typing import Any

# Random weights this large make logits that vary by token; the usual 0.02 makes them near equal,
# and then wrong KV would go unseen.
WEIGHTS_STD = 0.08


def tiny_llama(
    *,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 0,
    vocabulary: int = 256,
    positions_max: int = 4096,
    dtype: str = "float32",
) -> Any:
    """A Llama-shaped causal language model in eval mode, the same bytes for the same arguments.

    `kv_heads < heads` makes it a grouped-query model. No token ends its answers.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions_max,
        initializer_range=WEIGHTS_STD,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.random.set_rng_state(generator_state)
    return model.to(getattr(torch, dtype)).eval()


def random_tokens(count: int, *, seed: int, vocabulary: int = 256) -> list[int]:
    """`count` token ids, the same for the same seed."""
    import random

    chance = random.Random(seed)
    return [chance.randrange(3, vocabulary) for _ in range(count)]
