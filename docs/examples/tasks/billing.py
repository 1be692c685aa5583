"""Services: bound methods are tasks too. Parameters may be dataclasses, structs and enums."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from uuid import UUID

from jobd import App

app = App("billing")


class Currency(Enum):
    EUR = "EUR"
    USD = "USD"


@dataclass(frozen=True)
class Invoice:
    number: UUID
    due: date
    lines: list[tuple[str, Decimal]]
    currency: Currency = Currency.EUR


class Billing:
    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.charge = app.task(name="charge", queue="billing")(self._charge)

    async def _charge(self, invoice: Invoice) -> Decimal:
        return sum((price for _, price in invoice.lines), Decimal(0))


billing = Billing("https://gateway.example")


def main() -> None:
    invoice = Invoice(UUID(int=1), date(2026, 1, 2), [("paper", Decimal("1.10")), ("ink", Decimal("20"))], Currency.USD)
    print(billing.charge.enqueue(invoice).result(timeout=60) + Decimal(1))


if __name__ == "__main__":
    main()
