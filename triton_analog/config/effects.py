"""What a valid config asks for in vain, or by mistake: said once for a model, and marked wherever a config is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from triton_analog.config.enums import (
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseType,
    WeightQuantizationType,
)
from triton_analog.hints import bits_for_steps, warn_user


class ConfigWarning(UserWarning):
    """A config has a setting that does nothing, or that looks like a mistake. The message names it and the remedy."""


class Remark(NamedTuple):
    """One setting of a config that is worth a word."""

    path: str
    value: Any
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: got {self.value}, {self.why}; {self.remedy}"


# ---- What there is to say ----------------------------------------------------------------------------------------------


def without_effect(config: Any) -> list[Remark]:
    """The settings of a valid ``config`` that differ from their defaults but cannot act as the others are.

    A setting that is off, such as ``decay = 0``, is not one of them: nothing of it is lost.
    """
    found = []
    changed = config.changes()

    def note(path: str, why: str, remedy: str) -> None:
        if path in changed:
            found.append(Remark(path, changed[path], f"which has no effect as {why}", remedy))

    io, clip, modifier, range_ = config.forward, config.clip, config.modifier, config.pre_post.input_range
    if not io.inp_res > 0:
        note(
            "forward.inp_sto_round",
            "forward.inp_res is off",
            "set forward.inp_res, such as 2**8 - 2, or leave this False",
        )
    if not io.out_noise > 0:
        note("forward.out_noise_per_channel", "forward.out_noise is 0", "set forward.out_noise, or leave this False")
    if io.w_noise_type is WeightNoiseType.NONE:
        note(
            "forward.w_noise",
            "forward.w_noise_type is NONE",
            "set forward.w_noise_type = WeightNoiseType.ADDITIVE_CONSTANT or PCM_READ, or forward.w_noise = 0",
        )
    if not io.w_noise > 0:
        note(
            "forward.w_noise_type",
            "forward.w_noise is 0",
            "set forward.w_noise, such as 0.0175, or forward.w_noise_type = WeightNoiseType.NONE",
        )
    if clip.sigma > 0 and clip.type in (WeightClipType.NONE, WeightClipType.LEARNABLE_PER_CHANNEL):
        note(
            "clip.sigma",
            f"clip.type is {clip.type.name}",
            "set clip.type = WeightClipType.LAYER_GAUSSIAN or LAYER_GAUSSIAN_PER_CHANNEL, or clip.sigma = -1",
        )
    kindless, quiet = modifier.noise_type is WeightNoiseInjectionType.NONE, not modifier.std_dev > 0
    if kindless:
        note(
            "modifier.std_dev",
            "modifier.noise_type is NONE",
            "set modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL or ADD_NORMAL_PER_CHANNEL, or "
            "modifier.std_dev = 0",
        )
    if quiet:
        note(
            "modifier.noise_type",
            "modifier.std_dev is 0",
            "set modifier.std_dev, such as 0.03, or modifier.noise_type = WeightNoiseInjectionType.NONE",
        )
    if kindless or quiet:
        note(
            "modifier.refresh",
            "there is no weight noise",
            "set modifier.noise_type and modifier.std_dev, or modifier.refresh = WeightNoiseRefresh.FORWARD",
        )
    if modifier.res > 0 and modifier.quantization_type is WeightQuantizationType.NONE:
        note(
            "modifier.res",
            "modifier.quantization_type is NONE",
            "set modifier.quantization_type = WeightQuantizationType.DISCRETIZE or DISCRETIZE_PER_CHANNEL, or "
            "modifier.res = 0",
        )
    for name, why, remedy in _idle_of_range(range_):
        note(f"pre_post.input_range.{name}", why, remedy)
    return found


def _idle_of_range(range_: Any) -> list[tuple[str, str, str]]:
    """Every field of the input range that cannot act, whatever it is set to: its name, why, and what to do."""
    here = "pre_post.input_range."
    start_up = ["init_std_alpha", "act_range_momentum", *(["init_from_data"] if range_.init_from_data > 0 else [])]
    pull = ["input_min_percentage", *(["decay"] if range_.decay > 0 else [])]
    stored = ["learn_input_range", "init_value", *start_up, *pull]
    if not range_.enable:
        why, remedy = (
            f"{here}enable is False",
            f"set {here}enable = True, unless calibrate_input_ranges will, or leave it out",
        )
        return [(name, why, remedy) for name in ("dynamic", "fast_mode", *stored)]
    if range_.dynamic:
        why, remedy = f"{here}dynamic takes the range from each row", f"set {here}dynamic = False, or leave it out"
        return [(name, why, remedy) for name in stored]
    idle: dict[str, tuple[str, str]] = {}
    if range_.fast_mode:
        for name in ("init_std_alpha", *pull):
            idle[name] = f"{here}fast_mode has no such thing", f"set {here}fast_mode = False, or leave it out"
    else:
        idle["act_range_momentum"] = f"{here}fast_mode is False", f"set {here}fast_mode = True, or leave it out"
    if not range_.learn_input_range:
        for name in pull:
            idle[name] = f"{here}learn_input_range is False", f"set {here}learn_input_range = True, or leave it out"
    elif not range_.decay > 0:
        idle["input_min_percentage"] = f"{here}decay is 0", f"set {here}decay, such as 0.001, or leave it out"
    if not range_.init_from_data > 0:
        why, remedy = f"{here}init_from_data is {range_.init_from_data}", f"set {here}init_from_data, or leave it out"
        idle |= dict.fromkeys(start_up, (why, remedy))
        if not range_.learn_input_range:
            idle["fast_mode"] = f"{why} and {here}learn_input_range is False", remedy
    return [(name, *told) for name, told in idle.items()]


def likely_mistakes(config: Any) -> list[Remark]:
    """Settings of a valid ``config`` that act, but hardly as they were meant: bits where steps are counted."""
    io, modifier = config.forward, config.modifier
    res = {"forward.inp_res": io.inp_res, "forward.out_res": io.out_res}
    if modifier.quantization_type is not WeightQuantizationType.NONE:
        res["modifier.res"] = modifier.res
    said = {path: bits_for_steps(value) for path, value in res.items()}
    return [Remark(path, res[path], "few steps", text) for path, text in said.items() if text is not None]


def remarks(config: Any) -> list[Remark]:
    """All that is worth a word."""
    return without_effect(config) + likely_mistakes(config)


# ---- Saying it once -----------------------------------------------------------------------------------------------------


class Told:
    """The remarks that have been made of a model: its layers share one, and copies of it go on with a copy."""

    def __init__(self) -> None:
        self.remarks: set[Remark] = set()


class _Held:
    """How a config holds what was told of the layers it was given to. A copy of the config is for another model."""

    def __init__(self, told: Told | None = None) -> None:
        self.told = Told() if told is None else told

    def __deepcopy__(self, memo: Any) -> _Held:
        return _Held()

    def __reduce__(self) -> Any:
        return _Held, ()


def told_of(config: Any) -> Told:
    """What has been told of the model that the layers of ``config`` belong to."""
    if getattr(config, "_told", None) is None:
        share_told(config, Told())
    return config._told.told


def share_told(config: Any, told: Told) -> None:
    """Let the layers of ``config`` belong to a model of which that was ``told``."""
    object.__setattr__(config, "_told", _Held(told))  # no field, so no change of the config


def mute(config: Any) -> None:
    """Say nothing of ``config`` as it is, which no user has set."""
    told_of(config).remarks.update(remarks(config))


def warn_of(configs: Iterable[Any], told: Told) -> None:
    """One warning of what is new to ``told`` in the ``configs`` of so many layers."""
    layers = Counter(remark for config in configs for remark in remarks(config))
    new = [remark for remark in layers if remark not in told.remarks]
    told.remarks.update(layers)
    if new:
        most = max(layers.values())
        lines = [f"{remark} ({layers[remark]} layers)" if most > 1 else str(remark) for remark in new]
        warn_user("rpu_config: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0]), ConfigWarning)
