"""SerialQueue: order per key, no waiting across keys.

Items of one key run one at a time, in the order appended. Keys do not wait for each other: whatever blocks in one key's
item, an item of another key runs within milliseconds.

How many threads
----------------
Under the interpreter's lock more threads make quick items slower, never faster; only items that *block* need more. Nothing
tells from outside whether a thread blocks, so the queue watches whether it gets on:

- A worker takes a key from the line, runs up to `QUOTA` of its items (more if no other key waits), puts the key down, and
  takes the next. One worker alone drains thousands of keys on one wake-up.
- While any key waits in the line, exactly one further thread has the *watch*. It looks once in `PATIENCE`. A worker that has
  not put its key down for a whole look counts as blocked until it does.
- When all workers are blocked, and only then, the watch takes the first key of the line and becomes a worker. If more keys
  wait, it first hands the watch to an idle thread or to a new one. So threads grow by one at a time, each time after a
  look at all others: a burst of quick items over thousands of keys makes two or three. Where look after look finds
  everything blocked the next look comes sooner, down to `MIN_PATIENCE`, so that a thousand blocked keys take a fraction of
  a second and not two; any progress seen brings `PATIENCE` back.
- Where all workers are already known to be blocked, the watch does not wait at all.
- A worker that finds the line empty keeps the watch for `LINGER` and looks again, so that a stream of events, which comes
  one by one, wakes a thread about once per `LINGER` and not once per event. (Two threads that hand the interpreter's
  lock to each other for each event cost several times what the event costs.)
- A thread that has had nothing to do for `IDLE` ends. The one idle for the shortest time is used first, so that surplus
  threads do come to their end.

What runs when is decided by two pure classes, `Lanes` (the keys and the line) and `Crew` (the threads' roles); `SerialQueue`
puts a lock around them and threads beneath. The price of an item is in the low microseconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from types import TracebackType

    Item = Callable[[], object]

_log = structlog.get_logger("libcontainerd")

QUOTA: Final = 16
"""Items of one key that run before another key that waits has its turn."""
PATIENCE: Final = 0.002
"""Seconds in which a worker must put a key down, or counts as blocked."""
MIN_PATIENCE: Final = 0.0001
"""What `PATIENCE` shrinks to while everything that is looked at is blocked."""
LINGER: Final = 0.0002
"""Seconds that a worker waits for more before it goes idle; the most that an item can wait for a free worker.

Without it a stream of single events costs 23 microseconds of CPU each and two context switches; with it, 15 and a fifth of
one. Longer ones gain little more, and delay what answers to events in turn.
"""
IDLE: Final = 1.0
"""Seconds without work after which a thread ends."""
BACKLOG: Final = 1000
"""A key with more items waiting than this is reported."""
_REMEMBERED_BACKLOGS: Final = 1024


class Lane:
    """One key's items that wait, and how much of its turn is left."""

    __slots__ = ("items", "key", "turn")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.items: deque[Item] = deque()
        self.turn = 0


class Lanes:
    """Which item is next: order per key, turns between keys. Pure; not thread-safe, guarded by the queue's lock.

    A lane exists while its key has items waiting or is held by a worker, and no longer. It stands in the line while it
    has items and nobody holds it. Whoever takes a lane holds it until he puts it down.
    """

    def __init__(self, quota: int = QUOTA) -> None:
        self._quota = quota
        self._lanes: dict[Hashable, Lane] = {}
        self._line: deque[Lane] = deque()

    def __len__(self) -> int:
        """How many keys have items waiting or a worker."""
        return len(self._lanes)

    @property
    def ready(self) -> bool:
        """Whether a key stands in the line."""
        return bool(self._line)

    def add(self, key: Hashable, item: Item) -> int:
        """Append an item to its key; returns how many of this key now wait."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key)
            self._line.append(lane)
        lane.items.append(item)
        return len(lane.items)

    def take(self) -> Lane | None:
        """Hold the lane at the head of the line, for one turn; None if there is none."""
        if not self._line:
            return None
        lane = self._line.popleft()
        lane.turn = self._quota
        return lane

    def next_item(self, lane: Lane) -> Item | None:
        """Remove and return the held lane's next item; None if it has none, or if its turn is over and others wait."""
        if not lane.items:
            return None
        if lane.turn == 0:
            if self._line:
                return None
            lane.turn = self._quota
        lane.turn -= 1
        return lane.items.popleft()

    def put_down(self, lane: Lane) -> None:
        """End the hold: the lane goes to the end of the line, or ceases to exist if it is empty."""
        if lane.items:
            self._line.append(lane)
        else:
            del self._lanes[lane.key]

    def discard(self) -> int:
        """Drop all waiting items and return how many they were; lanes that are held stay until they are put down."""
        dropped = sum(len(lane.items) for lane in self._lanes.values())
        for lane in self._line:
            del self._lanes[lane.key]
        self._line.clear()
        for lane in self._lanes.values():
            lane.items.clear()
        return dropped


class Worker:
    """One thread of the queue, as the `Crew` sees it."""

    __slots__ = ("looking", "moved", "number", "resting", "thread", "wake")

    def __init__(self, number: int) -> None:
        self.number = number
        self.moved = False
        """Has put a key down since the watch looked last."""
        self.looking = False
        """Has the watch, and has begun a look at the others."""
        self.resting = False
        """Has begun its second of idleness."""
        self.wake = threading.Lock()
        """Released to make the worker look up from its wait, or from the next one: one look too many does no harm."""
        self.wake.acquire()
        self.thread: threading.Thread | None = None

    def rouse(self) -> None:
        """Tell it to look up. The queue's lock is held, so that no other thread releases `wake` in between."""
        if self.wake.locked():
            self.wake.release()


class Move(Enum):
    """What a worker does next, if it does not wait."""

    TAKE = "take"
    LEAVE = "leave"


Step = float | Literal[Move.TAKE, Move.LEAVE]
"""A wait in seconds, after which to look again; or take the first key of the line; or end the thread."""


class Crew:
    """The workers' roles, by the rule in the module's docstring. Pure; not thread-safe, guarded by the queue's lock.

    A worker is running, idle, or has the watch; one that has just been made has the watch. While a key stands in the line
    somebody has the watch: whoever adds a key or takes one sees to it by `appoint`.
    """

    def __init__(self) -> None:
        self.members: set[Worker] = set()
        self.watch: Worker | None = None
        self.running: set[Worker] = set()
        self.awake: dict[Worker, None] = {}
        """Of the running, those not known to be blocked. A dict for its order."""
        self.idle: dict[Worker, None] = {}
        """The last one went idle last."""
        self.patience = PATIENCE
        self._made = 0

    def appoint(self) -> Worker:
        """Give the watch, which nobody has, to an idle worker or to a new one; the caller must wake or start it."""
        if self.idle:
            worker, _ = self.idle.popitem()
        else:
            self._made += 1
            worker = Worker(self._made)
            self.members.add(worker)
        worker.looking = worker.resting = False
        self.watch = worker
        return worker

    def look(self, me: Worker, *, ready: bool, timed_out: bool, closed: bool) -> Step:
        """Decide what a worker does that is not running.

        Args:
            me: The worker.
            ready: Whether a key stands in the line.
            timed_out: Whether the wait that the last call told of has passed; False if the worker was woken or is new.
            closed: Whether nothing more will be added.
        """
        if self.watch is not me:
            if closed or (me.resting and timed_out):
                return self._leave(me)
            me.resting = True
            return IDLE
        if not ready:
            self.watch = None
            return self._rest(me, closed=closed)
        if me.looking and timed_out:
            self._judge()
        if not self.awake:
            self.watch = None
            self.running.add(me)
            self.awake[me] = None
            return Move.TAKE
        for worker in self.awake:
            worker.moved = False
        me.looking = True
        return self.patience

    def moved(self, me: Worker) -> None:
        """A running worker has put a key down."""
        me.moved = True
        if me not in self.awake:
            self.awake[me] = None

    def finish(self, me: Worker, *, closed: bool) -> Step:
        """A running worker has found the line empty."""
        self.running.discard(me)
        self.awake.pop(me, None)
        if closed or (self.watch is not None and self.awake):
            return self._rest(me, closed=closed)
        # It is free and up, so it watches better than one that is in a long look at workers that are gone.
        if self.watch is not None:
            self.idle[self.watch] = None
        me.looking = False
        self.watch = me
        return LINGER

    def lose(self, me: Worker) -> None:
        """A worker that was just appointed could not be started."""
        self.members.discard(me)
        self.idle.pop(me, None)
        if self.watch is me:
            self.watch = None

    def _rest(self, me: Worker, *, closed: bool) -> Step:
        if closed:
            return self._leave(me)
        me.resting = True
        self.idle[me] = None
        return IDLE

    def _leave(self, me: Worker) -> Literal[Move.LEAVE]:
        self.idle.pop(me, None)
        self.members.discard(me)
        return Move.LEAVE

    def _judge(self) -> None:
        blocked = [worker for worker in self.awake if not worker.moved]
        if len(blocked) == len(self.awake):
            self.patience = max(self.patience / 2, MIN_PATIENCE)
        else:
            self.patience = PATIENCE
        for worker in blocked:
            del self.awake[worker]


class SerialQueue:
    """Runs items in order per key, on threads of its own that come and go.

    Thread-safe. `append` may also be called from inside an item and from a finalizer (``__del__``, a weak reference's
    callback), wherever that may strike; not from a signal handler's C code.

    Args:
        name: Names the threads, ``libcontainerd-<name>-<number>``, and stands in the log.
        on_backlog: Called with key and length when more than `BACKLOG` items of a key wait, once per key (the last 1,024
            keys so reported are remembered), on the thread that appends. Nothing is dropped. What it raises is logged.
    """

    def __init__(self, name: str, on_backlog: Callable[[Hashable, int], None] | None = None) -> None:
        self._name = name
        self._on_backlog = on_backlog
        # Guards everything below. Innermost: nothing else is taken, called or waited for under it, except that a worker
        # is told to look up. Reentrant only for a finalizer that appends, see _Section.
        self._section = _Section(self._admit)
        self._lanes = Lanes()
        self._crew = Crew()
        self._unstarted: deque[tuple[Worker, threading.Thread]] = deque()
        self._by_thread: dict[int, Worker] = {}
        self._closed = False
        self._closing: dict[threading.Event, Worker | None] = {}
        self._undelivered = 0
        self._reported: dict[Hashable, None] = {}

    def append(self, key: Hashable, item: Callable[[], object]) -> bool:
        """Queue an item behind the others of its key; returns at once, whatever is running.

        An exception in an item is logged as ``item_failed``, and the next item runs.

        Args:
            key: What the item must be in order with.
            item: Called without arguments, on a thread of the queue; what it returns is ignored.

        Returns:
            False if the queue is closed: the item is dropped.

        Raises:
            TypeError: the key cannot be hashed. Nothing was queued.
        """
        section = self._section
        with section.lock:
            if self._closed:
                return False
            if section.inside:
                hash(key)
                section.late.append((key, item))
                return True
            section.inside = True
            try:
                waiting = self._lanes.add(key, item)
                if self._crew.watch is None:
                    self._keep_watch()
                overdue = waiting > BACKLOG and self._on_backlog is not None and self._is_news(key)
            finally:
                section.settle()
        if self._unstarted:
            self._start_workers()
        if overdue:
            self._report_backlog(key, waiting)
        return True

    def runs_caller(self) -> bool:
        """Whether the calling thread is one of the queue's, so that waiting for the queue would be waiting for itself."""
        with self._section:
            return threading.get_ident() in self._by_thread

    def close(self, timeout: float) -> int:
        """Refuse further items, let the queued ones run until the timeout, then drop the rest.

        When it has returned no item begins any more. An item that is running then is not interrupted; its thread ends
        with it. Called from inside an item it waits neither for that item nor for what is queued behind it on the same
        key, which is dropped. May be called again and by several threads at once: the first timeout counts for all.

        Args:
            timeout: Seconds; 0 or less drops at once what has not begun.

        Returns:
            How many items have not run, in all.
        """
        deadline = time.monotonic() + timeout
        settled = threading.Event()
        with self._section:
            self._closed = True
            me = self._by_thread.get(threading.get_ident())
            self._closing[settled] = me
            for worker in self._crew.idle:
                worker.rouse()
            self._tell_closers()
        try:
            in_time = settled.wait(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
        finally:
            with self._section:
                self._undelivered += self._lanes.discard()
                leaving = self._crew.members - {
                    closer for closer in self._closing.values() if closer is not None
                }
                del self._closing[settled]
                undelivered = self._undelivered
        if in_time:
            for worker in leaving:
                if worker.thread is not None and worker.thread.is_alive():
                    worker.thread.join(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
        return undelivered

    # ---------------------------------------------------------------------------------------- under the lock

    def _admit(self, key: Hashable, item: Item) -> None:
        """Queue what a finalizer has appended in the midst of a section."""
        self._lanes.add(key, item)
        self._keep_watch()

    def _keep_watch(self) -> None:
        """See to it that somebody has the watch while a key stands in the line."""
        if self._crew.watch is None and self._lanes.ready:
            worker = self._crew.appoint()
            if worker.thread is not None:
                worker.rouse()
                return
            name = f"libcontainerd-{self._name}-{worker.number}"
            worker.thread = threading.Thread(target=self._serve, args=(worker,), name=name, daemon=True)
            self._unstarted.append((worker, worker.thread))

    def _is_news(self, key: Hashable) -> bool:
        if key in self._reported:
            return False
        if len(self._reported) == _REMEMBERED_BACKLOGS:
            del self._reported[next(iter(self._reported))]
        self._reported[key] = None
        return True

    def _tell_closers(self) -> None:
        """Wake those in close() if all that still runs is items that are in close() themselves."""
        if self._closing and not self._lanes.ready:
            inside = {worker for worker in self._closing.values() if worker is not None}
            if self._crew.running <= inside:
                for settled in self._closing:
                    settled.set()

    # ---------------------------------------------------------------------------------------------- threads

    def _start_workers(self) -> None:
        """Start the threads of workers that were appointed. Outside the lock: it waits for the thread to be up."""
        while True:
            try:
                worker, thread = self._unstarted.popleft()
            except IndexError:
                return
            try:
                thread.start()
            except RuntimeError:
                # No more threads to be had. Running workers go on, and the next append or key taken tries again.
                with self._section:
                    self._crew.lose(worker)
                _log.warning("worker_not_started", queue=self._name, exc_info=True)

    def _serve(self, me: Worker) -> None:
        """The life of a worker's thread."""
        with self._section:
            self._by_thread[threading.get_ident()] = me
        timed_out = False
        while True:
            lane = None
            with self._section:
                step = self._crew.look(me, ready=self._lanes.ready, timed_out=timed_out, closed=self._closed)
                if step is Move.TAKE:
                    lane = self._lanes.take()
                    self._keep_watch()
                self._conclude(step)
            if self._unstarted:
                self._start_workers()
            if lane is not None:
                step = self._run(me, lane)
            if isinstance(step, Move):
                return
            timed_out = not me.wake.acquire(timeout=step)

    def _run(self, me: Worker, lane: Lane) -> Step:
        """Run the lane's items, then those of lane after lane until the line is empty."""
        lanes, section = self._lanes, self._section
        step: Step | None = None
        while True:
            with section:
                item = lanes.next_item(lane)
                if item is None:
                    lanes.put_down(lane)
                    self._crew.moved(me)
                    following = lanes.take()
                    if following is None:
                        step = self._crew.finish(me, closed=self._closed)
                        self._conclude(step)
                    else:
                        lane = following
                        item = lanes.next_item(lane)
            if self._unstarted:
                self._start_workers()
            if step is not None:
                return step
            if item is not None:
                try:
                    item()
                except BaseException:  # noqa: BLE001  # sys.exit() in an item must not stop its key either
                    self._log_failure(lane.key)
                item = None  # let go here and not under the lock: it may be the last to hold a container's streams

    def _conclude(self, step: Step) -> None:
        """Under the lock: what goes with a step, once the crew has decided on it."""
        if step is Move.LEAVE:
            del self._by_thread[threading.get_ident()]
        if self._closing:
            self._tell_closers()

    # -------------------------------------------------------------------------------------------- reporting

    def _report_backlog(self, key: Hashable, waiting: int) -> None:
        if self._on_backlog is None:
            return
        try:
            self._on_backlog(key, waiting)
        except Exception:  # noqa: BLE001  # the appender must go on
            _log.warning("backlog_report_failed", queue=self._name, key=key, exc_info=True)

    def _log_failure(self, key: Hashable) -> None:
        # A log that fails leaves nobody to tell, and the key must go on.
        with contextlib.suppress(Exception):
            _log.error("item_failed", queue=self._name, key=key, exc_info=True)


class _Section:
    """The queue's lock, which a finalizer may strike while it is held.

    The collector can run a finalizer at any allocation, so also while this very thread is inside a section, with lanes and
    crew half changed; and finalizers append: that of a stream that nobody closed, for one. A plain lock would never be
    had. So the lock is reentrant, `inside` says that the state is not to be touched, and what is appended then is admitted
    by the section that was struck, at its end.
    """

    __slots__ = ("_admit", "inside", "late", "lock")

    def __init__(self, admit: Callable[[Hashable, Item], None]) -> None:
        self.lock = threading.RLock()
        self.inside = False
        self.late: deque[tuple[Hashable, Item]] = deque()
        self._admit = admit

    def __enter__(self) -> None:
        self.lock.acquire()
        self.inside = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.settle()
        finally:
            self.lock.release()

    def settle(self) -> None:
        """End the section, and admit what came meanwhile. The lock is still held."""
        self.inside = False
        while self.late:
            self.inside = True
            try:
                self._admit(*self.late.popleft())
            finally:
                self.inside = False
