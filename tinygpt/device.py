"""Which device tinygrad uses, and which C compiler makes the kernels of its CPU device.

`import tinygpt` calls `prepare`, so that tinygrad finds a device that works on the machine as it
is; the commands call `select_device` before they compute anything. Four things go wrong without:

- tinygrad compiles CPU kernels with a program named `clang`, and many machines have none, or only
  a `clang-19`. Any clang on PATH is used, else the one inside `zig` (`pip install ziglang`).
- On Intel's CPUs clang uses half of each AVX-512 register: products take twice as long.
- OpenCL comes before the CPU when tinygrad chooses, even if it only drives the CPU (PoCL).
- A device that is unknown or missing ends in a traceback that does not say what would work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tinygpt.config import InputError

_requested = os.environ.pop("DEV", None)  # a malformed DEV ends tinygrad's import in a traceback
try:
    from tinygrad import Context, Device, Tensor
    from tinygrad.device import ALL_DEVICES
    from tinygrad.helpers import DEV, Target, getenv
finally:
    if _requested is not None:
        os.environ["DEV"] = _requested

ALIASES = {"GPU": "CL"}
STORAGE = {"DISK", "NPY", "RDMA", "TINYFS"}  # devices of tinygrad that hold data and never compute
WIDE_VECTORS = "x86_64,native,prefer-vector-width=512"  # as tinygrad's DEV names an architecture
GPUS = {  # what their drivers look for: a file, or vendors on PCI and, behind USB bridges, on USB
    "AMD": ("/dev/kfd", {"0x1002", "add1", "3801"}),
    "NV": ("/dev/nvidiactl", {"0x10de"}),
}
NEEDS_CLANG = "it needs clang: pip install ziglang, or install clang, or set CC to a clang"


class Compiler(NamedTuple):
    program: str
    version: str  # of clang, such as 19.1.7
    avx512: bool  # whether this CPU has it, as far as this compiler knows


def prepare() -> None:
    """Give tinygrad a compiler and a device that exist here. Opens no device unless it must.

    Reads CC, DEV and PATH; sets CC and, where tinygrad's own choice would be wrong, DEV, for this
    process and its children. Raises InputError if DEV is not a device, or if the device would be
    the CPU and there is no compiler; in a command (`python -m tinygpt.train`) that is left to
    `select_device`, because another device may follow among its flags.
    """
    try:
        _prepare()
    except InputError:
        if sys.argv[:1] != ["-m"]:  # Python's own mark while it looks up the module to run
            raise


@functools.cache
def _prepare() -> None:
    wanted, requested = os.environ.get("CC"), repr(DEV) or os.environ.get("DEV", "")
    DEV.value = ""  # nothing is chosen until the name is known to be good
    if requested:
        _use(_parse(requested))
    compiler = choose_compiler()
    if compiler and wanted not in (None, "", compiler.program) and DEV.device in ("", "CPU"):
        print(
            f"tinygpt: CC={wanted} does not run as a clang, which tinygrad's CPU device needs; "
            f"using {compiler.program} ({compiler.version}).",
            file=sys.stderr,
        )
    if not compiler and (DEV.device or _default()) == "CPU":
        raise _unavailable(repr(DEV) or "CPU", NEEDS_CLANG)
    if compiler and not DEV.device and _no_gpu():
        _use(_parse("CPU"))


def select_device(name: str | None) -> str:
    """Make `name` the device of everything that follows, after a small computation on it.

    `name` is what DEV may be, in any case: `cpu`, `GPU` (OpenCL, tinygrad's `CL`), `cpu:llvm`,
    `NULL:CUDA:sm_90`; None is the device that DEV or tinygrad chose. Returns the name as tinygrad
    writes it. Raises InputError, and changes nothing, if it is unknown or does not work here.
    """
    if name is None:
        _prepare()
        name = _name()
    targets = _parse(name)
    with Context(DEV=targets):
        canonical, failure = repr(DEV), _failure()
    if failure:
        raise _unavailable(canonical, failure)
    _use(targets)
    return canonical


@functools.cache
def available_devices() -> list[str]:
    """The devices that compute on this machine, in tinygrad's order of preference.

    PYTHON, tinygrad's emulator, is last and always there. Opens every device, about a second.
    """
    found = []
    for name in [*ALL_DEVICES, "PYTHON"]:
        with Context(DEV=name):
            if _failure() is None:
                found.append(name)
    return found


def device_name() -> str:
    """The device, and the compiler where tinygrad runs one: `CL`, `CPU (clang 19.1.7)`."""
    name, compiler = _name(), choose_compiler()
    uses_clang = name.split(":")[0] == "CPU" and DEV.renderer in ("", "CLANG")
    return f"{name} (clang {compiler.version})" if uses_clang and compiler else name


# Devices


def _parse(name: str) -> list[Target]:
    """Read tinygrad's [INTERFACE+]DEVICE[:RENDERER[:ARCH]], several of them joined by `;`."""
    try:
        targets = [_canonical(Target.parse(part.strip())) for part in name.split(";")]
    except RuntimeError as error:  # too many + or :
        raise InputError(f"device {name!r} cannot be read: {error}") from None
    for target in targets:
        module = f"tinygrad.runtime.ops_{target.device.lower()}"
        known = target.device.isidentifier() and importlib.util.find_spec(module)
        if not known or target.device in STORAGE:
            raise InputError(
                f"{name!r} is not a device that tinygrad computes on; available here: "
                + ", ".join(available_devices())
            )
        if target.renderer.isdigit():
            raise InputError(
                f"device {name!r} has a number, and DEV takes none; use {target.device}"
            )
    return targets


def _canonical(target: Target) -> Target:
    """The target under tinygrad's name for it, which leaves out the number of the first device."""
    renderer = "" if target.renderer == "0" else target.renderer
    return replace(target, device=ALIASES.get(target.device, target.device), renderer=renderer)


def _use(targets: list[Target]) -> None:
    DEV.value = targets
    os.environ["DEV"] = repr(DEV)  # for child processes
    DEV.value = [_with_wide_vectors(target) for target in targets]


def _with_wide_vectors(target: Target) -> Target:
    by_clang = target.device == "CPU" and target.renderer in ("", "CLANG")
    compiler = choose_compiler() if by_clang and not target.arch else None
    return replace(target, arch=WIDE_VECTORS) if compiler and compiler.avx512 else target


def _name() -> str:
    """DEV without the architecture that `_use` adds."""
    return re.sub(f"::?{WIDE_VECTORS}", "", repr(DEV)) or _default()


def _default() -> str:
    """The device that tinygrad chooses where DEV is not set; opens it. CPU if none opens."""
    try:
        return Device.DEFAULT
    except RuntimeError:  # no usable devices
        return "CPU"
    except AssertionError as error:  # CPU=1, as it was written before DEV
        raise InputError(str(error)) from None


def _no_gpu() -> bool:
    """Whether no device opens that tinygrad prefers to the CPU, but for an OpenCL that is one."""
    for name in ALL_DEVICES[: ALL_DEVICES.index("CPU")]:
        if not (_absent(name) or (name == "CL" and _opencl_is_a_cpu())) and _opens(name):
            return False
    return True


def _absent(name: str) -> bool:
    """Whether Linux knows of no such GPU. To load tinygrad's driver and hear it say so takes half a
    second for NVIDIA's and a quarter for AMD's."""
    if name not in GPUS or sys.platform != "linux" or {"MOCKGPU", "REMOTE"} & set(os.environ):
        return False
    node, vendors = GPUS[name]
    bus = Path("/sys/bus")
    try:
        files = [*bus.glob("pci/devices/*/vendor"), *bus.glob("usb/devices/*/idVendor")]
        return not Path(node).exists() and not vendors & {f.read_text().strip() for f in files}
    except OSError:  # not everything may be read: the driver will know
        return False


def _opens(name: str) -> bool:
    try:
        Device[name]
    except Exception:  # each driver has its own errors; none of them matters here
        return False
    return True


def _failure() -> str | None:
    """Why DEV's device does not give the right answer; None where it does.

    Opening is not enough: WEBGPU without a driver opens, and returns garbage. NULL has no answers.
    """
    if DEV.device == "CPU" and choose_compiler() is None:
        return NEEDS_CLANG
    try:
        Device[DEV.device]
        with Context(CACHELEVEL=0):  # a cached kernel would hide that the compiler is missing
            double = (Tensor([1, 2, 3], device=DEV.device) * 2).realize()
        if DEV.device != "NULL" and (answer := double.tolist()) != [2, 4, 6]:
            return f"twice 1, 2, 3 came out as {answer}"
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # tinygrad tried several drivers or compilers
        error = error.exceptions[0]
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} ended with status {error.returncode}"
    return (str(error) or type(error).__name__).splitlines()[0]


def _unavailable(name: str, reason: str) -> InputError:
    return InputError(
        f"device {name} does not work here ({reason}); DEV can choose another, available here: "
        + ", ".join(available_devices())
    )


def _opencl_is_a_cpu() -> bool:
    """Whether OpenCL's devices are CPUs; asks the first platform, the only one tinygrad uses."""
    from tinygrad.runtime.autogen import opencl as cl

    platform, count = (cl.cl_platform_id * 1)(), ctypes.c_uint32()
    try:
        if cl.clGetPlatformIDs(1, platform, None) != 0:
            return False
    except AttributeError:  # no OpenCL on this machine
        return False

    def has(kind: int) -> bool:
        return cl.clGetDeviceIDs(platform[0], kind, 0, None, count) == 0 and count.value > 0

    return has(cl.CL_DEVICE_TYPE_CPU) and not has(cl.CL_DEVICE_TYPE_GPU)


# C compilers


@functools.cache
def choose_compiler() -> Compiler | None:
    """CC if it is a clang, else the newest clang on PATH, else zig's; set as CC for tinygrad."""
    compiler = _clang(os.environ.get("CC", "")) or _newest_clang() or _zig_clang()
    if compiler:
        os.environ["CC"] = compiler.program
        if getenv("CC", "clang") != compiler.program:  # tinygrad has read CC before, and keeps it
            getenv.cache_clear()  # type: ignore[attr-defined]  # its overloads hide the cache
    return compiler


def _clang(program: str) -> Compiler | None:
    """The clang that this one program is, or None: gcc cannot compile tinygrad's kernels."""
    question = "__clang_major__ __clang_minor__ __clang_patchlevel__ __AVX512F__"
    native = ["-march=native"] if platform.machine().lower() in ("x86_64", "amd64") else []
    command = [program, "-E", "-P", *native, "-x", "c", "-"]
    try:
        run = subprocess.run(command, input=question, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    answer = re.fullmatch(r"(\d+ \d+ \d+) ?(\w*)", run.stdout.strip())
    if run.returncode != 0 or not answer:
        return None
    return Compiler(program, answer[1].replace(" ", "."), avx512=answer[2] == "1")


def _newest_clang() -> Compiler | None:
    """The newest of `clang` and `clang-NN` on PATH. On macOS `clang`: Xcode counts differently."""
    programs = [clang] if (clang := shutil.which("clang")) else []
    if sys.platform != "darwin":
        folders = dict.fromkeys(os.path.realpath(folder) for folder in os.get_exec_path())
        for folder in folders:  # on many systems /bin is /usr/bin
            programs += [str(path) for path in sorted(Path(folder).glob("clang-[0-9]*"))]
    with ThreadPoolExecutor() as pool:
        found = [compiler for compiler in pool.map(_clang, programs) if compiler]
    return max(found, default=None, key=lambda c: tuple(map(int, c.version.split("."))))


def _zig_clang() -> Compiler | None:
    """The clang inside the `ziglang` package, which needs no root to install."""
    package = importlib.util.find_spec("ziglang")
    if os.name != "posix" or package is None or package.origin is None:
        return None
    os.environ["TINYGPT_ZIG"] = str(Path(package.origin).with_name("zig"))
    return _clang(str(Path(__file__).with_name("zig-clang.sh")))
