"""Streams of several ranks in one process, on the CPU, in any order that they allow."""

import ctypes


class Queues:
    """Streams of several ranks in one process, on the CPU: what is on them is done later, in any order that they allow.

    Stands in the place of `Engine` (`of`, `current`) and, by `Moment`, of the events between streams.
    """

    def __init__(self, generator):
        self.generator, self.queues, self.mains, self.rank = generator, [], {}, 0

    def of(self, _):
        self.queues.append(OnQueue([]))
        return self.queues[-1]

    def current(self, _):
        if self.rank not in self.mains:
            self.mains[self.rank] = self.of(None)
        return self.mains[self.rank]

    def run(self):
        """All of it; fails where every stream waits."""
        speeds = {id(queue): self.generator.random() ** 4 for queue in self.queues}
        while waiting := [queue for queue in self.queues if queue.work]:
            ready = [queue for queue in waiting if queue.work[0][0]()]
            assert ready, "all streams wait"
            self.generator.choices(ready, [speeds[id(queue)] for queue in ready])[0].work.pop(0)[1]()


class OnQueue:
    """A stream of `Queues`."""

    def __init__(self, work):
        self.work = work

    def call(self, function, ready=lambda: True):
        self.work.append((ready, function))

    def copy(self, target, source, size):
        self.call(lambda: ctypes.memmove(target, source, size))

    def write(self, address, value):
        self.call(lambda: setattr(ctypes.c_uint32.from_address(address), "value", value))

    def wait(self, address, value):
        self.call(lambda: None, lambda: ctypes.c_uint32.from_address(address).value >= value)

    def follow(self, moment):
        number = moment.asked
        self.call(lambda: None, lambda: moment.reached >= number)


class Reached:
    """In place of `Moment`."""

    def __init__(self, _):
        self.asked = self.reached = 0

    def record(self, on):
        self.asked += 1
        on.call(lambda number=self.asked: setattr(self, "reached", number))
