"""Downloads: each accident becomes one status, in bounded time and memory, and no private address is met."""

import asyncio
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pycurl
import pytest

from pipelines.stages.pairs.config import Download
from pipelines.stages.pairs.web import curl
from pipelines.stages.pairs.web.addresses import is_public
from pipelines.stages.pairs.web.download import GIVE_UP_AFTER_FAILURES, Client
from pipelines.stages.pairs.web.opt_out import opts_out
from tests.pipelines.stages.pairs.own_network import thread_in_own_network
from tests.pipelines.stages.pairs.web_server import HOST, Web, picture

MAX_BYTES = 1_000_000


def fetch(urls: list[str], opt_out: tuple[str, ...] = (), **options: Any) -> list[bytes | str]:
    """Return bodies, or the statuses of what was rejected."""
    return [answer for _, answer in sorted(fetch_in_order(urls, opt_out, **options))]


def fetch_in_order(urls: list[str], opt_out: tuple[str, ...] = (), **options: Any) -> list[tuple[int, bytes | str]]:
    """Return the same with their positions, in the order in which they came."""
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
    return list(answers.items())


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
    # Short limits only for what must run into them: a machine may stop for longer.
    limits = {"timeout_s": 1.5, "read_timeout_s": 0.5} if status == "timeout" else {}
    assert fetch([server.url(path)], ("noai",), connect_to=server.connect_to, retries=0, **limits) == [status]


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


def test_a_slow_host_is_given_up_and_keeps_nobody_else_waiting(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    slow = [server.url(f"slow/{i}", "slow.example") for i in range(60)]
    limits = {"timeout_s": 1.0, "retries": 1, "connections_per_host": 8}
    got = fetch_in_order([*slow, server.url("a.jpg")], connect_to=server.connect_to, **limits)
    assert got[0] == (60, picture(1))
    assert sorted(got[1:]) == [(position, "timeout") for position in range(60)]
    # Without giving up it would be 60 x 2 requests.
    assert sum(server.requests.values()) <= 3 * GIVE_UP_AFTER_FAILURES + 1


def test_a_server_that_asks_for_patience_gets_it(server: Web) -> None:
    assert fetch([server.url("busy")], connect_to=server.connect_to, retries=1) == [picture(3)]
    assert server.requests["busy"] == 2
    # It asks for an hour: nobody waits for that, and nobody asks again.
    assert fetch([server.url("tomorrow")] * 2, connect_to=server.connect_to, connections_per_host=1) == ["http_429"] * 2
    assert server.requests["tomorrow"] == 1


def test_no_host_is_asked_more_than_allowed_at_once(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    server.delay_s = 0.05
    assert fetch([server.url("a.jpg")] * 40, connect_to=server.connect_to, connections_per_host=4) == [picture(1)] * 40
    assert server.most_at_once == 4


def test_as_many_requests_as_allowed_are_under_way_at_once(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    server.together = asyncio.Barrier(100)
    limits = {"connections": 100, "connections_per_host": 100, "retries": 0}
    assert fetch([server.url("a.jpg")] * 300, connect_to=server.connect_to, **limits) == [picture(1)] * 300
    assert server.most_at_once == 100


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


@pytest.fixture(scope="module")
def own_network() -> Iterator[ThreadPoolExecutor]:
    try:
        executor = thread_in_own_network()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not allow a network of one's own: {error}")
    with executor:
        yield executor


@pytest.fixture
def everywhere(own_network: ThreadPoolExecutor) -> Iterator[Web]:
    """A server that answers at every address of the test's own network."""
    server = own_network.submit(Web, everywhere=True).result()
    server.files["a.jpg"] = picture(1)
    yield server
    server.close()


PRIVATE_HOSTS = [
    "127.0.0.1",
    "localhost",
    # Other ways to write 127.0.0.1.
    "2130706433",
    "127.1",
    "[::ffff:127.0.0.1]",
    "[::1]",
    "0.0.0.0",
    "[::]",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    # Services of clouds: credentials, metadata.
    "169.254.169.254",
    "168.63.129.16",
    "[fd00:ec2::254]",
    # 10.0.0.1 inside IPv6, by NAT64 and 6to4.
    "[64:ff9b::a00:1]",
    "[2002:a00:1::]",
]


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_addresses_are_refused_however_they_are_written(
    everywhere: Web, own_network: ThreadPoolExecutor, host: str
) -> None:
    def attempt(**options: Any) -> list[bytes | str]:
        return own_network.submit(fetch, [f"http://{host}:{everywhere.port}/a.jpg"], retries=0, **options).result()

    assert attempt() == ["refused_address"]
    assert not everywhere.requests
    assert attempt(allow_private_addresses=True) == [picture(1)], "nothing to refuse: nobody answers there"


@pytest.mark.parametrize("host", ["93.184.216.34", "[2606:2800:220:1::1]", "[64:ff9b::5db8:d822]"])
def test_public_addresses_are_fetched(everywhere: Web, own_network: ThreadPoolExecutor, host: str) -> None:
    assert own_network.submit(fetch, [f"http://{host}:{everywhere.port}/a.jpg"]).result() == [picture(1)]


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_no_socket_is_opened_for_a_private_address(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []

    def open_socket(*arguments: Any) -> int:
        opened.append(arguments)
        return pycurl.SOCKET_BAD

    monkeypatch.setattr(curl, "socket", SimpleNamespace(socket=open_socket))
    assert fetch([f"http://{host}/a.jpg"], retries=0) == ["refused_address"]
    assert not opened
    assert fetch([f"http://{host}/a.jpg"], retries=0, allow_private_addresses=True) == ["connection_error"]
    assert opened


def test_a_redirect_to_a_private_address_is_refused(server: Web) -> None:
    server.files["a.jpg"] = picture(1)
    assert fetch([server.url("inside")], connect_to=server.connect_to, retries=0) == ["refused_address"]
    assert server.requests["a.jpg"] == 0


def test_a_redirect_to_a_clouds_metadata_is_refused(everywhere: Web, own_network: ThreadPoolExecutor) -> None:
    def attempt(**options: Any) -> list[bytes | str]:
        options |= {"connect_to": everywhere.connect_to, "retries": 0}
        return own_network.submit(fetch, [everywhere.url("metadata")], **options).result()

    assert attempt() == ["refused_address"]
    assert everywhere.requests["a.jpg"] == 0
    assert attempt(allow_private_addresses=True) == [picture(1)], "nothing to refuse: nobody answers there"


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
