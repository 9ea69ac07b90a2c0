"""Credit functions of `TokenCreditGRPOTrainer`, one file each: which tokens of a completion earned its reward.

`credit_function` finds one by name: first in this table, then in the table of signals, whose rows may name an online
form (`Signal.online`). A credit function is a callable, or an object with `tokens`;
`tokalign.trainers.token_credit_grpo` says what it is given and what becomes of its numbers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tokalign.signals import registry

CREDITS = {
    "field": "tokalign.trainers.credits.field:FieldCredit",
    "entropy": "tokalign.trainers.credits.entropy:EntropyCredit",
    "graded_entropy": "tokalign.trainers.credits.entropy:GradedEntropyCredit",
    "contrast": "tokalign.trainers.credits.contrast:ContrastCredit",
    "implicit_reward": "tokalign.trainers.credits.implicit_reward:ImplicitRewardCredit",
    "teacher": "tokalign.trainers.credits.teacher:TeacherCredit",
    "rollout_estimate": "tokalign.trainers.credits.rollout_estimate:RolloutEstimateCredit",
    "turns": "tokalign.trainers.credits.turns:TurnsCredit",
}


def credit_function(name: str) -> Any:
    """The credit function of a name: a new object of a class, or the function itself.

    Raises:
        ValueError: nobody has such a name, or it is a signal without an online form.
    """
    place = CREDITS.get(name)
    if place is None:
        signal = registry.known(name)
        if signal is None:
            raise ValueError(
                f"There is no credit function {name!r} (there are {', '.join(CREDITS)}): use one of these, register a "
                "signal with an `online` form, or pass your function as `credit_funcs`."
            )
        if not signal.online:
            raise ValueError(
                f"The signal {name!r} has no online form: give its row `online`, the 'module:name' of a function that "
                "computes it during training, or pass that function as `credit_funcs`."
            )
        place = signal.online
    module, _, attribute = place.partition(":")
    found = getattr(import_module(module), attribute)
    return found() if isinstance(found, type) else found
