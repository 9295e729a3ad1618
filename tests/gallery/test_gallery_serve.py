import signal
import socket
import subprocess
import sys
import threading
from http.client import HTTPConnection

import pytest

from polyspan.errors import WrongContent
from polyspan.gallery import serve_gallery
from polyspan.gallery.serve import make_server


@pytest.fixture(scope="module")
def server(site):
    made = make_server(site, "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def get(server, path, method="GET"):
    connection = HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_pages_are_served_with_their_types_and_forbid_everything_from_outside(server, site):
    for path, kind in [("/", "text/html"), ("/static/gallery.css", "text/css"), ("/static/icon.svg", "image/svg+xml")]:
        answer, body = get(server, path)
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert body == (site / (path[1:] or "index.html")).read_bytes()


@pytest.mark.parametrize(
    "path", ["/systems/", "/static/", "/nothing.html", "/../conftest.py", "/%2e%2e/%2e%2e/etc/passwd"]
)
def test_what_is_no_page_is_not_found(server, path):
    assert get(server, path)[0].status == 404


def test_nothing_can_be_sent_to_it(server):
    for method in ("POST", "PUT", "DELETE"):
        assert get(server, "/index.html", method)[0].status == 501


def test_by_default_only_this_machine_can_reach_it(site):
    server = make_server(site, "127.0.0.1", 0)
    try:
        assert server.server_address[0] == "127.0.0.1"
        assert server.address == f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.server_close()


def test_a_taken_port_and_a_wrong_one_are_told(site):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="must be free"):
            serve_gallery(site, port=taken.getsockname()[1])
    with pytest.raises(ValueError, match="port must lie"):
        serve_gallery(site, port=70000)


def test_a_folder_without_a_gallery_is_refused(tmp_path):
    with pytest.raises(WrongContent, match=r"no index\.html"):
        serve_gallery(tmp_path, port=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_politely(site, number):
    code = "import sys; from polyspan.gallery import serve_gallery; serve_gallery(sys.argv[1], port=0)"
    child = subprocess.Popen([sys.executable, "-c", code, str(site)], stderr=subprocess.PIPE, text=True)
    try:
        line = child.stderr.readline()
        assert line.startswith("gallery at http://127.0.0.1:"), line
        port = int(line.split(":")[2].split("/")[0])
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/verdicts.html")
        assert connection.getresponse().status == 200
        connection.close()
        child.send_signal(number)
        assert child.wait(timeout=20) == 0
        assert child.stderr.read() == ""
    finally:
        child.kill()
        child.wait()
        child.stderr.close()
