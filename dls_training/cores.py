"""One network on several cores of a processor: processes that share its memory, each with a part of every batch.

OpenMP's threads meet at the end of every operator, awake: most operators of a small network are over before a second
thread has begun, and where anything else keeps a core busy, all wait for the thread that is not there. These processes
meet once for each batch norm, asleep, and what is left of the processor is theirs.

They compute what one process computes, but for rounding: batch norm's statistics are those of the whole batch, and so
is its gradient.
"""

import contextlib
import itertools
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import get_worker_info

from datasets_scripts.errors import LostProcess

SECONDS_BETWEEN_LOOKS = 1.0  # whether the others are still alive
MIN_PART = 8  # clips: with fewer, what a step costs whatever the batch outweighs what a core is good for
LOOKS_AWAKE = 300  # before a process falls asleep: about as long as waking it up takes
# What the first process sends beside a part of a batch, and the others beside what came of it.
MAKE_VIEWS, COMPUTE, BACKWARD, FORGET, FAILED = range(5)

LOST = (
    "a process that computed a part of the batch has ended, perhaps for want of memory. What was saved is intact: "
    "--resume_from_checkpoint latest goes on from there"
)

_in_use: int | None = None


def available_cores() -> int:
    """The cores that this process may use: its affinity, OMP_NUM_THREADS where the user set it, or its share of them.

    accelerate's launcher and torchrun set OMP_NUM_THREADS=1 on behalf of a CPU's user, who did not ask for that.
    """
    launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"))
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) and not (launched and chosen == "1"):
        return int(chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cores_in_use() -> int:
    """As `use_cores` was told, or all."""
    return _in_use or available_cores()


def use_cores(cores: int, parts: int = 1) -> None:
    """Sets how many cores work beside one another, and with how many of them torch computes one operator.

    Args:
        cores: In all.
        parts: Of a batch, which are computed beside one another.
    """
    global _in_use
    _in_use = cores
    torch.set_num_threads(max(1, cores // parts))


def in_threads(work: Callable, items: list) -> list:
    """`work` of each item, on every core. Decoding and torch leave Python's lock alone, so threads are enough."""
    if len(items) < 2 or get_worker_info() is not None:  # a decoding process has brothers on the other cores
        return [work(item) for item in items]
    return list(_pool(cores_in_use(), os.getpid()).map(work, items))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Of a process: one that was forked has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="core")


def in_shared_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that processes share which are forked later. Not in /dev/shm, which containers make small."""
    memory = mmap.mmap(-1, tensor.numel() * tensor.element_size())
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


class Meeting:
    """Where processes wait for one another, and see one another's numbers.

    Attributes:
        parts: How many processes.
        rank: Which of them this is.
        is_open: Whether batch norm is to meet; else a batch is this process's alone.
    """

    def __init__(self, parts: int, width: int, dtype: torch.dtype, context: multiprocessing.context.BaseContext):
        """
        Args:
            parts: See the class.
            width: Largest number of numbers.
            dtype: Of the numbers.
            context: Of the processes.
        """
        self.parts, self.rank, self.is_open = parts, 0, False
        self.arrived = [context.Semaphore(0) for _ in range(parts)]
        # Two of each: who writes to the second knows that all have read the first.
        self.numbers, self.turn = in_shared_memory(torch.zeros(2, parts, width, dtype=dtype)).numpy(), 0
        self.check = lambda: None

    def gather(self, *numbers: np.ndarray) -> list[np.ndarray]:
        """Everyone's numbers, each (n,) -> (parts, n), in the order of the ranks; valid until the next but one."""
        tables, end = [], 0
        for own in numbers:
            start, end = end, end + len(own)
            tables.append(self.numbers[self.turn, :, start:end])
            tables[-1][self.rank] = own
        self.turn = 1 - self.turn
        for rank, arrived in enumerate(self.arrived):
            if rank != self.rank:
                arrived.release()
        for _ in range(self.parts - 1):
            self.wait(self.arrived[self.rank])
        return tables

    def wait(self, arrived) -> None:
        for _ in range(LOOKS_AWAKE):
            if arrived.acquire(block=False):
                return
        while not arrived.acquire(timeout=SECONDS_BETWEEN_LOOKS):
            self.check()


class BatchNormOfAllParts(torch.autograd.Function):
    """Batch norm in training over a batch of which every process has a part.

    By torch's own kernels, with statistics that have been exchanged; backward, one pass corrects what they know not.
    What is computed channel by channel is numpy's: of so few numbers, each of torch's operators costs several times as
    much.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, norm, meeting):
        channels = x.shape[1]
        dtype, own_count = torch.float32 if x.dtype == torch.bfloat16 else x.dtype, x.numel() // channels
        own_mean, own_var = torch.batch_norm_update_stats(x, *torch.zeros(2, channels, dtype=dtype), 0.0)
        counts, means, variances = meeting.gather(np.array([own_count]), own_mean.numpy(), own_var.numpy())
        count = counts.sum()
        shares = counts / count
        mean = (shares * means).sum(0)
        var = (shares * (variances + np.square(means - mean))).sum(0)
        if meeting.rank == 0:  # the running statistics are everyone's
            update_running_statistics(norm, mean, var * (count / (count - 1)))
        ctx.scale = 1 / np.sqrt(var + norm.eps)
        ctx.statistics = [torch.from_numpy(numbers) for numbers in (mean, var, ctx.scale)]
        ctx.meeting, ctx.epsilon, ctx.counts = meeting, norm.eps, (own_count, count)
        ctx.save_for_backward(x, weight)
        return torch.batch_norm(x, weight, bias, *ctx.statistics[:2], False, 0.0, norm.eps, False)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        mean, var, inverse = ctx.statistics
        # As if this part were all: what is left is small, so that it can be added in half precision, and linear in x.
        of_x, *of_both = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, mean, inverse, True, ctx.epsilon, [True, True, True]
        )
        own_count, count = ctx.counts
        scale = ctx.scale if weight is None else ctx.scale * weight.detach().numpy()
        slope, offset = (
            torch.from_numpy(scale * (table[ctx.meeting.rank] / own_count - table.sum(0) / count))
            for table in ctx.meeting.gather(*(gradient.numpy() for gradient in of_both))
        )
        of_x += torch.batch_norm(x, slope, offset, mean, var, False, 0.0, ctx.epsilon, False)
        return of_x, *((None, None) if weight is None else of_both), None, None


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, mean: np.ndarray, var: np.ndarray) -> None:
    """As torch's own batch norm does; without a momentum, they are the plain mean over all batches."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
        momentum = 1 / norm.num_batches_tracked.item() if momentum is None else momentum
    for running, new in ((norm.running_mean.numpy(), mean), (norm.running_var.numpy(), var)):
        running += momentum * (new - running)


def normalise_together(norm: _BatchNorm, meeting: Meeting, x: torch.Tensor) -> torch.Tensor:
    """A batch norm's `forward`, over all parts of a batch while the meeting is open."""
    if not (norm.training and meeting.is_open):
        return type(norm).forward(norm, x)
    return BatchNormOfAllParts.apply(x, norm.weight, norm.bias, norm, meeting)


class Joined(torch.autograd.Function):
    """The parts of the outputs, one after the other; backward sends the others the gradients of theirs."""

    @staticmethod
    def forward(ctx, own, on_cores):
        others = [unpacked(on_cores.received(c), own) for c in on_cores.connections]
        ctx.on_cores, ctx.sizes = on_cores, [len(own), *map(len, others)]
        return torch.cat([own, *others])

    @staticmethod
    def backward(ctx, gradient):
        own, *others = gradient.split(ctx.sizes)
        ctx.on_cores.begin_backward(others)
        return own, None


def packed(tensor: torch.Tensor) -> np.ndarray:
    """As it goes through a pipe; numpy has no bfloat16."""
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def unpacked(sent: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(sent).view(like.dtype)


class BackboneOnCores:
    """Has a backbone's batches computed in parts, by this process and others that it forks.

    Within `at_work`, and for batches that are large enough; else the backbone computes as ever.

    Attributes:
        make_views: Keys of some clips -> their `input_values`, for `views`; set before the first batch.
    """

    def __init__(self, backbone: nn.Module, parts: int, batch_size: int):
        """
        Args:
            backbone: An `ESResNetModel`.
            parts: Processes, this one included; with one, nothing is done.
            batch_size: Largest number of clips.
        """
        self.backbone, self.compute = backbone, backbone.forward
        self.parts, self.largest = parts, -(-batch_size // parts)
        self.meeting: Meeting | None = None
        self.make_views: Callable[[list], torch.Tensor] | None = None
        self.processes, self.connections, self.inputs, self.gradients = [], [], [], []
        self.in_backward, self.has_all_gradients = False, True

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """From the first batch on, others compute their parts; they are gone at the end."""
        if self.parts > 1:
            self.backbone.forward = self.forward
        try:
            yield
        finally:
            for process in self.processes:
                process.kill()
                process.join()
            for module in (self.backbone, *self.norms()) if self.parts > 1 else ():
                module.__dict__.pop("forward", None)
            self.processes, self.connections, self.inputs, self.gradients = [], [], [], []
            self.meeting, self.in_backward, self.has_all_gradients = None, False, True

    def forward(self, input_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs):
        """The backbone's, for all clips at once: `pooler_output` alone, where it is computed in parts."""
        in_parts = self.can_split(len(input_values)) and not output_hidden_states
        if in_parts and self.meeting is None:
            self.fork(input_values)
        if self.meeting is not None:
            self.meeting.is_open = in_parts and self.backbone.training
        if not in_parts:
            return self.compute(input_values, output_hidden_states=output_hidden_states, **kwargs)
        self.finish_backward()
        own, *others = input_values.tensor_split(self.parts)
        for place, part in zip(self.inputs, others, strict=True):
            place[: len(part)] = part
        self.send(COMPUTE, [(len(part), self.backbone.training, torch.is_grad_enabled()) for part in others])
        outputs = self.compute(own, **kwargs)
        return type(outputs)(pooler_output=Joined.apply(outputs.pooler_output, self))

    def can_split(self, clips: int) -> bool:
        return self.parts * MIN_PART <= clips <= self.parts * self.largest

    def views(self, keys: list) -> torch.Tensor:
        """`make_views` of all keys, of which each process makes a part as soon as there are others."""
        if self.meeting is None or not self.can_split(len(keys)):
            return self.make_views(keys)
        self.finish_backward()  # which needs the pictures that the new ones replace
        own, *others = ([keys[clip] for clip in part] for part in torch.arange(len(keys)).tensor_split(self.parts))
        self.send(MAKE_VIEWS, others)
        made = [self.make_views(own)]
        for connection, place, part in zip(self.connections, self.inputs, others, strict=True):
            self.received(connection)
            made.append(place[: len(part)])
        return torch.cat(made)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]

    def norms(self) -> list[_BatchNorm]:
        return [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]

    def fork(self, like: torch.Tensor) -> None:
        """Starts the others. The backbone's parameters and statistics come to lie in shared memory, and stay there.

        Args:
            like: A batch.
        """
        context = multiprocessing.get_context("fork")
        for tensor in itertools.chain(self.backbone.parameters(), self.backbone.buffers()):
            tensor.data = in_shared_memory(tensor.data)
        norms = self.norms()
        width, dtype = 1 + 2 * max(norm.num_features for norm in norms), norms[0].running_mean.dtype
        self.meeting = Meeting(self.parts, width, dtype, context)
        self.meeting.check = self.check
        for norm in self.norms():
            norm.forward = partial(normalise_together, norm, self.meeting)
        for rank in range(1, self.parts):
            self.inputs.append(in_shared_memory(like.new_zeros(self.largest, *like.shape[1:])))
            self.gradients.append([in_shared_memory(torch.zeros_like(parameter)) for parameter in self.trained()])
            ours, theirs = context.Pipe()
            self.connections.append(ours)
            process = context.Process(target=self.work, args=(rank, theirs), daemon=True)
            process.start()
            # Where nobody leaves `at_work`: at exit, multiprocessing asks with SIGTERM, which they ignore, and waits.
            Finalize(None, process.kill, exitpriority=0)
            self.processes.append(process)
            theirs.close()

    def send(self, command: int, details: list) -> None:
        """Something for each of the others."""
        for connection, detail in zip(self.connections, details, strict=True):
            with contextlib.suppress(OSError):  # who has ended is found out where their answer is waited for
                connection.send((command, detail))

    def received(self, connection):
        """What one of the others answers.

        Raises:
            LostProcess: if it, or another, is gone.
            Exception: that ended it.
        """
        while not connection.poll(SECONDS_BETWEEN_LOOKS):
            self.check()
        try:
            command, found = connection.recv()
        except (EOFError, OSError):
            command, found = FAILED, LostProcess(LOST)
        if command == FAILED:
            raise found
        return found

    def check(self) -> None:
        """Whether all others are there; see `received`."""
        for process, connection in zip(self.processes, self.connections, strict=True):
            if not process.is_alive():
                while True:  # what it had to say
                    self.received(connection)

    def begin_backward(self, gradients: list[torch.Tensor]) -> None:
        """Has the others go backward from the gradients of their outputs."""
        self.send(BACKWARD, list(map(packed, gradients)))
        self.in_backward, self.has_all_gradients = True, False

    def finish_backward(self) -> None:
        """Waits until they have."""
        for connection in self.connections if self.in_backward else ():
            self.received(connection)
        self.in_backward = False

    def collect_gradients(self) -> None:
        """Adds the others' gradients to this process's, after the last backward pass of a step."""
        if self.has_all_gradients:
            return
        self.finish_backward()
        for theirs in self.gradients:
            pairs = [(p.grad, t) for p, t in zip(self.trained(), theirs, strict=True) if p.grad is not None]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        self.send(FORGET, [None] * len(self.processes))
        self.has_all_gradients = True

    def work(self, rank: int, connection) -> None:
        """What the other processes do, until the first is gone."""
        # An interrupted run takes its step to the end: the first process decides.
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        for ours in self.connections:
            ours.close()
        first = os.getppid()
        self.meeting.rank = rank
        self.meeting.check = lambda: None if os.getppid() == first else os._exit(1)
        gradients, output = self.gradients[rank - 1], None
        for parameter, gradient in zip(self.trained(), gradients, strict=True):
            parameter.grad = gradient
        with contextlib.suppress(EOFError, OSError):
            while True:
                command, detail = connection.recv()
                try:
                    if command == MAKE_VIEWS:
                        with torch.autocast("cpu", enabled=False):
                            self.inputs[rank - 1][: len(detail)] = self.make_views(detail)
                        connection.send((command, None))
                    elif command == COMPUTE:
                        clips, training, with_gradient = detail
                        self.backbone.train(training)
                        self.meeting.is_open = training
                        # Forked within autocast, this process never leaves it, and must forget the weights of before.
                        torch.clear_autocast_cache()
                        with torch.set_grad_enabled(with_gradient):
                            output = self.compute(self.inputs[rank - 1][:clips]).pooler_output
                        connection.send((command, packed(output)))
                    elif command == BACKWARD:
                        output.backward(unpacked(detail, output))
                        connection.send((command, None))
                    elif command == FORGET:
                        torch._foreach_zero_(gradients)
                except Exception as error:
                    connection.send((FAILED, error))
                    return
