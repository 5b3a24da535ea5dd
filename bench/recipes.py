"""What is simulated in a bench, as values of config fields: the libraries compared here share the fields' names."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

Recipe = Mapping[str, Any]
"""Values by the path of the field; enums by name."""

RANGE = {
    "pre_post.input_range.enable": True,
    "pre_post.input_range.init_from_data": 0,  # at rest: what all but the first hundred steps of a training are
    "pre_post.input_range.init_value": 3.0,
}

LIGHTNING: Recipe = RANGE | {
    "forward.inp_res": 254,
    "modifier.noise_type": "ADD_NORMAL",
    "modifier.std_dev": 0.01,
    "clip.type": "LAYER_GAUSSIAN",
    "clip.sigma": 2.0,
}
"""AIHWKIT-Lightning's own speed test: input range with DAC, weight noise and clip; no ADC, no output noise."""

EVERYTHING: Recipe = RANGE | {
    "mapping.max_input_size": 512,
    "forward.inp_res": 254,
    "forward.out_res": 254,
    "forward.out_bound": 10.0,
    "forward.out_noise": 0.04,
    "forward.out_noise_per_channel": True,
    "modifier.noise_type": "ADD_NORMAL_PER_CHANNEL",
    "modifier.std_dev": 0.02,
    "clip.type": "LAYER_GAUSSIAN_PER_CHANNEL",
    "clip.sigma": 2.5,
}
"""All that the hardware does, in slices of 512 inputs."""

FLAGSHIP: Recipe = RANGE | {
    "pre_post.input_range.decay": 0.01,
    "forward.inp_res": 254,
    "forward.out_res": 254,
    "forward.out_bound": 14.0,
    "modifier.noise_type": "ADD_NORMAL_PER_CHANNEL",
    "modifier.std_dev": 0.03,
    "clip.type": "LAYER_GAUSSIAN_PER_CHANNEL",
    "clip.sigma": 2.5,
}
"""Analog Foundation Models (arXiv 2505.09663): no tiling, no output noise."""


def quiet(recipe: Recipe) -> Recipe:
    """The same without noise, so that there is one right result."""
    return {**recipe, "forward.out_noise": 0.0, "modifier.noise_type": "NONE"}


def is_noisy(recipe: Recipe) -> bool:
    return recipe.get("forward.out_noise", 0) > 0 or recipe.get("modifier.noise_type", "NONE") != "NONE"


def filled(config: Any, recipe: Recipe) -> Any:
    """``config``, of any library with these names, with the recipe's values."""
    for path, value in recipe.items():
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = getattr(section, part)
        current = getattr(section, name)
        setattr(section, name, type(current)[value] if isinstance(current, Enum) else value)
    return config
