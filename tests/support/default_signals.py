"""Restore the default handlers of signals that the caller of the tests ignores."""

import signal

DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


def restore_signals() -> None:
    """Restore the default handler of each signal that the caller ignores, so that tests can interrupt their processes.

    A shell ignores SIGINT for its background jobs, `nohup` ignores SIGHUP, and child processes inherit this.
    """
    for number, handler in DEFAULT_HANDLERS.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
