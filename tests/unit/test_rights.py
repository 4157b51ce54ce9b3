"""What deploy/README.md says of rights is what the code asks for."""

import re

from consumer import migrations
from consumer.broker import needed_rights
from schemas.topics import Topics
from tests.documents import rows_under
from tests.servers import REPOSITORY

README = REPOSITORY / "deploy" / "README.md"
DATABASE = rows_under("| table | right | columns |", README)


def test_the_table_of_rights_in_kafka_is_the_list() -> None:
    needed = needed_rights(Topics(), "campaign-stats", "CDC_TOPIC, if set")
    assert rows_under("| operation | resource | name | what for |", README) == [
        [right.operation, right.resource, right.name, right.why] for right in needed
    ]


def test_the_table_of_rights_in_the_database_is_the_lists() -> None:
    assert [[table.split(",")[0], right, columns] for table, right, columns in DATABASE] == [
        *(
            [table, right, ", ".join(columns)]
            for table, right, columns in (*migrations.RUN_RIGHTS, *migrations.API_RIGHTS)
        ),
        *([f"campaign_stats.{table}", ", ".join(rights), "all"] for table, rights in migrations.OWN_RIGHTS.items()),
    ]


def test_only_what_the_door_needs_is_said_to_be_for_the_door() -> None:
    tables = [table.split(",")[0] for table, *_ in DATABASE if "door" in table]
    assert tables == [table for table, *_ in migrations.API_RIGHTS]


def test_the_commands_have_no_other_operations_than_the_service() -> None:
    rights = [rights for _, rights in rows_under("| command | rights in Kafka |", README)]
    assert {word for text in rights for word in re.findall(r"\b[A-Z]\w+", text)} == {"Read", "Write"}
