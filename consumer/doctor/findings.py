"""What a check says: what is wrong, what follows, the command or SQL that mends it."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

from consumer.settings import PREFIX

AGAIN: Final = "campaign-stats doctor"
SETTING_EXAMPLES: Final = {  # first match by prefix; everything else is put back to its default
    "DATABASE_URL": "export DATABASE_URL='postgresql://user:password@host:5432/database'",
    "KAFKA_BOOTSTRAP_SERVERS": "export KAFKA_BOOTSTRAP_SERVERS='host:9092'",
    f"{PREFIX}KAFKA_SASL": (
        f"export {PREFIX}KAFKA_SECURITY_PROTOCOL=SASL_SSL {PREFIX}KAFKA_SASL_MECHANISM=SCRAM-SHA-512"
        f" {PREFIX}KAFKA_SASL_USERNAME='user' {PREFIX}KAFKA_SASL_PASSWORD='password'"
    ),
    f"{PREFIX}KAFKA_SSL": (
        f"export {PREFIX}KAFKA_SSL_CAFILE='ca.pem' {PREFIX}KAFKA_SSL_CERTFILE='client.pem'"
        f" {PREFIX}KAFKA_SSL_KEYFILE='client.key'"
    ),
    f"{PREFIX}GUARD_*": f"unset {PREFIX}GUARD_THRESHOLD_BP {PREFIX}GUARD_MIN_SENT {PREFIX}GUARD_WINDOW",
}


_NEEDS, _FITS = "deploy/README.md#what-it-needs", "deploy/adopting.md#1-does-it-fit"
_RIGHTS, _INSTALL = "deploy/README.md#the-rights-it-needs", "deploy/operations.md#install"
_UPGRADE, _DISASTERS = "deploy/operations.md#upgrade-and-the-way-back", "deploy/operations.md#disasters"
PAGES: Final = {
    "settings": "README.md#settings",
    "database": _DISASTERS,
    "postgresql version": _NEEDS,
    "writable": _DISASTERS,
    "product tables": _FITS,
    "schema version": _UPGRADE,
    "rights": _RIGHTS,
    "row security": _RIGHTS,
    "updated_at trigger": _FITS,
    "database clock": "deploy/operations.md#backup-and-restore",
    "service tables, indexes, functions, triggers": _RIGHTS,
    "service tables": _UPGRADE,
    "indexes": _UPGRADE,
    "functions": _UPGRADE,
    "contacted_at trigger": _UPGRADE,
    "campaign versions": "deploy/operations.md#backup-and-restore",
    "guard limits": "deploy/operations.md#turning-the-guard-on",
    "kafka": _DISASTERS,
    "kafka rights": _RIGHTS,
    "topics": _INSTALL,
    "partitions": "deploy/operations.md#sizing",
    "replicas": "deploy/operations.md#after-a-failover-that-lost-something",
    "cleanup policy": _NEEDS,
}
"""Check -> the page to read about what it finds."""


class Level(StrEnum):
    """How bad: `run` works as designed, works with a drawback, or does not."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be; `mend` is a command line or SQL that can be copied as it stands."""

    level: Level
    wrong: str
    follows: str
    mend: str


def an_error(wrong: str, follows: str, mend: str) -> Finding:
    return Finding(Level.ERROR, wrong, follows, mend)


def a_warning(wrong: str, follows: str, mend: str) -> Finding:
    return Finding(Level.WARNING, wrong, follows, mend)


@dataclass(frozen=True, slots=True)
class Report:
    """What every check found, in the order of the checks; nothing found is good."""

    checks: Sequence[tuple[str, Sequence[Finding]]]

    @property
    def ok(self) -> bool:
        """At most warnings."""
        return not any(finding.level is Level.ERROR for _, findings in self.checks for finding in findings)

    def document(self) -> dict[str, object]:
        """The shape of `doctor --json`: one element per finding, and one per check that found nothing."""
        lines: list[dict[str, object]] = []
        for check, findings in self.checks:
            lines += [{"check": check, **asdict(finding), "read": PAGES[check]} for finding in findings]
            if not findings:
                nothing = dict.fromkeys(("wrong", "follows", "mend", "read"))
                lines.append({"check": check, "level": Level.OK, **nothing})
        return {"ok": self.ok, "checks": lines}

    def show(self) -> None:
        """A list on stdout. Never folded, so that what mends can be copied from a narrow terminal too."""
        for check, findings in self.checks:
            for finding in findings:
                print(f"{finding.level:<8} {check}: {_printable(finding.wrong)}")
                print(f"         follows: {_printable(finding.follows)}")
                first, *rest = finding.mend.splitlines()
                print(f"         mend:    {_printable(first)}")
                for line in rest:
                    print(f"                  {_printable(line)}")
                print(f"         read:    {PAGES[check]}")
            if not findings:
                print(f"{Level.OK:<8} {check}")
        counts = {
            level: sum(finding.level is level for _, findings in self.checks for finding in findings)
            for level in (Level.ERROR, Level.WARNING)
        }
        print(f"{counts[Level.ERROR]} errors, {counts[Level.WARNING]} warnings.", end="")
        print(" SQL is for psql as the owner of the tables, the rest for a shell." if any(counts.values()) else "")


def _printable(text: str) -> str:
    """Names in a database may hold anything, but not play with the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def setting_finding(problem: str) -> Finding:
    name = re.split(r"[: ]", problem, maxsplit=1)[0]
    mend = next((example for prefix, example in SETTING_EXAMPLES.items() if name.startswith(prefix)), f"unset {name}")
    return an_error(problem, "`run` does not start: it ends with exit code 2", mend)


def not_checked(why: str) -> Finding:
    return an_error(f"not checked: {why}", "nothing is known about it", f"{AGAIN}  # once the rest is mended")


def misspelt(name: str) -> Finding:
    """A name in the environment that looks like a setting and is none."""
    return a_warning(f"{name} is no setting of this version", "it is ignored: is it misspelt?", f"unset {name}")
