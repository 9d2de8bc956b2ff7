"""Throw-away certificates and credentials, made anew at every start.

The certificate authority signs one certificate, for Google's hosts, and its private key is forgotten at once.
Only processes that are given its certificate through their environment trust it.
"""

import datetime
import json
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# A wildcard covers any one label, so regional hosts need no entries of their own.
HOSTS = ("*.googleapis.com", "googleapis.com", "*.google.com", "*.storage.googleapis.com")
LIFETIME = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Certificate:
    """A certificate for Google's hosts with its key, and the authority that signed it; all in PEM."""

    authority: bytes
    certificate: bytes
    key: bytes


def make_certificate() -> Certificate:
    """A new authority and a new certificate for `HOSTS`."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    authority = (
        _builder("local cloud, throw-away authority", authority_key, "local cloud, throw-away authority")
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        _builder("googleapis.com", key, "local cloud, throw-away authority")
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    return Certificate(
        authority=authority.public_bytes(serialization.Encoding.PEM),
        certificate=certificate.public_bytes(serialization.Encoding.PEM),
        key=_private_pem(key),
    )


def _builder(name: str, key: ec.EllipticCurvePrivateKey, issuer: str) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(**given: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: given.get(name, False) for name in names.split()})


def _private_pem(key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def server_context(certificate: Certificate, folder: Path) -> ssl.SSLContext:
    """The HTTPS server's TLS context.

    `folder` holds the key for a moment: ssl reads keys only from files.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    path = folder / "server.pem"
    write_private(path, certificate.key + certificate.certificate)
    context.load_cert_chain(path)
    path.unlink()
    return context


def service_account(project: str, address: str) -> dict:
    """A made-up service account's key file: clients sign with it, and only the local cloud accepts it."""
    return {
        "type": "service_account",
        "project_id": project,
        "private_key_id": "local-cloud",
        "private_key": _private_pem(rsa.generate_private_key(65537, 2048)).decode(),
        "client_email": address,
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }


def write_private(path: Path, content: bytes | dict) -> Path:
    """Writes a new file that only its owner can read; a dict is written as JSON."""
    if isinstance(content, dict):
        content = json.dumps(content).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
    return path
