"""PostgreSQL: the pool, what is done in one transaction, what errors mean. One statement per file in ../sql/."""

from consumer.database.outages import LOST, refusal
from consumer.database.pool import Database
from consumer.database.session import SESSION, Connection, statement
from consumer.database.transaction import Pending, Transaction, override, verbatim

__all__ = [
    "LOST",
    "SESSION",
    "Connection",
    "Database",
    "Pending",
    "Transaction",
    "override",
    "refusal",
    "statement",
    "verbatim",
]
