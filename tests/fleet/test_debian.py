"""The servers that other tests use do what those tests expect of them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import debian
import pytest

pytestmark = pytest.mark.debian


def test_each_database_is_new_and_behind_a_password(
    postgresql: str, postgresql_server: debian.Database
) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(postgresql)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE seen (id integer)"))
    engine.dispose()
    other = sqlalchemy.create_engine(postgresql_server.new())
    assert sqlalchemy.inspect(other).get_table_names() == []
    other.dispose()
    wrong = sqlalchemy.create_engine(postgresql.replace(postgresql_server.password, "wrong"))
    with pytest.raises(sqlalchemy.exc.OperationalError, match="password"):
        wrong.connect()


def answered(port: int, tls: ssl.SSLContext | None = None) -> str:
    """What a broker says to a client that connects with MQTT 5."""
    import threading

    import paho.mqtt.client as paho

    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    if tls:
        client.tls_set_context(tls)
    said: list[str] = []
    done = threading.Event()

    def connected(*arguments: Any) -> None:
        said.append(str(arguments[3]))
        done.set()

    client.on_connect = connected
    client.connect("127.0.0.1", port)
    client.loop_start()
    done.wait(10)
    client.disconnect()
    client.loop_stop()
    return said[0]


def test_a_broker(mosquitto: int) -> None:
    assert answered(mosquitto) == "Success"


def test_a_broker_that_asks_for_a_certificate(
    certificates: debian.Certificates, tmp_path: Path
) -> None:
    tls = ssl.create_default_context(cafile=str(certificates.authority))
    with debian.mosquitto(tmp_path / "mosquitto", certificates) as port:
        tls.load_cert_chain(certificates.client, certificates.client_key)
        assert answered(port, tls) == "Success"
