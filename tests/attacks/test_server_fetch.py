"""Picture URLs that attack the network of the server: nothing private is reached, and nothing is told about it."""

import asyncio
import gzip
import socket
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from patience import PATIENCE
from serving import png

from visualrwkv_hf.inference.server_fetch import (
    MAX_FETCHES,
    MAX_FETCHES_OF_A_CLIENT,
    Fetcher,
    Unfetchable,
    _decompressed,
    _Response,
    is_public,
)
from visualrwkv_hf.inference.server_limits import Access, Limits, Refusal
from visualrwkv_hf.inference.server_messages import Medium

httpx = pytest.importorskip("httpx", reason="needs the extra serve")

MEBI = 2**20
SENTENCE = "Picture 1: there is no picture that can be fetched at its URL."
SECRET = b"secret of an internal address"
LIMITS = Limits(fetch_seconds=2, picture_bytes=MEBI, body_bytes=4 * MEBI)
OPEN = Access(allow_private_urls=True)


class Handler(BaseHTTPRequestHandler):
    """Answers by the path; notes the Host header of every request."""

    def log_message(self, *_):
        """Stay quiet."""

    def do_GET(self):
        self.server.hosts.append(self.headers["host"])
        kind = self.path.strip("/").partition("?")[0]
        headers, body = {}, png("red")
        if kind == "secret":
            body = SECRET
        elif kind == "nothing":
            return self.send_error(404, SECRET.decode())
        elif kind == "loop":
            headers["location"] = "/loop"
        elif kind.startswith("to="):
            headers["location"] = kind.removeprefix("to=").replace("|", "/")
        elif kind == "slow":
            time.sleep(8)
        elif kind == "second":
            time.sleep(1)
        elif kind == "held":
            self.server.released.wait(PATIENCE)
        elif kind == "large":
            body = b"x" * 3 * MEBI
        elif kind == "full":
            body = bytes(MEBI)
        elif kind in ("gzip", "bomb"):
            headers["content-encoding"] = "gzip"
            body = gzip.compress(png("red") if kind == "gzip" else bytes(16 * MEBI), 1)
        elif kind == "deflate":
            headers["content-encoding"], body = "deflate", zlib.compress(png("red"))
        elif kind in ("br", "zstd"):
            headers["content-encoding"] = kind
        elif kind == "broken":
            headers["content-encoding"] = "gzip"
        self.send_response(302 if "location" in headers else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # of whoever has seen enough
            self.wfile.write(body)


@pytest.fixture(scope="module")
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close, server.hosts = True, False, []
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def address(web):
    web.hosts.clear()
    return f"http://127.0.0.1:{web.server_port}"


def fetched(*pictures, access=OPEN, limits=LIMITS):
    async def run():
        return await Fetcher(limits, access).fetch_all(media_of(pictures))

    return [medium.content for medium in asyncio.run(run())]


def media_of(contents):
    return [Medium(f"Picture {n}", content) for n, content in enumerate(contents, start=1)]


def sentence_of(url, access=OPEN):
    """What the client reads of a URL that cannot be fetched."""
    with pytest.raises(Refusal) as refused:
        fetched(url, access=access)
    assert refused.value.status == 400
    return str(refused.value)


@contextmanager
def names(monkeypatch, **known):
    """A resolver that knows some names, dots written as underscores, and notes what it is asked."""
    asked, real = [], socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        asked.append(host)
        found = known.get(str(host).replace(".", "_"))
        if found is None:
            return real(host, port, *args, **kwargs)
        found = found.pop(0) if isinstance(found, list) else found
        return [entry for ip in found.split() for entry in real(ip, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield asked
    monkeypatch.undo()


# --- which addresses are public ---------------------------------------------------------------------------

PRIVATE = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.8.8.8",
    "169.254.169.254",
    "172.16.0.1",
    "192.168.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "192.0.0.192",
    "192.88.99.1",
    "3fff::1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%lo",
    "fc00::1",
    "fd12::1",
    "ff02::1",
    "2001:db8::1",
    "100::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:0:127.0.0.1",
    "::127.0.0.1",
    "::10.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a00:1",
    "64:ff9b:1:a00:0:100:808:808",
    "fec0::1",
    "fec0::1234:8.8.8.8",
    "4000::1",
    "2002:7f00:1::",
    "2002:a00:1::",
    "2002:c0a8:101::1",
    "2001:0:7f00:1::",
    "localhost",
    "nonsense",
    "1",
    "127.1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_in_every_disguise(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "151.101.1.1", "2606:4700::1111", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(address)


# --- what is reached --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
    ],
)
def test_this_machine_is_not_reached_under_any_of_its_names(web, address, host):
    assert sentence_of(f"http://{host}:{web.server_port}/red.png", access=Access()) == SENTENCE
    assert not web.hosts


def test_a_name_that_leads_inside_is_not_followed(web, address, monkeypatch):
    for found in ("127.0.0.1", "10.0.0.1", "8.8.8.8 127.0.0.1", "::1"):
        with names(monkeypatch, inside_example=found):
            assert sentence_of(f"http://inside.example:{web.server_port}/", access=Access()) == SENTENCE
    assert not web.hosts


def test_the_address_that_was_checked_is_the_one_that_is_connected(web, address, monkeypatch):
    """A name that leads elsewhere when it is asked again is asked once."""
    with names(monkeypatch, rebound_example=["127.0.0.1", "203.0.113.9"]) as asked:
        url = f"http://rebound.example:{web.server_port}/red.png"
        assert fetched(url) == [png("red")]
    assert asked.count("rebound.example") == 1
    assert web.hosts == [f"rebound.example:{web.server_port}"]


def test_a_redirect_is_checked_anew(web, address, monkeypatch):
    """The first address counts as public here; what it leads to does not."""
    from visualrwkv_hf.inference import server_fetch

    monkeypatch.setattr(server_fetch, "is_public", lambda ip: ip == "127.0.0.1")
    assert fetched(f"{address}/to=|red.png", access=Access()) == [png("red")]
    web.hosts.clear()
    with socket.create_server(("127.0.0.2", 0)) as inside:
        inside.settimeout(0.5)
        target = f"http:||127.0.0.2:{inside.getsockname()[1]}|"
        assert sentence_of(f"{address}/to={target}", access=Access()) == SENTENCE
        with pytest.raises(TimeoutError):
            inside.accept()
    assert len(web.hosts) == 1


def test_media_domains_are_the_only_ones(web, address, monkeypatch):
    access = Access(allow_private_urls=True, media_domains=("good.example",))
    known = dict(good_example="127.0.0.1", bad_example="127.0.0.1")
    port = web.server_port
    with names(monkeypatch, **known):
        assert fetched(f"http://GOOD.example:{port}/red.png", access=access) == [png("red")]
        for host in ("bad.example", "good.example.bad.example", "127.0.0.1", "good.example@bad.example"):
            assert sentence_of(f"http://{host}:{port}/red.png", access=access) == SENTENCE
        web.hosts.clear()
        assert (
            sentence_of(f"http://good.example:{port}/to=http:||bad.example:{port}|", access=access)
            == SENTENCE
        )
    assert web.hosts == [f"good.example:{port}"]


# --- what is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "nothing",
        "loop",
        "slow",
        "large",
        "bomb",
        "br",
        "zstd",
        "broken",
        "to=file:||etc|passwd",
        "to=|nothing",
    ],
)
def test_all_failures_read_the_same(address, path):
    assert sentence_of(f"{address}/{path}") == SENTENCE


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/",
        "http://",
        "http://[::1/",
        "http://256.256.256.256/",
        "http://127.0.0.1:99999/",
        "http://a\x00b/",
        "http://" + "a" * 300 + ".example/",
        "http://xn--/",
        "http://user:password@127.0.0.1:1/",
    ],
)
def test_urls_that_lead_nowhere_read_the_same(url):
    assert sentence_of(url) == SENTENCE


def test_a_port_that_speaks_something_else_reads_the_same():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak():
            connection, _ = other.accept()
            connection.sendall(b"220 mail.internal ESMTP\r\n")
            connection.close()

        threading.Thread(target=speak, daemon=True).start()
        assert sentence_of(f"http://127.0.0.1:{other.getsockname()[1]}/") == SENTENCE


def test_proxies_and_passwords_of_the_environment_are_not_used(web, address, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert fetched(f"{address}/red.png") == [png("red")]


# --- how much ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["red.png", "gzip", "deflate"])
def test_a_picture_arrives(address, path):
    assert fetched(f"{address}/{path}", png("blue")) == [png("red"), png("blue")]


def test_a_compressed_body_is_counted_as_it_unfolds(address):
    """16 kB arrive that become 16 MB: at most the limit is unfolded at once, and nothing after it."""
    bomb, arrived = gzip.compress(bytes(16 * MEBI)), []

    class Answer:
        status_code, headers = 200, {"content-encoding": "gzip"}

        async def aiter_raw(self):
            for start in range(0, len(bomb), 8000):
                arrived.append(start)
                yield bomb[start : start + 8000]

    async def sizes():
        return [len(piece) async for piece in _decompressed(_Response(Answer(), None), MEBI)]

    unfolded = asyncio.run(sizes())
    assert sum(unfolded) == 16 * MEBI and max(unfolded) == MEBI
    arrived.clear()
    with pytest.raises(Unfetchable, match="too large"):
        asyncio.run(Fetcher(LIMITS, OPEN)._read(_Response(Answer(), None), 3 * MEBI, lambda count: None))
    assert len(arrived) == 1, "its 8000 bytes are 8 MB: the rest is not asked for"
    assert sentence_of(f"{address}/bomb") == SENTENCE


@pytest.mark.parametrize("path", ["nothing", "large", "bomb", "to=file:||etc|passwd"])
def test_films_are_fetched_as_pictures_are(address, path):
    for url in (f"{address}/{path}", "http://169.254.169.254/film.mp4"):
        with pytest.raises(Refusal) as refused:
            fetched_film(url)
        assert str(refused.value) == "Film 2: there is no film that can be fetched at its URL."


def test_films_have_a_largest_size_of_their_own(address):
    limits = Limits(picture_bytes=10, film_bytes=MEBI, body_bytes=4 * MEBI)
    assert fetched_film(f"{address}/red.png", limits) == png("red")
    with pytest.raises(Refusal, match=f"Film 2: it has more than {MEBI} bytes") as refused:
        fetched_film(bytes(MEBI + 1), limits)
    assert refused.value.status == 413


FILMS = Limits(fetch_seconds=2, film_bytes=MEBI)


def fetched_film(content, limits=FILMS):
    access = OPEN if "127.0.0.1" in str(content) else Access()
    (film,) = asyncio.run(Fetcher(limits, access).fetch_all([Medium("Film 2", content, is_film=True)]))
    return film.content


def test_pictures_of_a_request_together_have_a_limit():
    with pytest.raises(Refusal, match=f"Picture 2: it has more than {MEBI} bytes") as refused:
        fetched(b"a", bytes(MEBI + 1))
    assert refused.value.status == 413
    with pytest.raises(Refusal, match=f"{4 * MEBI} bytes together"):
        fetched(*[bytes(MEBI)] * 5)


def test_a_request_is_refused_as_soon_as_too_much_has_come(web, address):
    """Not when its last picture has come, which keeps the server waiting."""
    web.released.clear()
    urls = [f"{address}/held", *(f"{address}/full?{n}" for n in range(5))]
    with pytest.raises(Refusal, match=f"{4 * MEBI} bytes together") as refused:
        fetched(*urls, limits=Limits(fetch_seconds=PATIENCE, picture_bytes=MEBI, body_bytes=4 * MEBI))
    assert refused.value.status == 413 and not web.released.is_set()
    web.released.set()


def test_bytes_count_while_they_come(address):
    spent = []

    def spend(count):
        spent.append(count)
        if sum(spent) > MEBI // 2:
            raise Refusal("The server is busy.", 503)

    async def run(*urls):
        return await Fetcher(LIMITS, OPEN).fetch_all(media_of(urls), spend=spend)

    (picture,) = asyncio.run(run(f"{address}/gzip"))
    assert sum(spent) == len(picture.content)
    with pytest.raises(Refusal, match="is busy") as refused:
        asyncio.run(run(f"{address}/full"))
    assert refused.value.status == 503 and sum(spent) < MEBI + len(picture.content)


def test_the_time_of_a_picture_begins_when_it_is_its_turn(address):
    """Twenty pictures of a second each, four at a time, take longer together than one may."""
    urls = [f"{address}/second?{n}" for n in range(20)]
    assert fetched(*urls, limits=Limits(fetch_seconds=4)) == [png("red")] * 20


def test_a_name_that_is_never_resolved_keeps_its_place(monkeypatch):
    """Its thread cannot be ended: a client that gave all its fetches up would else fill all threads."""
    asked, answer, real = threading.Semaphore(0), threading.Event(), socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        if not str(host).endswith(".example"):
            return real(host, *args, **kwargs)
        asked.release()
        answer.wait(PATIENCE)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    async def run():
        fetcher = Fetcher(Limits(fetch_seconds=0.2), Access())
        urls = media_of(f"http://{n}.example/" for n in range(MAX_FETCHES_OF_A_CLIENT))
        with pytest.raises(Refusal, match="no picture that can be fetched"):
            await fetcher.fetch_all(urls, "one")
        held = MAX_FETCHES - fetcher.slots._value
        assert 1 <= held <= MAX_FETCHES_OF_A_CLIENT
        answer.set()
        while fetcher.slots._value < MAX_FETCHES:
            await asyncio.sleep(0.01)
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "resolver")
        return held

    assert asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_certificates_are_read_once(address, monkeypatch):
    read, real = [], httpx.create_ssl_context
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **given: (read.append(given), real(**given))[1])
    assert fetched(*[f"{address}/red.png"] * 6) == [png("red")] * 6
    assert read == [{"trust_env": False}]


def test_one_clients_slow_pictures_do_not_hold_the_others(web, address):
    """They are more than are fetched at the same time, and come when the other client's picture has come."""
    web.released.clear()

    async def run():
        fetcher = Fetcher(Limits(fetch_seconds=PATIENCE), OPEN)
        held = media_of(f"{address}/held?{n}" for n in range(20))
        slow = asyncio.ensure_future(fetcher.fetch_all(held, "one"))
        while len(web.hosts) < MAX_FETCHES_OF_A_CLIENT:
            await asyncio.sleep(0.01)
        (quick,) = await fetcher.fetch_all(media_of([f"{address}/red.png"]), "other")
        assert quick.content == png("red") and not slow.done()
        assert len(web.hosts) == MAX_FETCHES_OF_A_CLIENT + 1
        web.released.set()
        assert [medium.content for medium in await slow] == [png("red")] * 20
        del slow
        return len(fetcher.slots_of_clients)

    assert asyncio.run(run()) == 0  # nothing is kept of clients that are served
