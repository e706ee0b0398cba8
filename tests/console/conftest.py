"""A whole hub, and Debian's chromium at its console. Without chromium the tests are skipped, by name."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from hub.client.client import Client
from hub.local.ports import free_port
from tests.support.hub_process import serve

CHROMIUM = shutil.which("chromium")
DESK, PHONE = (1280, 900), (360, 740)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
WAIT_MS = 30_000  # for one step of a page, on a busy machine


@dataclass
class Console:
    """A hub, and browsers at its console."""

    url: str
    key: str
    admin_key: str
    home: Path
    browser: Browser
    faults: list[str] = field(default_factory=list)
    forgiven: list[str] = field(default_factory=list)

    def page(
        self, path: str = "", *, size: tuple[int, int] = DESK, signed_in: bool = True, admin: bool = False
    ) -> Page:
        """Open a page of the console in a browser context of its own. Its errors fail the test."""
        context = self.browser.new_context(viewport={"width": size[0], "height": size[1]})
        context.set_default_timeout(WAIT_MS)
        if signed_in:
            stored = json.dumps(json.dumps({"tenant": self.key} | ({"admin": self.admin_key} if admin else {})))
            context.add_init_script(f"sessionStorage.setItem('karst-hub keys', {stored})")
        page = context.new_page()
        page.on("request", lambda request: self._note_request(request.url))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._note_message)
        page.goto(f"{self.url}/#{path}")
        return page

    def forgive(self, *texts: str) -> None:
        """Expect faults with one of these texts, which the test causes."""
        self.forgiven += texts

    def _note_request(self, url: str) -> None:
        if not url.startswith((f"{self.url}/", f"blob:{self.url}/", "data:")):
            self.faults.append(f"a request to another host: {url}")

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.faults.append(f"{message.text} {message.location['url']}")

    def client(self) -> Client:
        return Client(self.url, self.key)


def accessibility_findings(page: Page, *names: str) -> list[str]:
    """Return what axe finds serious in a page as it is: light and dark, on a desk's and on a phone's screen.

    A page that is wider than its screen is a finding, too. `names` say in the findings which page it is.
    """
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = []
    for size in (DESK, PHONE):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            found.append(f"{names} {size}: {wide} pixels wider than the screen")
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            found += [
                f"{names} {size} {scheme}: {violation['id']} in {violation['nodes'][0]['html']}"
                for violation in axe.run(page).response["violations"]
                if violation["impact"] in ("serious", "critical")
            ]
    page.set_viewport_size({"width": DESK[0], "height": DESK[1]})
    return found


@pytest.fixture(scope="package")
def whole_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str, Path]]:
    """Start a hub; yield its URL, the keys of an owner and of an admin, and its home."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    home = tmp_path_factory.mktemp("console")
    served = serve(home, free_port())
    yield served.url, str(served.key), str(served.admin_key), home
    served.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a browser. It ends with the module: its event loop would disturb tests that run one of their own."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *FAKE_CAMERA])
        yield browser
        browser.close()


@pytest.fixture
def console(whole_hub: tuple[str, str, str, Path], browser: Browser) -> Iterator[Console]:
    """The console of a hub. A script error, or a violation of the page's policy, fails the test."""
    console = Console(*whole_hub, browser)
    yield console
    for context in browser.contexts:
        context.close()
    assert [fault for fault in console.faults if not any(text in fault for text in console.forgiven)] == []


@pytest.fixture
def new_task(console: Console) -> Callable[..., str]:
    """Return a function that makes a task of the given folders of images, and returns its name."""

    def make(name: str, folder: Path | None = None) -> str:
        with console.client() as client:
            client.create_task(name)
            for label in sorted(folder.iterdir()) if folder else ():
                client.images.add(name, sorted(label.iterdir()), label=label.name)
        return name

    return make
