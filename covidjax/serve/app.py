"""The web application: the page, and the same as REST. openapi.json in static/ describes it."""

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from covidjax.serve.access import Access, respond_refused
from covidjax.serve.limits import Limits, Refused
from covidjax.serve.metrics import CONTENT_TYPE, Metrics
from covidjax.serve.scans import Scan, Scans
from covidjax.serve.upload import drain, receive_files
from covidjax.serve.worker import Job, Worker

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / 'static'
_EXPIRE_SECONDS = 2.0
_MAX_SERIES = 16  # characters
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"  # of prediction.html
_FILES = {  # results that can be downloaded: content type, by name
    'prediction.html': 'text/html; charset=utf-8',
    'prediction.json': 'application/json',
    'slices.csv': 'text/csv; charset=utf-8',
    'dicom.zip': 'application/zip',
}
_LAYERS = ('slices', 'maps', 'lungs', 'lesions')


class Server:
    """The state of a server and its request handlers.

    Args:
      scans: the scans.
      worker: predicts them.
      limits: of the server.
      about: facts on the model, for the page.
    """

    def __init__(self, scans: Scans, worker: Worker, limits: Limits, about: dict[str, Any]):
        self._scans, self._worker, self._limits, self._about = scans, worker, limits, about
        self.metrics = Metrics()
        self._runner = threading.Thread(target=self._run_queue, name='queue', daemon=True)

    def create_app(self, *, host: str, token: str | None) -> Starlette:
        """Returns the ASGI application; see `Access` for the arguments."""
        scan = '/api/scans/{id}'
        return Starlette(
            routes=[
                Route('/', self.show_page),
                Route('/openapi.json', self.show_description),
                Route('/healthz', self.show_health),
                Route('/metrics', self.show_metrics),
                Route('/api/about', self.show_about),
                Route('/api/scans', self.add_scan, methods=['POST']),
                Route(scan, self.show_scan, methods=['GET']),
                Route(scan, self.delete_scan, methods=['DELETE']),
                Route(f'{scan}/predict', self.predict_again, methods=['POST']),
                Route(f'{scan}/{{layer}}/{{number:int}}.png', self.show_picture),
                Route(f'{scan}/{{name}}', self.show_file),
                Mount('/static', StaticFiles(directory=STATIC)),
            ],
            middleware=[
                Middleware(_Counting, metrics=self.metrics),
                Middleware(Access, host=host, token=token),
            ],
            exception_handlers={Refused: self._refuse, HTTPException: _describe_http_error},
            lifespan=self._live,
        )

    @contextlib.asynccontextmanager
    async def _live(self, app: Starlette) -> AsyncIterator[None]:
        self._runner.start()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._expire)
            yield
            tasks.cancel_scope.cancel()
        self._scans.close()
        await anyio.to_thread.run_sync(self._runner.join)
        self._worker.stop()

    async def _expire(self) -> None:
        while True:
            await anyio.sleep(_EXPIRE_SECONDS)
            await anyio.to_thread.run_sync(self._scans.expire)

    def _run_queue(self) -> None:
        """Predicts one scan after the other until the server closes."""
        while (scan := self._scans.take()) is not None:
            start, refused = time.monotonic(), None
            try:
                job = Job(scan.source, scan.results, scan.series, scan.force)
                self._worker.predict(job, lambda stage: setattr(scan, 'stage', stage), lambda: scan.is_deleted)
            except Refused as error:
                refused = error
                self.metrics.count('refusals_total', f'code="{error.code}"')
            except Exception as error:
                # The message may quote a header.
                log.error('unexpected %s in the queue', type(error).__name__)
                refused = Refused(422, 'error', f'Unexpected error ({type(error).__name__}). Please report it.')
            self._scans.finish(scan, refused)
            seconds = time.monotonic() - start
            self.metrics.count('predictions_total', f'outcome="{"done" if refused is None else refused.code}"')
            self.metrics.count('prediction_seconds_total', amount=seconds)
            log.info('scan %s in %.1f s', 'predicted' if refused is None else f'refused ({refused.code})', seconds)

    def _refuse(self, request: Request, refused: Refused) -> Response:
        self.metrics.count('refusals_total', f'code="{refused.code}"')
        return respond_refused(refused)

    # -----------------------------------------------------------------------------------------------------------------
    # Handlers

    def show_page(self, request: Request) -> Response:
        """Returns the page."""
        return Response((STATIC / 'index.html').read_bytes(), media_type='text/html; charset=utf-8')

    def show_description(self, request: Request) -> Response:
        """Returns the OpenAPI description."""
        return Response((STATIC / 'openapi.json').read_bytes(), media_type='application/json')

    def show_health(self, request: Request) -> Response:
        """Says whether the queue is served."""
        is_well = self._runner.is_alive()
        return JSONResponse({'status': 'ok' if is_well else 'the queue stopped'}, 200 if is_well else 503)

    def show_metrics(self, request: Request) -> Response:
        """Returns counters for Prometheus."""
        gauges = {('scans', f'state="{state}"'): count for state, count in self._scans.count_states().items()}
        gauges['disk_bytes', ''] = self._scans.num_bytes
        gauges['worker_starts_total', ''] = self._worker.num_starts
        gauges['worker_memory_bytes', ''] = self._worker.memory_bytes
        return Response(self.metrics.format(gauges), headers={'Content-Type': CONTENT_TYPE})

    def show_about(self, request: Request) -> Response:
        """Returns facts on the model and the limits."""
        return JSONResponse(self._about | {'limits': dataclasses.asdict(self._limits)})

    async def add_scan(self, request: Request) -> Response:
        """Receives a scan and puts it into the queue."""
        try:
            options = _read_options(request)
            scan = self._scans.open()
        except Refused:
            await drain(request)
            raise
        try:
            await receive_files(request, scan.source, self._limits, lambda size: self._scans.add_bytes(scan, size))
            self._scans.enqueue(scan, **options)
        except BaseException:
            with contextlib.suppress(Refused):
                self._scans.delete(scan.id)
            raise
        return JSONResponse(self._describe(scan), 202, {'Location': f'/api/scans/{scan.id}'})

    def predict_again(self, request: Request) -> Response:
        """Puts a scan into the queue again, to force it or for another series."""
        scan = self._scans.get(request.path_params['id'])
        self._scans.enqueue(scan, **_read_options(request))
        return JSONResponse(self._describe(scan), 202)

    def show_scan(self, request: Request) -> Response:
        """Returns the state of a scan, and what the page shows of a finished one."""
        return JSONResponse(self._describe(self._scans.get(request.path_params['id'])))

    def _describe(self, scan: Scan) -> dict[str, Any]:
        facts = self._scans.describe(scan) | {'view': None, 'files': []}
        if facts['state'] == 'done':
            # It may be deleted at any time.
            with contextlib.suppress(OSError):
                facts['view'] = json.loads((scan.results / 'view.json').read_bytes())
        if facts['state'] in ('done', 'refused'):
            facts['files'] = [name for name in _FILES if (scan.results / name).exists()]
        return facts

    def delete_scan(self, request: Request) -> Response:
        """Deletes a scan and stops its prediction."""
        self._scans.delete(request.path_params['id'])
        return Response(status_code=204)

    def show_file(self, request: Request) -> Response:
        """Returns a result as a download."""
        name = request.path_params['name']
        if name not in _FILES:
            raise HTTPException(404)
        data = self._read(request, name)
        headers = {'Content-Disposition': f'attachment; filename="{name}"', 'Content-Type': _FILES[name]}
        if name == 'prediction.html':
            headers['Content-Security-Policy'] = _PAGE_POLICY
        return Response(data, headers=headers)

    def show_picture(self, request: Request) -> Response:
        """Returns a slice, or its map, lungs or lesions."""
        layer = request.path_params['layer']
        if layer not in _LAYERS:
            raise HTTPException(404)
        return Response(self._read(request, f'{layer}/{request.path_params["number"]}.png'), media_type='image/png')

    def _read(self, request: Request, name: str) -> bytes:
        """Returns a result of a scan. `name` is one of a fixed list, with at most a number of the client in it."""
        scan = self._scans.get(request.path_params['id'])
        has_report = name == 'dicom.zip' and (scan.results / name).exists()
        if scan.state == 'refused' and scan.refused is not None and not has_report:
            raise scan.refused
        if scan.state not in ('done', 'refused'):
            raise Refused(409, 'early', f'The scan is {scan.state}. Ask for its state, and come back when it is done.')
        try:
            return (scan.results / name).read_bytes()
        except OSError as error:
            raise Refused(404, 'none', 'This scan has no such result.') from error


def _read_options(request: Request) -> dict[str, Any]:
    """Returns the query parameters 'series' and 'force'."""
    series = request.query_params.get('series') or None
    if series is not None and (len(series) > _MAX_SERIES or not series.isalnum()):
        raise Refused(400, 'series', 'series must be a number, and a letter if several series share it.')
    force = request.query_params.get('force', 'false')
    if force not in ('true', 'false'):
        raise Refused(400, 'force', 'force must be true or false.')
    return {'series': series, 'force': force == 'true'}


def _describe_http_error(request: Request, error: HTTPException) -> Response:
    message = {404: 'There is no such address.', 405: 'This address does not take this method.'}
    code = {404: 'address', 405: 'method'}.get(error.status_code, 'http')
    refused = Refused(error.status_code, code, message.get(error.status_code, error.detail))
    response = respond_refused(refused)
    response.headers.update(error.headers or {})
    return response


class _Counting:
    """ASGI middleware that counts answers by status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            if message['type'] == 'http.response.start':
                self._metrics.count('requests_total', f'status="{message["status"]}"')
            await send(message)

        await self._app(scope, receive, send_counted if scope['type'] == 'http' else send)
