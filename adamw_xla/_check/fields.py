"""Checks of a config's fields, each by itself and beside the others."""

from typing import Any

from adamw_xla._check import formats, options

_FLAGS = (
    "amsgrad",
    "use_ema",
    "epsilon_hat",
    "skip_nonfinite",
    "nesterov",
    "maximize",
    "decay_times_lr",
    "cautious_decay",
)
_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


def check(c: Any) -> None:
    """Refuses a field that is of the wrong kind, out of its range or at odds with another."""
    options.coefficients(
        rates={"learning_rate": c.learning_rate, "weight_decay": c.weight_decay},
        betas={"beta_1": c.beta_1, "beta_2": c.beta_2},
        epsilons={"epsilon": c.epsilon},
    )
    if c.epsilon_root is not None:
        expected = "at least 0, or None for none"
        options.scalar("epsilon_root", c.epsilon_root, lambda x: x >= 0, expected)
    options.scalar("ema_momentum", c.ema_momentum, lambda x: 0 <= x <= 1, "in [0, 1]")
    for name in (*_CLIPS, "loss_scale_factor"):
        if getattr(c, name) is not None:
            options.scalar(name, getattr(c, name), lambda x: x > 0, "above 0, or None for none")
    for name in _FLAGS:
        options.flag(name, getattr(c, name))
    options.choice("state_format", c.state_format, ("moments", "word16"))
    options.choice("params_rounding", c.params_rounding, ("nearest", "stochastic"))
    options.choice("master", c.master, (None, "split"))
    formats.check_options(c)
    options.mask("weight_decay_mask", c.weight_decay_mask)
    options.count("ema_overwrite_frequency", c.ema_overwrite_frequency, 1)
    options.count("gradient_accumulation_steps", c.gradient_accumulation_steps, 2)
    if not isinstance(c.name, str):
        raise TypeError(f"AdamW: name must be a string, got {c.name!r}.")
    chosen = [name for name in _CLIPS if getattr(c, name) is not None]
    if len(chosen) > 1:
        raise ValueError(f"AdamW: at most one clip option may be given, got {', '.join(chosen)}.")
    if c.ema_overwrite_frequency is not None and not c.use_ema:
        raise ValueError(
            "AdamW: ema_overwrite_frequency needs use_ema=True; without it there is no "
            "average to overwrite the params with."
        )
