"""A Kafka broker on a loopback port: librdkafka's own, which speaks the protocol for real and keeps messages in memory. Run as a process, it prints its address and stays until its input is closed."""
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def broker() -> Iterator[str]:
    "The address of a broker that lives as long as the block."
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try: yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(10)


if __name__ == "__main__":
    from confluent_kafka import Producer
    cluster = Producer({"test.mock.num.brokers": 1, "log_level": 0})
    print(",".join(f"{b.host}:{b.port}" for b in cluster.list_topics(timeout=10).brokers.values()), flush=True)
    sys.stdin.read()
