"""Real nginx in front of a real server, with the file that `tracker.py nginx` prints, over TLS, on loopback."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from conftest import Server, missing

# Only what stands around the printed file on every machine: it is included as it is, never edited.
MAIN = """\
{user}
worker_processes 2;
worker_rlimit_nofile 20000;
pid {folder}/nginx.pid;
error_log {folder}/logs/error.log;
events {{ worker_connections {connections}; }}
http {{
    client_body_temp_path {folder}/temp/body;
    proxy_temp_path {folder}/temp/proxy;
    fastcgi_temp_path {folder}/temp/fastcgi;
    uwsgi_temp_path {folder}/temp/uwsgi;
    scgi_temp_path {folder}/temp/scgi;
    include {folder}/email-tracker.conf;
}}
"""


# The site whose path leads to the tracker.
SITE = """\
server {{
    listen {port} ssl;
    listen {http_port};
    server_name localhost;
    ssl_certificate {keys}/fullchain.pem;
    ssl_certificate_key {keys}/privkey.pem;
    access_log off;
    location / {{ return 200 "the site"; }}
{locations}
}}
"""


def free_port(besides: int = 0) -> int:
    """A port that nobody listens on at this moment, and that no client is given meanwhile: those begin at 32,768."""
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    ports = range(20_000 + process % 8, 32_000, 8)  # each process of the tests takes its own
    while True:
        # On all addresses, as nginx will: clients that have gone keep ports of other loopback addresses for a minute.
        with contextlib.suppress(OSError), socket.create_server(("", random.choice(ports))) as listener:
            if (port := int(listener.getsockname()[1])) != besides:
                return port


def make_certificate(folder: Path, hosts: Sequence[str]) -> None:
    """Certificates as certbot lays them out, one for each host, signed by an authority of their own: folder/ca.pem."""
    if shutil.which("openssl") is None:
        missing("openssl")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    # Python 3.13 holds an authority to RFC 5280: it says what its key is for, and names the key in what it signs.
    authority = ("-subj", "/CN=test authority", "-addext", "keyUsage=critical,keyCertSign")
    openssl("req", "-x509", *ec, "-days", "2", *authority, "-keyout", "ca.key", "-out", "ca.pem")
    for host in hosts:
        (folder / host).mkdir()
        request = f"{host}/request.pem"
        openssl("req", *ec, "-subj", f"/CN={host}", "-keyout", f"{host}/privkey.pem", "-out", request)
        extensions = f"subjectAltName=DNS:{host},IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n"
        (folder / host / "extensions").write_text(extensions)
        sign = ("x509", "-req", "-in", request, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
        openssl(*sign, "-extfile", f"{host}/extensions", "-out", f"{host}/fullchain.pem")


class BareNginx:
    """nginx with a file of its own in the folder: email-tracker.conf, which somebody writes before it starts."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("nginx") is None:
            missing("nginx")
        self.folder = folder / "nginx"
        for name in ("logs", "temp", "certificates"):
            (self.folder / name).mkdir(parents=True)
        self.port = free_port()
        self.http_port = free_port(besides=self.port)
        self.connections = 8192
        self.process: subprocess.Popen[bytes] | None = None

    def lay(self, text: str) -> None:
        """Write the file, and what stands around it."""
        (self.folder / "email-tracker.conf").write_text(text)
        user = "user root;" if os.geteuid() == 0 else ""  # its workers must get into the test's folder
        main = MAIN.format(folder=self.folder, user=user, connections=self.connections)
        (self.folder / "nginx.conf").write_text(main)

    def _command(self, *words: str) -> list[str]:
        return ["nginx", "-e", str(self.folder / "logs" / "error.log"), "-c", str(self.folder / "nginx.conf"), *words]

    def launch(self) -> None:
        """Start nginx and wait until it listens: for plain HTTP, as it does even where there is no certificate yet."""
        self.process = subprocess.Popen(self._command("-g", "daemon off;"), stderr=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.http_port), timeout=5):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"nginx did not start:\n{(self.folder / 'logs' / 'error.log').read_text()}")
            time.sleep(0.02)

    def reload(self) -> None:
        """Load the file anew, gracefully."""
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Stop nginx."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            assert self.process.stderr is not None
            self.process.stderr.close()
        self.process = None


class Nginx(BareNginx):
    """nginx before a Server that listens on a unix socket; `server.start()` first, then `start()`."""

    def __init__(self, folder: Path, tracking_hosts: Sequence[str] = (), *options: str, **settings: str) -> None:
        super().__init__(folder)
        self.host = "localhost"
        self.path = settings.pop("path", "")  # below which the tracker is, in the server of another site
        self.url = f"https://{self.host}:{self.port}{self.path}"
        self.socket = folder / "app.sock"
        make_certificate(self.folder / "certificates", [self.host, *tracking_hosts])
        self.server = Server(folder, BIND=f"unix:{self.socket}", BASE_URL=self.url, **settings)
        self._options = options  # of the command that prints the file
        self._context: ssl.SSLContext | None = None

    def write(self) -> str:
        """Print the file anew, as one does after a change of tracking hosts; returns it."""
        certificates, logs = self.folder / "certificates", ("--log-folder", str(self.folder / "logs"))
        places = (
            "--certificates",
            str(certificates),
            "--webroot",
            str(self.folder),
            "--http-port",
            str(self.http_port),
        )
        text = self.server.run("nginx", *places, *logs, *self._options)
        if self.path:
            site = {"port": self.port, "http_port": self.http_port, "keys": certificates / self.host}
            text += SITE.format(locations=self.server.run("nginx", "--location", *logs, *self._options), **site)
        self.lay(text)
        return text

    def start(self) -> Nginx:
        """Start nginx with the file."""
        self.write()
        self.launch()
        return self

    def stop(self) -> None:
        """Stop nginx, then the server."""
        super().stop()
        self.server.stop()
        self.server.listener.close()

    def context(self) -> ssl.SSLContext:
        """TLS that trusts this nginx's authority and no other."""
        if self._context is None:
            self._context = ssl.create_default_context(cafile=str(self.folder / "certificates" / "ca.pem"))
        return self._context

    def connect(self, host: str | None = None, timeout: float = 20, source: str = "127.0.0.1") -> ssl.SSLSocket:
        """A TLS connection; `host` is the name asked for, a tracking host perhaps, `source` the address it comes from."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=timeout, source_address=(source, 0))
        return self.context().wrap_socket(plain, server_hostname=host or self.host)
