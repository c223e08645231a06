"""Downloads: each accident becomes one status, in bounded time and memory, and no private address is met."""

import threading
import time
from typing import Any

import pytest

from pipelines.pairs.config import Download
from pipelines.pairs.web.addresses import is_public
from pipelines.pairs.web.download import GIVE_UP_AFTER_FAILURES, Client
from pipelines.pairs.web.opt_out import opts_out
from tests.pipelines.pairs.web import HOST, Web, picture

MAX_BYTES = 1_000_000


def fetch(urls: list[str], opt_out: tuple[str, ...] = (), **options: Any) -> list[bytes | str]:
    """Bodies, or the statuses of what was rejected."""
    answers: dict[int, bytes | str] = {}
    done = threading.Event()
    with Client(Download(**options), max_bytes=MAX_BYTES, opt_out=opt_out) as client:

        def deliver(position: int, answer: bytes | str) -> None:
            assert position not in answers
            answers[position] = answer
            if isinstance(answer, bytes):
                client.give_back(len(answer))
            if len(answers) == len(urls):
                done.set()

        client.fetch(urls, deliver)
        assert done.wait(30)
    return [answers[position] for position in range(len(urls))]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("missing.jpg", "http_404"),
        ("403", "http_403"),
        ("204", "http_204"),
        ("loop/0", "too_many_redirects"),
        ("endless", "too_large"),
        ("reset", "connection_error"),
        ("short", "incomplete_body"),
        ("trickle", "timeout"),
        ("silent", "timeout"),
        ("429", "http_429"),
        ("noai", "opt_out"),
        ("large", "too_large"),
        ("garbage", "connection_error"),
    ],
)
def test_accidents_become_statuses(server: Web, path: str, status: str) -> None:
    limits = {"retries": 0, "timeout_s": 1.5, "read_timeout_s": 0.5}
    began = time.monotonic()
    assert fetch([server.url(path)], ("noai",), connect_to=server.connect_to, **limits) == [status]
    assert time.monotonic() - began < 5


def test_bodies_and_redirects_arrive(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    urls = [server.url("a.jpg"), server.url("moved/../a.jpg"), server.url("a.jpg").upper().replace("A.JPG", "a.jpg")]
    assert fetch(urls, connect_to=server.connect_to) == [picture(1)] * 3


def test_a_server_that_recovers_is_asked_again(server: Web) -> None:
    assert fetch([server.url("flaky")], connect_to=server.connect_to, retries=1) == [picture(3)]


def test_a_server_that_does_not_recover_is_asked_as_often_as_said(server: Web) -> None:
    assert fetch([server.url("503")], connect_to=server.connect_to, retries=2) == ["http_503"]
    assert server.requests["503"] == 3
    assert fetch([server.url("404")], connect_to=server.connect_to, retries=2) == ["http_404"]
    assert server.requests["404"] == 1


def test_slow_hosts_cost_no_more_than_their_time_limits(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    slow = [server.url(f"slow/{i}", "slow.example") for i in range(60)]
    began = time.monotonic()
    got = fetch(
        [*slow, server.url("a.jpg")], connect_to=server.connect_to, timeout_s=0.5, retries=1, connections_per_host=8
    )
    assert got == ["timeout"] * 60 + [picture(1)]
    # Without giving up it would be 60 x 2 attempts x 0.5 s / 8 connections = 7.5 s.
    assert time.monotonic() - began < 5
    assert sum(server.requests.values()) <= 3 * GIVE_UP_AFTER_FAILURES + 1


def test_a_server_that_asks_for_patience_gets_it(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    began = time.monotonic()
    assert fetch([server.url("busy")], connect_to=server.connect_to, retries=1) == [picture(3)]
    assert time.monotonic() - began > 1
    # It asks for an hour: nobody waits for that, and nobody asks again.
    assert fetch([server.url("tomorrow")] * 2, connect_to=server.connect_to, connections_per_host=1) == ["http_429"] * 2
    assert server.requests["tomorrow"] == 1


def test_no_host_is_asked_more_than_allowed_at_once(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    server.delay_s = 0.05
    assert fetch([server.url("a.jpg")] * 40, connect_to=server.connect_to, connections_per_host=4) == [picture(1)] * 40
    assert server.most_at_once == 4


def test_latency_is_hidden_by_connections(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    server.delay_s = 0.2
    began = time.monotonic()
    fetch([server.url("a.jpg")] * 300, connect_to=server.connect_to, connections_per_host=100, connections=100)
    # One after the other it would be a minute.
    assert time.monotonic() - began < 6


def test_bodies_in_memory_are_bounded(server: Web) -> None:
    server.files["a.jpg"] = bytes(100_000)
    held, most, answered = 0, 0, 0
    lock = threading.Lock()
    with Client(Download(connect_to=server.connect_to), max_bytes=MAX_BYTES, room_bytes=500_000) as client:

        def deliver(position: int, answer: bytes | str) -> None:
            nonlocal held, most
            with lock:
                held += len(answer)
                most = max(most, held)

        client.fetch([server.url("a.jpg")] * 200, deliver)
        while answered < 200:
            time.sleep(0.005)
            with lock:
                done, held = held // 100_000, 0
            answered += done
            client.give_back(done * 100_000)
    # Those that were on their way when the room was full still arrive.
    assert most <= 500_000 + 32 * 100_000


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("noai", True),
        ("noindex, NoAI", True),
        ("nofollow", False),
        ("otherbot: noai", False),
        ("ldm-pipelines: noai", True),
        ("otherbot: nofollow, noai", False),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", True),
        ("", False),
    ],
)
def test_opt_out_headers_are_read_as_robots_read_them(header: str, found: bool) -> None:
    assert opts_out([header], {"noai", "noimageai"}, "ldm-pipelines/0.1") is found


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/a.jpg",
        "http://localhost:{port}/a.jpg",
        "http://2130706433:{port}/a.jpg",
        "http://127.1:{port}/a.jpg",
        "http://[::1]:{port}/a.jpg",
        "http://[::ffff:127.0.0.1]:{port}/a.jpg",
        "http://169.254.169.254/latest/meta-data/",
        "http://0.0.0.0:{port}/a.jpg",
    ],
)
def test_private_addresses_are_refused_however_they_are_written(server: Web, url: str) -> None:
    server.files["a.jpg"] = picture(1)
    # The guard is asked before anything is sent, so that it does not matter whether somebody listens there.
    assert fetch([url.format(port=server.port)], retries=0) == ["refused_address"]
    assert not server.requests


def test_a_redirect_to_a_private_address_is_refused(server: Web) -> None:
    assert fetch([server.url("inside")], connect_to=server.connect_to, retries=0) == ["refused_address"]
    assert server.requests["a.jpg"] == 0


def test_private_addresses_are_fetched_where_the_recipe_allows_it(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    url = f"http://127.0.0.1:{server.port}/a.jpg"
    assert fetch([url], allow_addresses=("127.0.0.0/8",)) == [picture(1)]
    assert fetch([url], allow_addresses=("10.0.0.0/8",)) == ["refused_address"]
    assert fetch([f"http://127.0.0.1:{server.port}/a.jpg"], allow_private_addresses=True) == [picture(1)]


@pytest.mark.parametrize(
    "url", ["http://a\x00b/", "http://pictures.example/\x00b", "http://[fe80::1%ü]/", "http://a@][@/x.jpg"]
)
def test_what_no_client_can_ask_for_still_gets_a_status(server: Web, url: str) -> None:
    server.files["a.jpg"] = picture(1)
    found = fetch([url, server.url("a.jpg")], connect_to=server.connect_to, retries=0)
    assert found[0] in ("bad_url", "http_404", "connection_error", "refused_address")
    assert found[1] == picture(1)


def test_a_redirect_to_bytes_that_are_no_text_is_followed_or_refused(server: Web) -> None:
    assert fetch([server.url("bytes")], connect_to=server.connect_to, retries=0)[0] in ("http_404", "bad_url")


def test_a_redirect_counts_however_its_page_ends(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    assert fetch([server.url("cutoff")], connect_to=server.connect_to, retries=0) == [picture(1)]


def test_large_bodies_take_turns_and_arrive(server: Web) -> None:
    server.files["large.jpg"] = bytes(1_200_000)
    server.files["a.jpg"] = picture(1)
    urls = [server.url("large.jpg"), server.url("a.jpg")] * 6
    answers: dict[int, int] = {}
    done = threading.Event()
    with Client(Download(connect_to=server.connect_to), max_bytes=5_000_000, room_bytes=2_000_000) as client:

        def deliver(position: int, answer: bytes | str) -> None:
            answers[position] = len(answer)
            client.give_back(len(answer))
            if len(answers) == len(urls):
                done.set()

        client.fetch(urls, deliver)
        assert done.wait(30)
    assert [answers[n] for n in range(0, 12, 2)] == [1_200_000] * 6


@pytest.mark.parametrize(
    "url", ["", "nonsense", "ftp://pictures.example/a", "file:///etc/passwd", "http://", "http://[::1"]
)
def test_what_is_no_http_url_is_a_bad_url(url: str) -> None:
    assert fetch([url]) == ["bad_url"]


def test_addresses_inside_addresses_are_seen() -> None:
    private = ["10.0.0.1", "100.64.0.1", "fc00::1", "fe80::1%eth0", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"]
    private += ["168.63.129.16", "192.0.0.192", "fec0::1", "::127.0.0.1", "64:ff9b:1::7f00:1"]
    assert [address for address in [*private, "224.0.0.1", "::"] if is_public(address)] == []
    assert is_public("93.184.216.34")
    assert is_public("64:ff9b::5db8:d822")


def test_connect_to_must_name_hosts_and_addresses_with_ports() -> None:
    with pytest.raises(ValueError, match="must be ADDRESS:PORT, got 'localhost'"):
        Download(connect_to={HOST: "localhost"})
    with pytest.raises(ValueError, match=r"takes names of hosts, got '10\.0\.0\.1'"):
        Download(connect_to={"10.0.0.1": "127.0.0.1:80"})
