"""Apache Kafka as child processes, from Maven; for tests and benchmarks. One KRaft node, or three for faults."""

import contextlib
import fcntl
import shutil
import socket
import subprocess
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from consumer.demo.servers import Server, ServerFailed, free_port, refuse_taken

KAFKA_VERSION: Final = "4.3.1"
REPOSITORY: Final = Path(__file__).parent.parent
CLUSTER_ID: Final = "MkU3OEVBNTcwNTJENDM2Qk"

LOG4J: Final = """rootLogger.level=WARN
rootLogger.appenderRef.out.ref=OUT
appender.out.type=Console
appender.out.name=OUT
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c{1}: %m%n
"""


def java_available() -> bool:
    """Whether this machine can run Apache Kafka: Java, and Maven to fetch it."""
    return shutil.which("java") is not None and shutil.which("mvn") is not None


def kafka_jars() -> Path:
    """The folder with Kafka's jars, fetched once per clone (54 MB). Raises ServerFailed when Maven cannot."""
    cache = REPOSITORY / ".cache"
    cache.mkdir(exist_ok=True)
    jars = cache / f"kafka-{KAFKA_VERSION}"
    with (cache / "kafka.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not jars.exists():
            for left in cache.glob("kafka-*.unfinished"):  # of a run that was killed
                shutil.rmtree(left)
            unfinished = cache / f"kafka-{KAFKA_VERSION}.unfinished"
            fetched = subprocess.run(
                ["mvn", "-q", "-B", "-f", REPOSITORY / "tests" / "kafka" / "pom.xml", "dependency:copy-dependencies",
                 "-DincludeScope=runtime", f"-DoutputDirectory={unfinished}"],
                capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if fetched.returncode != 0:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise ServerFailed(f"Maven could not fetch Kafka:\n{(fetched.stdout + fetched.stderr)[-2000:]}")
            unfinished.rename(jars)
    return jars


class ApacheKafka(Server):
    """One node that is broker and controller, on loopback.

    Beside the plain listener there can be `secured` ones, name -> protocol; what they need else goes into `properties`.
    `users`, name -> password, log in by SCRAM; they are written when the storage is formatted.
    """

    name = "kafka"

    def __init__(
        self,
        directory: Path,
        properties: Mapping[str, str] | None = None,
        *,
        secured: Mapping[str, str] | None = None,
        users: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory)
        self.port = free_port()
        self.controller_port = free_port()
        self.properties = dict(properties or {})
        self.secured = dict(secured or {})
        self.users = dict(users or {})
        self.ports = {listener: free_port() for listener in self.secured}

    @property
    def bootstrap(self) -> str:
        """For KAFKA_BOOTSTRAP_SERVERS."""
        return f"127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        """Of all its nodes."""
        return [self.pid]

    def start(self) -> None:
        """Format the storage if it is new, start, wait until it accepts connections. Raises ServerFailed."""
        jars = kafka_jars()
        for port in (self.port, *self.ports.values()):
            refuse_taken(port)
        self.directory.mkdir(parents=True, exist_ok=True)
        data = self.directory / "log"
        ports = {"PLAINTEXT": self.port, **self.ports, "CONTROLLER": self.controller_port}
        protocols = {"PLAINTEXT": "PLAINTEXT", **self.secured, "CONTROLLER": "PLAINTEXT"}
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self.controller_port}",
            "listeners": ",".join(f"{listener}://127.0.0.1:{port}" for listener, port in ports.items()),
            "advertised.listeners": ",".join(  # secured ones by name, so that certificates can be held against it
                f"{listener}://{'localhost' if listener in self.secured else '127.0.0.1'}:{port}"
                for listener, port in ports.items()
                if listener != "CONTROLLER"
            ),
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
            "log.dirs": str(data),
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            "auto.create.topics.enable": "false",
            **self.properties,
        }
        properties = self.directory / "server.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        log4j = self.directory / "log4j2.properties"
        log4j.write_text(LOG4J)
        java = ["java", "-Xms256m", "-Xmx512m", "-cp", f"{jars}/*", f"-Dlog4j2.configurationFile={log4j}"]
        if not (data / "meta.properties").exists():  # written last
            scram = [
                f"--add-scram={mechanism}=[name={user},password={password}]"
                for user, password in self.users.items()
                for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            ]
            self.prepare([*java, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties), *scram])
        self.spawn([*java, "kafka.Kafka", str(properties)])
        self.wait_until_ready()

    def is_ready(self) -> bool:
        """Whether it accepts connections."""
        with contextlib.closing(socket.socket()) as probe:
            probe.settimeout(0.2)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class ApacheCluster:
    """Three nodes that keep three replicas of everything, two of which must have a record before it is acknowledged.

    `doors`: for each node the loopback port that it tells clients of its second listener, where a proxy may stand; that
    listener itself is at `behind`. `controllers`: the nodes that vote; with one alone, that one must live, but the rest
    may die together.
    """

    def __init__(
        self,
        directory: Path,
        doors: Mapping[int, int],
        properties: Mapping[str, str] | None = None,
        controllers: Collection[int] = (1, 2, 3),
    ) -> None:
        self.nodes = {number: ApacheKafka(directory / f"kafka-{number}") for number in doors}
        voters = ",".join(f"{number}@127.0.0.1:{self.nodes[number].controller_port}" for number in controllers)
        for number, node in self.nodes.items():
            node.secured = {"PROXIED": "PLAINTEXT"}
            node.ports = {"PROXIED": free_port()}
            node.properties = {
                "node.id": str(number),
                "controller.quorum.voters": voters,
                "advertised.listeners": (f"PLAINTEXT://127.0.0.1:{node.port},PROXIED://127.0.0.1:{doors[number]}"),
                "inter.broker.listener.name": "PLAINTEXT",
                "min.insync.replicas": "2",
                "default.replication.factor": "3",
                "offsets.topic.replication.factor": "3",
                "transaction.state.log.replication.factor": "3",
                "transaction.state.log.min.isr": "2",
                **(properties or {}),
            }
            if number not in controllers:
                node.properties["process.roles"] = "broker"
                node.properties["listeners"] = (
                    f"PLAINTEXT://127.0.0.1:{node.port},PROXIED://127.0.0.1:{node.ports['PROXIED']}"
                )

    @property
    def bootstrap(self) -> str:
        """Past the proxies, for the tests themselves."""
        return ",".join(node.bootstrap for node in self.nodes.values())

    @property
    def pids(self) -> list[int]:
        """Of all its nodes."""
        return [node.pid for node in self.nodes.values()]

    @property
    def behind(self) -> dict[int, int]:
        """Node -> the port that a proxy for it connects to."""
        return {number: node.ports["PROXIED"] for number, node in self.nodes.items()}

    def start(self, numbers: Iterable[int] = ()) -> None:
        """Start these nodes, or all, at once: one alone would wait for a second vote. Raises ServerFailed."""
        kafka_jars()
        wanted = [self.nodes[number] for number in numbers] or list(self.nodes.values())
        with ThreadPoolExecutor(len(wanted)) as pool:
            for started in [pool.submit(node.start) for node in wanted]:
                started.result()

    def stop(self) -> None:
        """End all nodes, the hard way: nothing of theirs is needed afterwards."""
        for node in self.nodes.values():
            node.kill()
