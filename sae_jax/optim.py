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


def scheduled(hyper: Hyperparams, step: jax.Array, architecture: Architecture) -> Hyperparams:
    """Hyperparameters as they stand at a step, from 0: warm-ups, then the schedule.

    The warm-up of w steps multiplies step i by min(1, (i + 1) / w); the schedule decays from the
    end of the warm-up to the last of `hyper.steps`, linearly or by half a cosine.
    """
    dtype = hyper.learning_rate.dtype

    def warmed(value: jax.Array, steps: jax.Array) -> jax.Array:
        share = (step + 1).astype(dtype) / jnp.maximum(steps, 1).astype(dtype)
        return value * jnp.minimum(share, 1)

    rate = warmed(hyper.learning_rate, hyper.lr_warmup)
    if architecture.schedule != "constant":
        left = (hyper.steps - hyper.lr_warmup).astype(dtype)
        done = (step - hyper.lr_warmup).astype(dtype) / jnp.maximum(left, 1)
        done = jnp.clip(done, 0, 1)
        if architecture.schedule == "linear":
            rate = rate * (1 - done)
        else:
            rate = rate * (1 + jnp.cos(jnp.pi * done)) / 2
    return hyper.replace(
        learning_rate=rate,
        l1_weight=warmed(hyper.l1_weight, hyper.l1_warmup),
        l0_weight=warmed(hyper.l0_weight, hyper.l0_warmup),
    )


def clipped(grads: Params, norm: jax.Array) -> Params:
    """Gradients scaled to a global norm where theirs is larger (Pascanu et al. 2013).

    `optax.clip_by_global_norm` in units of a power of two, so that no square over- or underflows.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(grads)]))
    exponent = jnp.frexp(largest)[1]
    unit = jax.tree.map(lambda leaf: jnp.ldexp(leaf, -exponent), grads)
    clip = optax.clip_by_global_norm(jnp.ldexp(norm, -exponent))
    unit, _ = clip.update(unit, optax.EmptyState())
    return jax.tree.map(lambda leaf: jnp.ldexp(leaf, exponent), unit)


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
    if architecture.clipping == "norm":
        grads = clipped(grads, hyper.clip_norm)
    steps, state = ADAM.update(grads, state)
    if architecture.decay == "decoupled":  # Loshchilov and Hutter 2019
        steps = steps.replace(
            encoder=steps.encoder + hyper.weight_decay * params.encoder,
            decoder=steps.decoder + hyper.weight_decay * params.decoder,
        )
    params = jax.tree.map(lambda p, step: p - hyper.learning_rate * step, params, steps)
    if unit:
        params = params.replace(decoder=models.unit_rows(params.decoder))
    return params, state
