"""The page in Chromium, in front of a server without a model."""

import contextlib
import json
import re
import shutil
import threading

import numpy as np
import pytest
import uvicorn
from PIL import Image

from covidjax.serve.worker import load_run_once
from tests.serve.conftest import open_client

playwright = pytest.importorskip('playwright.sync_api', reason='the page is tested with Playwright')
CHROMIUM = shutil.which('chromium')
# Playwright's event loop leaves a socket to the garbage collector.
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason='no chromium, which Debian has as a package'),
    pytest.mark.filterwarnings('ignore::ResourceWarning', 'ignore::pytest.PytestUnraisableExceptionWarning'),
]
DROP = """
([contents, name]) => {
  const data = new DataTransfer();
  for (const content of contents) data.items.add(new File([content], name));
  document.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));
}
"""


@contextlib.contextmanager
def serve(root, **options):
    """Yields the client of a server that listens on a port, and its address."""
    with open_client(root, **options) as client:
        config = uvicorn.Config(client.app, port=0, lifespan='off', log_level='error')
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            pass
        try:
            yield client, f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/'
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    with serve(tmp_path_factory.mktemp('scans')) as (_, address):
        yield address


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    with open_page(browser, address) as page:
        yield page


@contextlib.contextmanager
def open_page(browser, address):
    """Yields the page on a phone, and checks that it has no faults and loads nothing from elsewhere."""
    faults = []
    context = browser.new_context(viewport={'width': 390, 'height': 844}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on('pageerror', lambda error: faults.append(str(error)))
    # A broken Content-Security-Policy is a message on the console.
    page.on('console', lambda message: faults.append(message.text) if message.type == 'error' else None)
    page.on('request', lambda request: request.url.startswith((address, 'blob:')) or faults.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert [fault for fault in faults if 'status of 4' not in fault] == []


def drop(page, *contents, name='Secretname.dcm'):
    page.wait_for_selector('#columns:not([hidden])')
    page.evaluate(DROP, [list(contents), name])


def get_slice(page):
    return page.locator('.caption').inner_text().split(':')[0]


def test_a_scan_from_the_drop_to_its_end(page):
    drop(page, 'slow')
    page.get_by_text('Reading the slices ...').wait_for()
    page.locator('.verdict').get_by_text('COVID-19').wait_for()
    assert page.locator('.headline').inner_text().startswith('The most likely class')
    assert page.locator('#notice').inner_text().startswith('The model was trained on synthetic phantoms')
    assert page.locator('.more').inner_text().split()[:3] == ['Measurements', 'lung', 'volumes,']
    assert page.evaluate('document.documentElement.scrollWidth') == 390

    # By keyboard.
    assert get_slice(page).startswith('Slice 3 of 12')
    page.locator('.stage').focus()
    for key, expected in (('ArrowDown', 4), ('PageDown', 12), ('Home', 1), ('End', 12), ('ArrowUp', 11), ('PageUp', 1)):
        page.keyboard.press(key)
        assert get_slice(page).startswith(f'Slice {expected} of 12')
    for _ in range(3):
        page.keyboard.press('+')
    page.wait_for_selector('canvas.zoomed')
    page.keyboard.press('0')
    page.wait_for_selector('canvas:not(.zoomed)')
    for overlay in ('lesions', 'lungs', '', 'maps'):
        page.keyboard.press('o')
        assert page.locator('.overlay').input_value() == overlay
    page.keyboard.press('w')
    assert page.locator('.window').input_value() == '1'

    # By curve, thumbnail, slider and wheel.
    box = page.locator('.curve svg').bounding_box()
    page.locator('.curve svg').click(position={'x': box['width'] - 10, 'y': 80})
    assert get_slice(page).startswith('Slice 12 of 12')
    page.locator('.thumbs button').nth(3).click()
    assert get_slice(page).startswith('Slice 4 of 12')
    assert page.locator('.thumbs button[aria-current]').inner_text().startswith('Slice 4')
    page.locator('.slider').fill('7')
    assert get_slice(page).startswith('Slice 7 of 12')
    page.locator('canvas').hover()
    page.mouse.wheel(0, 60)
    page.wait_for_function("document.querySelector('.caption').textContent.startsWith('Slice 9 ')")

    # The canvas shows the slice and not one colour.
    colours = page.evaluate(
        """() => { const c = document.querySelector('canvas');
        return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size; }"""
    )
    assert colours > 20

    with page.expect_download() as download:
        page.get_by_role('button', name='JSON').click()
    with open(download.value.path()) as file:
        assert json.load(file)['verdict'] == 'covid19'

    page.reload()
    page.locator('.verdict').get_by_text('COVID-19').wait_for()
    page.get_by_role('button', name='Delete this scan').click()
    page.get_by_text('None yet.').wait_for()
    page.reload()
    page.get_by_text('None yet.').wait_for()


def test_a_real_scan_and_an_x_ray(browser, real_data, tmp_path):
    """Every sixth slice of a real scan, and the lesion model of the package, which gives no verdict."""
    names = (real_data / 'dicom/covid_p001_slices.csv').read_text().split()[1:]
    (tmp_path / 'covid').mkdir()
    for name in [line.split(',')[0] for line in names[::6]]:
        shutil.copy(real_data / 'dicom/covid_p001' / name, tmp_path / 'covid')
    write_x_ray(tmp_path / 'x-ray.png')
    (tmp_path / 'scans').mkdir()
    with serve(tmp_path / 'scans', load=load_run_once) as (_, address), open_page(browser, address) as page:
        page.wait_for_selector('#columns:not([hidden])')
        page.set_default_timeout(300_000)
        page.evaluate(
            """() => { window.seen = new Set();
            new MutationObserver(() => window.seen.add(document.querySelector('.state')?.textContent))
              .observe(document.body, { subtree: true, childList: true, characterData: true }); }"""
        )
        page.locator('#folder').set_input_files(tmp_path / 'covid')
        page.locator('.headline, .reason').wait_for()
        assert re.match('Lesions in [0-9.]+ %', page.locator('.headline, .reason').inner_text())
        assert {'Reading the slices ...', 'Predicting ...'} & set(page.evaluate('[...window.seen]'))
        assert page.locator('.verdict').inner_text() == 'Lungs and lesions'
        assert page.locator('#scans').inner_text().splitlines() == ['covid', 'Predicted']
        assert page.locator('.parts tr').count() == 7
        assert page.evaluate('document.documentElement.scrollWidth') == 390
        page.locator('.stage').focus()
        page.keyboard.press('Home')
        assert get_slice(page).startswith('Slice 1 of 25')
        box = page.locator('.curve svg').bounding_box()
        page.locator('.curve svg').click(position={'x': box['width'] - 10, 'y': 80})
        assert get_slice(page).startswith('Slice 25 of 25')
        with page.expect_download() as download:
            page.get_by_role('button', name='JSON').click()
        with open(download.value.path()) as file:
            assert json.load(file)['lesions']['num_infected'] > 3

        page.locator('#files').set_input_files(tmp_path / 'x-ray.png')
        page.locator('.verdict').get_by_text('Not predicted').wait_for()
        page.get_by_role('button', name='Predict all the same').click()
        page.locator('.warnings .banner').get_by_text('Forced in spite of').wait_for()
        page.get_by_role('button', name='Delete this scan').click()
        page.reload()
        page.locator('.headline').get_by_text('Lesions in').wait_for()
        assert page.locator('#scans li').count() == 1


def write_x_ray(path):
    """Writes a picture that is like an X-ray of a chest: bright in the middle, two grey lungs, no air around it."""
    rows, columns = np.mgrid[:256, :256] / 256
    grey = 60 + 140 * np.exp(-(((columns - 0.5) / 0.08) ** 2)) + 80 * np.exp(-(((rows - 0.9) / 0.2) ** 2))
    for centre in (0.3, 0.7):
        grey -= 50 * (((columns - centre) / 0.14) ** 2 + ((rows - 0.45) / 0.3) ** 2 < 1)
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(path)


def test_a_refusal_is_read_and_forced(page):
    drop(page, 'doubt')
    page.locator('.verdict').get_by_text('Not predicted').wait_for()
    assert page.locator('.reason').inner_text() == 'The greys do not part: an X-ray?'
    page.get_by_role('button', name='Predict all the same').click()
    page.locator('.banner').get_by_text('Forced in spite of: an X-ray?.').wait_for()


def test_a_series_is_chosen(page):
    drop(page, 'studies')
    page.locator('.series input').fill('3')
    page.get_by_role('button', name='Predict this series').click()
    page.locator('.verdict').get_by_text('COVID-19').wait_for()


def test_the_queue_shows_places_and_the_names_of_files_stay_in_the_browser(page):
    page.evaluate(
        """() => { window.sent = []; const { append } = FormData.prototype;
        FormData.prototype.append = function (...values) {
          window.sent.push(values[2]);
          append.apply(this, values);
        }; }"""
    )
    for name in ('Secretname 1.dcm', 'Secretname 2.dcm', 'Secretname 3.dcm'):
        drop(page, 'slow', name=name)
    # The newest is at the top. Each may be next for a moment.
    page.locator('#scans li').nth(0).get_by_text('Number 2 in the queue').wait_for()
    page.locator('#scans li').nth(1).get_by_text('Next in the queue').wait_for()
    page.locator('#scans li').nth(2).get_by_text('COVID-19').wait_for()
    assert page.evaluate('window.sent') == ['00001.dcm'] * 3


def test_what_is_too_large_is_refused_before_the_upload(page):
    page.wait_for_selector('#columns:not([hidden])')
    page.evaluate(
        """() => { const data = new DataTransfer();
        for (let i = 0; i < 5001; i += 1) data.items.add(new File(['x'], `${i}`));
        document.querySelector('#files').files = data.files;
        document.querySelector('#files').dispatchEvent(new Event('change')); }"""
    )
    page.locator('.reason').get_by_text('More than 5,000 files.').wait_for()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe_finds_no_serious_fault(page, scheme):
    axe = pytest.importorskip(
        'axe_playwright_python.sync_playwright', reason='axe-core comes with axe-playwright-python'
    )
    page.emulate_media(color_scheme=scheme)
    for wish, place in (('', '#drop'), ('doubt', '.refusal'), ('hang', 'progress'), ('good', None)):
        if wish == 'good':
            page.get_by_role('button', name='Cancel and delete').click()
        if wish:
            drop(page, wish)
        page.locator(place or '.thumbs img[src^=blob]').first.wait_for()
        found = axe.Axe().run(page).response['violations']
        assert [(fault['id'], fault['nodes'][0]['html']) for fault in found] == []


def test_a_server_with_a_token_asks_for_it(browser, tmp_path):
    with serve(tmp_path, token='t' * 20) as (_, address):
        page = browser.new_page()
        page.goto(address)
        page.get_by_label('Token of this server').fill('wrong')
        page.get_by_role('button', name='Continue').click()
        page.get_by_text('The server does not take this token.').wait_for()
        page.get_by_label('Token of this server').fill('t' * 20)
        page.get_by_role('button', name='Continue').click()
        drop(page, 'good')
        page.locator('.thumbs img[src^=blob]').first.wait_for(state='attached')
        page.close()
