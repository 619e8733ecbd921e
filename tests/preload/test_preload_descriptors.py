"""What programs do with descriptors: duplicate, close, inherit, send; and what goes past the library."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import socket
import subprocess
import sys

from inside import Served, inside
from vfio import (
    CONFIG,
    DEVICE_GET_INFO,
    IOAS_ALLOC,
    MIG_GET_PRECOPY_INFO,
    PRE_COPY,
    Attached,
    Device,
    Iommufd,
    ioctl,
    precopy_info,
    refused,
)


@inside()
def test_duplicates_are_the_same_file(served: Served) -> None:
    """It is let go of with the last of them."""
    first = Attached("iommufd-cdev").device
    copies = [os.dup(first.fd), fcntl.fcntl(first.fd, fcntl.F_DUPFD, 300), os.dup2(first.fd, 200)]
    copies.append(fcntl.fcntl(first.fd, fcntl.F_DUPFD_CLOEXEC, 0))
    assert copies[1] == 300
    assert copies[2] == 200
    os.close(first.fd)
    for fd in copies:
        assert Device(fd).read(CONFIG, 0, 2) == b"VF"
        os.close(fd)
    assert refused(Device(copies[-1]).info) == "EBADF"
    assert Attached("iommufd-cdev").device.info()[1] == 9  # so the server is free


@inside()
def test_a_number_that_is_used_again_is_the_new_file(served: Served) -> None:
    """Whatever put it there."""
    device = Attached("iommufd-cdev").device
    file = os.memfd_create("other")
    os.write(file, b"content")
    os.dup2(file, device.fd)
    assert os.pread(device.fd, 7, 0) == b"content"
    other = os.open("/dev/vfio/devices/vfio-user1", os.O_RDWR)
    os.close(other)
    again = os.memfd_create("another")
    assert again == other
    assert os.write(again, b"x") == 1


@inside()
def test_ranges_are_closed(served: Served) -> None:
    """close_range() and closefrom() let go of a device, and leave alone what the library itself needs."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    way = Attached("iommufd-cdev")
    data = way.device.set_state(PRE_COPY)
    assert libc.close_range(3, 0xFFFFFFFF, 0) == 0
    for fd in (way.device.fd, way.iommufd.fd, data):
        assert refused(os.fstat, fd) == "EBADF"
    way = Attached("iommufd-cdev")
    assert way.device.read(CONFIG, 0, 2) == b"VF"
    os.closerange(3, 2000)
    way = Attached("iommufd-cdev")
    assert way.device.read(CONFIG, 0, 2) == b"VF"
    libc.closefrom(3)
    way = Attached("iommufd-cdev")
    assert way.device.read(CONFIG, 0, 2) == b"VF"


@inside({"VFU_DEV_PRELOAD_LOG": "/dev/null"})
def test_what_the_library_uses_itself_is_not_closed_or_replaced(served: Served) -> None:
    """EBADF and EBUSY: the program does not know of these descriptors."""
    way = Attached("iommufd-cdev")
    sockets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if int(name) >= 500 or target.startswith("socket:"):
            sockets.append(int(name))
    assert sockets
    for fd in sockets:
        if fd >= 500:
            assert refused(os.close, fd) == "EBADF"
            assert refused(os.dup2, 0, fd) == "EBUSY"
    assert way.device.read(CONFIG, 0, 2) == b"VF"


@inside()
def test_a_forked_child_leaves_its_parents_device_alone(served: Served) -> None:
    """It cannot use it (EIO); closing it, or ending, disturbs nothing."""
    way = Attached("iommufd-cdev")
    child = os.fork()
    if child == 0:
        answers = [
            refused(way.device.info),
            refused(way.device.read, CONFIG, 0, 2),
            refused(way.iommufd.alloc),
        ]
        os.close(way.device.fd)
        new = os.memfd_create("child")  # takes the lowest number: that of the device
        os.write(new, b"child")
        answers.append(os.pread(way.device.fd, 5, 0).decode() if new == way.device.fd else "child")
        os._exit(0 if answers == ["EIO", "EIO", "EIO", "child"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert way.device.read(CONFIG, 0, 2) == b"VF"
    assert way.device.info()[1] == 9


@inside()
def test_a_child_may_be_the_one_who_begins(served: Served) -> None:
    """As a QEMU with -daemonize: it forks before it binds the device that it was given by descriptor."""
    child = os.fork()
    if child == 0:
        way = Attached("iommufd-fd")
        os._exit(0 if way.device.read(CONFIG, 0, 2) == b"VF" else 1)
    assert os.waitpid(child, 0)[1] == 0


@inside()
def test_programs_that_are_started_do_no_harm(served: Served) -> None:
    """They inherit LD_PRELOAD and the variables; subprocess closes all descriptors in a vfork()ed child."""
    way = Attached("iommufd-cdev")
    for close_fds in (True, False):
        words = subprocess.run(
            ["sh", "-c", "echo hello | cat"], stdout=subprocess.PIPE, close_fds=close_fds, check=True
        )
        assert words.stdout == b"hello\n"
        assert way.device.read(CONFIG, 0, 2) == b"VF"
    script = (
        "import os; assert os.pread(os.memfd_create('x'), 1, 0) == b''; print(os.listdir('/proc/self/fd'))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE, check=True)
    assert b"500" not in done.stdout.split(b",")[:3]
    assert way.device.read(CONFIG, 0, 2) == b"VF"


@inside()
def test_descriptors_are_not_sent_to_other_processes(served: Served) -> None:
    """They would be /dev/null there: EOPNOTSUPP, and a message. Others are sent as ever."""
    way = Attached("iommufd-cdev")
    ours, theirs = socket.socketpair()
    for fd in (way.device.fd, way.iommufd.fd, way.device.set_state(PRE_COPY)):
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, fd]))
        assert refused(ours.sendmsg, [b"x"], [rights]) == "EOPNOTSUPP"
    socket.send_fds(ours, [b"y"], [0])
    data, fds, _, _ = socket.recv_fds(theirs, 10, 4)
    assert data == b"y"
    assert len(fds) == 1


@inside()
def test_copies_within_the_kernel_are_refused(served: Served) -> None:
    """They cannot reach us, and must not pass for copies from or to /dev/null."""
    device = Attached("iommufd-cdev").device
    fd = device.set_state(PRE_COPY)
    pipe = os.pipe()
    file = os.memfd_create("file")
    assert refused(os.sendfile, file, fd, 0, 10) == "EINVAL"
    assert refused(os.splice, fd, pipe[1], 10) == "EINVAL"
    assert refused(os.splice, pipe[0], fd, 10) == "EINVAL"
    assert refused(os.copy_file_range, fd, file, 10) == "EINVAL"


@inside()
def test_what_goes_past_the_library_fails_and_cannot_pass_for_success(served: Served) -> None:
    """System calls that a program makes by itself: EBADF."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    way = Attached("iommufd-cdev")
    buffer = ctypes.create_string_buffer(64)
    sys_read, sys_write, sys_mmap, sys_ioctl, sys_pread = 0, 1, 9, 16, 17
    fds = (way.device.fd, way.iommufd.fd, way.device.set_state(PRE_COPY), 100, 101)
    for fd in fds:
        for arguments in (
            (sys_read, fd, buffer, 64), (sys_write, fd, buffer, 64), (sys_pread, fd, buffer, 64, 0),
            (sys_ioctl, fd, DEVICE_GET_INFO, buffer), (sys_mmap, 0, 4096, 1, 1, fd, 0),
        ):  # fmt: skip
            ctypes.set_errno(0)
            assert libc.syscall(*arguments) == -1, (fd, arguments)
            assert ctypes.get_errno() == 9, (fd, arguments)


@inside()
def test_descriptors_of_other_kinds_do_what_they_always_do(served: Served) -> None:
    """Reading, writing, mapping and control of a program's own files."""
    import mmap
    import termios

    Attached("iommufd-cdev")
    file = os.memfd_create("file")
    assert os.write(file, b"0123456789") == 10
    assert os.pwrite(file, b"ab", 2) == 2
    assert os.pread(file, 4, 1) == b"1ab4"
    assert os.preadv(file, [bytearray(2), bytearray(2)], 0) == 4
    os.lseek(file, 0, os.SEEK_SET)
    assert os.readv(file, [bytearray(3), bytearray(3)]) == 6
    assert mmap.mmap(file, 10)[:3] == b"01a"
    assert os.sendfile(os.memfd_create("to"), file, 0, 5) == 5
    master, slave = os.openpty()
    assert len(termios.tcgetattr(slave)) == 7
    assert refused(fcntl.ioctl, file, DEVICE_GET_INFO, bytearray(20), True) == "ENOTTY"
    assert os.access("/dev/iommu", os.R_OK)
    assert not os.access("/dev/no-such-device", os.R_OK)
    assert refused(os.open, "/dev/vfio/devices/vfio-user7", os.O_RDWR) == "ENOENT"
    assert refused(os.open, "/dev/vfio/1000007", os.O_RDWR) == "ENOENT"
    assert refused(os.open, "/dev/vfio/devices/vfio-user", os.O_RDWR) == "ENOENT"
    assert refused(os.open, "/dev/vfio/devices/vfio-user0x", os.O_RDWR) == "ENOENT"
    os.close(master)


@inside()
def test_errno_is_left_alone_by_calls_that_succeed(served: Served) -> None:
    """Some programs look at it without looking at the result."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    device = Attached("iommufd-cdev").device
    buffer = ctypes.create_string_buffer(8)
    libc.pread64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
    ctypes.set_errno(77)
    assert libc.pread64(device.fd, buffer, 2, CONFIG << 40) == 2
    assert ctypes.get_errno() == 77


@inside()
def test_signals_go_to_the_programs_own_threads(served: Served) -> None:
    """The library's threads take none: a handler runs where the program expects it."""
    import threading

    Attached("iommufd-cdev").device.set_state(4)  # RESUMING: there are two threads of ours now
    where: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: where.append(threading.get_native_id()))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1
    assert where == []


@inside()
def test_the_descriptors_of_the_environment_are_ours(served: Served) -> None:
    """100 and 101, as the launcher opened them; one that is no /dev/null would be left alone."""
    iommufd = Iommufd(100)
    assert iommufd.alloc() > 0
    device = Device(101)
    assert refused(device.info) == "EINVAL"  # not bound yet
    assert device.bind(iommufd.fd) > 0
    assert device.info()[1] == 9
    assert refused(ioctl, 0, IOAS_ALLOC, "III", 12, 0, 0) != "ok"


@inside()
def test_a_data_descriptor_outlives_the_device_descriptor(served: Served) -> None:
    """Closed in the wrong order, nothing is used after it was freed."""
    way = Attached("iommufd-cdev")
    fd = way.device.set_state(PRE_COPY)
    os.close(way.device.fd)
    assert precopy_info(fd)[0] == 0
    os.close(fd)
    assert refused(ioctl, fd, MIG_GET_PRECOPY_INFO, "IIQQ", 24, 0, 0, 0) == "EBADF"
