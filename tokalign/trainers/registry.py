"""The table of trainers: a row makes a trainer a public name and a verb of `tokalign`.

A new trainer is one file, with its `…Config` and `…Trainer`, and one row here. Its verb reads the arguments that all
trainings share (`tokalign.cli.train`) and its configuration. One that wants more names a file of its own (`main`).
"""

from __future__ import annotations

from typing import NamedTuple


class TrainerRow(NamedTuple):
    """One trainer.

    Attributes:
        verb: `tokalign <verb>`.
        name: of its classes, before "Config" and "Trainer".
        module: the file in tokalign/trainers/ that holds them.
        text: what it trains, for the list of verbs.
        data: what `dataset_name` is, for the error where it is not given.
        main: a module whose `main` is the verb; empty for the shared one.
    """

    verb: str
    name: str
    module: str
    text: str
    data: str
    main: str = ""

    @property
    def classes(self) -> tuple[str, str]:
        """Names of the configuration and of the trainer."""
        return f"{self.name}Config", f"{self.name}Trainer"


PAIRS = "a folder of pairs or a preference dataset on the hub"
TRAINERS = (
    TrainerRow(
        verb="critical-dpo",
        name="CriticalTokenDPO",
        module="critical_token_dpo",
        text="critical-token DPO (arXiv 2411.19943)",
        data="a folder of scored pairs (`tokalign score contrast`) or a dataset on the hub",
        main="tokalign.cli.train_critical_dpo",
    ),
    TrainerRow(
        verb="treg",
        name="TReg",
        module="treg",
        text="T-REG on DPO or SimPO (arXiv 2412.02685)",
        data=PAIRS,
        main="tokalign.cli.train_treg",
    ),
    TrainerRow(
        verb="token-credit-grpo",
        name="TokenCreditGRPO",
        module="token_credit_grpo",
        text="GRPO with an advantage per token",
        data="a folder of problems (`tokalign data`) or a dataset on the hub",
        main="tokalign.cli.train_token_credit_grpo",
    ),
    TrainerRow(
        verb="structured-grpo",
        name="StructuredGRPO",
        module="structured_grpo",
        text="GRPO, structured-output reward (2512.00319)",
        data="a folder of structured problems or a dataset on the hub",
        main="tokalign.cli.train_structured_grpo",
    ),
)
