"""Models of pydantic as parameters and results."""

from __future__ import annotations

from pydantic import BaseModel, Field

from jobd import App

app = App("crm")


class Signup(BaseModel):
    email: str
    age: int = Field(ge=18)


class Customer(BaseModel):
    id: int
    signup: Signup


@app.task(queue="crm", max_attempts=3)
def create_customer(signup: Signup, tags: list[str] | None = None) -> Customer:
    return Customer(id=len(tags or []), signup=signup)


def main() -> None:
    customer = create_customer.enqueue(Signup(email="a@b.c", age=33), tags=["new"]).result(timeout=60)
    print(customer.signup.email.upper(), customer.id + 1)


if __name__ == "__main__":
    main()
