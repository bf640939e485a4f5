"""Serve from several processes: the first accepts connections and hands each to the next process in turn.

A connection's descriptor goes through a socket pair. A process whose pair is closed (the first one stops, or is gone) takes no more
connections and ends after its answers; signals are for the first process alone.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

from pipeline.core.stage import StageError

MAX_PROCESSES = 4  # by default
_BACKLOG = 1024  # connections that wait to be accepted
_READY = b"r"
_POLL_S, _KILL_AFTER_S = 0.1, 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C and service managers send them to all processes

Serve = Callable[..., Coroutine[Any, Any, None]]
"""Takes the channel, the number of its process, and the arguments; returns after the channel has ended."""


def default_processes() -> int:
    """One per CPU that this process may use, at most MAX_PROCESSES."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MAX_PROCESSES)


def listen_on(bound: socket.socket) -> None:
    """Let a bound socket listen. Raises OSError, naming the address, when another program listens there."""
    bound.setblocking(False)
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        where = bound.getsockname()[:2]
        bound.close()
        raise OSError(
            error.errno, f"error while attempting to listen on {where}: {os.strerror(error.errno or 0)}"
        ) from None


class ServingProcesses:
    """The processes of one server.

    Args:
        serve: a function of a module, which a new process imports.
        arguments: as for `multiprocessing.Process`.
    """

    def __init__(self, number: int, serve: Serve, arguments: Sequence[object]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the libraries' threads and locks
        self._channels: list[socket.socket] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        resource_tracker.ensure_running()  # starting it unblocks signals
        with _signals_blocked():
            for position in range(number):
                ours, theirs = socket.socketpair()
                with theirs:
                    process = context.Process(target=_run, args=(serve, theirs, position, *arguments), daemon=True)
                    process.start()
                ours.setblocking(False)
                self._channels.append(ours)
                self._processes.append(process)

    async def ready(self) -> None:
        """Wait until all can answer. Raises StageError when one ends before."""
        for channel in self._channels:
            with suppress(ConnectionError):
                if await asyncio.get_running_loop().sock_recv(channel, 1) == _READY:
                    continue
            await asyncio.sleep(_POLL_S)
            self.check()
            raise StageError("a process of the server ended before it could answer; its error is above")

    def check(self) -> None:
        """Raise StageError when a process has ended: its connections are lost, and its part of the clients would get no answers."""
        for process in self._processes:
            if process.exitcode is not None:
                raise StageError(
                    f"a process of the server ended (exit code {process.exitcode}; -9: it was killed, for memory perhaps); start the "
                    "server again, with fewer serve.processes if memory is short"
                )

    async def hand_over(self, listening: socket.socket) -> None:
        """Accept connections and give them to the processes in turn, for ever."""
        loop, turns = asyncio.get_running_loop(), itertools.cycle(self._channels)
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError:  # the client has left, or this machine has no descriptors left
                await asyncio.sleep(_POLL_S)
                continue
            with connection, suppress(OSError):  # a full channel: its process does not keep up
                socket.send_fds(next(turns), [b"c"], [connection.fileno()])

    async def stop(self, seconds: float) -> None:
        """Let the processes finish their answers for `seconds`; kill those that have not ended some time later."""
        for channel in self._channels:
            channel.close()
        deadline = time.monotonic() + seconds + _KILL_AFTER_S
        while any(process.is_alive() for process in self._processes) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Hold signals back inside the block. Processes that start in it never get them, so that none ends while it imports modules."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(serve: Serve, channel: socket.socket, position: int, *arguments: object) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(serve(channel, position, *arguments))


async def receive_connections(channel: socket.socket, protocol: Callable[[], asyncio.BaseProtocol]) -> None:
    """Answer the connections that come through `channel`, until it ends."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    def receive() -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        except BlockingIOError:
            return
        except ConnectionError:
            data, descriptors = b"", []
        if not data:
            ended.set()
        for descriptor in descriptors:
            task = loop.create_task(_connect(socket.socket(fileno=descriptor), protocol))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    channel.setblocking(False)
    loop.add_reader(channel, receive)
    try:
        channel.send(_READY)
        await ended.wait()
    finally:
        loop.remove_reader(channel)
        channel.close()


async def _connect(connection: socket.socket, protocol: Callable[[], asyncio.BaseProtocol]) -> None:
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
    except OSError:  # the client has left
        connection.close()
