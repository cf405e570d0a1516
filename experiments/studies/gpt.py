"""GPT-2 in Flax, with low-rank terms beside the last layers' attention if asked for."""

import flax.linen as nn
import jax
import jax.numpy as jnp

_HEAD = 64


class LoraDense(nn.Module):
    """A dense layer with a low-rank term A B beside it; A is random and B zero, and B alone is tuned (LoRA-FA)."""

    features: int
    rank: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(tokens, width) -> (tokens, features)."""
        a = self.param("lora_a", nn.initializers.normal(x.shape[-1] ** -0.5), (x.shape[-1], self.rank))
        b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        return nn.Dense(self.features)(x) + x @ a @ b


class Block(nn.Module):
    """Pre-norm attention, heads of 64, and MLP; LoRA on the query, key and value where `lora_rank` is not 0."""

    width: int
    lora_rank: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(tokens, width) -> (tokens, width)."""
        tokens = len(x)
        h = nn.LayerNorm()(x)
        qkv = LoraDense(3 * self.width, self.lora_rank)(h) if self.lora_rank else nn.Dense(3 * self.width)(h)
        q, k, v = (y.reshape(tokens, -1, _HEAD) for y in jnp.split(qkv, 3, axis=-1))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(tokens, self.width)
        x = x + nn.Dense(self.width)(attended)
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))


class GPT(nn.Module):
    """GPT-2; its defaults are those of the small model."""

    vocabulary: int = 50257
    width: int = 768
    layers: int = 12
    context: int = 1024
    lora_rank: int = 0
    lora_layers: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (tokens, vocabulary)."""
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(tokens) + nn.Embed(self.context, self.width)(jnp.arange(len(tokens)))
        for i in range(self.layers):
            rank = self.lora_rank if i >= self.layers - self.lora_layers else 0
            x = Block(self.width, rank)(x)
        return embed.attend(nn.LayerNorm()(x))
