"""What a run may use: limits for each agent and for all of them together, and the accounts that keep them."""

from __future__ import annotations

from dataclasses import dataclass, fields


class Exceeded(Exception):
    """A limit is used up; its name is the argument."""


@dataclass(frozen=True)
class Limits:
    """Of one agent in one task, or of a whole run; None is no limit.

    Steps are counted before they are taken and never exceeded. Tokens and money are known after a reply: no step begins
    once they are used up, so at most the steps under way go beyond.

    Attributes:
        steps: replies of policies. tokens: read and written. money: US dollars. seconds: of wall clock.
        critical_steps: steps that could not be taken at the same time as others (see `critical.py`).
    """

    steps: int | None = None
    critical_steps: int | None = None
    tokens: int | None = None
    money: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ValueError(f"a limit is above 0, got {field.name}={value}")


NO_LIMITS = Limits()


class Account:
    """What has been used, with those who use it on one's behalf.

    Args:
        limits: of this account. parent: the account that pays along.
    """

    __slots__ = ("limits", "money", "parent", "steps", "tokens")

    def __init__(self, limits: Limits, parent: Account | None = None):
        self.limits, self.parent = limits, parent
        self.steps = self.tokens = 0
        self.money = 0.0

    def begin_step(self) -> None:
        """Count a step.

        Raises:
            Exceeded: this account, or one that pays along, has nothing left; then none has counted it.
        """
        account: Account | None = self
        while account is not None:
            limits = account.limits
            if limits.steps is not None and account.steps >= limits.steps:
                raise Exceeded("steps")
            if limits.tokens is not None and account.tokens >= limits.tokens:
                raise Exceeded("tokens")
            if limits.money is not None and account.money >= limits.money:
                raise Exceeded("money")
            account = account.parent
        account = self
        while account is not None:
            account.steps += 1
            account = account.parent

    def pay(self, tokens: int, money: float, steps: int = 0) -> None:
        """Count what was used; steps only where they were not counted when they began."""
        account: Account | None = self
        while account is not None:
            account.steps += steps
            account.tokens += tokens
            account.money += money
            account = account.parent

    @property
    def is_last_step(self) -> bool:
        """Whether the step that has begun is the last one of this account."""
        return self.limits.steps is not None and self.steps >= self.limits.steps
