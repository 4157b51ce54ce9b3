"""Servers with TLS and logins: certificates made here, a broker with secured listeners, the machine's PostgreSQL."""

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from consumer.demo.servers import Postgres, machine_binaries, unprivileged_account
from tests.conftest import NO_FSYNC

LOGIN = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class Files:
    """Certificates in PEM files. `other_ca` signed nothing that is used here."""

    ca: Path
    other_ca: Path
    server: Path
    certificate: Path
    key: Path
    encrypted_key: Path
    server_key: Path
    foreign_certificate: Path
    foreign_key: Path


def certificates(folder: Path) -> Files:
    """A server that is `localhost` by name only, a client `service`, and a client of an authority nobody trusts."""
    authority, other = trustme.CA(), trustme.CA()
    server = authority.issue_cert("localhost")
    client = authority.issue_cert("service", common_name="service")
    foreign = other.issue_cert("service", common_name="service")

    def write(name: str, *blobs: bytes) -> Path:
        path = folder / name
        path.write_bytes(b"".join(blobs))
        return path

    def key(cert: trustme.LeafCert, encryption: KeySerializationEncryption | None = None) -> bytes:
        loaded = load_pem_private_key(cert.private_key_pem.bytes(), None)
        return loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())

    def chain(cert: trustme.LeafCert) -> bytes:
        return b"".join(blob.bytes() for blob in cert.cert_chain_pems)

    return Files(
        ca=write("ca.pem", authority.cert_pem.bytes()),
        other_ca=write("other-ca.pem", other.cert_pem.bytes()),
        server=write("server.pem", chain(server)),
        server_key=write("server-key.pem", key(server)),
        certificate=write("client.pem", chain(client)),
        key=write("client-key.pem", key(client)),
        encrypted_key=write("client-key-encrypted.pem", key(client, BestAvailableEncryption(b"pass phrase"))),
        foreign_certificate=write("foreign.pem", chain(foreign)),
        foreign_key=write("foreign-key.pem", key(foreign)),
    )


def with_store(files: Files) -> dict[str, str]:
    """Properties of a broker that shows the server's certificate and knows the authority."""
    store = files.server.with_name("server-store.pem")
    store.write_bytes(files.server_key.read_bytes() + files.server.read_bytes())
    return {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(store),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(files.ca),
    }


@contextmanager
def postgres_with_tls(directory: Path, files: Files) -> Iterator[Postgres]:
    """The machine's own PostgreSQL (the one of the wheel is built without TLS); by TCP only encrypted, with login."""
    server = Postgres(directory, machine_binaries(), tcp=True)
    folder = directory.with_name(f"{directory.name}-files")
    folder.mkdir(mode=0o755)
    rules = folder / "pg_hba.conf"
    rules.write_text(
        "local all all trust\n"
        "hostssl all certified 127.0.0.1/32 cert map=anybody\n"
        "hostssl all all 127.0.0.1/32 scram-sha-256\n"
    )
    (folder / "pg_ident.conf").write_text("anybody service certified\n")
    for name, source in (("server.pem", files.server), ("server-key.pem", files.server_key), ("ca.pem", files.ca)):
        (folder / name).write_bytes(source.read_bytes())
    (folder / "server-key.pem").chmod(0o600)
    if account := unprivileged_account():
        os.chown(folder / "server-key.pem", pwd.getpwnam(account).pw_uid, -1)
    server.options = {
        **NO_FSYNC,
        "hba_file": str(rules),
        "ident_file": str(folder / "pg_ident.conf"),
        "ssl": "on",
        "ssl_cert_file": str(folder / "server.pem"),
        "ssl_key_file": str(folder / "server-key.pem"),
        "ssl_ca_file": str(folder / "ca.pem"),
    }

    try:
        server.start()
        yield server
    finally:
        server.stop()
