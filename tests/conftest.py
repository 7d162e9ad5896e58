"""Settings that hold for every test."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")  # [B] - [B, 1] is an error, not [B, B]
