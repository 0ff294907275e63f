"""Headless Chromium, spoken to through the pipe of its remote debugging, and a whole site for it to look at.

It resolves no name but localhost, and whatever a page or a link asks of another origin is written down and answered
here, so nothing gets out.
"""

from __future__ import annotations

import base64
import fcntl
import http.client
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from conftest import CHROME, missing
from frontend import Nginx

import tracker

SECRET = "a-secret-that-signs-whatever-a-test-wants-signed"
PATIENCE = 60  # seconds for one answer of Chromium on a machine that has much else to do
HOSTILE_NAME = "Initech <script>console.error(0)</script>"
RATE, BURST = 30, 60  # what nginx grants one address: plain links and pages, but not signed links
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    # Its own second thoughts would hide where a link led: http made https, and a page in place of a look-alike.
    # And it asks its maker what the fields of a form are for, on behalf of the page, autocomplete="off" or not.
    "--disable-features=HttpsUpgrades,HttpsFirstBalancedModeAutoEnable,LookalikeUrlNavigationThrottle,"
    "AutofillServerCommunication",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
    *("--remote-debugging-pipe", "--ignore-certificate-errors"),  # nothing is asked of anybody but the test's nginx
)
KEYS = {"Tab": (9, ""), "Enter": (13, "\r")}  # with their codes and what they type
COMPLAINTS = {  # by what Chromium tells them with
    "Runtime.consoleAPICalled": "console",
    "Runtime.exceptionThrown": "exception",
    "Log.entryAdded": "log",
    "Audits.issueAdded": "issue",
    "Page.javascriptDialogOpening": "dialog",
}


# == Chromium ==


class Chromium:
    """A running Chromium with a profile of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._tabs: dict[str, Tab] = {}
        self._answers: dict[int, dict[str, Any]] = {}
        self._numbers = itertools.count(1)
        self._unread = b""
        theirs, self._out = os.pipe()
        self._in, theirs_too = os.pipe()
        flags = (*FLAGS, f"--user-data-dir={folder}/profile", *flags)
        # Remote debugging reads descriptor 3 and writes to 4; only a program between can give pipes these numbers.
        given = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (theirs, theirs_too)]
        launch = ["bash", "-c", 'exec "${@:3}" 3<&"$1" 4>&"$2"', "bash", *map(str, given)]
        with (folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                [*launch, "chromium", *flags, "about:blank"],
                pass_fds=given,
                env={"PATH": os.environ["PATH"], "HOME": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        for each in (theirs, theirs_too, *given):
            os.close(each)

    def send(self, method: str, session: str = "", **params: Any) -> int:
        """Send a command without waiting; returns its number."""
        number = next(self._numbers)
        whose = {"sessionId": session} if session else {}
        unsent = json.dumps({"id": number, "method": method, "params": params, **whose}).encode() + b"\0"
        while unsent:
            unsent = unsent[os.write(self._out, unsent) :]
        return number

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result; what happens meanwhile goes to the tabs."""
        number = self.send(method, session, **params)
        while number not in self._answers:
            self.hear()
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def hear(self) -> None:
        """Wait for one message, and give it to whom it is for."""
        while b"\0" not in self._unread:
            waiting = select.poll()  # which, unlike select, knows descriptors beyond the first thousand
            waiting.register(self._in, select.POLLIN)
            assert waiting.poll(PATIENCE * 1000), "Chromium says nothing"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "Chromium is gone"
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(line)
        if "method" not in message:
            self._answers[message["id"]] = message
        elif (tab := self._tabs.get(message.get("sessionId", ""))) is not None:
            tab.hear(message["method"], message["params"])

    def tab(self, ours: str) -> Tab:
        """A new tab; what does not begin with `ours` is elsewhere."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        made = self._tabs[session] = Tab(self, session, ours)
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            made.call(f"{domain}.enable")
        made.call("Page.setLifecycleEventsEnabled", enabled=True)
        made.call("Fetch.enable", patterns=[{"urlPattern": "*"}])
        return made

    def close(self) -> None:
        """Let it end in order, so that its logs are whole."""
        try:
            self.send("Browser.close")
            self.process.wait(timeout=PATIENCE)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            os.close(self._in)
            os.close(self._out)


class Tab:
    """One tab, and what was asked for and complained about since it last went somewhere."""

    def __init__(self, chromium: Chromium, session: str, ours: str) -> None:
        self.chromium = chromium
        self.session = session
        self.ours = ours
        self.served: dict[str, tuple[bytes, str]] = {}  # pages of a test's own, with their CSP
        self._forget()

    def _forget(self) -> None:
        self.asked: list[str] = []  # of our origin
        self.elsewhere: list[str] = []  # of any other
        self.complaints: list[str] = []
        self.statuses: list[int] = []  # of our documents
        self.referrers: list[str] = []
        self._loaded: set[str] = set()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this tab."""
        return self.chromium.call(method, self.session, **params)

    def hear(self, method: str, params: dict[str, Any]) -> None:
        """Write down what happened."""
        if method == "Fetch.requestPaused":
            self._decide(params)
        elif method == "Page.lifecycleEvent":
            if params["name"] == "load":
                self._loaded.add(params["loaderId"])
        elif method == "Network.responseReceived":
            status, url = params["response"]["status"], params["response"]["url"]
            if params["type"] != "Document" and status >= 400:
                self.complaints.append(f"status {status}: {url}")
            elif params["type"] == "Document" and url.startswith(self.ours):
                self.statuses.append(status)
        elif method == "Network.requestWillBeSent" and "redirectResponse" in params:
            self.statuses.append(params["redirectResponse"]["status"])
        elif method == "Network.loadingFailed" and params["type"] != "Document":
            self.complaints.append(f"failed: {params['type']} {params['errorText']} {params.get('blockedReason', '')}")
        elif method in COMPLAINTS:
            self.complaints.append(f"{COMPLAINTS[method]}: {params}")
        if method == "Page.javascriptDialogOpening":
            self.chromium.send("Page.handleJavaScriptDialog", self.session, accept=False)

    def _decide(self, params: dict[str, Any]) -> None:
        request, paused = params["request"], params["requestId"]
        url = request["url"] + request.get("urlFragment", "")
        if url.startswith(self.ours) and url not in self.served:
            self.asked.append(url)
            self.chromium.send("Fetch.continueRequest", self.session, requestId=paused)
            return
        answer: dict[str, Any] = {"responseCode": 204}  # which leaves a tab where it is
        if url in self.served:
            body, policy = self.served[url]
            headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
            named = [{"name": name, "value": value} for name, value in headers.items()]
            answer = {"responseCode": 200, "responseHeaders": named, "body": base64.b64encode(body).decode()}
        else:
            self.elsewhere.append(url)
            self.referrers.append(request["headers"].get("Referer", ""))
        self.chromium.send("Fetch.fulfillRequest", self.session, requestId=paused, **answer)

    def go(self, url: str, *, whole: bool = True) -> None:
        """Follow a link as from another program; wait until the page is there, and whole, unless it leads elsewhere."""
        self._forget()
        went = self.call("Page.navigate", url=url)
        if "errorText" in went:
            assert went["errorText"] == "net::ERR_ABORTED" and self.elsewhere, f"{went['errorText']}: {url}"
            return
        while whole and went["loaderId"] not in self._loaded:
            self.chromium.hear()

    def run(self, expression: str) -> Any:
        """The value of an expression, or of its promise; the page's CSP does not bind it."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def text(self, selector: str) -> list[str]:
        """What one can read in each element of a kind."""
        found = self.run(f"Array.from(document.querySelectorAll({json.dumps(selector)}), e => e.innerText)")
        return [text.replace("\N{NO-BREAK SPACE}", " ") for text in found]

    def screen(self, width: int, scheme: str) -> None:
        """Look at pages on a screen of another width and colour scheme; a narrow one is a phone's."""
        shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **shape)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def follow(self, act: Callable[[], object]) -> None:
        """Do what leads to another page, and wait until that is whole."""
        self._forget()
        act()
        while not self._loaded:
            self.chromium.hear()

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        code, text = KEYS[key] if key in KEYS else (ord(key.upper()) if key.isalnum() else 0, key)
        common = {"key": key, "code": key if key in KEYS else "", "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, height: int | None = None) -> bytes:
        """A WebP of the page from its top, so high, or the whole of it."""
        width, whole = self.run("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
        how = {"format": "webp", "quality": 75, "captureBeyondViewport": True}
        return base64.b64decode(self.call("Page.captureScreenshot", clip=clip, **how)["data"])

    def read(self, urls: Sequence[str]) -> list[Reading]:
        """How Chromium reads URLs: alone, in a page of another site, and in a link's attribute there."""
        return [Reading(*each) for each in json.loads(self.run(f"({READ})({json.dumps(urls)})"))]


# Each text that is seen, with its contrast to what is painted behind it (WCAG 2.2, relative luminance).
CONTRASTS = """(() => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => numbers(colour).slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
    const behind = e => {
        const colour = getComputedStyle(e).backgroundColor;
        return (numbers(colour)[3] ?? 1) === 1 ? colour : behind(e.parentElement);
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const range = document.createRange();
        range.selectNodeContents(walker.currentNode);
        if (!range.getClientRects().length || !walker.currentNode.data.trim()) continue;
        const parent = walker.currentNode.parentElement, style = getComputedStyle(parent);
        const pair = [light(parent.closest("svg") ? style.fill : style.color), light(behind(parent))].sort((a, b) => b - a);
        found.push([walker.currentNode.data.trim(), (pair[0] + 0.05) / (pair[1] + 0.05)]);
    }
    return found;
})()"""

READ = """urls => {
    const whole = (url, base) => { try { return new URL(url, base) } catch { return null } };
    const link = document.createElement("a");
    document.head.append(Object.assign(document.createElement("base"), {href: "https://base.example/in/a/folder?q#f"}));
    const found = urls.map(url => {
        const alone = whole(url);
        link.href = url;
        return [
            alone?.protocol.slice(0, -1) ?? "", alone?.hostname ?? "", alone?.port ?? "", alone?.href ?? null,
            whole(url, document.baseURI)?.href ?? null, link.protocol === ":" ? null : link.href,
        ];
    });
    document.querySelector("base").remove();
    return JSON.stringify(found);
}"""


class Reading(NamedTuple):
    """What Chromium makes of one URL."""

    scheme: str
    host: str
    port: str
    url: str | None  # alone; None if it is none, or relative
    based: str | None  # in a page of another site
    link: str | None  # in the attribute of a link there

    @property
    def place(self) -> tuple[str, str, int]:
        """Scheme, host and port, as tracker.Target has them."""
        return self.scheme, self.host.rstrip("."), int(self.port or tracker.DEFAULT_PORTS.get(self.scheme, 0))


# == The stage ==


class Site:
    """nginx over TLS before a server: Acme's plain links lead to acme.com, Globex's to any host, and Initech has a mailing.

    If asked for, the shop of the demo is there as well.
    """

    def __init__(self, folder: Path, *, demo: bool = False) -> None:
        if shutil.which("chromium") is None:
            missing("chromium")
        self.nginx = Nginx(folder, SECRET_KEY=SECRET)
        self.url = self.nginx.url
        self._limited: deque[float] = deque(maxlen=BURST)
        self._folder = folder
        self._chromium: Chromium | None = None
        try:
            server = self.nginx.server
            # First of all, since the demo wants an empty database, and the server fills it.
            self.shop = server.demo().removeprefix(self.url) if demo else ""
            self.acme = server.tenant("Acme", "--domain", "acme.com")
            self.globex = server.tenant("Globex", "--any-domain")
            self.initech = server.tenant(HOSTILE_NAME, "--domain", "acme.com")
            server.start()
            self.nginx.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop all of it."""
        if self._chromium:
            self._chromium.close()
        self.nginx.stop()

    def tab(self) -> Tab:
        """A new tab of its Chromium, which is started for the first."""
        self._chromium = self._chromium or Chromium(self._folder)
        return self._chromium.tab(self.url + "/")

    def pace(self, requests: int = 1) -> None:
        """Wait until nginx grants so many more requests."""
        for _ in range(requests):
            if len(self._limited) == BURST:
                time.sleep(max(0.0, self._limited[0] + BURST / (RATE - 2) - time.monotonic()))
            self._limited.append(time.monotonic())

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Ask over TLS, from Python; returns status and body."""
        self.pace()
        context = self.nginx.context()
        with closing(http.client.HTTPSConnection("localhost", self.nginx.port, context=context, timeout=20)) as asking:
            asking.request(method, path, None if body is None else json.dumps(body), {"User-Agent": CHROME, **headers})
            response = asking.getresponse()
            return response.status, response.read()

    def plain(self, tenant: dict[str, Any], target: str, *, key: str = "e1", raw: bool = False) -> str:
        """A plain link, its target encoded, or as somebody wrote it who did not know better."""
        value = target if raw else quote(target, safe="", errors="surrogatepass")
        return f"{self.url}/{tenant['mail_id']}/click/{key}?url={value}"

    def signed(self, tenant: dict[str, Any], target: str) -> str:
        """A link that this server's secret signed, whatever its target is."""
        encoded = tracker.encode_target(target)
        return f"{self.url}/{tenant['mail_id']}/click/e1/{tracker.sign(SECRET, tenant['mail_id'], encoded)}/{encoded}"
