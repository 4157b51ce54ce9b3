"""A Kafka Streams application as its users would write it, in Java, and how Maven builds it."""

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

from consumer.demo.servers import ServerFailed
from tests.servers import KAFKA_VERSION, REPOSITORY

HERE: Final = Path(__file__).parent
POM: Final = HERE / "pom.xml"
FLAGS: Final = ("-Xms512m", "-Xmx512m", "-XX:+UseParallelGC")  # by CPU per hint before Serial (+7 %) and G1 (+12 %)
MAIN: Final = "campaignstats.bench.CountHints"


def command() -> list[str]:
    """How to start it. Raises ServerFailed when Maven cannot build it."""
    return ["java", *FLAGS, "-cp", classpath(), MAIN]


def classpath() -> str:
    """For `java -cp`: the compiled class and the jars it needs (96 MB), built when a source or the pom has changed.

    Raises ServerFailed when Maven cannot.
    """
    cache = REPOSITORY / ".cache"
    cache.mkdir(exist_ok=True)
    built = cache / f"streams-{KAFKA_VERSION}-{_fingerprint()}"
    with (cache / "streams.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            for left in cache.glob("streams-*.unfinished"):  # of a run that was killed
                shutil.rmtree(left)
            unfinished = built.with_name(f"{built.name}.unfinished")
            made = subprocess.run(
                ["mvn", "-q", "-B", "-f", POM, f"-Doutput={unfinished}", "compile", "dependency:copy-dependencies",
                 "-DincludeScope=runtime", f"-DoutputDirectory={unfinished / 'jars'}"],
                capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if made.returncode != 0:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise ServerFailed(
                    "Maven could not build the Kafka Streams peer (it needs a Java compiler too):\n"
                    f"{(made.stdout + made.stderr)[-2000:]}"
                )
            unfinished.rename(built)  # older builds stay: somebody may run one
    return f"{built}/classes:{built}/jars/*"


def _fingerprint() -> str:
    """Changes with every byte that Maven builds from."""
    digest = hashlib.sha256()
    for source in [POM, *sorted(path for path in (HERE / "src").rglob("*") if path.is_file())]:
        content = source.read_bytes()
        digest.update(f"{source.relative_to(HERE)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
