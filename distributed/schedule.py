"""The learning rate as a function of the samples consumed."""

import math

from distributed.config import Recipe


def learning_rate(recipe: Recipe, samples: int) -> float:
    """Learning rate of the step that begins after `samples` samples: linear warm-up, then cosine to
    zero.

    The first step of a warm-up has a rate above zero, because a rate of zero would waste the step.
    """
    if samples < recipe.warmup_samples:
        return recipe.lr * min(1.0, (samples + recipe.global_batch) / recipe.warmup_samples)
    done = (samples - recipe.warmup_samples) / max(1, recipe.samples - recipe.warmup_samples)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
