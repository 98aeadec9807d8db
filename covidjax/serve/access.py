"""Who may talk to the server: checks of Host, Origin and token, and the headers of every answer."""

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from covidjax.serve.limits import Refused

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    'Content-Security-Policy': _POLICY,
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',
    'Cache-Control': 'no-store',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Cross-Origin-Opener-Policy': 'same-origin',
}
_OPEN = ('/', '/openapi.json', '/healthz')  # without a token


class Access:
    """ASGI middleware that refuses foreign requests.

    Args:
      app: what it guards.
      host: value of --host, a further name of this server.
      token: what clients of /api and /metrics must send as `Authorization: Bearer`; None for no check.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str | None):
        self._app, self._token = app, token
        self._names = {'localhost', host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message['type'] == 'http.response.start':
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope['method'], scope['path'], Headers(scope=scope))
        except Refused as refused:
            await respond_refused(refused)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = headers.get('host', '')
        if not self._is_own(host):
            # A page of another site may have pointed its own name at this address (DNS rebinding).
            raise Refused(421, 'host', 'This server does not answer to that host name. Open it by its address.')
        origin, site = headers.get('origin'), headers.get('sec-fetch-site', 'none')
        is_foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if is_foreign or (site not in ('same-origin', 'none') and path.startswith('/api')):
            raise Refused(403, 'origin', 'Pages of other sites may not use this server.')
        is_open = path in _OPEN or path.startswith('/static/')
        if self._token is not None and not is_open:
            scheme, _, given = headers.get('authorization', '').partition(' ')
            if scheme.lower() != 'bearer' or not hmac.compare_digest(given.encode(), self._token.encode()):
                raise Refused(401, 'token', 'Send the token of this server as Authorization: Bearer <token>.')

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f'//{host}').hostname or ''
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True  # an address can't be rebound


def respond_refused(refused: Refused) -> JSONResponse:
    """Returns the answer for a refused request."""
    headers = {}
    if refused.status == 429:
        headers['Retry-After'] = '10'
    if refused.status == 401:
        headers['WWW-Authenticate'] = 'Bearer'
    if refused.status in (400, 408, 413, 415, 429):
        headers['Connection'] = 'close'  # the rest of an upload may still come
    return JSONResponse({'error': refused.describe()}, refused.status, headers)
