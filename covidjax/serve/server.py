"""`covidjax serve`: checks the options, loads the run, and serves the page until it is stopped."""

import importlib.util
import ipaddress
import logging
import socket
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from covidjax.errors import UserError
from covidjax.serve.app import Server
from covidjax.serve.folder import open_folder
from covidjax.serve.limits import Limits
from covidjax.serve.scans import Scans
from covidjax.serve.worker import Load, Worker, load_run_once

log = logging.getLogger(__name__)

LOOPBACK = '127.0.0.1'
PORT = 8765
KEEP_MINUTES = 30.0
_MIN_TOKEN = 16  # characters
_HEADER_SECONDS = 30


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections on which no request arrives in time; uvicorn would wait forever."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(_HEADER_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def serve(
    workdir: Path | None,
    *,
    host: str | None = None,
    port: int | None = None,
    token_file: Path | None = None,
    keep_minutes: float | None = None,
    dicom: bool = False,
    limits: Limits | None = None,
    load: Load = load_run_once,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM, and then deletes all scans.

    Args:
      workdir: see `runs.load_run`.
      host: address to listen on; None for this machine only.
      port: None for `PORT`; 0 for a free one.
      token_file: holds the token that clients must send.
      keep_minutes: scans are deleted this long after their prediction; None for `KEEP_MINUTES`.
      dicom: offers DICOM results, which name the patient.
      limits: None for the defaults.
      load: how the worker loads the run.

    Raises:
      UserError: an option or the run is no good, or the port is taken.
    """
    limits, keep_minutes = limits or Limits(), KEEP_MINUTES if keep_minutes is None else keep_minutes
    if dicom and importlib.util.find_spec('highdicom') is None:
        raise UserError("--dicom needs highdicom: pip install 'covidjax[dicom]'")
    if not 0 < keep_minutes <= 24 * 60:
        raise UserError(f'--keep_minutes={keep_minutes:g}: it must be above 0, and at most 1440')
    token = None if token_file is None else read_token(token_file)
    if host is not None and token is None and not is_loopback(host):
        raise UserError(f'--host={host} opens the server to other machines: pass --token_file=<file with a secret> too')
    address = host or LOOPBACK
    opened = _open_socket(address, PORT if port is None else port)
    worker = Worker(load, workdir, limits, dicom=dicom)
    with opened, open_folder() as folder:
        about = worker.start() | {'keep_minutes': keep_minutes}
        app = Server(Scans(folder, limits, 60 * keep_minutes), worker, limits, about).create_app(
            host=address, token=token
        )
        shown = f'[{address}]' if ':' in address else address
        print(
            f'Open http://{shown}:{opened.getsockname()[1]}/ (Ctrl-C ends the server and deletes all scans)', flush=True
        )
        if about['notice']:
            print('The model was trained on phantoms: its verdicts say nothing about patients.', flush=True)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws='none',
            access_log=False,  # it would show the ids of scans, which open them
            log_level='warning',
            server_header=False,
            timeout_graceful_shutdown=3,
        )
        try:
            uvicorn.Server(config).run(sockets=[opened])
        except KeyboardInterrupt:
            pass
        finally:
            worker.stop()
    print('Stopped; all scans are deleted.', flush=True)


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach an address."""
    try:
        return host == 'localhost' or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """Returns the token in a file.

    Raises:
      UserError: the file is unreadable, others may read it, or the token is too short or has spaces.
    """
    try:
        token, mode = path.read_text(encoding='ascii').strip(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--token_file={path}: not a readable file with an ASCII token') from error
    if mode & 0o077:
        raise UserError(f'--token_file={path}: other users may read it: chmod 600 {path}')
    if len(token) < _MIN_TOKEN or not token.isprintable() or ' ' in token:
        raise UserError(
            f'--token_file={path}: the token must have {_MIN_TOKEN} characters or more and no space, e.g. of '
            'openssl rand -hex 16'
        )
    return token


def _open_socket(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    opened = socket.socket(family)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((address, port))
        opened.listen(128)  # now, so that a client may connect as soon as the address is printed
    except (OSError, OverflowError) as error:
        opened.close()
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'cannot listen on {address}, port {port} ({reason}): choose another --port') from error
    return opened
