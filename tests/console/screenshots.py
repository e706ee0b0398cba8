"""Take the pictures of docs/console.md: `python -m tests.console.screenshots`.

The script starts a hub with the demo backbone, gives it a task of its own with two versions and a review, and writes
`docs/img/console-*.webp`.
"""

import io
import json
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from hub.client.client import Client
from hub.local.ports import free_port
from tests.console.conftest import CHROMIUM, WAIT_MS
from tests.support.hub_process import serve
from tests.support.image_sets import write_digits

FOLDER = Path(__file__).parents[2] / "docs" / "img"
SIZE = 1100, 760
# name -> path, and an element that shows that the page is complete
PAGES = {
    "tasks": ("/tasks", "main table"),
    "images": ("/tasks/digits/images", ".cell img"),
    "train": ("/tasks/digits/train", ".confusion"),
    "review": ("/tasks/digits/review", ".review img"),
    "versions": ("/tasks/digits/versions", ".alias"),
    "use": ("/tasks/digits/use", ".u-legend"),
    "tenant": ("/tenant", "main .meter"),
    "hub": ("/hub", ".u-legend"),
}


def main() -> None:
    """Start a hub and a browser, and write a picture of each page."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "home"
        served = serve(home, free_port())
        try:
            with Client(served.url, str(served.key)) as client:
                _prepare(client, Path(name))
            _take(served.url, {"tenant": str(served.key), "admin": str(served.admin_key)})
        finally:
            served.stop()


def _prepare(client: Client, folder: Path) -> None:
    images = write_digits(folder / "digits", 0, 12)
    client.create_task("digits")
    for label in sorted(images.iterdir()):
        client.images.add("digits", sorted(label.iterdir()), label=label.name)
    client.train("digits")
    unseen = sorted((write_digits(folder / "unseen", 60, 4)).rglob("*.png"))
    for image in unseen:
        client.classify("digits", image)
    client.images.add("digits", unseen)


def _take(url: str, keys: dict[str, str]) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": SIZE[0], "height": SIZE[1]})
        context.set_default_timeout(WAIT_MS)
        context.add_init_script(f"sessionStorage.setItem('karst-hub keys', {json.dumps(json.dumps(keys))})")
        page = context.new_page()
        for name, (path, ready) in PAGES.items():
            page.goto(f"{url}/#{path}")
            page.locator(ready).first.wait_for()
            page.wait_for_timeout(3000)  # thumbnails and charts
            Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(FOLDER / f"console-{name}.webp", quality=80)
        browser.close()


if __name__ == "__main__":
    main()
