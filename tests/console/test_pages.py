"""Pages of the console beside a task's tabs: sign-in, tasks, tenant, hub; and a hub that goes away and comes back."""

import asyncio
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.errors import NotFound
from hub.local.embedded_redis import url_of_running
from hub.local.ports import free_port
from hub.registry.audit import OPERATOR
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.schemas import TaskSettings
from tests.console.conftest import PHONE, WAIT_MS, Console, accessibility_findings
from tests.support.hub_app import REDIS_PATIENCE
from tests.support.hub_process import KARST_HUB, serve
from tests.support.image_sets import write_digits
from tests.support.nginx import CERTIFICATE, KEY, nginx

pytestmark = pytest.mark.slow
# A notice is gone after some seconds, and a hub answers before it is ready.
NOTE_NOTICES = """() => {
  const notices = document.querySelector(".notices");
  window.noticed = [];
  const look = () => window.noticed.push(notices.innerText);
  new MutationObserver(look).observe(notices, { childList: true, subtree: true });
}"""
LINES_OF_TEXT = """(element) => {
  const range = document.createRange();
  range.selectNodeContents(element);
  return range.getClientRects().length;
}"""
Page = Any  # of playwright, which a machine without it cannot name


def own_tenant(console: Console, name: str) -> str:
    """Create a tenant; return the key of its owner."""
    with Client(console.url, console.admin_key) as admin:
        admin.create_tenant(name)
        return admin.create_key(name, "owner", role="owner").key


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()


async def make_tasks(home: Path, tenant: str, count: int) -> None:
    """Make tasks without versions directly in the registry: keys of a tenant may make only 600 changes a minute."""
    database = RegistryConnection(url_of_running(home), patience=REDIS_PATIENCE)
    tasks = TaskRegistry(database)
    for i in range(count):
        await tasks.put(OPERATOR, tenant, f"task-{i:05}", TaskSettings())
    await database.close()


def main_link(page: Page, name: str) -> Page:
    return page.get_by_role("navigation", name="Pages").get_by_role("link", name=name, exact=True)


def test_login_link_signs_in_once_and_leaves_no_code_in_the_address(console: Console) -> None:
    environment = os.environ | {"HUB_HOME": str(console.home), "HUB_PORT": console.url.rpartition(":")[2]}
    command = [str(KARST_HUB), "login-link", "--admin"]
    link = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    code = link.rpartition("/")[2]
    page = console.page(f"/login/{code}", signed_in=False)
    main_link(page, "Hub").wait_for()
    assert code not in page.url

    again = console.page(f"/login/{code}", signed_in=False)
    again.get_by_text("This login link was used or has expired.").wait_for()
    console.forgive("status of 401")


def test_new_tenant_gets_the_demo_s_tasks_with_one_click(console: Console) -> None:
    page = console.page("/tasks", signed_in=False)
    sign_in(page, own_tenant(console, "newcomer"))
    page.get_by_role("heading", name="From pictures to an endpoint in three steps").wait_for()
    page.get_by_role("button", name="Add the demo's three tasks").click()
    for task in ("count", "digits", "shapes"):
        page.get_by_role("link", name=task, exact=True).wait_for()
    for header in ("labels", "labels", "name"):  # numbers begin with the largest, and names with A
        page.get_by_role("button", name=header, exact=True).click()
    page.get_by_role("columnheader", name="name").and_(page.locator("[aria-sort=ascending]")).wait_for()
    page.locator("tbody tr:first-child", has_text="count").wait_for()  # the reply comes after the header has changed
    assert page.locator("tbody td:first-child").all_inner_texts() == ["count", "digits", "shapes"]
    page.get_by_role("button", name="labels", exact=True).click()
    page.locator("tbody tr:first-child", has_text="digits").wait_for()
    labels = page.locator("tbody td:nth-child(2)").all_inner_texts()
    assert labels == sorted(labels, key=int, reverse=True)
    page.get_by_role("link", name="digits", exact=True).click()
    page.get_by_role("link", name="Try", exact=True).click()
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Choose files", exact=True).click()
    image = next(Path("adapters/demo/samples/digits").glob("*.png"))
    chooser.value.set_files(str(image))
    page.locator(".tried").get_by_role("meter", name=image.stem.rpartition("-")[0], exact=True).wait_for()


def test_key_that_is_revoked_under_an_open_page_ends_in_the_sign_in_page(console: Console) -> None:
    with Client(console.url, console.admin_key) as admin:
        made = admin.create_key("default", "page", role="owner")
    page = console.page("/tasks", signed_in=False)
    sign_in(page, made.key)
    page.get_by_role("heading", name="Tasks", exact=True).wait_for()
    with Client(console.url, console.admin_key) as admin:
        admin.revoke_key("default", made.id)
    page.evaluate("location.hash = '#/tenant'")  # no click: a request in flight may have ended the session already
    page.get_by_text("The hub does not accept this key any more").wait_for()
    page.get_by_role("heading", name="Sign in").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    console.forgive("status of 401")


def test_tenant_sees_nothing_of_another_tenant(console: Console, new_task: Callable[..., str]) -> None:
    task = new_task("secret-task")
    page = console.page("/tasks", signed_in=False)
    sign_in(page, own_tenant(console, "stranger"))
    page.get_by_role("heading", name="From pictures to an endpoint in three steps").wait_for()
    for name in (task, f"default:{task}"):
        page.goto(f"{console.url}/#/tasks/{name}/try")
        page.get_by_role("alert").get_by_text("not found").or_(page.get_by_text("there is no task")).first.wait_for()
    page.goto(f"{console.url}/#/hub")
    assert not main_link(page, "Hub").count()
    console.forgive("status of 403", "status of 404")


def test_caller_s_key_tries_and_calls_only(console: Console, new_task: Callable[..., str]) -> None:
    task = new_task("called")
    with Client(console.url, console.admin_key) as admin:
        key = admin.create_key("default", "caller").key
    page = console.page("/tasks", signed_in=False)
    sign_in(page, key)
    page.get_by_role("link", name=task, exact=True).click()
    parts = page.get_by_role("navigation", name=f"Parts of {task}").get_by_role("link")
    parts.first.wait_for()
    assert parts.all_inner_texts() == ["Try", "Use"]
    assert not page.get_by_role("button", name="New task").count()
    console.forgive("status of 403")


def test_owner_makes_copies_and_revokes_a_key_by_clicks(console: Console) -> None:
    page = console.page("/tenant")
    page.get_by_role("button", name="New key").click()
    page.get_by_label("Name", exact=False).first.fill("camera 3")
    page.get_by_role("button", name="Make the key").click()
    dialog = page.get_by_role("dialog", name="The key camera 3")
    key = dialog.locator("code").inner_text()
    with Client(console.url, key) as client:
        assert client.usage().tenant == "default"
    dialog.get_by_role("button", name="Close").click()
    assert key not in page.content()
    page.get_by_role("button", name="Revoke camera 3").click()
    page.get_by_role("button", name="Revoke", exact=True).click()
    page.get_by_text("The key camera 3 is revoked.").wait_for()
    page.get_by_role("button", name="Revoke camera 3").wait_for(state="detached")


def test_name_with_capitals_and_spaces_is_offered_as_a_task_s_name(console: Console) -> None:
    page = console.page("/tasks", signed_in=False)
    sign_in(page, own_tenant(console, "namer"))
    page.get_by_role("button", name="Make a task").click()
    page.get_by_role("textbox", name="Name").fill("My Shapes")
    page.get_by_role("button", name="Use my-shapes instead").click()
    assert page.get_by_role("textbox", name="Name").input_value() == "my-shapes"
    page.get_by_role("button", name="Make the task").click()
    page.get_by_role("heading", name="my-shapes").wait_for()


def test_tenant_sees_sizes_with_units_and_newest_changes_first_and_chooses_the_shared_task_from_a_list(
    console: Console,
) -> None:
    key = own_tenant(console, "tidy")
    with Client(console.url, key) as client:
        client.create_task("first")
        client.create_task("second")
    page = console.page("/tenant", signed_in=False)
    sign_in(page, key)
    main_link(page, "Tenant").click()
    page.get_by_text("Adapters: 0 bytes of 10 GiB").wait_for()
    changes = page.get_by_role("region", name="Changes").locator("tbody tr")
    changes.first.get_by_text("task: second").wait_for()
    assert changes.nth(1).get_by_text("task: first").count()
    page.locator("#own-tasks option").first.wait_for(state="attached")
    assert page.locator("#own-tasks option").evaluate_all("found => found.map(({ value }) => value)") == [
        "first",
        "second",
    ]


def test_only_lasting_admin_key_cannot_be_revoked(console: Console) -> None:
    page = console.page("/hub", admin=True)
    keys = page.get_by_role("region", name="Admin keys").get_by_role("row")
    lasting = keys.filter(has_text="never").get_by_role("button", name="Revoke")
    page.get_by_text("The last admin key that does not expire cannot be revoked.").wait_for()
    assert lasting.first.is_disabled()
    with Client(console.url, console.admin_key) as admin:
        made = admin.create_admin_key("spare")
    page.reload()
    page.get_by_role("button", name="Revoke spare").wait_for()
    assert page.get_by_role("button", name="Revoke spare").is_enabled()
    with Client(console.url, console.admin_key) as admin:
        admin.revoke_admin_key(made.id)


def test_wide_table_keeps_its_words_whole_and_scrolls_in_its_box_on_a_phone(console: Console) -> None:
    page = console.page("/hub", size=PHONE, admin=True)
    table = page.get_by_role("region", name="Workers")
    table.wait_for()
    assert table.evaluate("box => box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX") == "auto"
    worker = table.locator("tbody td").first
    assert worker.evaluate(LINES_OF_TEXT) == 1


def test_long_list_of_keys_is_shown_page_by_page(console: Console) -> None:
    key = own_tenant(console, "cameras")
    with Client(console.url, console.admin_key) as admin:
        for i in range(60):
            admin.create_key("cameras", f"camera {i}")
    page = console.page("/tenant", signed_in=False)
    sign_in(page, key)
    cameras = page.get_by_role("button", name="Revoke camera")
    cameras.nth(40).wait_for()
    page.get_by_role("button", name="More keys").click()
    cameras.nth(59).wait_for()
    page.get_by_role("button", name="More keys").wait_for(state="detached")


def test_admin_sees_trainings_of_tenants_and_errors_by_kind(console: Console, tmp_path: Path) -> None:
    key = own_tenant(console, "trainer")
    folder = write_digits(tmp_path / "digits", 0, 4)
    with Client(console.url, key) as client:
        client.create_task("watched")
        for label in sorted(folder.iterdir()):
            client.images.add("watched", sorted(label.iterdir()), label=label.name)
        client.train("watched")
        with suppress(NotFound):
            client.task("none")
    page = console.page("/hub", admin=True)
    row = page.get_by_role("region", name="Trainings").get_by_role("row").filter(has_text="watched")
    row.filter(has_text="trainer").filter(has_text="instant").filter(has_text="done").first.wait_for()
    errors = page.get_by_role("region", name="Errors of the last hour").get_by_role("row")
    errors.filter(has_text="not-found").filter(has_text="404").wait_for()


def test_every_page_has_no_serious_accessibility_finding_and_fits_its_screen(
    console: Console, new_task: Callable[..., str]
) -> None:
    new_task("listed")
    page = console.page("/tasks", signed_in=False)
    page.get_by_role("heading", name="Sign in").wait_for()
    found = accessibility_findings(page, "login")
    sign_in(page, own_tenant(console, "sighted"))
    page.get_by_role("heading", name="From pictures to an endpoint in three steps").wait_for()
    found += accessibility_findings(page, "first steps")
    page = console.page("/tasks", admin=True)
    for path, ready in {"/tasks": "main table", "/tenant": "main .meter", "/hub": "main .u-legend"}.items():
        page.goto(f"{console.url}/#{path}")
        page.locator(ready).first.wait_for()
        found += accessibility_findings(page, path)
    assert found == []


@pytest.mark.long
def test_list_of_many_tasks_is_searched_and_paged_on_the_server(console: Console) -> None:
    key = own_tenant(console, "many")
    with Client(console.url, console.admin_key) as admin:
        admin.change_limits("many", LimitsChange(tasks=20_000))
    with ThreadPoolExecutor(1) as thread:  # playwright's event loop runs in this one
        thread.submit(asyncio.run, make_tasks(console.home, "many", 10_000)).result()
    page = console.page("/tasks", signed_in=False)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    sign_in(page, key)
    page.get_by_role("link", name="task-00024", exact=True).wait_for()
    assert page.locator("tbody tr").count() == 25
    page.get_by_role("button", name="More tasks").click()
    page.get_by_role("link", name="task-00049", exact=True).wait_for()
    page.get_by_role("button", name="name", exact=True).click()
    page.get_by_role("link", name="task-09999", exact=True).wait_for()
    assert page.locator("tbody tr").count() == 25
    page.get_by_label("Search by name").fill("09999")
    page.get_by_role("link", name="task-09998", exact=True).wait_for(state="detached")
    page.get_by_role("link", name="task-09999", exact=True).wait_for()
    assert page.locator("tbody tr").count() == 1
    assert sum("/v1/tasks?" in url for url in asked) < 20


@pytest.mark.long
def test_open_page_says_that_the_hub_went_away_and_works_when_it_is_back(
    tmp_path: Path, browser: Any, request: pytest.FixtureRequest
) -> None:
    home, port = tmp_path / "home", free_port()
    served = serve(home, port)
    request.addfinalizer(served.process.terminate)
    with Client(served.url, str(served.key)) as client:
        folder = write_digits(tmp_path / "digits", 0, 3)
        client.create_task("digits")
        for label in sorted(folder.iterdir()):
            client.images.add("digits", sorted(label.iterdir()), label=label.name)
    console = Console(served.url, str(served.key), str(served.admin_key), home, browser)
    page = console.page("/tasks/digits/images")
    page.locator(".cell img").first.wait_for()
    served.stop()
    main_link(page, "Tenant").click()
    page.get_by_role("alert").get_by_text("The hub does not answer").first.wait_for()
    page.evaluate(NOTE_NOTICES)
    again = serve(home, port)
    request.addfinalizer(again.process.terminate)
    page.wait_for_function("() => window.noticed.some((text) => text.includes('The hub answers again.'))")
    page.get_by_role("alert").filter(has_text="tries again every second").wait_for(state="detached")
    main_link(page, "Tasks").click()
    page.get_by_role("link", name="digits", exact=True).wait_for()
    page.context.close()
    again.stop()


def test_console_works_below_a_path_and_behind_tls(
    console: Console, new_task: Callable[..., str], tmp_path: Path
) -> None:
    task = new_task("prefixed", write_digits(tmp_path / "digits", 0, 2))
    port = free_port()
    url = f"https://localhost:{port}/below/here"
    site = f"""
        server {{
            listen {port} ssl;
            ssl_certificate {tmp_path}/{CERTIFICATE};
            ssl_certificate_key {tmp_path}/{KEY};
            location /below/here/ {{ proxy_pass {console.url}/; }}
        }}
    """
    with nginx(tmp_path, site, url):
        context = console.browser.new_context(ignore_https_errors=True)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/")
        sign_in(page, console.key)
        page.get_by_role("link", name=task, exact=True).click()
        page.locator(".cell img").first.wait_for()
        context.close()
    own = (f"{url}/", f"blob:https://localhost:{port}/")
    assert [address for address in asked if not address.startswith(own)] == []
