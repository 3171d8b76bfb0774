"""The page in a real browser: Debian's chromium, without a screen, driven by playwright."""

import re
import shutil

import finished
import pytest
from playwright.sync_api import expect, sync_playwright

import mrefali
from mrefali import page as page_module

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def outdir(tmp_path_factory):
    """A run of twelve classes of unequal size, class 9 vanished, whose names would do harm if they were not escaped."""
    outdir = finished.write(tmp_path_factory.mktemp("browser"), n_classes=12, n_particles=240, n_iterations=3,
                            vanished=(9,), maskfile='</script><script>window.harmed = true</script>')
    mrefali.report(outdir)
    return outdir


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "chromium is not installed: apt-get install chromium, or make .venv/installed-for-developers"
    with sync_playwright() as playwright:
        # root may not have chromium's sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """The page open in a browser, and what the browser had to say about it."""

    def __init__(self, browser, outdir, **options):
        self.page = browser.new_page(**options)
        self.messages, self.requests = [], []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = f"file://{outdir}/report.html"
        self.page.goto(self.address)

    def order(self):
        return [int(text) for text in self.page.locator("#wall .number").all_inner_texts()]

    def title(self):
        return self.page.locator("#single-title").inner_text()

    def focused(self):
        return self.page.evaluate("document.activeElement.id")

    def is_open(self):
        return self.page.locator("dialog[open]").count() == 1


@pytest.fixture
def visit(browser, outdir):
    visit = Visit(browser, outdir, viewport={"width": 1280, "height": 900})
    yield visit
    visit.page.close()
    assert visit.messages == []
    assert {url.partition("#")[0] for url in visit.requests if not url.startswith("data:")} == {visit.address}


def test_the_page_opens_from_a_file_draws_its_curves_and_asks_for_nothing(visit):
    for name in ("criterion", "changed", "counts", "resolution", "x", "y", "angles"):
        assert visit.page.locator(f"#chart-{name} svg").count() == 1, name
    assert visit.page.locator("#chart-counts path").count() == 13  # a line a class, and the median
    assert visit.page.locator("#chart-x .dashed").count() == 2
    assert visit.page.locator("#chart-x rect").count() >= 5
    loaded = visit.page.evaluate("[...document.images].filter(i => i.src).map(i => i.complete && i.naturalWidth > 0)")
    assert len(loaded) == 11
    assert all(loaded)
    assert [url for url in visit.requests if not url.startswith("data:")] == [visit.address]
    assert visit.page.evaluate("window.harmed") is None
    assert "</script><script>window.harmed" in visit.page.locator("#parameters").inner_text()


def test_the_policy_of_the_page_lets_no_request_through(visit):
    outcome = visit.page.evaluate("""async () => {
        try { await fetch("http://127.0.0.1:9/"); return "sent"; } catch (error) { return "refused"; } }""")
    assert outcome == "refused"
    assert any("Content Security Policy" in message for message in visit.messages)
    visit.messages.clear()


def test_the_switch_changes_the_order_and_is_remembered(visit, outdir):
    by_size = mrefali.open_run(outdir).by_size.tolist()
    assert visit.order() == by_size
    visit.page.get_by_text("by number").click()
    assert visit.order() == list(range(12))
    visit.page.reload()
    assert visit.order() == list(range(12))
    assert visit.page.locator("input[value=number]").is_checked()
    visit.page.get_by_text("by size").click()
    assert visit.order() == by_size


def test_a_click_opens_a_class_with_its_curve_history_and_members(visit, outdir):
    run = mrefali.open_run(outdir)
    visit.page.locator("#class-3").click()
    assert visit.title() == "Class 3"
    for name in ("frc", "counts", "changed", "resolution"):
        assert visit.page.locator(f"#single-{name} svg").is_visible()
    facts = visit.page.locator("#single-facts").inner_text()
    assert f"{run.counts[-1, 3]} particles" in facts
    assert f"{run.in_words(run.resolution_05_px[-1, 3])} (FRC 0.5)" in facts
    shown = [int(text) for text in visit.page.locator("#single-indices li").all_inner_texts()]
    assert shown == run.choose_members(3, 12).tolist()
    for name in ("picture", "moved", "raw"):
        assert visit.page.locator(f"#single-{name}").evaluate("i => i.complete && i.naturalWidth > 0"), name
    # the strip is as wide as its numbers, so that each stands below its particle
    widths = [visit.page.locator(f"#single-{name}").bounding_box()["width"] for name in ("moved", "indices")]
    assert widths[0] == pytest.approx(widths[1], abs=2)


def test_a_class_that_vanished_shows_no_average(visit):
    assert visit.page.locator("#class-9 img").count() == 0
    visit.page.locator("#class-9").click()
    assert visit.page.locator("#single-gone").is_visible()
    assert not visit.page.locator("#single-picture").is_visible()
    assert visit.page.locator("#single-frc path").get_attribute("d") == ""


def test_the_keyboard_alone_will_do(visit):
    by_size = visit.order()
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        if visit.focused() == f"class-{by_size[0]}":
            break
    assert visit.focused() == f"class-{by_size[0]}"
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Enter")
    assert visit.title() == f"Class {by_size[1]}"
    visit.page.keyboard.press("ArrowRight")
    visit.page.keyboard.press("ArrowRight")
    assert visit.title() == f"Class {by_size[3]}"
    visit.page.keyboard.press("ArrowLeft")
    assert visit.title() == f"Class {by_size[2]}"
    visit.page.keyboard.press("Escape")
    assert not visit.is_open()
    # a dialog says that it is closed in a task of its own, after the key
    expect(visit.page.locator(f"#class-{by_size[2]}")).to_be_focused()
    # back to the switch, whose arrows choose
    for _ in range(40):
        visit.page.keyboard.press("Shift+Tab")
        if visit.page.evaluate("document.activeElement.name") == "order":
            break
    visit.page.keyboard.press("ArrowRight")
    assert visit.order() == list(range(12))


def test_the_buttons_of_a_class_lead_on_and_close(visit):
    by_size = visit.order()
    visit.page.locator(f"#class-{by_size[0]}").click()
    visit.page.get_by_label("Next class").click()
    assert visit.title() == f"Class {by_size[1]}"
    for _ in range(2):
        visit.page.get_by_label("Previous class").click()
    assert visit.title() == f"Class {by_size[-1]}"
    visit.page.get_by_label("Close").click()
    assert not visit.is_open()
    visit.page.locator(f"#class-{by_size[0]}").click()
    visit.page.mouse.click(5, 5)  # beside it
    assert not visit.is_open()


def test_a_phone_needs_no_sideways_scrolling(browser, outdir):
    visit = Visit(browser, outdir, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    boxes = [tile.bounding_box() for tile in visit.page.locator(".tile").all()[:3]]
    assert boxes[0]["y"] == boxes[2]["y"]  # three in a row
    visit.page.locator(".tile").first.tap()
    assert visit.page.locator("#single").evaluate("d => d.scrollWidth <= d.clientWidth")
    assert visit.page.locator("#single-frc svg").bounding_box()["width"] <= 360
    assert visit.messages == []
    visit.page.close()


def test_print_has_the_wall_and_the_curves_without_the_switches(visit):
    visit.page.emulate_media(media="print")
    assert not visit.page.locator("#order").is_visible()
    assert not visit.page.locator("nav").is_visible()
    assert visit.page.locator("#class-0").is_visible()
    assert visit.page.locator("#chart-criterion svg").is_visible()
    assert len(re.findall(rb"/Type\s*/Page\b", visit.page.pdf(format="A4"))) in (2, 3, 4)


def test_without_its_script_the_page_still_has_wall_and_tables(browser, outdir):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{outdir}/report.html")
    assert page.locator(".tile").count() == 12
    assert "Without its script" in page.locator("body").inner_text()
    context.close()


def test_a_live_page_loads_itself_anew_unless_a_class_is_open(browser, tmp_path):
    outdir = finished.write(tmp_path, finished=False, maxit=5)
    page_module.write_page(mrefali.open_run(outdir), live=True)
    page = browser.new_page()
    page.clock.install()
    page.goto(f"file://{outdir}/report.html")
    assert "unfinished: 2 of 5 iterations" in page.locator("h1").inner_text()
    page.evaluate("window.before = true")
    page.locator(".tile").first.click()
    page.clock.run_for(40_000)
    assert page.evaluate("window.before") is True
    page.keyboard.press("Escape")
    page.clock.run_for(16_000)
    page.wait_for_function("window.before === undefined")
    page.close()
