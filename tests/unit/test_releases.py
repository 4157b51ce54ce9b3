"""Releases of the contracts: what they hold, in which order they come, and that none is rewritten or gone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from pydantic import Field

from schemas import events
from schemas.tools import compatibility, releases
from schemas.tools.releases import Contract, Unreleasable
from tests.unit.test_compatibility import CHANNEL, variant

RELEASED = {
    "0.1.0": "b05ac8fb7b8a96ee82dec54080d42f8a606c865485c54deae3012d8733038f2a",
}
"""Version -> sha256 of its SHA256SUMS: a release that is rewritten or goes is an edit of this line too."""

FIRST = "## 0.1.0 - 2026-11-28"


def test_no_release_was_rewritten_and_none_is_gone() -> None:
    assert releases.pins() == RELEASED


def test_a_release_written_anew_has_another_digest(repository: Path) -> None:
    """The control: the folder alone does not show it."""
    compatibility.release(repository, rejected())
    first = releases.pins(repository)
    rmtree(repository / "schemas" / "released" / "0.1.0")
    assert releases.pins(repository) == {}
    other = rejected(note=(str | None, None))
    assert compatibility.release(repository, other) == 0
    assert list(releases.broken(repository, other)) == []
    assert releases.pins(repository).keys() == first.keys()
    assert releases.pins(repository) != first


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A project whose first release is due."""
    _version(tmp_path, "0.1.0")
    _headings(tmp_path, FIRST)
    return tmp_path


def _version(repository: Path, version: str) -> None:
    (repository / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')


def _headings(repository: Path, *lines: str) -> None:
    (repository / "CHANGELOG.md").write_text("\n\n".join(["# Changelog", "## Unreleased", *lines]) + "\n")


def rejected(**fields: Any) -> Contract:
    """A small contract: sync_rejected alone."""
    channel = CHANNEL[events.SYNC_REJECTED]
    return releases.current([replace(channel, model=variant(channel.model, **fields))])


def test_a_release_holds_the_documents_and_their_topics(repository: Path) -> None:
    assert compatibility.release(repository, rejected()) == 0
    folder = repository / "schemas" / "released" / "0.1.0"
    others = {"topics.json", "dead-letters.json", "door.json", "release.json", "SHA256SUMS"}
    assert {path.name for path in folder.iterdir()} == {*rejected().schemas, *others}
    assert json.loads((folder / "topics.json").read_text()) == {
        "campaign.sync_rejected.v1": {
            "topic": "campaign.sync-rejected",
            "written_by": "the service",
            "key": events.LOWER_ID_PATTERN,
            "content_type": "application/cloudevents+json",
            "modes": ["structured"],
        }
    }
    kept = json.loads((folder / "release.json").read_text())
    assert kept == {"version": "0.1.0", "day": "2026-11-28", "deprecated": []}
    assert releases.released(repository) == [replace(rejected(), version="0.1.0")]
    assert compatibility.check(repository, rejected()) == 0


def test_a_release_is_not_overwritten(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compatibility.release(repository, rejected()) == 0
    assert compatibility.release(repository, rejected()) == 0  # the same again is no change
    assert compatibility.release(repository, rejected(note=(str | None, None))) == 1
    assert "raise the version in pyproject.toml" in capsys.readouterr().out
    assert releases.released(repository) == [replace(rejected(), version="0.1.0")]


def test_what_breaks_somebody_is_not_released(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compatibility.release(repository, rejected())
    _version(repository, "0.2.0")
    _headings(repository, "## 0.2.0 - 2026-11-28", FIRST)
    assert compatibility.release(repository, rejected(note=(str, Field()))) == 1
    assert "publish campaign.sync_rejected.v2 beside v1" in capsys.readouterr().out
    assert [one.version for one in releases.released(repository)] == ["0.1.0"]


def test_before_the_first_release_it_says_so(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _headings(repository)
    assert compatibility.check(repository, rejected()) == 0
    out = capsys.readouterr().out
    assert "No release yet" in out
    assert "ok      campaign.sync_rejected.v1 event ITSELF  rules, 200 values" in out


def test_a_line_for_every_event_form_and_direction(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compatibility.release(repository, rejected())
    _version(repository, "0.2.0")
    capsys.readouterr()
    assert compatibility.check(repository, rejected(note=(str, Field()))) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "ok      campaign.sync_rejected.v1 topic FORWARD since 0.1.0  names" in lines
    assert "ok      dead letters topic FORWARD since 0.1.0  names" in lines
    assert "ok      sync-stats door call FORWARD since 0.1.0  names" in lines
    assert "ok      sync-stats door answer PROMISE since 0.1.0  rules, 200 values" in lines
    for form in ("event", "data"):
        assert f"ok      campaign.sync_rejected.v1 {form} FORWARD since 0.1.0  rules, 200 values" in lines
        assert f"ok      campaign.sync_rejected.v1 {form} PROMISE since 0.1.0  rules, 200 values" in lines
        assert f"refused campaign.sync_rejected.v1 {form} BACKWARD since 0.1.0  rules, 200 values" in lines
    assert (
        "campaign.sync_rejected.v1 data BACKWARD since 0.1.0: $.note: the 0.1.0 writer may leave it out, "
        "the new reader requires it. Fix: make it optional in the model, or "
        'publish campaign.sync_rejected.v2 beside v1: schemas/README.md, "A new version".'
    ) in lines


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "topics.json").write_text("{}"), "0.1.0/topics.json was changed"),
        (lambda folder: (folder / "release.json").write_text("{}"), "0.1.0/release.json was changed"),
        (lambda folder: (folder / "topics.json").unlink(), "0.1.0/topics.json is gone"),
        (lambda folder: (folder / "more.json").write_text("{}"), "0.1.0/more.json was added"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "0.1.0/topics.json was added"),
    ],
    ids=["changed", "another day", "gone", "added", "no sums"],
)
def test_a_changed_release_is_found(
    repository: Path, break_it: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    compatibility.release(repository, rejected())
    assert list(releases.broken(repository, rejected())) == []
    break_it(repository / "schemas" / "released" / "0.1.0")
    assert compatibility.check(repository, rejected()) == 1
    assert said in capsys.readouterr().out


def test_a_version_without_a_folder_is_found_and_a_folder_without_a_version(repository: Path) -> None:
    [sentence] = releases.broken(repository, rejected())
    assert "CHANGELOG.md has a release 0.1.0, schemas/released has not" in sentence
    compatibility.release(repository, rejected())
    _headings(repository)
    [sentence] = releases.broken(repository, rejected())
    assert "schemas/released/0.1.0 is not in CHANGELOG.md" in sentence


def test_a_version_without_a_heading_is_not_released(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _headings(repository)
    assert compatibility.release(repository, rejected()) == 1
    assert "write the heading `## 0.1.0 - <day>`" in capsys.readouterr().out
    assert releases.released(repository) == []


def test_a_released_version_keeps_its_contract_to_the_byte(repository: Path) -> None:
    compatibility.release(repository, rejected())
    told_better = rejected(reason=(events.AnyRejection, Field(description="Told better.")))
    [sentence] = releases.broken(repository, told_better)
    assert sentence.startswith("The models differ from schemas/released/0.1.0 in campaign.sync_rejected.v1.data.reader")
    assert "Fix: raise the version in pyproject.toml." in sentence
    more = replace(rejected(), door={**rejected().door, "path": "/sync"})
    [sentence] = releases.broken(repository, more)
    assert sentence.startswith("The models differ from schemas/released/0.1.0 in door.json;")
    _version(repository, "0.1.1")
    assert list(releases.broken(repository, told_better)) == []


@pytest.mark.parametrize("version", ["0.0.9", "0.1.0rc1", "0"])
def test_a_version_that_was_passed_over_is_refused(repository: Path, version: str) -> None:
    compatibility.release(repository, rejected())
    _version(repository, version)
    [sentence] = releases.broken(repository, rejected())
    assert sentence.startswith(f"pyproject.toml has version {version}, which is neither released nor newer")
    assert compatibility.release(repository, rejected()) == 1


def test_a_newer_version_has_no_heading_before_it_is_released(repository: Path) -> None:
    compatibility.release(repository, rejected())
    _version(repository, "0.10.0")
    assert list(releases.broken(repository, rejected())) == []
    _headings(repository, "## 0.10.0 - 2026-11-28", FIRST)
    [sentence] = releases.broken(repository, rejected())
    assert "CHANGELOG.md has a release 0.10.0, schemas/released has not" in sentence
    assert compatibility.release(repository, rejected()) == 0
    assert list(releases.broken(repository, rejected())) == []


def test_a_release_that_was_tampered_with_stops_the_next(repository: Path) -> None:
    compatibility.release(repository, rejected())
    (repository / "schemas" / "released" / "0.1.0" / "topics.json").write_text("{}")
    _version(repository, "0.2.0")
    _headings(repository, "## 0.2.0 - 2026-11-28", FIRST)
    assert compatibility.release(repository, rejected()) == 1
    assert [one.version for one in releases.released(repository)] == ["0.1.0"]


@pytest.mark.parametrize("heading", ["## 0.1.0", "## 0.1.0 - 2026-13-45"])
def test_a_heading_without_a_day_is_found(repository: Path, heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    _headings(repository, heading)
    with pytest.raises(Unreleasable, match="no day; write `## 0"):
        releases.changelog(repository)
    assert compatibility.check(repository, rejected()) == 1
    assert compatibility.release(repository, rejected()) == 1
    assert capsys.readouterr().out.count("no day") == 2


def test_a_day_that_is_to_come_is_found(repository: Path) -> None:
    _headings(repository, "## 0.1.0 - 9999-12-31")
    assert compatibility.release(repository, rejected()) == 1
    assert [
        told for told in releases.broken(repository, rejected()) if "0.1.0 is of 9999-12-31, which is still" in told
    ]


def test_days_are_in_the_order_of_versions(repository: Path) -> None:
    compatibility.release(repository, rejected())
    _version(repository, "0.2.0")
    _headings(repository, "## 0.2.0 - 2026-11-27", FIRST)
    assert compatibility.release(repository, rejected()) == 1
    [sentence] = releases.broken(repository, rejected(), due="0.2.0")
    assert sentence.startswith("CHANGELOG.md: 0.2.0 is of 2026-11-27, before 0.1.0 of 2026-11-28. Fix: correct the day")


LATE = "### Deprecated\n- `campaign.sync_rejected.v1`"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["## 0.1.0 - 2026-11-20"], "says of 0.1.0: 2026-11-20, deprecated: nothing; the release says: 2026-11-28, "),
        ([FIRST, LATE], "says of 0.1.0: 2026-11-28, deprecated: campaign.sync_rejected.v1; the release says: "),
    ],
    ids=["day", "deprecated"],
)
def test_a_heading_that_is_rewritten_is_found_and_not_believed(repository: Path, lines: list[str], said: str) -> None:
    compatibility.release(repository, rejected())
    before = releases.history(repository)
    _headings(repository, *lines)
    assert releases.changelog(repository) != before
    assert releases.history(repository) == before
    [sentence] = releases.broken(repository, rejected())
    assert said in sentence
    assert sentence.endswith("Fix: correct CHANGELOG.md.")
    assert compatibility.check(repository, rejected()) == 1


def test_releases_are_in_the_order_of_their_numbers(repository: Path) -> None:
    versions = ("0.10.0", "0.2.0", "0.9.1")
    _headings(repository, *(f"## {version} - 2026-11-28" for version in versions))
    for version in versions:
        releases.release(rejected(), version, repository)
    assert [one.version for one in releases.released(repository)] == ["0.2.0", "0.9.1", "0.10.0"]
