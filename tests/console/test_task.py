"""The tabs of a task, as a person uses them: in a browser, by clicks and keys, at a whole hub."""

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page

from hub.errors import HubError
from hub.local.embedded_redis import url_of_running
from hub.registry.audit import OPERATOR
from hub.registry.datasets.index import DatasetIndex
from hub.registry.redis.connection import RegistryConnection
from tests.console.conftest import DESK, PHONE, Console, accessibility_findings
from tests.support.datasets import new_image, unpaced_reads
from tests.support.hub_app import REDIS_PATIENCE
from tests.support.image_sets import write_digits
from tests.support.models import coloured_noise, wait_until
from tests.support.zips import zip_of

pytestmark = pytest.mark.slow
LABELS = ("0", "1", "4")
PIXELS_OF_LINE = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let found = 0;
  for (let i = 0; i < data.length; i += 4) found += data[i] === 47 && data[i + 1] === 127 && data[i + 2] === 209;
  return found;
}"""  # of the first line's colour
HEIGHT_OF_LINE = """(canvas) => {
  const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const found = [];
  for (let i = 0; i < data.length; i += 4) {
    if (data[i] === 47 && data[i + 1] === 127 && data[i + 2] === 209) found.push(i);
  }
  return found.reduce((sum, i) => sum + Math.floor(i / 4 / width), 0) / found.length / canvas.height;
}"""  # its mean; 0 is the top


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of twelve images of each of three digits."""
    return write_digits(tmp_path_factory.mktemp("digits"), 0, 12)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two further images of each digit."""
    return write_digits(tmp_path_factory.mktemp("unseen"), 40, 2)


def files(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.iterdir())]


def choose(page: Page, paths: list[str]) -> None:
    """Choose files, as a person does with the button."""
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Choose files", exact=True).click()
    chooser.value.set_files(paths)


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("navigation", name="Parts of").get_by_role("link", name=name, exact=True).click()


def add_labelled(page: Page, label: str, paths: list[str]) -> None:
    """Add images with a new label, in the tab Images."""
    page.get_by_role("combobox", name="Label of new images").select_option("+")
    page.get_by_role("textbox", name="New label").fill(label)
    page.get_by_role("button", name="Add", exact=True).click()
    choose(page, paths)
    page.get_by_text(f"Done: {len(paths)} added.").wait_for()
    assert not page.get_by_text("No images yet").count()
    page.locator(".card").get_by_role("button", name="Close").click()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_own_task_answers_when_a_person_clicks_from_sign_in_to_an_answer(
    console: Console, digits: Path, unseen: Path, size: tuple[int, int]
) -> None:
    name = f"own-{size[0]}"
    page = console.page(size=size, signed_in=False)
    page.get_by_label("API key").fill(console.key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="New task").or_(page.get_by_role("button", name="Make a task")).first.click()
    page.get_by_role("textbox", name="Name").fill(name)
    page.get_by_role("button", name="Make the task").click()
    page.get_by_text("No images yet").wait_for()
    for label in LABELS:
        add_labelled(page, label, files(digits / label))
    page.get_by_text("36 images, 3 labels.").wait_for()
    page.get_by_role("link", name="Next: train").click()
    page.get_by_role("button", name="Train now").click()
    page.get_by_text("Version 1 is ready").wait_for()
    page.get_by_role("link", name="Try it").click()
    for label in LABELS:
        choose(page, [files(unseen / label)[0]])
        page.locator(".tried").first.get_by_role("heading", name=f"{label} version 1").wait_for()
    assert page.locator(".tried").count() == 3
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0  # nothing is cut off beside the screen


def test_label_without_a_test_image_is_named_before_and_after_the_training(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("untested")
    with console.client() as client:
        client.images.add(task, files(digits / "0"), label="0", split="train")
        client.images.add(task, files(digits / "1")[:8], label="1", split="train")
        client.images.add(task, files(digits / "1")[8:], label="1", split="test")
    page = console.page(f"/tasks/{task}/images")
    page.get_by_text("No test image of 0: the accuracy on test images does not cover this label.").wait_for()
    page.get_by_role("link", name="Next: train").click()
    page.get_by_role("button", name="Train now").click()
    page.get_by_text("No test image of '0', so the accuracy on test images does not cover these labels.").wait_for()


def test_training_says_at_once_that_it_starts_and_leads_with_left_out_images_when_few_images_test(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("few-tests", digits)
    with console.client() as client:
        for label in client.images.info(task).labels:
            for image in client.images.list(task, label=label.label, split="test").images[1:]:
                client.images.label(task, image.digest, label.label, split="train")
    page = console.page(f"/tasks/{task}/train")
    page.get_by_text("This hub's backbone sees images at 32 x 32 pixels").wait_for()
    page.get_by_role("button", name="Train now").click()
    page.get_by_role("status").get_by_text("Starting the training ...").wait_for()
    page.get_by_text("Version 1 is ready").wait_for()
    page.get_by_role("meter", name="Accuracy on 33 left-out images").wait_for()
    page.get_by_text("On 3 test images: ").filter(has_text="So few images say little.").wait_for()
    page.get_by_text("Always naming the most frequent label would be right for 33 %.").wait_for()
    for heading in ("Labels of the 33 left-out images", "Answers to the 33 left-out images"):
        page.get_by_role("heading", name=heading).wait_for()
    curve = page.get_by_role("img", name="by number of images").locator("canvas").first
    curve.wait_for()
    wait_until(lambda: int(curve.evaluate(PIXELS_OF_LINE)) > 20)
    assert float(curve.evaluate(HEIGHT_OF_LINE)) < 0.25  # an accuracy near 1 is near the top of its scale
    page.get_by_role("combobox", name="for about").select_option("60")
    open_tab(page, "Try")
    open_tab(page, "Train")
    assert page.get_by_role("combobox", name="for about").input_value() == "60"


@pytest.mark.long
def test_karst_training_that_makes_no_version_says_what_happened_and_what_to_do(
    console: Console, tmp_path: Path, new_task: Callable[..., str]
) -> None:
    grey = dict.fromkeys(("fine", "broken"), (128, 128, 128))
    task = new_task("noise", coloured_noise(tmp_path / "noise", grey, 10, 0))
    with console.client() as client, suppress(HubError):
        client.train(task, recipe="auto", budget_s=20)
    page = console.page(f"/tasks/{task}/train")
    page.get_by_role("heading", name="No version was made").wait_for()
    page.get_by_text("The adapter is not clearly better than a constant answer, so it is not used.").wait_for()
    page.get_by_text("this one sees images at 32 x 32 pixels.").wait_for()
    assert not page.get_by_text("Advice:").count()
    assert not page.get_by_text("KARST is ").count()
    assert not page.get_by_role("img", name="by number of images").count()


@pytest.mark.long
def test_karst_training_that_is_not_better_says_that_its_version_is_the_instant_one(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("easy", digits)  # without an error to improve on
    with console.client() as client:
        client.train(task, recipe="auto", budget_s=20)
    page = console.page(f"/tasks/{task}/train")
    page.get_by_text("So this version is what “Train now” makes.").wait_for()


def test_images_are_labelled_by_key_by_dragging_and_in_bulk_undone_and_deleted(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("labels")
    with console.client() as client:
        client.images.add(task, files(digits / "0")[:6])
        client.create_task(task, labels=["cat", "dog"])
    page = console.page(f"/tasks/{task}/images")
    cells = page.locator(".cell")
    cells.first.click()
    page.keyboard.press("2")
    page.get_by_text("1 image is labelled dog now.").wait_for()
    cells.nth(1).drag_to(page.get_by_role("button", name="cat"))
    page.get_by_text("1 image is labelled cat now.").wait_for()
    cells.nth(2).click()
    cells.nth(4).click(modifiers=["Shift"])
    page.get_by_text("3 selected").wait_for()
    page.get_by_role("combobox", name="Label them").select_option("=cat")
    page.get_by_text("3 images are labelled cat now.").wait_for()
    assert counts(console, task) == {"cat": 4, "dog": 1, None: 1}
    page.keyboard.press("Control+z")
    page.get_by_text("3 images are without a label now.").wait_for()
    for _ in range(20):  # after a change the list is read again, and the key then selects what is there
        page.get_by_role("listbox").focus()
        page.keyboard.press("Control+a")
        page.wait_for_timeout(500)
        if page.get_by_text("6 selected").count():
            break
    page.get_by_text("6 selected").wait_for()
    page.keyboard.press("1")
    page.get_by_text("6 images are labelled cat now.").wait_for()
    assert counts(console, task) == {"cat": 6, "dog": 0, None: 0}
    cells.nth(2).click()
    page.get_by_role("button", name="+ new label for the selected").click()
    page.get_by_role("textbox", name="Name").fill("bird")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_text("1 image is labelled bird now.").wait_for()
    assert counts(console, task) == {"bird": 1, "cat": 5, "dog": 0, None: 0}
    page.keyboard.press("Control+z")
    page.get_by_text("1 image is labelled cat now.").wait_for()
    cells.locator("img").nth(5).wait_for()  # none is fetched while its image is deleted, which would be a 404
    cells.nth(1).click()
    page.keyboard.press("Delete")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_text("1 image deleted.").wait_for()
    assert counts(console, task) == {"bird": 0, "cat": 5, "dog": 0, None: 0}


def test_refused_files_are_shown_with_reasons_and_the_others_kept(
    console: Console, digits: Path, tmp_path: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("refused")
    (tmp_path / "notes.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((digits / "0" / "0.png").read_bytes()[:60])
    (tmp_path / "folders.zip").write_bytes(
        zip_of({"rose/1.png": (digits / "0" / "1.png").read_bytes(), "rose/a.txt": b"text"})
    )
    page = console.page(f"/tasks/{task}/images")
    choose(page, [str(digits / "0" / "0.png"), *map(str, sorted(tmp_path.iterdir()))])
    page.get_by_text("Done: 2 added, 3 refused.").wait_for()
    reasons = page.locator(".refused li").all_inner_texts()
    assert any(text.startswith("notes.png: not an image") for text in reasons)
    assert any(text.startswith("cut.png: ") for text in reasons)
    assert any(text.startswith("rose/a.txt: ") for text in reasons)
    assert counts(console, task) == {"rose": 1, None: 1}


def test_review_by_keyboard_labels_corrects_undoes_and_retrains(
    console: Console, digits: Path, unseen: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("review", digits)
    with console.client() as client:
        client.train(task)
        client.images.add(task, [path for label in LABELS for path in files(unseen / label)])
    page = console.page(f"/tasks/{task}/review")
    status = page.locator(".row > p[role=status]")
    expect_text(page, status, "6 left")
    page.get_by_text("Suggestion:").wait_for()
    page.keyboard.press("Enter")
    expect_text(page, status, "5 left, 1 done")
    page.get_by_role("checkbox", name="letters and numbers are commands").uncheck()
    page.keyboard.press("3")
    page.keyboard.press("s")
    page.get_by_role("checkbox", name="letters and numbers are commands").check()
    expect_text(page, status, "5 left, 1 done")
    page.keyboard.press("3")
    expect_text(page, status, "4 left, 2 done")
    page.keyboard.press("u")
    expect_text(page, status, "5 left, 1 done")
    page.keyboard.press("Control+z")
    expect_text(page, status, "6 left")
    for left in range(5, -1, -1):
        page.get_by_text("Suggestion:").wait_for()
        page.keyboard.press("Enter")
        expect_text(page, status, f"{left} left, {6 - left} done")
    with console.client() as client:
        found = {image.name: image.label for image in client.images.list(task, count=6).images}
    assert len(found) == 2  # two names, each of three images
    page.get_by_role("button", name="Retrain").click()
    page.get_by_text("Version 2 is ready").wait_for()


def test_enter_confirms_in_the_review_after_clicks_on_its_tab_and_on_skip(
    console: Console, digits: Path, unseen: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("clicked", digits)
    page = console.page(f"/tasks/{task}/review")
    page.get_by_text("Images that you add without a label come here.").wait_for()
    with console.client() as client:
        client.images.add(task, [path for label in LABELS for path in files(unseen / label)])
    open_tab(page, "Images")
    open_tab(page, "Review")
    status = page.locator(".row > p[role=status]")
    page.get_by_text("Suggestion:").wait_for()
    page.keyboard.press("Enter")
    expect_text(page, status, "5 left, 1 done")
    page.get_by_text("Suggestion:").wait_for()
    page.get_by_role("button", name="Skip").click()
    page.get_by_text("Suggestion:").wait_for()
    page.keyboard.press("Enter")
    expect_text(page, status, "4 left, 2 done")
    page.locator("h1").click()
    page.keyboard.press("Shift")  # the browser then shows where the focus is
    assert page.locator("#main").evaluate("main => getComputedStyle(main).outlineStyle") == "none"


def test_review_of_labels_that_may_be_wrong_keeps_a_label_by_enter_and_takes_the_suggestion_by_another_key(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("doubts", digits)
    with console.client() as client:
        wrong = client.images.list(task, label="0").images[0].digest
        client.images.label(task, wrong, "1")
    page = console.page(f"/tasks/{task}/review?kind=errors")
    page.get_by_text("Its label is 1.").wait_for()
    page.keyboard.press("t")
    page.get_by_text("Its label is 1.").wait_for(state="detached")
    assert counts(console, task)["0"] == 12
    page.keyboard.press("u")
    page.get_by_text("Its label is 1.").wait_for()
    page.keyboard.press("Enter")
    page.get_by_text("1 done").wait_for()
    assert counts(console, task)["0"] == 11


def test_images_that_no_folder_names_are_counted_after_an_upload_and_get_a_label(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("loose")
    page = console.page(f"/tasks/{task}/images")
    choose(page, files(digits / "0")[:3])
    page.get_by_text("3 images without a label, as no folder names one.").wait_for()
    page.get_by_role("combobox", name="Label of these").select_option("+")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("combobox", name="Label of these").select_option("+")
    page.get_by_role("textbox", name="New label").fill("zero")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_text("3 images are labelled zero now.").wait_for()
    page.get_by_text("as no folder names one").wait_for(state="detached")
    assert counts(console, task) == {"zero": 3, None: 0}
    page.locator(".cell", has_text="zero").nth(2).wait_for()
    page.keyboard.press("Control+z")
    page.get_by_text("3 images are without a label now.").wait_for()


def test_wrong_labels_are_found_in_the_confusion_matrix_and_corrected(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("wrong", digits)
    with console.client() as client:
        wrong = client.images.list(task, label="0", split="train").images[0]
        client.images.label(task, wrong.digest, "1")
    page = console.page(f"/tasks/{task}/train")
    page.get_by_role("button", name="Train now").click()
    page.get_by_role("button", name="1 image of 1 answered 0").click()
    page.get_by_role("region", name="Images of the cell").get_by_role("button", name="1, taken for 0").click()
    page.get_by_role("dialog").get_by_role("combobox", name="Label").select_option("=0")
    page.get_by_text("now 0").first.wait_for(state="attached")
    with console.client() as client:
        assert wrong.digest in {image.digest for image in client.images.list(task, label="0").images}


@pytest.mark.long
def test_training_job_shows_its_progress_and_is_cancelled(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("job", digits)
    page = console.page(f"/tasks/{task}/train")
    page.get_by_role("button", name="Train now").click()
    page.get_by_text("Version 1 is ready").wait_for()
    page.get_by_role("combobox", name="for about").select_option("3600")
    page.get_by_role("button", name="Improve").click()
    page.get_by_role("status").get_by_text("KARST,").wait_for(timeout=240_000)
    curve = page.get_by_role("img", name="Loss and accuracy while training").locator("canvas").first
    curve.wait_for(timeout=120_000)
    wait_until(lambda: int(curve.evaluate(PIXELS_OF_LINE)) > 20)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("The training was cancelled").wait_for()


def test_camera_s_pictures_join_the_images_and_get_an_answer(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("camera", digits)
    page = console.page(f"/tasks/{task}/images")
    page.get_by_role("combobox", name="Label of new images").select_option("=0")
    page.get_by_role("button", name="Take pictures").click()
    dialog = page.get_by_role("dialog", name="Camera")
    for taken in (1, 2):
        page.wait_for_function("() => document.querySelector('video').videoWidth > 0")
        dialog.get_by_role("button", name="Take the picture").click()
        page.get_by_text(f"{36 + taken} images, 3 labels.").wait_for()
    dialog.get_by_role("button", name="Close").last.click()
    assert counts(console, task)["0"] == 14
    page.get_by_role("link", name="Next: train").click()
    page.get_by_role("button", name="Train now").click()
    page.get_by_role("link", name="Try it").click()
    page.get_by_role("button", name="Use the camera").click()
    page.wait_for_function("() => document.querySelector('video').videoWidth > 0")
    dialog.get_by_role("button", name="Take the picture").click()
    page.locator(".tried").get_by_role("heading", name="version 1").wait_for()  # any label: both pictures may test


def test_two_versions_answer_side_by_side_and_the_picture_joins_the_images(
    console: Console, digits: Path, unseen: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("beside", digits)
    with console.client() as client:
        for _ in range(3):
            client.train(task)
    page = console.page(f"/tasks/{task}/train")
    page.get_by_text("Version 3 is ready").wait_for()
    assert page.get_by_role("combobox", name="Compare with").input_value() == "2"
    open_tab(page, "Try")
    page.get_by_role("combobox", name="Compare with").select_option("1")
    picture = files(unseen / "4")[0]
    choose(page, [picture])
    page.get_by_role("heading", name="4 version 3").wait_for()
    page.get_by_role("heading", name="4 version 1").wait_for()
    page.locator(".tried").get_by_text(Path(picture).name).wait_for()
    assert page.get_by_role("meter", name="Typicality").count() == 2
    page.get_by_role("combobox", name="Add to the images as").select_option("=4")
    page.get_by_text("Added as 4.").wait_for()
    assert counts(console, task)["4"] == 13


def test_picture_that_is_unlike_the_task_s_images_is_called_unknown_and_not_by_a_label(
    console: Console, digits: Path, unseen: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("foreign", digits)
    with console.client() as client:
        client.train(task)
        client.create_task(task, unknown_below=1)
    page = console.page(f"/tasks/{task}/try")
    choose(page, [files(unseen / "4")[0]])
    page.get_by_role("heading", name="Unknown version 1").wait_for()
    page.get_by_text("The picture does not look like the task's images").wait_for()
    assert not page.get_by_text("90 % sure").count()
    with console.client() as client:
        client.create_task(task, unknown_below=0)
    choose(page, [files(unseen / "4")[1]])
    page.get_by_role("heading", name="4 version 1").wait_for()
    page.get_by_text("90 % sure").wait_for()


def test_commands_of_the_tab_use_work_word_for_word_with_a_key_and_a_picture(
    console: Console, digits: Path, unseen: Path, tmp_path: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("copied", digits)
    with console.client() as client:
        client.train(task)
    page = console.page(f"/tasks/{task}/use")
    page.get_by_text("Put it in place of kh_..., and your file in place of picture.jpg.").wait_for()
    (tmp_path / "picture.jpg").write_bytes(Path(files(unseen / "4")[0]).read_bytes())
    for name, command in {"curl": ["bash", "-c"], "Python": [sys.executable, "-c"]}.items():
        text = page.get_by_role("region", name=name).inner_text()
        assert text.count("kh_...") == 1
        command = [*command, text.replace("kh_...", console.key)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "4" in (json.loads(done.stdout)["predictions"][0][0]["label"] if name == "curl" else done.stdout)


def test_labels_that_may_be_wrong_are_listed_and_leave_the_list_when_corrected(
    console: Console, digits: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("suspects", digits)
    with console.client() as client:
        wrong = client.images.list(task, label="0").images[0]
        client.images.label(task, wrong.digest, "1")
    page = console.page(f"/tasks/{task}/images")
    page.locator(".cell").first.wait_for()
    page.get_by_role("combobox", name="Show").select_option("errors")
    suspect = page.locator(".cell", has_text="1; or 0?").first
    suspect.click()
    page.keyboard.press("1")
    page.get_by_text("1 image is labelled 0 now.").wait_for()
    assert counts(console, task)["0"] == 12


def test_near_duplicates_are_listed_in_groups(
    console: Console, digits: Path, tmp_path: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("duplicates", digits)
    original = files(digits / "0")[0]
    Image.open(original).convert("RGB").save(tmp_path / "again.jpg", quality=98)
    with console.client() as client:
        client.images.add(task, [tmp_path / "again.jpg"], label="0")
    page = console.page(f"/tasks/{task}/images")
    page.get_by_role("combobox", name="Show").select_option("duplicates")
    page.get_by_text("Groups of nearly equal images").wait_for()
    again = page.locator(".cell[aria-label^='again.jpg, ']")
    again.wait_for()
    group = again.inner_text().split(":")[0]
    assert page.locator(".cell", has_text=f"{group}: 0").count() >= 2


def test_canary_takes_a_share_and_rolls_back(console: Console, digits: Path, new_task: Callable[..., str]) -> None:
    task = new_task("canary", digits)
    with console.client() as client:
        client.train(task)
        client.train(task)
        client.set_alias(task, "stable", 1)
    page = console.page(f"/tasks/{task}/versions")
    card = page.locator(".alias").filter(has_text="stable")
    card.get_by_text("Canary: a share").click()
    card.get_by_role("combobox", name="Canary").select_option("2")
    card.get_by_role("slider").fill("20")
    card.get_by_role("button", name="Set").click()
    card.get_by_text("80 % version 1, 20 % version 2").wait_for()
    assert aliases(console, task)["stable"] == {1: 80, 2: 20}
    for share in (50, 70):
        card.get_by_role("slider").fill(str(share))
        card.get_by_role("button", name="Set").click()
        card.get_by_text(f"{100 - share} % version 1, {share} % version 2").wait_for()
        assert card.get_by_role("combobox", name="Canary").input_value() == "2"
    assert aliases(console, task)["stable"] == {1: 30, 2: 70}
    for target, shown in (("50 % version 1, 50 % version 2", 50), ("80 % version 1, 20 % version 2", 20)):
        card.get_by_role("button", name="Roll back stable").click()
        card.get_by_text(target).wait_for()
        card.get_by_text(f"Share of stable: {shown} %").wait_for()
    card.get_by_role("button", name="Roll back stable").click()
    card.get_by_text("80 % version 1").wait_for(state="detached")
    page.get_by_text("stable is back at its previous target.").wait_for()
    assert aliases(console, task)["stable"] == {1: 1}
    with page.expect_download() as download:
        page.get_by_role("button", name="Download version 1").click()
    assert download.value.suggested_filename == f"{task}-1.safetensors"


@pytest.mark.long
def test_list_of_10_000_images_needs_few_requests_when_a_person_scrolls_to_its_end(
    console: Console, new_task: Callable[..., str]
) -> None:
    task = new_task("many")
    for start in range(0, 10_000, 2000):
        add_zip(console, task, zip_of({f"l{i % 5}/{i}.png": square(i) for i in range(start, start + 2000)}))
    page = console.page(f"/tasks/{task}/images")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator(".cell img").first.wait_for()
    box = page.get_by_role("listbox")
    for part in range(1, 51):
        box.evaluate(f"box => {{ box.scrollTop = box.scrollHeight * {part} / 50 }}")
    last = page.locator(".cell[aria-label^='l0/0.png, ']")
    last.scroll_into_view_if_needed()
    last.locator("img").wait_for()
    assert sum("count=" in url for url in asked) <= 20
    assert sum(url.endswith("/thumbnail") for url in asked) < 500
    assert page.locator(".cell").count() < 200


@pytest.mark.long
def test_list_of_100_000_images_stays_light_when_a_person_scrolls_to_its_end(
    console: Console, new_task: Callable[..., str]
) -> None:
    task = new_task("hundred-thousand")
    with ThreadPoolExecutor(1) as thread:  # playwright's event loop runs in this one
        thread.submit(asyncio.run, fill_index(console.home, task, 100_000)).result()
    page = console.page(f"/tasks/{task}/images")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_text("100,000 images, 5 labels.").wait_for()
    box = page.get_by_role("listbox")
    for part in range(1, 201):
        box.evaluate(f"box => {{ box.scrollTop = box.scrollHeight * {part} / 200 }}")
    page.locator(".cell[aria-label^='0.png, ']").wait_for(timeout=300_000)  # the oldest
    assert sum("count=" in url for url in asked) <= 210
    assert page.locator(".cell").count() < 200
    assert sum(url.endswith("/thumbnail") for url in asked) < 2000
    console.forgive("status of 404", "status of 503")  # the images have no files


async def fill_index(home: Path, task: str, count: int) -> None:
    """Add made-up images without files to a dataset, directly in the registry."""
    database = RegistryConnection(url_of_running(home), patience=REDIS_PATIENCE)
    index = DatasetIndex(database, unpaced_reads())
    for start in range(0, count, 500):
        images = [new_image(i, f"l{i % 5}") for i in range(start, start + 500)]
        await index.add(OPERATOR, "default", task, images, {}, patience_s=86_400)
    await database.close()


def test_every_tab_has_no_serious_accessibility_finding_and_fits_its_screen(
    console: Console, digits: Path, unseen: Path, new_task: Callable[..., str]
) -> None:
    task = new_task("axe", digits)
    with console.client() as client:
        client.train(task)
        client.train(task)
        client.images.add(task, files(unseen / "0"))
    found = []
    page = console.page(f"/tasks/{task}/images")
    for tab, ready in {
        "Images": ".cell img",
        "Train": ".confusion",
        "Try": ".drop",
        "Review": ".review img",
        "Versions": ".alias",
        "Use": ".copy",
    }.items():
        open_tab(page, tab)
        if tab == "Try":
            choose(page, [files(unseen / "0")[0]])
            ready = ".answer"
        page.locator(ready).first.wait_for()
        if tab == "Images":
            page.locator(".cell").first.dblclick()
            page.get_by_role("dialog").locator("img.full").wait_for()
            found += accessibility_findings(page, tab, "dialog")
            page.keyboard.press("Escape")
        found += accessibility_findings(page, tab)
    assert found == []


def counts(console: Console, task: str) -> dict[str | None, int]:
    """Return the number of images of each label."""
    with console.client() as client:
        info = client.images.info(task)
    return {row.label: row.train + row.test for row in (*info.labels, info.unlabelled)}


def aliases(console: Console, task: str) -> dict[str, dict[int, int]]:
    with console.client() as client:
        return client.task(task).aliases


def expect_text(page: Page, place: Locator, text: str) -> None:
    """Wait until an element has exactly this text."""
    page.wait_for_function(
        "([element, text]) => element.textContent.trim() === text", arg=[place.element_handle(), text]
    )


def add_zip(console: Console, task: str, data: bytes) -> None:
    headers = {"authorization": f"Bearer {console.key}", "content-type": "application/zip"}
    url = f"{console.url}/v1/tasks/{task}/images"
    httpx.post(url, content=data, headers=headers, timeout=600).raise_for_status()


def square(i: int) -> bytes:
    """Return a small image that differs from those of other numbers."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (i % 256, i // 256, 77)).save(data, "PNG")
    return data.getvalue()
