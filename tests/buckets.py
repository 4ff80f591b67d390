"""Amazon's services for tests: moto's, over HTTP on a loopback port."""
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}


@contextmanager
def amazon() -> Iterator[tuple[str, Any]]:
    "Its address, and the server, for who stops it early."
    moto = pytest.importorskip("moto.server", reason="pip install 'mlray[dev]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try: yield "http://{}:{}".format(*server.get_host_and_port()), server
    finally: server.stop()


@contextmanager
def bucket(name: str) -> Iterator[tuple[Any, Any]]:
    "A client of a bucket that the environment leads to, and the server."
    with amazon() as (url, server), pytest.MonkeyPatch.context() as environment:
        import boto3
        for variable, value in {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_DEFAULT_REGION": "us-east-1", **KEYS}.items(): environment.setenv(variable, value)
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket=name)
        yield client, server
