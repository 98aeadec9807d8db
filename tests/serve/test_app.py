import io
import json
import re
import time

import pytest
from PIL import Image
from starlette.routing import Route

from covidjax.serve.app import STATIC
from tests.serve import fake
from tests.serve.conftest import open_client


def get_error(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()['error']
    assert error['status'] == status
    assert error['message'][-1] in '.?'
    return error


class TestPredicting:
    def test_a_scan_is_predicted_and_every_result_is_there(self, client):
        answer = client.upload(b'good', b'slice')
        assert answer.headers['location'] == f'/api/scans/{answer.json()["id"]}'
        scan = answer.headers['location']
        status = client.wait(answer.json()['id'])
        assert status['state'] == 'done'
        assert status['view']['headline'].startswith('The most likely class')
        assert status['files'] == ['prediction.html', 'prediction.json', 'slices.csv']
        assert 1700 < status['deleted_in_seconds'] <= 1800
        assert client.get(f'{scan}/prediction.json').json()['verdict'] == 'covid19'
        for layer in ('slices', 'maps', 'lungs', 'lesions'):
            picture = client.get(f'{scan}/{layer}/12.png')
            assert picture.headers['content-type'] == 'image/png'
            assert Image.open(io.BytesIO(picture.content)).size == (64, 64)
        page = client.get(f'{scan}/prediction.html')
        assert page.headers['content-disposition'] == 'attachment; filename="prediction.html"'
        assert 'sandbox' in page.headers['content-security-policy']
        for missing in (f'{scan}/slices/13.png', f'{scan}/slices/0.png', f'{scan}/dicom.zip'):
            assert get_error(client.get(missing), 404)['code'] == 'none'
        for missing in (f'{scan}/view.json', f'{scan}/source/1.png', f'{scan}/slices/x.png', '/nowhere'):
            assert get_error(client.get(missing), 404)['code'] == 'address'

    def test_what_is_doubtful_is_refused_until_it_is_forced(self, client):
        status = client.predict(b'doubt')
        assert status['error'] == {
            'status': 422,
            'code': 'doubts',
            'message': 'The greys do not part: an X-ray?',
            'can_force': True,
        }
        scan = f'/api/scans/{status["id"]}'
        assert get_error(client.get(f'{scan}/prediction.json'), 422)['code'] == 'doubts'
        assert client.post(f'{scan}/predict?force=true').status_code == 202
        status = client.wait(status['id'])
        assert (status['state'], status['forced']) == ('done', True)
        assert client.get(f'{scan}/prediction.json').json()['forced'] == ['an X-ray?']
        assert client.predict(b'doubt', params={'force': 'true'})['state'] == 'done'

    def test_a_refused_scan_may_have_a_report_in_dicom(self, client):
        status = client.predict(b'doubt, dicom')
        assert status['files'] == ['dicom.zip']
        assert client.get(f'/api/scans/{status["id"]}/dicom.zip').content == b'a report'
        assert get_error(client.get(f'/api/scans/{status["id"]}/prediction.json'), 422)['code'] == 'doubts'

    def test_a_series_can_be_chosen(self, client):
        status = client.predict(b'studies')
        assert status['error']['message'] == (
            'Slices of several studies, choose one by its number: series 3: 20 slices.'
        )
        client.post(f'/api/scans/{status["id"]}/predict?series=3a')
        assert client.wait(status['id'])['state'] == 'done'
        assert client.get(f'/api/scans/{status["id"]}/prediction.json').json()['series_wanted'] == '3a'
        for series in ('3/..', 'x' * 17):
            assert get_error(client.upload(b'x', params={'series': series}), 400)['code'] == 'series'
        assert get_error(client.upload(b'x', params={'force': 'maybe'}), 400)['code'] == 'force'

    def test_the_queue_tells_the_place_and_runs_one_at_a_time(self, client):
        names = [client.upload(wish).json()['id'] for wish in (b'hang', b'slow', b'slow')]
        client.wait(names[0], 'running')
        states = [client.get(f'/api/scans/{name}').json() for name in names]
        assert [(one['state'], one['place']) for one in states] == [('running', None), ('queued', 1), ('queued', 2)]
        early = client.get(f'/api/scans/{names[2]}/prediction.json')
        assert get_error(early, 409)['code'] == 'early'
        assert get_error(client.post(f'/api/scans/{names[1]}/predict'), 409)['code'] == 'busy'
        assert client.delete(f'/api/scans/{names[1]}').status_code == 204
        assert client.get(f'/api/scans/{names[2]}').json()['place'] == 1
        client.delete(f'/api/scans/{names[0]}')
        assert client.wait(names[2])['state'] == 'done'

    def test_unexpected_errors_do_not_quote_headers(self, client, caplog, capfd):
        status = client.predict(b'error')
        assert re.search(r'ValueError in fake.py, line \d+', status['error']['message'])
        assert fake.SECRET not in json.dumps(status) + caplog.text + ''.join(capfd.readouterr())


class TestDeleting:
    def test_a_deleted_scan_leaves_nothing(self, client):
        status = client.predict(b'good')
        assert any(file.startswith(status['id']) for file in client.list_files())
        assert client.delete(f'/api/scans/{status["id"]}').status_code == 204
        assert not any(file.startswith(status['id']) for file in client.list_files())
        for answer in (client.get(f'/api/scans/{status["id"]}'), client.delete(f'/api/scans/{status["id"]}')):
            assert get_error(answer, 404)['code'] == 'unknown'

    def test_deleting_a_running_scan_stops_the_worker(self, client):
        name = client.upload(b'hang').json()['id']
        client.wait(name, 'running')
        before, start = client.worker.num_starts, time.monotonic()
        assert client.delete(f'/api/scans/{name}').status_code == 204
        assert client.predict(b'good')['state'] == 'done'
        assert time.monotonic() - start < 50  # and not the minute that it would have run
        assert client.worker.num_starts == before + 1
        assert not any(file.startswith(name) for file in client.list_files())

    def test_scans_expire(self, tmp_path):
        with open_client(tmp_path, keep_seconds=0.1) as client:
            status = client.predict(b'good')
            for _ in range(100):
                # The folder is deleted after the scan has left the list.
                if client.get(f'/api/scans/{status["id"]}').status_code == 404 and not client.list_files():
                    break
                time.sleep(0.05)
            assert client.get(f'/api/scans/{status["id"]}').status_code == 404
            assert client.list_files() == []


class TestLimits:
    """Each limit has a status and a sentence, and the server goes on."""

    def test_sizes_of_uploads(self, tmp_path):
        with open_client(tmp_path, upload_bytes=50_000, num_files=10) as client:
            assert 'larger than 0.05 MB' in get_error(client.upload(b'x' * 60_000), 413)['message']
            assert get_error(client.upload(*[b'x'] * 11), 413)['code'] == 'files'
            assert client.list_files() == []
            assert client.predict(*[b'x'] * 10)['state'] == 'done'

    def test_ten_thousand_files(self, client):
        parts = [
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="%d.dcm"\r\n\r\nx\r\n' % number
            for number in range(10_000)
        ]
        headers = {'Content-Type': 'multipart/form-data; boundary=x'}
        answer = client.post('/api/scans', content=b''.join(parts) + b'--x--\r\n', headers=headers)
        assert get_error(answer, 413)['message'] == 'More than 5,000 files. Upload a single series, or a zip.'

    def test_the_queue(self, tmp_path):
        with open_client(tmp_path, num_waiting=2) as client:
            names = [client.upload(wish).json()['id'] for wish in (b'hang', b'slow')]
            answer = client.upload(b'good')
            assert get_error(answer, 429)['code'] == 'queue'
            assert answer.headers['retry-after'] == '10'
            client.delete(f'/api/scans/{names[0]}')
            client.wait(names[1])
            assert client.predict(b'good')['state'] == 'done'

    def test_the_disk(self, tmp_path):
        with open_client(tmp_path, disk_bytes=100_000) as client:
            first = client.predict(b'good' + bytes(90_000))
            assert get_error(client.upload(b'good' + bytes(90_000)), 429)['code'] == 'disk'
            client.delete(f'/api/scans/{first["id"]}')
            assert client.predict(b'good')['state'] == 'done'

    @pytest.mark.parametrize(('wish', 'code', 'status'), [('hang', 'time', 422), ('hungry', 'memory', 413)])
    def test_time_and_memory(self, tmp_path, wish, code, status):
        with open_client(tmp_path, predict_seconds=20 if wish == 'hungry' else 5, memory_bytes=300_000_000) as client:
            error = client.predict(wish.encode())['error']
            assert (error['code'], error['status']) == (code, status)
            assert client.predict(b'good')['state'] == 'done'

    def test_a_crash_of_a_decoder_ends_the_worker_only(self, client):
        before = client.worker.num_starts
        assert client.predict(b'crash')['error']['code'] == 'crash'
        assert client.predict(b'good')['state'] == 'done'
        assert client.worker.num_starts == before + 1
        assert client.get('/healthz').json() == {'status': 'ok'}

    def test_a_bomb(self, client):
        error = client.predict(b'bomb')['error']
        assert (error['status'], error['code']) == (413, 'unpacked')
        assert error['message'] == 'Unpacks to more than 200 times its size, taken for a zip bomb.'


class TestUploads:
    def test_names_order_the_files_and_never_become_paths(self, client):
        names = [
            '../../etc/cron.d/10',
            'C:\\a\\2.PNG',
            '/etc/passwd.nii.gz',
            f'{fake.SECRET}9',
            'a' * 900,
            '..',
            'x/../..',
        ]
        before = set(client.list_files())
        scan = client.upload(*(name.encode() for name in names), names=names).json()['id']
        client.wait(scan)
        found = {
            file: (client.root / file).read_bytes().decode()
            for file in set(client.list_files()) - before
            if '/source/' in file
        }
        assert all(re.fullmatch(rf'{scan}/source/0000\d(\.png|\.nii\.gz)?', file) for file in found)
        assert sorted(found.values()) == sorted(names)
        assert found[f'{scan}/source/00002'] == '..'
        assert not any(fake.SECRET in file for file in client.list_files())

    def test_images_keep_their_natural_order(self, client):
        names = ['slice10.png', 'slice9.png', 'slice100.png']
        scan = client.upload(*(name.encode() for name in names), names=names).json()['id']
        client.wait(scan)
        found = [file.read_text() for file in sorted((client.root / scan / 'source').iterdir())]
        assert found == ['slice9.png', 'slice10.png', 'slice100.png']

    @pytest.mark.parametrize(
        ('kind', 'body', 'status', 'code'),
        [
            ('application/zip', b'PK', 415, 'type'),
            ('multipart/form-data', b'', 415, 'type'),
            ('multipart/form-data; boundary=x', b'--x\r\n\r\nno end', 400, 'empty'),
            ('multipart/form-data; boundary=x', b'nothing of the kind', 400, 'multipart'),
            ('multipart/form-data; boundary=x', b'--x\r\nA: ' + b'b' * 5_000, 400, 'multipart'),
            ('multipart/form-data; boundary=x', b'--x\r\n' + b'A: b\r\n' * 100, 400, 'multipart'),
            ('multipart/form-data; boundary=' + 'x' * 3_000, b'', 400, 'multipart'),
        ],
    )
    def test_damaged_requests(self, client, kind, body, status, code):
        before = client.list_files()
        answer = client.post('/api/scans', content=body, headers={'Content-Type': kind})
        assert get_error(answer, status)['code'] == code
        assert client.list_files() == before

    def test_a_detached_header_is_refused(self, client):
        assert get_error(client.upload(b'x', names=['a.mhd']), 415)['code'] == 'detached'

    def test_a_form_without_a_file(self, client):
        assert get_error(client.post('/api/scans', files=[('files', ('', b''))]), 400)['code'] == 'empty'


class TestAccess:
    @pytest.mark.parametrize(
        'host', ['evil.example', 'evil.example:8765', '127.0.0.1.evil.example', '', '[::1', 'a@b@c']
    )
    def test_foreign_hosts(self, client, host):
        assert get_error(client.get('/', headers={'Host': host}), 421)['code'] == 'host'

    @pytest.mark.parametrize('host', ['localhost:1', '127.0.0.1', '[::1]:8765', '10.1.2.3:8765'])
    def test_own_hosts(self, client, host):
        assert client.get('/healthz', headers={'Host': host}).status_code == 200

    @pytest.mark.parametrize(
        'headers',
        [
            {'Origin': 'http://evil.example'},
            {'Origin': 'http://127.0.0.1:9999'},
            {'Origin': 'null'},
            {'Sec-Fetch-Site': 'cross-site'},
            {'Sec-Fetch-Site': 'same-site'},
        ],
    )
    def test_requests_of_other_sites(self, client, headers):
        scan = f'/api/scans/{client.predict(b"good")["id"]}'
        assert get_error(client.upload(b'good', headers=headers), 403)['code'] == 'origin'
        assert get_error(client.delete(scan, headers=headers), 403)['code'] == 'origin'
        assert get_error(client.get(f'{scan}/prediction.json', headers=headers), 403)['code'] == 'origin'
        assert client.get(scan, headers={'Origin': 'http://127.0.0.1:8765'}).status_code == 200

    def test_tokens(self, tmp_path):
        with open_client(tmp_path, token='s' * 20) as client:
            for headers in (
                {},
                {'Authorization': 'Bearer no'},
                {'Authorization': 's' * 20},
                {'Authorization': 'Bearer é'.encode()},
            ):
                for path in ('/api/about', '/api/scans/x', '/metrics'):
                    answer = client.get(path, headers=headers)
                    assert get_error(answer, 401)['code'] == 'token'
                    assert answer.headers['www-authenticate'] == 'Bearer'
            for path in ('/', '/static/page.js', '/healthz', '/openapi.json'):
                assert client.get(path).status_code == 200
            client.headers['Authorization'] = f'Bearer {"s" * 20}'
            assert client.predict(b'good')['state'] == 'done'

    def test_answers_load_nothing_from_elsewhere(self, client):
        for path in ('/', '/static/page.js', '/static/page.css', '/api/about', '/nowhere', '/static/../app.py'):
            answer = client.get(path)
            assert "default-src 'none'" in answer.headers['content-security-policy']
            assert 'unsafe' not in answer.headers['content-security-policy']
            assert answer.headers['x-content-type-options'] == 'nosniff'
            assert answer.headers['cache-control'] == 'no-store'
        page = client.get('/').text
        assert not re.search(r'<style|style=|<script(?![^>]*src="/static/)|\son\w+=|https?://', page)
        assert client.get('/static/%2e%2e/app.py').status_code == 404


def test_the_description_names_every_route_and_answer(client):
    description = client.get('/openapi.json').json()
    described = {
        (path, method.upper()) for path, of in description['paths'].items() for method in of.keys() - {'parameters'}
    }
    routes = {
        (route.path.replace(':int', ''), method)
        for route in client.app.routes
        if isinstance(route, Route) and route.path not in ('/', '/openapi.json')
        for method in route.methods - {'HEAD'}
    }
    assert described == routes
    scan = client.predict(b'good')
    schemas = description['components']['schemas']
    assert set(scan) == set(schemas['Scan']['properties'])
    assert set(client.get('/api/about').json()) == set(schemas['About']['properties'])
    validator = pytest.importorskip('openapi_spec_validator', reason='to check openapi.json')
    validator.validate(description)


def test_metrics(tmp_path):
    with open_client(tmp_path) as client:
        client.predict(b'good')
        client.predict(b'doubt')
        client.get('/nowhere')
        text = client.get('/metrics').text
    for line in (
        'covidjax_predictions_total{outcome="done"} 1',
        'covidjax_predictions_total{outcome="doubts"} 1',
        'covidjax_scans{state="done"} 1',
        'covidjax_requests_total{status="404"} 1',
        'covidjax_refusals_total{code="doubts"} 1',
        'covidjax_worker_starts_total 1',
        '# TYPE covidjax_disk_bytes gauge',
    ):
        assert line in text.splitlines()


def test_everything_of_the_page_is_in_the_package():
    page = (STATIC / 'index.html').read_text()
    scripts = ''.join(file.read_text() for file in STATIC.glob('*.js'))
    names = re.findall(r'/static/([\w.]+)', page) + re.findall(r"from '\./(\w+\.js)'", scripts)
    assert len(names) > 6
    assert set(names) <= {file.name for file in STATIC.iterdir()}
