"""A broker that gives each user only the rights it was given."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from consumer.broker import Connection
from consumer.demo.servers import free_port
from tests.servers import ApacheKafka, kafka_jars

PASSWORD = "hunter2"


@dataclass(frozen=True)
class Strict:
    """A broker with rights for users, and a listener that clients reach by way of `proxy_port` only."""

    kafka: ApacheKafka
    proxy_port: int

    def as_user(self) -> Connection:
        """As the user `service`."""
        security = {
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": "service",
            "sasl_plain_password": PASSWORD,
        }
        return Connection(f"127.0.0.1:{self.kafka.ports['USERS']}", security)

    async def acl(self, *arguments: str) -> None:
        """Change rights, with Kafka's own tool."""
        process = await asyncio.create_subprocess_exec(
            "java", "-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*",
            "org.apache.kafka.tools.AclCommand", "--bootstrap-server", self.kafka.bootstrap, "--force", *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(30):
            out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()


@contextmanager
def strict_broker(directory: Path) -> Iterator[Strict]:
    """Started, and ended afterwards."""
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    server, proxy_port = (
        ApacheKafka(
            directory,
            {
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS",
                "listener.name.users.sasl.enabled.mechanisms": "SCRAM-SHA-512",
                "listener.name.users.scram-sha-512.sasl.jaas.config": login,
            },
            secured={"PROXIED": "PLAINTEXT", "USERS": "SASL_PLAINTEXT"},
            users={"service": PASSWORD},
        ),
        free_port(),
    )
    server.properties["advertised.listeners"] = (
        f"PLAINTEXT://127.0.0.1:{server.port},PROXIED://127.0.0.1:{proxy_port},"
        f"USERS://127.0.0.1:{server.ports['USERS']}"
    )
    try:
        server.start()
        yield Strict(server, proxy_port)
    finally:
        server.stop()
