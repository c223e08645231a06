"""Messages between workers and the driver, with a real actor that is killed."""

import time

import pytest
import ray

from pipelines.compute.mailbox import Mailbox

pytestmark = pytest.mark.usefixtures("ray_cluster")


@ray.remote(num_cpus=0)
def work(mailbox: Mailbox[str]) -> str:
    """Send a message, then work until told to stop; return the reason."""
    mailbox.send("started")
    while (reason := mailbox.stop_ordered()) is None:
        time.sleep(0.01)
    return reason


def receive(mailbox: Mailbox[str]) -> list[str]:
    """Return the next messages; the test's own time limit ends the wait."""
    while not (messages := mailbox.receive(0.1)):
        pass
    return messages


def kill_actor(mailbox: Mailbox[str]) -> None:
    """Kill the mailbox's process, as a lost node would; Ray starts it again."""
    ray.kill(mailbox._actor, no_restart=False)


def test_every_message_arrives_once() -> None:
    mailbox = Mailbox[str]()
    for number in range(3):
        mailbox.send(str(number))
    received: list[str] = []
    while len(received) < 3:
        received += mailbox.receive(0.1)
    assert sorted(received) == ["0", "1", "2"]
    assert mailbox.receive(0.01) == []
    mailbox.close()


@pytest.mark.timeout(240)
def test_an_order_to_stop_reaches_a_worker_even_after_the_mailbox_has_died() -> None:
    mailbox = Mailbox[str]()
    working = work.remote(mailbox)
    assert receive(mailbox) == ["started"]
    kill_actor(mailbox)
    while not ray.wait([working], timeout=0.1)[0]:
        mailbox.order_stop("the root is lost")
    assert ray.get(working) == "the root is lost"
    mailbox.close()
