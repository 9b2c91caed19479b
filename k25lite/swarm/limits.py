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
        steps: replies of policies. tokens: read and written. money: US dollars.
        critical_steps: steps that could not be taken at the same time as others (see `critical.py`).
        seconds: of wall clock. Those of an agent begin anew where a killed run is resumed, those of the run do not.

    Raises:
        ValueError: a limit that is not above 0.
    """

    steps: int | None = None
    critical_steps: int | None = None
    tokens: int | None = None
    money: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"a limit is above 0, got {field.name}={value}")


NO_LIMITS = Limits()


class Account:
    """What has been used, with those who use it on one's behalf.

    Args:
        limits: of this account. parent: the account that pays along.
        reserve: steps of the parent's that this account leaves to it.
    """

    __slots__ = ("limits", "money", "parent", "reserve", "steps", "tokens")

    def __init__(self, limits: Limits, parent: Account | None = None, reserve: int = 0):
        self.limits, self.parent, self.reserve = limits, parent, reserve
        self.steps = self.tokens = 0
        self.money = 0.0

    def begin_step(self) -> bool:
        """Count a step, and tell whether it is the last one: no other can follow.

        Raises:
            Exceeded: this account, or one that pays along, has nothing left; then none has counted it.
        """
        is_last = self.is_last_step()
        self.pay(0, 0.0, 1)
        return is_last

    def is_last_step(self) -> bool:
        """Whether the step to come is the last one, by the steps of this account and of those that pay along.

        Raises:
            Exceeded: there is none to come.
        """
        account, reserve, is_last = self, 0, False
        while True:
            limits = account.limits
            if limits.steps is not None:
                left = limits.steps - reserve - account.steps
                if left <= 0:
                    raise Exceeded("steps")
                is_last = is_last or left == 1
            if limits.tokens is not None and account.tokens >= limits.tokens:
                raise Exceeded("tokens")
            if limits.money is not None and account.money >= limits.money:
                raise Exceeded("money")
            if account.parent is None:
                return is_last
            account, reserve = account.parent, account.reserve

    def recall(self, tokens: int, money: float) -> None:
        """Count a step that was paid for before a kill; those who pay along know of it already."""
        self.steps, self.tokens, self.money = self.steps + 1, self.tokens + tokens, self.money + money

    def pay(self, tokens: int, money: float, steps: int = 0) -> None:
        """Count what was used. Steps are counted when they begin, and given back (-1) if no reply came."""
        account: Account | None = self
        while account is not None:
            account.steps += steps
            account.tokens += tokens
            account.money += money
            account = account.parent
