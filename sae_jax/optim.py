"""Adam for ONE dictionary, driven by its Hyperparams, and the decoder's norm.

The optax transformation is one global object and the step is scaled outside of it: a transformation
closed over a member's learning rate would be a new function, and a new compilation, every time.
"""

import jax
import jax.numpy as jnp
import optax

from sae_jax import models
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Params

ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def update(
    params: Params,
    state: optax.OptState,
    grads: Params,
    hyper: Hyperparams,
    architecture: Architecture,
) -> tuple[Params, optax.OptState]:
    """One step of Adam at rate `hyper.learning_rate`.

    With a unit decoder the gradient loses its part along each latent's direction first, so Adam's
    moments hold none of it, and the directions are brought back to norm 1 afterwards (Bricken et
    al. 2023).
    """
    unit = architecture.decoder_norm == "unit"
    if unit:
        along = jnp.sum(grads.decoder * params.decoder, axis=1, keepdims=True)
        grads = grads.replace(decoder=grads.decoder - along * params.decoder)
    steps, state = ADAM.update(grads, state)
    params = jax.tree.map(lambda p, step: p - hyper.learning_rate * step, params, steps)
    if unit:
        params = params.replace(decoder=models.unit_rows(params.decoder))
    return params, state
