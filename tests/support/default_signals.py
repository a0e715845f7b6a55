"""Signals that the caller of the tests ignores get their defaults again."""

import signal

DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


def restore_signals() -> None:
    """Give signals that the caller ignores their default again, so that the processes of tests can be interrupted.

    A shell ignores SIGINT for its background jobs, and `nohup` SIGHUP; a child inherits that.
    """
    for number, handler in DEFAULT_HANDLERS.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
